"""Plans for people: formulas in the language's own notation, key sets as intervals and steps."""

from __future__ import annotations

from collections.abc import Sequence

from attnc.compiler.composition import (
    Attend,
    Carry,
    Choose,
    Compute,
    Extent,
    Extreme,
    Heads,
    Order,
    Recur,
    Regroup,
    Sequential,
    Step,
)
from attnc.compiler.ir import Node, text, walk
from attnc.compiler.plan import Branch, Diagonals, Domain, Grid, KeySet, Listed, Rows, Stepped
from attnc.compiler.schedule import SHARED_ROWS, WIDE_ENTRY
from attnc.compiler.schedule_chunked import NEAR
from attnc.compiler.schedule_selecting import HELD

SIZES = {"b": "B", "h": "H", "i": "N", "j": "M", "t": "M", "d": "D", "e": "E", "offset": "offset"}
INFIX = {
    "or": ("or", 1),
    "and": ("and", 2),
    "lt": ("<", 4),
    "le": ("<=", 4),
    "eq": ("==", 4),
    "ne": ("!=", 4),
    "add": ("+", 5),
    "sub": ("-", 5),
    "mul": ("*", 6),
    "dot": ("@", 6),
    "div": ("/", 6),
    "floordiv": ("//", 6),
    "mod": ("%", 6),
    "pow": ("**", 8),
}
HEADS = {"each": "each query head", "group": "each key head", "one": "all heads"}
CALLS = {"minimum": "min", "maximum": "max", "to_real": "real"}
LONGEST = 500  # operations that a formula is written out with


def formula(node: Node, above: int = 0) -> str:
    """A node in the notation of the language; parentheses only where precedence asks for them.

    One of more than LONGEST operations is `(...)`: shared values are written as often as they are used.
    """
    written: dict[Node, int] = {}
    for inner in walk(node):
        written[inner] = 1 + sum(written[arg] for arg in inner.args)
    return _formula(node, above) if written[node] <= LONGEST else "(...)"


def _formula(node: Node, above: int = 0) -> str:
    if node.op in INFIX:
        sign, level = INFIX[node.op]
        left, right = (_formula(arg, level + (slot if level > 2 else 0)) for slot, arg in enumerate(node.args))
        written = f"{left} {sign} {right}"
        return f"({written})" if level < above else written
    if node.op == "not":
        return f"not {_formula(node.args[0], 3)}"
    if node.op == "neg":
        return f"-{_formula(node.args[0], 7)}"
    if node.op == "size":
        return SIZES.get(str(node.attribute), str(node.attribute).upper())
    if node.op == "select":
        written = "if {} then {} else {}".format(*(_formula(arg) for arg in node.args))
        return f"({written})" if above else written
    if node.op in ("take", "rename"):
        place = _formula(node.args[1]) if node.op == "take" else str(node.attribute[1])  # type: ignore[index]
        return f"{_formula(node.args[0], 9)}[{place}]"
    if node.op in ("start", "stop"):
        return f"{node.attribute}.{node.op}"
    if not node.args:
        if isinstance(node.attribute, bool):
            return str(node.attribute).lower()
        return str(node.attribute)
    return f"{CALLS.get(node.op, node.op)}({', '.join(_formula(arg) for arg in node.args)})"


def describe_domain(domain: Domain, key: str = "j") -> str:
    """How rows are grouped, then each key set, a line a run. `key`: the index that streams by."""
    lines = [f"rows: {describe_rows(domain.rows)}"]
    if not domain.key_sets:
        lines.append("keys: none; the condition is never true")
    lines += [f"keys: {line}" for key_set in domain.key_sets for line in describe_keys(key_set, key)]
    return "\n".join(lines)


def describe_branch(branch: Branch) -> str:
    """Which keys the rows of a branch see."""
    selected = branch.selected
    if selected is None:
        return describe_domain(branch.domain)
    entry = "one key" if selected.width is None else f"{formula(selected.width)} keys"
    line = "a line a row" if selected.row_block is None else f"a line for {formula(selected.row_block)} rows"
    return (
        f"rows: stay where {SHARED_ROWS} or more share a line, or an entry has fewer than {WIDE_ENTRY} keys; "
        "else keys do\n"
        f"keys: listed by {selected.members}, {line}, {entry} an entry\n"
        f"keys: mask: {formula(branch.condition)}"
    )


def describe_passes(passes: Sequence[Domain]) -> str:
    """Transposed domains: rows are keys j, keys are the queries i that see them."""
    if not passes:
        return "no pass; the condition is never true"
    return "\n".join(f"pass {n}:\n{describe_domain(domain, 'i')}" for n, domain in enumerate(passes))


def describe_rows(rows: Rows) -> str:
    """How rows are grouped into tiles."""
    if rows.listed is not None:
        return f"listed by {rows.listed.table}"
    if rows.packed:
        return describe_packed(rows)
    if rows.phase is not None and rows.step is not None:
        return f"by step {formula(rows.step)} from {formula(rows.phase)}"
    if rows.period is not None:
        steps = [
            f"{name} digits by {formula(step)}"
            for name, step in (("high", rows.high_step), ("low", rows.low_step))
            if step
        ]
        shape = "squares" if rows.square else "parts of one line"
        return f"{shape} of a grid of width {formula(rows.period)}" + (f", {', '.join(steps)}" if steps else "")
    if rows.step is not None:
        return f"one residue class modulo {formula(rows.step)} a tile"
    return "consecutive"


def describe_packed(rows: Rows) -> str:
    """Rows of a grid of which only some columns or classes are left."""
    assert rows.period is not None
    parts = [f"columns {formula(rows.low.lo)} .. {formula(rows.low.hi)}"] if rows.low else []
    for name, phase, step in (
        ("high", rows.high_phase, rows.high_step),
        ("low", rows.low_phase, rows.low_step),
    ):
        if step is not None:
            parts.append(f"{name} digits by {formula(step)}" + (f" from {formula(phase)}" if phase else ""))
    return f"of a grid of width {formula(rows.period)}, " + ", ".join(parts)


def describe_keys(key_set: KeySet, key: str = "j") -> list[str]:
    """The runs of a key set as inequalities, and its mask."""
    walk = key_set.walk
    if isinstance(walk, Stepped):
        how = f"by step {formula(walk.step)} from {formula(walk.phase)}, "
    elif isinstance(walk, Grid):
        how = f"on a grid of width {formula(walk.period)}, columns {formula(walk.low.lo)} .. {formula(walk.low.hi)}, "
    elif isinstance(walk, Listed):
        how = f"listed by {walk.table}, {formula(walk.width)} each, "
    elif isinstance(walk, Diagonals):
        how = f"on the diagonals listed by {walk.table}, "
    else:
        how = "consecutive, "
    lines = []
    for run in key_set.runs:
        written = f"{how}{formula(run.outer.lo)} <= {key} < {formula(run.outer.hi)}"
        if run.inner is None:
            written += "; masked throughout"
        elif run.inner is not run.outer:
            written += f"; unmasked {formula(run.inner.lo)} <= {key} < {formula(run.inner.hi)}"
        lines.append(written)
    lines.append(f"mask on partial tiles: {formula(key_set.mask)}")
    return lines


def describe_step(step: Step) -> str:
    """One step for people, with the heads that it runs on where these are not all."""
    heads = getattr(step, "heads", None)
    if not isinstance(heads, Heads):
        return describe_kind(step)
    return f"{describe_kind(step)}\n    - on heads {formula(heads.first)} <= h < {formula(heads.last)} alone"


def describe_kind(step: Step) -> str:
    """One step for people, whatever heads it runs on."""
    match step:
        case Compute(name, node):
            return f"{name}: {node.type} = {text(node).removeprefix('return ')}"
        case Attend():
            scores = text(*(branch.score for branch in step.plan.branches))
            return (
                f"{step.name}, {step.lse}: softmax over {step.keys} of rows {step.rows}; "
                f"q = {step.query}, k = {step.key}, v = {step.value}; score {scores}"
            )
        case Extreme():
            which, by = "largest" if step.largest else "smallest", step.attend
            score = text(*(branch.score for branch in by.plan.branches))
            given = f"q = {by.query}, k = {by.key}"
            return f"{step.name}: {which} score of each row {by.rows} over {by.keys}; {given}; score {score}"
        case Regroup():
            return describe_regroup(step)
        case Carry():
            total = "" if step.total is None else f", {step.total}"
            decay = "" if step.decay is None else f"; log decay {step.decay}"
            return (
                f"{step.name}{total}: a state carried along the keys, read where {describe_extent(step.extent)}; "
                f"q = {step.query}, k = {step.key}, v = {step.value}{decay}{describe_near(step)}"
            )
        case Recur():
            decay = "" if step.decay is None else f"; log decay {step.decay}"
            return (
                f"{step.name}: a state with a change of rank one, read after each position; "
                f"q = {step.query}, k = {step.key}, v = {step.value}, x = {step.left}, y = {step.right}{decay}"
            )
        case Choose():
            return describe_choice(step)
        case Sequential():
            return f"{step.name}: one position after the other: {step.reason}"


def describe_near(step: Carry) -> str:
    """How pairs of a block are weighed, where that is not by the features."""
    if step.near is None:
        return ""
    powers = " and ".join(str(power) for power, one in enumerate(step.near.coefficients) if one.attribute != 0.0)
    return f"; pairs of {NEAR} positions by power {powers} of {step.near.query} @ {step.near.key}"


def describe_extent(extent: Extent) -> str:
    """Which keys a row sees, as a condition."""
    seen = "j is any key"
    if extent.amount is not None:
        amount = formula(extent.amount)
        back = "" if amount == "0" else f" - {amount}"
        seen = f"j <= i{back}" if extent.kind == "lag" else f"j < i // {amount} * {amount}"
    return seen if extent.same is None else f"{seen} and {extent.same}[i] == {extent.same}[j]"


def describe_choice(step: Choose) -> str:
    """How a selection is made."""
    rows = f"each {step.rows}" if step.rows else "all rows"
    amount = "" if step.amount is None else f", {formula(step.amount)}"
    force = "" if step.force is None else f", first {formula(step.force)}"
    return (
        f"{step.name}: {step.form} of {step.axis}{amount} for {rows}, {HEADS[step.heads]}, {describe_choosing(step)}; "
        f"candidates {formula(step.condition)}{force}; score {text(step.score).removeprefix('return ')}"
    )


def describe_choosing(step: Choose) -> str:
    """What makes a selection, and what it holds meanwhile."""
    if step.scores is None or step.amount is None:
        return f"by chunks of rows with torch ({step.reason})"
    most = f"4 * {_factor(step.amount)} + {HELD}"
    return f"by a kernel (holds at most {most} members of each row at work), on a CPU by chunks of rows with torch"


def _factor(node: Node) -> str:
    """A formula as a factor."""
    return formula(node) if not node.args else f"({formula(node)})"


def describe_regroup(step: Regroup) -> str:
    """Which rows and keys take part, in what order, and the attention over them."""

    def side(name: str, order: Order | None) -> str:
        parts = [f"{name} in their order" if order is None else name]
        if order is not None and order.live is not None:
            parts.append(f"where {formula(order.live)}")
        if order is not None and order.group is not None:
            parts.append(f"sorted by {formula(order.group)}")
        return " ".join(parts)

    inner = describe_step(step.attend).partition(": ")[2]
    lines = [f"{step.name}, {step.lse}: {side('rows', step.rows)}, {side('keys', step.keys)}: {inner}"]
    for one in step.ranges:
        low = "" if one.low is None else f"{formula(one.low)} <= "
        high = "" if one.high is None else f" < {formula(one.high)}"
        bounded = f" and {low}j{high}" if low or high else ""
        lines.append(f"    slots {one.first} .. {one.last}: keys of the row's group{bounded}")
    lines += [f"    {name}: position of {'a row' if at == 'i' else 'a key'}" for at, name in step.positions.items()]
    return "\n".join(lines)

"""What a plan costs, as formulas: the keys that one row has, from the closed forms of its key sets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import sympy

from attnc.compiler.algebra import Algebra, Expr
from attnc.compiler.composition import Attend, Carry, Recur, Regroup, Step
from attnc.compiler.describe import formula
from attnc.compiler.ir import Graph, Node
from attnc.compiler.plan import Bounds, Diagonals, Domain, Grid, KeySet, Listed, Plan, Selected, Stepped
from attnc.compiler.totals import BEFORE, total_keys
from attnc.dsl.terms import Input

LONGEST = 60  # characters of a closed form that people are shown


def step_costs(steps: Iterable[Step]) -> Iterator[list[str]]:
    """The lines of every step that streams keys."""
    for step in steps:
        if isinstance(step, Regroup):
            yield cost_formulas(step.attend.plan)
        elif isinstance(step, Attend):
            yield [*counted_heads(step), *cost_formulas(step.plan)]


def counted_heads(step: Attend | Carry | Recur) -> list[str]:
    """A line where a step runs on some heads alone."""
    if step.heads is None:
        return []
    return [f"H: as many as the heads {formula(step.heads.first)} <= h < {formula(step.heads.last)}"]


def cost_formulas(plan: Plan) -> list[str]:
    """Lines for people: keys of a row and live pairs of every branch, operations, bytes."""
    branches = len(plan.branches)
    names = [f"live_{number}" if branches > 1 else "live" for number in range(branches)]
    lines = []
    for name, branch in zip(names, plan.branches, strict=True):
        lines.append(f"{name} = B*H * sum over i of the keys of row i:")
        if branch.selected is not None:
            lines.append(f"    at most {listed_keys(branch.selected)}")
            continue
        lines += [f"    {keys}" for keys in row_keys(branch.domain)] or ["    0"]
        lines += closed_form(branch.domain)
    total = " + ".join(names)
    lines.append(f"FLOPs = 2*(D + E) * {f'({total})' if branches > 1 else total}")
    results = "E" if branches == 1 else f"{branches}*E"
    lines.append(f"bytes = (B*H*N*(D + {results}) + B*Hk*M*(D + E)) * itemsize + {4 * branches}*B*H*N")
    return lines


def closed_form(domain: Domain) -> list[str]:
    """The sum, for as many rows as keys, where it has a form that is short enough to read."""
    total = total_keys(domain)
    written = "" if total is None else str(sympy.factor_terms(total.subs(BEFORE, 0)))
    return [f"    which is {written} where N = M"] if 0 < len(written) <= LONGEST else []


def listed_keys(selected: Selected) -> str:
    """How many keys a row has of those that its line lists."""
    width = "one" if selected.width is None else formula(selected.width)
    return f"{width} for each entry of {selected.members}"


@dataclass(frozen=True)
class Count:
    """A number of keys: the least of `terms`; `exact` or an upper bound."""

    terms: tuple[Expr, ...]
    exact: bool

    def divided(self, by: Expr) -> tuple[Expr, ...] | None:
        """The terms over `by` where it divides them all."""
        quotients = tuple(sympy.cancel(term / by) for term in self.terms)
        return quotients if all(sympy.denom(quotient) == 1 for quotient in quotients) else None


def row_keys(domain: Domain) -> list[str]:
    """One line a key set: how many keys row i has, for N <= M. A negative number means none.

    Several runs of a set may overlap and are visited once, so their sum is an upper bound.
    """
    algebra = Algebra(Graph())
    lines = []
    for key_set in domain.key_sets:
        counts = [_count(algebra, run.outer) for run in key_set.runs]
        sure = len(counts) == 1 and counts[0].exact and key_set.runs[0].inner is key_set.runs[0].outer
        lines.append(("" if sure else "at most ") + _key_set(algebra, key_set, counts))
    return lines


def _key_set(algebra: Algebra, key_set: KeySet, counts: list[Count]) -> str:
    walk = key_set.walk
    written = " + ".join(_written(algebra, count, alone=len(counts) == 1) for count in counts) or "0"
    if isinstance(walk, Stepped):
        return _in_class(algebra, key_set.runs[0].outer, counts[0], walk)
    if isinstance(walk, Grid):
        period = algebra.expression(walk.period)
        lines = _divided(algebra, counts[0], period * algebra.expression(walk.high_step) if walk.high_step else period)
        low = _count(algebra, walk.low)
        columns = _divided(algebra, low, algebra.expression(walk.low_step) if walk.low_step else sympy.Integer(1))
        return f"{lines} grid lines of {columns}"
    if isinstance(walk, Listed):
        return f"{formula(walk.width)} for each entry of {walk.table}, no more than {written}"
    if isinstance(walk, Diagonals):
        return f"one for each entry of {walk.table}"
    return written


def _in_class(algebra: Algebra, bounds: Bounds, count: Count, walk: Stepped) -> str:
    """Members of a residue class: as many as start at the phase, or end at the row that the phase names."""
    phase, step = algebra.expression(walk.phase), algebra.expression(walk.step)
    if bounds.lo.op == "literal" and bounds.lo.attribute == 0 and not _varies(walk.phase):
        return _divided(algebra, Count(tuple(sympy.expand(term - phase) for term in count.terms), count.exact), step)
    ends_at_phase = any(algebra.expression(hi) == phase + 1 for hi in _operands(bounds.hi, "minimum"))
    return ("" if ends_at_phase else "at most ") + _divided(algebra, count, step)


def _divided(algebra: Algebra, count: Count, by: Expr) -> str:
    quotients = count.divided(by)
    if quotients is not None:
        return _written(algebra, Count(quotients, count.exact), alone=True)
    numerator = _written(algebra, count, alone=False)
    whole = f"({numerator})" if len(count.terms) == 1 and isinstance(count.terms[0], sympy.Add) else numerator
    return f"ceil({whole} / {formula(algebra.node(by), 7)})"


def _written(algebra: Algebra, count: Count, *, alone: bool) -> str:
    terms = [formula(algebra.node(term), 0 if alone or len(count.terms) > 1 else 1) for term in count.terms]
    return terms[0] if len(terms) == 1 else f"min({', '.join(terms)})"


def _count(algebra: Algebra, bounds: Bounds) -> Count:
    """hi - lo. min(a, b) - max(c, d) is the least of a - c, a - d, b - c, b - d, without those never the least.

    More than two that are left are said by those that are the same in every row, if there are any; rows that a
    condition leaves without keys are not told apart where the others have a closed form.
    """
    is_guarded = bounds.hi.op == "select" and bounds.hi.args[1].op == "minimum" and bounds.hi.args[2].attribute == 0
    upper = bounds.hi.args[1] if is_guarded else bounds.hi
    differences = {
        sympy.expand(algebra.expression(hi) - algebra.expression(lo)): None
        for hi in _operands(upper, "minimum")
        for lo in _operands(bounds.lo, "maximum")
    }
    least = [x for x in differences if not any(y != x and _never_below(algebra, x, y) for y in differences)]
    least = least or list(differences)
    everywhere = [x for x in least if not any(_varies(algebra.node(symbol)) for symbol in x.free_symbols)]
    if len(least) > 2 and everywhere:
        return Count(tuple(everywhere), exact=False)
    return Count(tuple(least), exact=not is_guarded)


def _varies(node: Node) -> bool:
    return bool(node.type.indices) or node.op == "size"


def _operands(node: Node, op: str) -> list[Node]:
    if node.op != op:
        return [node]
    return [operand for arg in node.args for operand in _operands(arg, op)]


def _never_below(algebra: Algebra, x: Expr, y: Expr) -> bool:
    """Whether x >= y for 0 <= i < M and parameters that are not negative."""
    row = sympy.Symbol("row", integer=True, nonnegative=True)
    beyond = sympy.Symbol("beyond", integer=True, nonnegative=True)
    values = {}
    for symbol in (x - y).free_symbols:
        node = algebra.node(symbol)
        if node.op == "index" and node.attribute == "i":
            values[symbol] = row
        elif node.op == "size" and node.attribute in ("j", "t"):
            values[symbol] = row + 1 + beyond
        elif node.op in ("parameter", "size"):
            values[symbol] = sympy.Symbol(f"p{len(values)}", integer=True, nonnegative=True)
    return bool(sympy.expand((x - y).subs(values, simultaneous=True)).is_nonnegative)


def state_formula(step: Carry | Recur, arrays: Mapping[str, Input]) -> str:
    """What a step that carries a state costs: linear in the sequence. `F`: its features; C: positions of a chunk."""
    width, value = (arrays[name].axes[-1] for name in (step.query, step.value))
    pairs = "2*C*N*(F + E)" if isinstance(step, Carry) else "C*M*(8*F + 4*E)"
    sizes = ", ".join([f"F = size of {width}, E = size of {value}, C = 64", *counted_heads(step)])
    return f"{step.name}: FLOPs = B*H*(2*F*E*(N + M) + {pairs}), {sizes}"

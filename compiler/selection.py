"""Selections by scores that steer which keys a softmax sees: each becomes a `Choose` step and a listed branch.

The condition of a softmax is split. Conjunctions without a selection stay in closed form; those with `j in picked`
become one branch over the keys that the selection lists, masked by the rest of the conjunction and without the pairs of
the closed form. The two parts share no pair, so joining them by log-sum-exp is the one softmax over both.
"""

from __future__ import annotations

from dataclasses import dataclass

from attnc.compiler.build import unlowered
from attnc.compiler.composition import Choose
from attnc.compiler.conditions import disjunction, negate
from attnc.compiler.decompose import Decomposer
from attnc.compiler.ir import Graph, Node, walk
from attnc.compiler.ops import OPS
from attnc.compiler.plan import Selected
from attnc.dsl.terms import Input
from attnc.dsl.types import Base, Type

FORMS = frozenset({"topk", "threshold", "mass"})
LEAVES = frozenset({"literal", "parameter", "size", "index", "start", "stop", "input"})


def steered(collection: Node) -> bool:
    """Whether a collection is a selection that tensors steer; others are derived tables (`compiler.membership`)."""
    return collection.op in FORMS and any(node.op == "input" for node in walk(collection))


# Lowering of a selection


def choose(at: Decomposer, selection: Node) -> Node:
    """Adds the step of a selection over blocks of keys or keys; gives the node that reads its lists."""
    if selection not in at.chosen:
        at.chosen[selection] = _choose(at, selection)
    return at.chosen[selection]


def _choose(at: Decomposer, selection: Node) -> Node:
    axis = str(selection.attribute)
    if axis != "j":
        declared = at.axes.get(axis)
        if declared is None or declared.over != "j" or declared.kind != "blocks":
            raise unlowered(selection, f"a selection of members of `{axis}` that steers which keys are seen")
        if declared.stride is not None:
            raise unlowered(selection, "a selection of blocks with a stride of their own, which may overlap,")
    from attnc.compiler.selecting import attend_first, with_scores  # it reads attention, which chooses

    attend_first(at, selection)
    rows, row_block, selection = by_row_blocks(at, selection)
    score, amount, condition, *force = (one_at_a_time(at, fold_diagonals(at, arg), rows, {}) for arg in selection.args)
    parts = (score, amount, condition, *force)
    heads = heads_of(parts)
    name, forced = at.fresh("choice"), force[0] if force else None
    made = with_scores(at, Choose(name, selection.op, axis, rows, heads, score, amount, condition, forced))
    at.steps.append(made)
    width = None if axis == "j" else at.term(at.axes[axis].size)
    at.selected[name] = Selected(name, width, row_block)
    axes = ("b", "h", f"{name}.lines", f"{name}.entries")
    at.inputs[name] = Input(name, Base.INT, axes, None, span=at.pattern.span)
    type = Type(Base.INT, frozenset("bh"), axes[2:], selects=axis)
    return at.graph.make("input", type=type, attribute=name, span=selection.span)


def heads_of(parts: tuple[Node, ...]) -> str:
    """Which heads differ: those under a sum over the query heads of a key head do not, within the group."""
    found = "one"
    stack, seen = list(parts), set[Node]()
    while stack:
        node = stack.pop()
        if node in seen or not node.depends_on("h"):
            continue
        seen.add(node)
        if node.op == "group_sum":
            found = "group"
        elif node.args and node.op != "input":
            if node.op not in ("sum", "mean", "max", "min", "softmax", "rename") and not OPS[node.op].pointwise:
                return "each"
            stack.extend(node.args)
        else:
            return "each"
    return found


def by_row_blocks(at: Decomposer, selection: Node) -> tuple[str, Node | None, Node]:
    """A selection that reads the query's position as a block number only is made once a block of queries.

    (axis of the rows, rows of a block, the selection over that axis); (i, None, selection) where it reads more; no
    axis, and a block of all rows, where it does not vary over them.
    """
    if not any(name == "i" or at.over_queries(name) for name in selection.type.indices):
        longest = at.graph.make("maximum", at.graph.size("i"), at.graph.size("j"))
        return "", longest, selection  # one line for all rows: every position is below it
    sizes: set[Node] = set()
    if not all(reads_blocks(arg, sizes, set()) for arg in selection.args) or len(sizes) != 1:
        return "i", None, selection
    (size,) = sizes
    for axis in at.axes.values():
        if axis.over == "i" and axis.kind == "blocks" and axis.stride is None and at.term(axis.size) is size:
            return axis.name, size, over_blocks(at.graph, selection, axis.name, {})
    return "i", None, selection


def reads_blocks(node: Node, sizes: set[Node], seen: set[Node]) -> bool:
    """Whether i is found in `i // size` alone; collects the sizes."""
    if not node.depends_on("i") or node in seen:
        return True
    seen.add(node)
    if node.op == "floordiv" and node.args[0].op == "index":
        sizes.add(node.args[1])
        return not node.args[1].type.indices
    return bool(node.args) and all(reads_blocks(arg, sizes, seen) for arg in node.args)


def over_blocks(graph: Graph, node: Node, axis: str, done: dict[Node, Node]) -> Node:
    """The node with `i // size` as the number of a member, and reads of members there as the members themselves."""
    if not node.depends_on("i"):
        return node
    if node not in done:
        if node.op == "floordiv" and node.args[0].op == "index":
            done[node] = graph.index(axis)
        elif node.op == "shift" and node.attribute == axis and node.args[1].op == "floordiv":
            done[node] = node.args[0]
        else:
            args = tuple(over_blocks(graph, arg, axis, done) for arg in node.args)
            type = None
            if not OPS[node.op].pointwise:
                old = node.type
                type = Type(old.base, (old.indices - {"i"}) | {axis}, old.axes, old.selects)
            done[node] = graph.make(node.op, *args, type=type, attribute=node.attribute, span=node.span)
    return done[node]


def one_at_a_time(at: Decomposer, node: Node, rows: str, done: dict[Node, Node]) -> Node:
    """The node over arrays: what does not vary over queries is made once, the rest for some rows at a time."""
    if node not in done:
        done[node] = _one_at_a_time(at, node, rows, done)
    return done[node]


def _one_at_a_time(at: Decomposer, node: Node, rows: str, done: dict[Node, Node]) -> Node:
    if node.op in LEAVES:
        return node
    of_rows = any(name == "i" or at.over_queries(name) for one in walk(node) for name in one.type.indices)
    if of_rows or simple(node):
        return at.graph.rebuild(node, tuple(one_at_a_time(at, arg, rows, done) for arg in node.args))
    return at.read(at.array(node))


def simple(node: Node) -> bool:
    """Pointwise in leaves: cheaper to compute where it is used."""
    return all(one.op in LEAVES or OPS[one.op].pointwise for one in walk(node))


def fold_diagonals(at: Decomposer, node: Node, done: dict[Node, Node] | None = None) -> Node:
    """Sums over antidiagonals of small tiles of q @ k as products of longer vectors.

    sum over i in u, j in w with i % n + j % n == n - 1 of x_i @ y_j
        = [x_(un + n - 1); ..; x_(un)] @ [y_(wn); ..; y_(wn + n - 1)],  blocks u and w of n tokens, those missing zero
    """
    done = {} if done is None else done
    if node not in done:
        made = folded_diagonal(at, node)
        if made is None:
            made = at.graph.rebuild(node, tuple(fold_diagonals(at, arg, done) for arg in node.args))
        done[node] = made
    return done[node]


def folded_diagonal(at: Decomposer, node: Node) -> Node | None:
    """The product of one such sum."""
    if node.op != "sum" or node.args[0].op != "sum":
        return None
    inner = node.args[0]
    ranges: dict[str, str] = {}
    for one in (node, inner):
        assert isinstance(one.attribute, tuple)
        ranges[str(one.attribute[0])] = str(one.attribute[1])
    product, condition = inner.args
    always = node.args[1]
    if set(ranges) != {"i", "j"} or product.op != "dot" or not (always.op == "literal" and always.attribute is True):
        return None
    axes = [at.axes.get(ranges[name]) for name in "ij"]
    sizes = {at.term(axis.size) for axis in axes if axis and axis.kind == "blocks" and axis.stride is None}
    if len(sizes) != 1 or None in axes or not is_antidiagonal(condition, *sizes):
        return None
    x, y = product.args if product.args[0].depends_on("i") else product.args[::-1]
    if x.depends_on("j") or y.depends_on("i") or len(x.type.axes) != 1 or len(y.type.axes) != 1:
        return None
    x = fold(at.graph, x, "i", ranges["i"], reverse=True)
    y = fold(at.graph, y, "j", ranges["j"], reverse=False)
    return at.graph.make("dot", x, y, type=node.type, attribute="folded", span=node.span)


def fold(graph: Graph, x: Node, index: str, axis: str, *, reverse: bool) -> Node:
    """The vectors of each block end to end."""
    type = Type(Base.REAL, (x.type.indices - {index}) | {axis}, ("folded",))
    return graph.make("fold", x, type=type, attribute=(index, axis, reverse))


def is_antidiagonal(condition: Node, size: Node) -> bool:
    """i % size + j % size == size - 1"""
    if condition.op != "eq":
        return False
    for total, last in (condition.args, condition.args[::-1]):
        one = last.args[1] if last.op == "sub" else None
        if total.op != "add" or one is None or last.args[0] is not size or (one.op, one.attribute) != ("literal", 1):
            continue
        digits = {(arg.op, arg.args[0].attribute, arg.args[1]) for arg in total.args if len(arg.args) == 2}
        return digits == {("mod", "i", size), ("mod", "j", size)}
    return False


# The condition of a softmax


@dataclass(frozen=True)
class Split:
    """`closed`: the part in closed form, None where there is none. `members`: the node that reads a selection's lists,
    None where its pairs are all among the others; `rest`: what else must hold of the pairs that it lists."""

    closed: Node | None
    members: Node | None
    rest: Node


def split(graph: Graph, condition: Node) -> Split | None:
    """The parts of a condition; None where no selection of arrays steers it."""
    if not any(is_listed(node) for node in walk(condition)):
        return None
    closed, rests = list[tuple[Node, ...]](), list[tuple[Node, ...]]()
    members: Node | None = None
    for atoms in disjunction(graph, condition):
        chosen = [atom for atom in atoms if is_listed(atom)]
        others = tuple(atom for atom in atoms if atom not in chosen)
        nested = next((one for atom in others for one in walk(atom) if is_listed(one)), None)
        if nested is not None:
            raise unlowered(nested, "a selection that is denied, or asked for inside of other operations,")
        if not chosen:
            closed.append(atoms)
            continue
        if len(chosen) > 1 or members not in (None, chosen[0].args[1]):
            raise unlowered(chosen[-1], "a second selection in one softmax")
        members = chosen[0].args[1]
        rests.append(others)
    if members is None:
        return Split(graph.any_of(graph.all_of(atoms) for atoms in closed), None, graph.literal(False))
    # An atom that every listed pair fulfils need not be denied.
    shared = set(rests[0]).intersection(*map(set, rests))
    covered = graph.any_of(graph.all_of(atom for atom in atoms if atom not in shared) for atoms in closed)
    rest = graph.any_of(graph.all_of(atoms) for atoms in rests)
    held = graph.all_of([rest, negate(graph, covered)]) if closed else rest
    return Split(graph.any_of(graph.all_of(atoms) for atoms in closed) if closed else None, members, held)


def is_listed(node: Node) -> bool:
    """Whether a node asks for a key in a selection that a step made."""
    return node.op == "member" and node.args[1].op == "input" and node.args[1].type.selects is not None

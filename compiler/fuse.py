"""Which parts of a value over one sequence run as one generated kernel: all that lives on one row of tokens.

A row is one batch, head and place of a sequence. What is computed of a row's own elements, maths element by element,
reductions along a vector axis, vectors end to end, positions, is a group: its operands are read once, its result is
written once, and nothing in between exists as an array. What reads other rows (sums over tokens, products with
matrices, gathers) is made before, by torch, and is an operand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from attnc.compiler.ir import Graph, Node
from attnc.compiler.lower_rows import Lowering
from attnc.compiler.ops import OPS
from attnc.dsl.types import Base

PLACES = frozenset("ijt")
REDUCTIONS = ("sum", "mean", "max", "min", "softmax", "normalize")
NUMBERS = frozenset({"literal", "parameter", "size"})
UNKNOWN_TO_NUMBERS = frozenset({"elu", "relu", "silu", "sigmoid", "softplus"})


@dataclass(frozen=True, eq=False)
class Operand:
    """An array that a group reads: `node` is an input, or what torch makes before. `name`: its argument's.

    `moved`: laid out over tokens and read at queries, which are the last ones.
    """

    name: str
    node: Node
    moved: bool

    @property
    def along(self) -> str | None:
        """The index of the sequence that it is laid out over; None: the same for all rows."""
        return next((one for one in self.node.type.indices if one not in ("b", "h")), None)


@dataclass(frozen=True, eq=False)
class Group:
    """One kernel: `root`, a node of a step, as `value`, the same over operands and numbers only.

    `value` reads `input` nodes named by operands, `parameter` nodes named by `numbers` (worked out by the host from
    sizes and parameters), `size` nodes of vector axes, and `index` nodes, of which `along` is the sequence's.
    """

    root: Node
    value: Node
    along: str
    operands: tuple[Operand, ...]
    numbers: tuple[tuple[str, Node], ...]
    graph: Graph

    @property
    def indices(self) -> tuple[str, ...]:
        return self.root.type.ordered_indices()


def segments(axis: str) -> tuple[str, ...]:
    """The axes that stand end to end along one: `d+d` is twice d, `(d*d)+1` a square of d and one number."""
    parts, depth, last = [], 0, 0
    for at, sign in enumerate(axis):
        depth += (sign == "(") - (sign == ")")
        if sign == "+" and depth == 0:
            parts.append(axis[last:at])
            last = at + 1
    return (*parts, axis[last:])


@lru_cache(maxsize=1024)
def groups(root: Node) -> tuple[Group, ...]:
    """The groups below a node (and at it), those that others read first."""
    found: dict[Node, Group] = {}
    seen: set[Node] = set()

    def visit(node: Node) -> None:
        if node in seen:
            return
        seen.add(node)
        group = group_of(node) if is_worthwhile(node) else None
        group = group if group and group.operands else None  # of positions alone: torch makes it
        below: Sequence[Node] = node.args
        if group is not None:
            below = [operand.node for operand in group.operands]
        for one in below:
            visit(one)
        if group is not None:
            found[node] = group

    visit(root)
    return tuple(found.values())


def group_of(root: Node) -> Group:
    """The group that makes a node."""
    along = along_of(root)
    assert along is not None
    graph = Graph()
    lowering = Lowering(graph)
    operands: dict[tuple[Node, bool], Operand] = {}
    numbers: dict[Node, str] = {}

    def leaf(node: Node, moved: bool) -> Node:
        found = operands.setdefault((node, moved), Operand(f"x{len(operands)}", node, moved))
        type = lowering.at(node.type, along)
        return graph.make("input", type=type, attribute=found.name, span=node.span)

    def number(node: Node) -> Node:
        name = numbers.setdefault(node, f"n{len(numbers)}")
        return graph.make("parameter", type=node.type, attribute=name, span=node.span)

    done: dict[tuple[Node, str], Node] = {}

    def lower(node: Node, own: str) -> Node:
        """A node whose sequence is called `own` where it stands."""
        if (node, own) not in done:
            done[node, own] = lowered(node, own)
        return done[node, own]

    def lowered(node: Node, own: str) -> Node:
        if node.op == "literal":
            return graph.literal(node.attribute)  # type: ignore[arg-type]
        if is_number(node):
            return number(node)
        if node.op == "index" and is_row_wise(node):
            return graph.index(along if node.attribute == own else str(node.attribute))
        if not is_row_wise(node):
            return leaf(node, along == "i" and own != "i" and node.depends_on(own))
        if node.op == "rename":
            assert isinstance(node.attribute, tuple)
            return lower(node.args[0], str(node.attribute[0]))
        return lowering.made(node, [lower(arg, own) for arg in node.args], along)

    value = lower(root, along)
    named = tuple((name, node) for node, name in numbers.items())
    return Group(root, value, along, tuple(operands.values()), named, graph)


def along_of(node: Node) -> str | None:
    """The index of the sequence that a value varies over; None of one that varies over none or several."""
    long = [one for one in node.type.indices if one not in ("b", "h")]
    return long[0] if len(long) == 1 else None


def is_worthwhile(node: Node) -> bool:
    """Whether a node is the result of a group: a real over one sequence that is more than another array."""
    if node.type.base is not Base.REAL or along_of(node) is None or not is_row_wise(node):
        return False
    return node.op not in ("rename", "index", "detach") and any(not is_number(arg) for arg in node.args)


@lru_cache(maxsize=4096)
def is_row_wise(node: Node) -> bool:
    """Whether a node's value at a row comes from its operands at that row; a leaf that is no array is."""
    type = node.type
    long = type.indices - {"b", "h"}
    if len(type.axes) > 1 or len(long) > 1 or type.selects is not None:
        return False
    if node.op == "index":
        return node.attribute in PLACES or node.attribute in ("b", "h")
    if node.op in ("literal", "parameter", "size"):
        return True
    if any(len(arg.type.axes) > 1 for arg in node.args):
        return False
    if node.op == "pow" and type.base is not Base.REAL:
        return False
    if OPS[node.op].pointwise:
        return all(arg.type.axes in ((), type.axes) for arg in node.args)
    if node.op == "rename":
        assert isinstance(node.attribute, tuple)
        source, target = node.attribute
        return source in ("t", "j") and target in PLACES
    if node.op in REDUCTIONS:
        assert isinstance(node.attribute, tuple)
        axis, within = node.attribute
        body, condition, *options = node.args
        own = within is None and body.type.axes == (axis,) and condition.type.axes in ((), (axis,))
        return own and all(not one.type.axes for one in options) and body.type.base is Base.REAL
    if node.op == "dot":
        return all(arg.type.axes == (node.attribute,) for arg in node.args)
    return node.op == "detach" or (node.op in ("features", "concat") and fits_end_to_end(node))


def fits_end_to_end(node: Node) -> bool:
    """Whether the parts of a vector are those that the name of its axis says."""
    (axis,) = node.type.axes
    parts = [part for arg in node.args for part in (segments(arg.type.axes[0]) if arg.type.axes else ("1",))]
    return tuple(parts) == segments(axis) and not any(sign in part for part in parts for sign in "(^*")


@lru_cache(maxsize=4096)
def is_number(node: Node) -> bool:
    """Whether a node is made of sizes and parameters only, so that the host works it out."""
    if node.type.indices or node.type.axes or not (OPS[node.op].pointwise or node.op in NUMBERS):
        return False
    return node.op not in UNKNOWN_TO_NUMBERS and all(is_number(arg) for arg in node.args)

"""The gradients of a group's operands, as values of the same rows: reverse mode on its nodes."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from attnc.compiler.differentiate import CONSTANT, GRADIENTS
from attnc.compiler.fuse import Group, segments
from attnc.compiler.ir import Graph, Node, walk
from attnc.dsl.types import Base

COTANGENT = "g"
HELD = "p_"  # and an operand's name: what its gradient is added to


def row_gradients(group: Group, wanted: Collection[str], held: Collection[str] = ()) -> dict[str, Node]:
    """What a row adds to the gradient of each wanted operand, by name; absent where nothing flows.

    Reads the group's own leaves and the cotangent of its value, an input `g` of the value's type. To operands in `held`
    there is a part of the gradient already, an input `p_` and its name. A result may lack the operand's axis: it is
    then the same for all its elements.
    """
    graph = group.graph
    carries = flowing(group.value, wanted)
    order = [node for node in walk(group.value) if carries[node]]
    cotangent = graph.make("input", type=group.value.type, attribute=COTANGENT)
    adjoints = {group.value: cotangent}
    found: dict[str, Node] = {}
    for node in reversed(order):
        adjoint = adjoints.get(node)
        if adjoint is None:
            continue
        if node.op == "input":
            name = str(node.attribute)
            before = graph.make("input", type=node.type, attribute=HELD + name)
            found[name] = graph.make("add", adjoint, before) if name in held else adjoint
            continue
        for arg, part in zip(node.args, parts(graph, node, adjoint), strict=True):
            if part is None or not carries[arg]:
                continue
            part = fitted(graph, part, node, arg)
            sofar = adjoints.get(arg)
            adjoints[arg] = part if sofar is None else graph.make("add", sofar, part)
    return found


def flowing(root: Node, wanted: Collection[str]) -> dict[Node, bool]:
    """Whether a gradient reaches a wanted operand through each node."""
    carries: dict[Node, bool] = {}
    for node in walk(root):
        smooth = node.type.base is Base.REAL and node.op not in CONSTANT and node.op != "detach"
        own = node.op == "input" and node.attribute in wanted
        carries[node] = smooth and (own or any(carries[arg] for arg in node.args))
    return carries


def parts(graph: Graph, node: Node, adjoint: Node) -> tuple[Node | None, ...]:
    """What a node's adjoint gives to each of its operands."""
    if node.op == "sum":
        return adjoint, None
    if node.op in ("max", "min"):  # equal extrema share
        same = graph.make("eq", node.args[0], node)
        ones = graph.make("select", same, graph.literal(1.0), graph.literal(0.0))
        count = graph.make("sum", ones, node.args[1], type=node.type, attribute=node.attribute)
        share = graph.make("div", adjoint, count)
        return graph.make("select", same, share, graph.literal(0.0)), None
    if node.op == "features":
        return tuple(part_of(graph, node, adjoint, at) for at in range(len(node.args)))
    if node.op == "abs":  # 0 at 0
        x, zero = node.args[0], graph.literal(0.0)
        below = graph.make("select", graph.make("lt", x, zero), graph.make("neg", adjoint), zero)
        return (graph.make("select", graph.make("lt", zero, x), adjoint, below),)
    if node.op == "pow" and node.args[1].op == "literal":  # exact where the exponent is a small whole number
        x, y = node.args
        power = float(y.attribute)  # type: ignore[arg-type]
        slope = graph.make("mul", graph.literal(power), graph.make("pow", x, graph.literal(power - 1.0)))
        return graph.make("mul", adjoint, slope), None
    return GRADIENTS[node.op](graph, node, adjoint)


def part_of(graph: Graph, node: Node, adjoint: Node, at: int) -> Node:
    """The adjoint of one of the vectors that stand end to end."""
    if not adjoint.type.axes:
        return adjoint
    before = sum(len(segments(arg.type.axes[0])) if arg.type.axes else 1 for arg in node.args[:at])
    type = replace(adjoint.type, axes=node.args[at].type.axes)
    return graph.make("part", adjoint, type=type, attribute=before)


def fitted(graph: Graph, part: Node, node: Node, arg: Node) -> Node:
    """An adjoint summed over the axis along which its operand was the same for all elements."""
    if arg.type.axes or not node.type.axes or node.op == "features":
        return part
    (axis,) = node.type.axes
    if part.type.axes:
        type = replace(part.type, axes=())
        return graph.make("sum", part, graph.literal(True), type=type, attribute=(axis, None))
    return graph.make("mul", part, graph.make("to_real", graph.size(axis)))

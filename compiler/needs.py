"""Which rows of a value matter: conditions that go from the result down to what it is made of.

A branch that `if` passes over, or that is multiplied by a weight that is exactly 0, need not be computed there. Nothing
flows back to it either: a `where` or an `if` that makes the 0 stops the gradient of the weight as well.
"""

from __future__ import annotations

from collections.abc import Sequence

from attnc.compiler.conditions import negate
from attnc.compiler.ir import Graph, Node, walk
from attnc.compiler.simplify import is_literal
from attnc.dsl.types import Base

MEMBERWISE = frozenset({"sum", "mean", "max", "min", "softmax", "normalize"})  # args: body, condition, options
ELSEWHERE = frozenset({"rename", "shift", "cumsum", "member", "topk", "threshold", "mass", "argmax", "scan", "repeat"})


def needs(graph: Graph, root: Node, start: Node | None = None) -> dict[Node, Node]:
    """For every node below `root`, a bool over some of its indices: where it is false the node's value is not used.

    `start`: the same of the root itself; None: it is used everywhere.
    """
    found: dict[Node, Node] = {root: graph.literal(True) if start is None else start}
    for node in reversed(list(walk(root))):  # users before operands
        for arg, part in zip(node.args, operand_needs(graph, node, found[node]), strict=True):
            if not part.type.indices <= arg.type.indices or part.type.axes:
                part = graph.literal(True)
            found[arg] = either(graph, found.get(arg), part)
    return found


def either(graph: Graph, known: Node | None, part: Node) -> Node:
    """known or part"""
    if known is None:
        return part
    if negate(graph, known) is part:
        return graph.literal(True)
    return graph.any_of([known, part])


def operand_needs(graph: Graph, node: Node, need: Node) -> Sequence[Node]:
    """Where each operand is used, if the node itself is where `need` says."""
    if node.op == "select":
        condition, _, _ = node.args
        if condition.type.axes:
            return [need] * 3
        return [need, graph.all_of([need, condition]), graph.all_of([need, negate(graph, condition)])]
    if node.op in ("mul", "dot"):
        x, y = node.args
        return [graph.all_of([need, nonzero(graph, y)]), graph.all_of([need, nonzero(graph, x)])]
    if node.op in ELSEWHERE or (node.op == "group_sum" and need.depends_on("h")):
        return [graph.literal(True) for _ in node.args]  # other places may be asked for
    if node.op in MEMBERWISE:
        assert isinstance(node.attribute, tuple)
        everywhere = need.depends_on(str(node.attribute[0]))  # a member counts in the sums of the others
        need = graph.literal(True) if everywhere else need
        _, condition, *rest = node.args
        return [graph.all_of([need, condition]), need, *(need for _ in rest)]
    return [need for _ in node.args]


def nonzero(graph: Graph, root: Node) -> Node:
    """A bool: where it is false the value is exactly 0, and so is what its gradient becomes further down."""
    found: dict[Node, Node] = {}
    for node in walk(root):
        found[node] = _nonzero(graph, node, [found[arg] for arg in node.args])
    return found[root]


def _nonzero(graph: Graph, node: Node, operands: Sequence[Node]) -> Node:
    """`operands`: the same of the node's operands."""
    if node.type.base is not Base.REAL and node.op != "select":
        return graph.literal(not is_literal(node, 0))
    if node.op == "literal":
        return graph.literal(node.attribute != 0)
    if node.op in ("mul", "neg", "abs", "detach"):
        return graph.all_of(operands)
    if node.op in ("add", "sub"):
        return graph.any_of(operands)
    if node.op == "div":
        return operands[0]
    if node.op in ("softmax", "normalize"):
        condition = node.args[1]
        return graph.literal(True) if condition.type.axes else condition
    if node.op == "select":
        condition, accepted, otherwise = node.args[0], operands[1], operands[2]
        if condition.type.axes:
            return graph.literal(True)
        taken = graph.all_of([condition, accepted])
        passed = graph.all_of([negate(graph, condition), otherwise])
        both = accepted.op == otherwise.op == "literal" and accepted.attribute and otherwise.attribute
        return graph.literal(True) if both else graph.any_of([taken, passed])
    return graph.literal(True)

"""Products in the order that costs least: what attends stays next to its values, so that no pairs are written down.

(P @ Z) @ Y = P @ (Z @ Y) where P holds the weights of many rows over few keys (Nystroem's landmarks, for one): the
right side is as small as Y, and P @ .. is an attention.
"""

from __future__ import annotations

from attnc.compiler.ir import Graph, Node, walk
from attnc.dsl.types import Base, Type


def reassociate(graph: Graph, root: Node) -> Node:
    """The graph with chains of products that begin with weights turned around."""
    done: dict[Node, Node] = {}
    for node in walk(root):
        done[node] = _turned(graph, graph.rebuild(node, tuple(done[arg] for arg in node.args)))
    return done[root]


def _turned(graph: Graph, node: Node) -> Node:
    """`dot[c](matrix[c](weights), x)` as the attention `dot[c](weights, x)` over the index c; through chains."""
    if node.op not in ("dot", "matmul") or len(node.args) != 2:
        return node
    left, right = node.args
    if _attends(left) and right.type.axes[:1] == left.type.axes == (node.attribute,):
        weights, values = left.args  # sum over keys of weights * values, times a matrix: the values times it
        type = Type(Base.REAL, values.type.indices | right.type.indices, right.type.axes[1:])
        few = graph.make("dot", values, right, type=type, attribute=node.attribute, span=node.span)
        return graph.make("dot", weights, few, type=node.type, attribute=left.attribute, span=node.span)
    if left.op in ("dot", "matmul") and _begins_with_weights(left) and len(right.type.axes) == 2:
        inner = _product(graph, left.args[1], right, node)
        whole = _product(graph, left.args[0], inner, node) if inner is not None else None
        return _turned(graph, whole) if whole is not None else node
    if left.op == "matrix" and left.args[0].op == "softmax" and isinstance(left.attribute, tuple):
        (weights,), names = left.args, left.attribute
        if len(names) == 1 and weights.attribute == (names[0], None) and right.type.axes[:1] == names:
            return graph.make(
                "dot",
                weights,
                _as_index(graph, right, str(names[0])),
                type=node.type,
                attribute=str(names[0]),
                span=node.span,
            )
    return node


def _attends(node: Node) -> bool:
    """Whether a node is weights over few keys with the sum of the keys' vectors, made here out of matrices."""
    if node.op != "dot" or len(node.args) != 2 or len(node.type.axes) != 1:
        return False
    weights, values = node.args
    return weights.op == "softmax" and weights.attribute == (node.attribute, None) and values.op == "unmatrix"


def _begins_with_weights(node: Node) -> bool:
    while node.op in ("dot", "matmul"):
        node = node.args[0]
    return node.op == "matrix" and node.args[0].op == "softmax"


def _product(graph: Graph, x: Node, y: Node, like: Node) -> Node | None:
    """The matrix product of x's last axis with y's first, where the axes' names allow to say which."""
    shared = x.type.axes[-1]
    if y.type.axes[0] != shared:
        return None
    axes = (*x.type.axes[:-1], *y.type.axes[1:])
    type = Type(Base.REAL, x.type.indices | y.type.indices, axes)
    if x.type.axes.count(shared) == 1 and y.type.axes.count(shared) == 1:
        return graph.make("dot", x, y, type=type, attribute=shared, span=like.span)
    return graph.make("matmul", x, y, type=type, span=like.span)


def _as_index(graph: Graph, node: Node, name: str) -> Node:
    """A matrix whose first axis has the name of an index, as values of that index."""
    type = Type(node.type.base, node.type.indices | {name}, node.type.axes[1:])
    return graph.make("unmatrix", node, type=type, attribute=name, span=node.span)

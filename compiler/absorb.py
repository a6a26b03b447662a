"""Projections of keys moved to the queries' side, so that a cache keeps what heads share and not what each makes of it.

    q @ (W @ x) = (q @ W) @ x        softmax @ (W @ x) = W @ (softmax @ x)

where x is one vector a token for all heads and W a matrix for each (multi-head latent attention, arXiv 2405.04434,
section 2.1.2). A row's products get as wide as x; a whole sequence in one call is cheaper the other way.
"""

from __future__ import annotations

from attnc.compiler.ir import Graph, Node, walk
from attnc.dsl.types import Base, Type


def absorb(graph: Graph, root: Node) -> Node:
    """The graph with projections absorbed; `root` itself where there are none."""
    done: dict[Node, Node] = {}
    for node in walk(root):
        done[node] = _absorbed(graph, graph.rebuild(node, tuple(done[arg] for arg in node.args)))
    return done[root]


def _absorbed(graph: Graph, node: Node) -> Node:
    if node.op != "dot":
        return node
    for rows, keys in (node.args, node.args[::-1]):
        found = _projection(keys)
        if found is None:
            continue
        matrix, shared = found
        (width,) = shared.type.axes
        if rows.op == "softmax" and rows.attribute == (node.attribute, None) and rows.args[0].depends_on("i"):
            type = Type(Base.REAL, (rows.type.indices | shared.type.indices) - {"j"}, (width,))
            inner = graph.make("dot", rows, shared, type=type, attribute=node.attribute, span=node.span)
            return graph.make("dot", matrix, inner, type=node.type, attribute=width, span=node.span)
        if node.attribute == matrix.type.axes[0] and rows.type.axes == (node.attribute,) and not rows.depends_on("j"):
            type = Type(Base.REAL, rows.type.indices | matrix.type.indices, (width,))
            inner = graph.make("dot", rows, matrix, type=type, attribute=node.attribute, span=node.span)
            return graph.make("dot", inner, shared, type=node.type, attribute=width, span=node.span)
    return node


def _projection(keys: Node) -> tuple[Node, Node] | None:
    """(matrix of each head, vector of each key that heads share) of their product."""
    if keys.op != "dot" or len(keys.type.axes) != 1:
        return None
    matrix, shared = keys.args
    if len(matrix.type.axes) != 2 or matrix.type.axes[1] != keys.attribute or matrix.type.axes[0] == keys.attribute:
        return None
    fixed = not matrix.type.indices & frozenset("ijt") and matrix.depends_on("h")
    single = shared.depends_on("j") and not shared.depends_on("h") and shared.type.axes == (keys.attribute,)
    return (matrix, shared) if fixed and single else None

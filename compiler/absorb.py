"""Projections of the keys taken over by the queries and the results, and what that costs.

    x @ (W z_j) = (x W) @ z_j,     P @ (W z) = W (P @ z)

Where keys and values are projections of a latent that is wider than they are, but that all heads share, the left sides
cost less per pair and the right sides less per key: few queries (decoding) take the latent as it is, many project it
first (DeepSeek-V2, arXiv 2405.04434, section 2.1.2). Which is cheaper is known at a call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from attnc.compiler.ir import Graph, Node, walk
from attnc.dsl.types import Base, Type


@dataclass(frozen=True)
class Projection:
    """A projection of the keys from axis `inner` (the latent's) to axis `outer` (the keys' or values')."""

    outer: str
    inner: str


def absorb(graph: Graph, root: Node) -> tuple[Node, tuple[Projection, ...]]:
    """The graph with every projection of the keys taken over, and which these are."""
    done: dict[Node, Node] = {}
    found: list[Projection] = []
    for node in walk(root):
        done[node] = _turned(graph, graph.rebuild(node, tuple(done[arg] for arg in node.args)), found)
    return done[root], tuple(found)


def _turned(graph: Graph, node: Node, found: list[Projection]) -> Node:
    if node.op != "dot" or len(node.args) != 2:
        return node
    for x, projected in (node.args, node.args[::-1]):
        parts = _projection(projected)
        if parts is None:
            continue
        weight, latent, inner = parts
        (outer,) = projected.type.axes
        scored = node.attribute == outer and x.type.axes == (outer,) and "i" in x.type.indices
        if scored and "j" not in x.type.indices:
            found.append(Projection(outer, inner))
            query = _dot(graph, x, weight, outer, (inner,), node)
            return graph.make("dot", query, latent, type=node.type, attribute=inner, span=node.span)
        if node.attribute == "j" and x.op == "softmax" and x.attribute == ("j", None):
            found.append(Projection(outer, inner))
            type = Type(Base.REAL, (x.type.indices | latent.type.indices) - {"j"}, (inner,))
            attended = graph.make("dot", x, latent, type=type, attribute="j", span=node.span)
            return graph.make("dot", weight, attended, type=node.type, attribute=inner, span=node.span)
    return node


def _projection(node: Node) -> tuple[Node, Node, str] | None:
    """(matrix, latent of the keys, the axis between them) of a projection that is the same for all positions."""
    if node.op != "dot" or len(node.type.axes) != 1 or "j" not in node.type.indices:
        return None
    for weight, latent in (node.args, node.args[::-1]):
        matrix = len(weight.type.axes) == 2 and weight.type.indices <= {"h"}
        if matrix and latent.type.axes == (node.attribute,) and "h" not in latent.type.indices:
            return weight, latent, str(node.attribute)
    return None


def _dot(graph: Graph, x: Node, y: Node, axis: str, axes: tuple[str, ...], like: Node) -> Node:
    type = Type(Base.REAL, x.type.indices | y.type.indices, axes)
    return graph.make("dot", x, y, type=type, attribute=axis, span=like.span)


def saves(projections: Sequence[Projection], sizes: Mapping[str, int]) -> bool:
    """Whether taking the projections over costs fewer multiplications in a call: of pairs, and of one side."""
    rows, keys = sizes["i"], sizes["j"]
    projected = sum(rows * keys * sizes[one.outer] + keys * sizes[one.inner] * sizes[one.outer] for one in projections)
    absorbed = sum(rows * keys * sizes[one.inner] + rows * sizes[one.inner] * sizes[one.outer] for one in projections)
    return bool(absorbed < projected)

"""A value of one token index, read at another, pushed down to the inputs: t becomes i or j where the text said t."""

from __future__ import annotations

from dataclasses import replace

from attnc.compiler.ir import Graph, Node, walk
from attnc.compiler.ops import OPS

# Ops that work position by position, whatever the index is called; others read along an index.
BY_POSITION = frozenset({"outer", "concat", "transpose", "matmul", "take", "features", "kronecker", "symmetric"})


def reindexed(graph: Graph, root: Node, source: str, target: str) -> Node:
    """`root` with the index `source` read at `target`."""
    done: dict[Node, Node] = {}
    for node in walk(root):
        if not node.depends_on(source):
            done[node] = node
        elif node.op == "index":
            done[node] = graph.index(target)
        elif is_by_position(node, source):
            args = tuple(done[arg] for arg in node.args)
            done[node] = graph.make(
                node.op, *args, type=moved(node, source, target).type, attribute=node.attribute, span=node.span
            )
        else:
            done[node] = renamed(graph, node, source, target)
    return done[root]


def is_by_position(node: Node, index: str) -> bool:
    """Whether a value at one position depends on its operands at that position only."""
    if OPS[node.op].pointwise or node.op in BY_POSITION:
        return True
    if node.op == "dot":
        return node.attribute != index
    if node.op in ("sum", "mean", "max", "min", "softmax", "normalize"):
        return isinstance(node.attribute, tuple) and node.attribute[1] is None and node.attribute[0] != index
    return False


def renamed(graph: Graph, node: Node, source: str, target: str) -> Node:
    """A rename of what reads along the index, joined with the rename that it may be itself."""
    if node.op == "rename":
        assert isinstance(node.attribute, tuple)
        first = str(node.attribute[0])
        (inner,) = node.args
        if first == target:
            return inner
        type = replace(node.type, indices=(node.type.indices - {source}) | {target})
        return graph.make("rename", inner, type=type, attribute=(first, target), span=node.span)
    return graph.make("rename", node, type=moved(node, source, target).type, attribute=(source, target), span=node.span)


def moved(node: Node, source: str, target: str) -> Node:
    """The node with its type's index exchanged; for its type only."""
    return replace(node, type=replace(node.type, indices=(node.type.indices - {source}) | {target}))

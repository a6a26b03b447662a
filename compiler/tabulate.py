"""Integers of the distance i - j that need real arithmetic (T5's logarithmic buckets), as tables.

Rounding a logarithm in a kernel's float32 may land in another bucket than float64 does, and costs a
logarithm a pair; a table over the distances, made in float64, is exact, linear, and one load.
"""

from __future__ import annotations

from attnc.compiler.ir import Graph, Node, walk
from attnc.compiler.membership import Tables
from attnc.dsl.types import Base, Type


def tabulate(graph: Graph, root: Node, tables: Tables) -> Node:
    """`root` with every maximal such integer read from a table indexed by i - j + M."""
    done: dict[Node, Node] = {}
    users: dict[Node, list[Node]] = {}
    for node in walk(root):
        for arg in node.args:
            users.setdefault(arg, []).append(node)
    fitting = {node for node in walk(root) if _fits(node)}
    for node in walk(root):
        maximal = node in fitting and not all(user in fitting for user in users.get(node, []))
        if maximal or (node in fitting and node is root):
            done[node] = _read(graph, node, tables)
        else:
            done[node] = graph.rebuild(node, tuple(done[arg] for arg in node.args))
    return done[root]


def _fits(node: Node) -> bool:
    if node.type.base is not Base.INT or not {"i", "j"} <= node.type.indices or node.type.axes:
        return False
    inner = list(walk(node))
    if not any(one.op == "floor" for one in inner):
        return False
    for one in inner:
        if one.op == "sub" and {arg.attribute for arg in one.args if arg.op == "index"} == {"i", "j"}:
            continue
        if any(arg.op == "index" for arg in one.args) or one.op in ("input", "take", "derived", "dot"):
            return False
    return True


def _read(graph: Graph, node: Node, tables: Tables) -> Node:
    derived = tables.table("tabulated", (node,), ("table",))
    table = tables.part(derived, "table", frozenset(), ("distance",))
    distance = graph.make("sub", graph.index("i"), graph.index("j"))
    place = graph.make("add", distance, graph.size("j"))
    return graph.make("take", table, place, type=Type(Base.INT, frozenset({"i", "j"})), attribute="distance")

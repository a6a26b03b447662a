"""Conditions as a disjunction of conjunctions of atoms."""

from __future__ import annotations

from attnc.compiler.ir import Graph, Node, walk
from attnc.compiler.simplify import simplify_node
from attnc.dsl.types import Base

CONJUNCTIONS = 32  # past this many the condition is kept whole, as one atom

Conjunction = tuple[Node, ...]


def negate(graph: Graph, root: Node) -> Node:
    """not root, pushed inwards."""
    done: dict[Node, Node] = {}  # conditions share parts
    for node in walk(root):
        if node.op in ("and", "or"):
            swapped = graph.any_of if node.op == "and" else graph.all_of
            done[node] = swapped(done[arg] for arg in node.args)
        elif node.type.base is Base.BOOL:
            done[node] = simplify_node(graph, graph.make("not", node, span=node.span))
    return done[root]


def disjunction(graph: Graph, node: Node) -> list[Conjunction]:
    """Conjunctions whose union is the condition; none for false, one empty for true."""
    expanded = _expand(graph, node, {})
    if expanded is None:
        return [(node,)]
    distinct = dict.fromkeys(tuple(dict.fromkeys(conjunction)) for conjunction in expanded)
    return [one for one in distinct if not any(set(other) < set(one) for other in distinct)]


def _expand(graph: Graph, root: Node, done: dict[Node, list[Conjunction] | None]) -> list[Conjunction] | None:
    """The conjunctions of a condition; None past CONJUNCTIONS. `done`: of parts, which conditions share."""
    if root not in done:
        for node in walk(root):  # operands first: a chain may be longer than Python's stack
            if node.type.base is Base.BOOL and node not in done:
                done[node] = _expand_anew(graph, node, done)
    return done[root]


def _expand_anew(graph: Graph, node: Node, done: dict[Node, list[Conjunction] | None]) -> list[Conjunction] | None:
    if node.op == "literal":
        return [()] if node.attribute else []
    if node.op == "not" and node.args[0].op in ("and", "or"):
        return _expand(graph, negate(graph, node.args[0]), done)
    if node.op == "or":
        parts = [_expand(graph, arg, done) for arg in node.args]
        if None in parts:
            return None
        joined = [conjunction for part in parts for conjunction in part or []]
        return joined if len(joined) <= CONJUNCTIONS else None
    if node.op == "and":
        left, right = (_expand(graph, arg, done) for arg in node.args)
        if left is None or right is None or len(left) * len(right) > CONJUNCTIONS:
            return None
        return [one + other for one in left for other in right]
    split = split_absolute(graph, node)
    if split is not None:
        return _expand(graph, split, done)
    return [(node,)]


def split_absolute(graph: Graph, node: Node) -> Node | None:
    """|x| <= r -> x <= r and -x <= r, on ints; the same for <."""
    if node.op not in ("lt", "le") or node.args[0].op != "abs" or node.args[0].type.base is not Base.INT:
        return None
    (inner,) = node.args[0].args
    negated = graph.make("neg", inner, span=inner.span)
    return graph.make(
        "and",
        graph.make(node.op, inner, node.args[1], span=node.span),
        graph.make(node.op, negated, node.args[1], span=node.span),
        span=node.span,
    )


def split_unequal(graph: Graph, node: Node) -> tuple[Node, Node] | None:
    """The two sides of x != y and of r < |x|, on ints."""
    if node.op == "ne" and node.args[0].type.base is node.args[1].type.base is Base.INT:
        x, y = node.args
        return graph.make("lt", x, y, span=node.span), graph.make("lt", y, x, span=node.span)
    if node.op in ("lt", "le") and node.args[1].op == "abs" and node.args[1].type.base is Base.INT:
        (inner,) = node.args[1].args
        negated = graph.make("neg", inner, span=inner.span)
        return (
            graph.make(node.op, node.args[0], inner, span=node.span),
            graph.make(node.op, node.args[0], negated, span=node.span),
        )
    return None

"""Sums over the keys that need no pair: (Q K^T) V read as Q (K^T V), where the weight separates.

`associate` takes `sum[j](w * v where ..)`, `normalize[j](w where ..) @ v` or `w @ v` apart. By algebra, never by a
name, it says which sums of values, `Part`s, a state can carry, and `finish` says what the result is of their outcomes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from attnc.compiler.algebra import Algebra
from attnc.compiler.extents import Reach, Reaches, looks_ahead
from attnc.compiler.features import end_to_end, features
from attnc.compiler.ir import Graph, Node, walk
from attnc.compiler.separate import Inseparable, Separator, Term, is_mixed
from attnc.dsl.types import Base, Type


@dataclass(frozen=True)
class Part:
    """One carried sum: out_i = times_i * sum over j in the reach of w_ij value_j, w as in `features.Features`.

    `query` (b, h, i; f), `key` (b, h, j; f), `value` (b, h, j; e) or, for the sum of the weights alone, (b, h, j; 1).
    `times`: what the sum is multiplied by, a vector of the row; None: nothing.
    """

    query: Node
    key: Node
    value: Node
    decay: Node | None
    reach: Reach
    times: Node | None = None


@dataclass(frozen=True)
class Associated:
    """A reduction over the keys as the sum of `parts`; `options`: eps and floor of a normaliser, None without one."""

    node: Node
    parts: tuple[Part, ...]
    options: tuple[Node, ...] | None


@dataclass(frozen=True)
class Declined:
    """A reduction that no state carries: why, and what in the text says so."""

    reason: str
    node: Node


def associate(graph: Graph, algebra: Algebra, node: Node) -> Associated | Declined | None:
    """A reduction over the keys as carried sums; None where it is no sum of weights over the keys."""
    found = weighted(graph, node)
    if found is None:
        return None
    body, condition, value, options = found
    try:
        reach = Reaches(graph, algebra).read(condition)
        return Associated(node, tuple(parts(graph, body, value, reach)), options)
    except Inseparable as reason:
        return Declined(reason.reason, reason.node)


def weighted(graph: Graph, node: Node) -> tuple[Node, Node, Node | None, tuple[Node, ...] | None] | None:
    """Weight, condition, value and options of a sum over the keys; the value of a `sum` is inside of its weight."""
    if node.op == "sum" and node.attribute == ("j", None) and is_mixed_body(node.args[0], node):
        return node.args[0], node.args[1], None, None
    if node.op != "dot" or node.attribute != "j":
        return None
    for weights, value in (node.args, node.args[::-1]):
        if value.depends_on("i"):
            continue
        if weights.op == "normalize" and weights.attribute == ("j", None):
            body, condition, *options = weights.args
            return body, condition, value, tuple(options)
        if is_mixed(weights) and not _has_softmax(weights):
            return weights, graph.literal(True), value, None
    return None


def is_mixed_body(body: Node, reduction: Node) -> bool:
    """Whether a sum is one of pairs: the row plays a part in its body or its condition."""
    return body.depends_on("j") and any(arg.depends_on("i") for arg in reduction.args)


def _has_softmax(weights: Node) -> bool:
    return any(node.op == "softmax" and node.attribute == ("j", None) for node in walk(weights))


def parts(graph: Graph, body: Node, value: Node | None, reach: Reach) -> list[Part]:
    """The carried sums of a weight. Raises Inseparable."""
    separator = Separator(graph)
    one, zero = graph.literal(1.0), graph.literal(0.0)
    masks = Term(factors=tuple(graph.make("select", mask, one, zero) for mask in reach.masks))
    groups: dict[tuple[Node | None, Node | None], list[Term]] = {}
    for term in separator.separate(body):
        vectors = [factor for factor in term.factors if factor.type.axes]
        if any(len(vector.type.axes) > 1 for vector in vectors):
            raise Inseparable("its value is a matrix", body)
        theirs = separator.product(vector for vector in vectors if vector.depends_on("j"))
        own = separator.product(vector for vector in vectors if not vector.depends_on("j"))
        scalar = replace(term, factors=tuple(factor for factor in term.factors if factor not in vectors))
        if any(decay.type.axes for decay in term.decays):
            raise Inseparable("its decay differs by the value's channel", body)
        groups.setdefault((theirs, own), []).append(scalar.times(masks))
    found = []
    for (theirs, own), terms in groups.items():
        values = theirs if value is None else value
        if values is None:
            values = end_to_end(graph, [one])
        for made in features(separator, terms):
            if made.decay is not None:
                check_decay(reach, body)
            found.append(Part(made.query, made.key, values, made.decay, reach, own))
    return found


def check_decay(reach: Reach, body: Node) -> None:
    """A decay runs from the key up to the row: keys behind the row would grow."""
    if reach.kind == "all" or looks_ahead(reach.amount):
        raise Inseparable("its decay has no bound where keys lie behind the row; let the condition hold j <= i", body)


def finish(graph: Graph, associated: Associated, sums: Sequence[Node], totals: Sequence[Node]) -> Node:
    """The reduction, from each part's sum (b, h, i; e) and, under a normaliser, its weights' total (b, h, i)."""
    node, result = (
        associated.node,
        _added(graph, [_times(graph, *pair) for pair in zip(associated.parts, sums, strict=True)]),
    )
    if not node.type.axes:  # the weights were summed alone
        axis = result.type.axes[0]
        type = Type(Base.REAL, result.type.indices)
        result = graph.make("take", result, graph.literal(0), type=type, attribute=axis)
    if associated.options is None:
        return result
    return graph.make("mul", result, reciprocal(graph, _added(graph, totals), associated.options))


def reciprocal(graph: Graph, total: Node, options: Sequence[Node]) -> Node:
    """What `normalize` multiplies by: 1 / (total + eps), or 1 / max(|total + eps|, floor); of 0: 0."""
    zero, one = graph.literal(0.0), graph.literal(1.0)
    if options:
        total = graph.make("add", total, options[0])
    if len(options) > 1:
        total = graph.make("maximum", graph.make("abs", total), options[1])
    empty = graph.make("eq", total, zero)
    return graph.make("select", empty, zero, graph.make("div", one, graph.make("select", empty, one, total)))


def _times(graph: Graph, part: Part, sum: Node) -> Node:
    return sum if part.times is None else graph.make("mul", sum, part.times)


def _added(graph: Graph, nodes: Sequence[Node]) -> Node:
    result = nodes[0]
    for node in nodes[1:]:
        result = graph.make("add", result, node)
    return result

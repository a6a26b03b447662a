"""Sums over the keys that need no pair: (Q K^T) V read as Q (K^T V), where the weight separates.

`associate` takes `sum[j](w * v where ..)`, `normalize[j](w where ..) @ v` or `w @ v` apart. By algebra, never by a
name, it says which sums of values, `Part`s, a state can carry, and `finish` says what the result is of their outcomes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from attnc.compiler.algebra import Algebra
from attnc.compiler.conditions import negate
from attnc.compiler.extents import Reach, Reaches, looks_ahead
from attnc.compiler.features import Score, end_to_end, features
from attnc.compiler.ir import Graph, Node, walk
from attnc.compiler.separate import Inseparable, Separator, Term, is_mixed
from attnc.dsl.types import Base, Type


@dataclass(frozen=True)
class Part:
    """One carried sum: out_i = times_i * sum over j in the reach of w_ij value_j, w as in `features.Features`.

    `query` (b, h, i; f), `key` (b, h, j; f), `value` (b, h, j; e) or, for the sum of the weights alone, (b, h, j; 1).
    `times`: what the sum is multiplied by, a vector of the row; None: nothing. `score`: as in `features.Features`.
    """

    query: Node
    key: Node
    value: Node
    decay: Node | None
    reach: Reach
    times: Node | None = None
    score: Score | None = None


@dataclass(frozen=True)
class Exponential:
    """One sum with weights exp(score + shift): exp(lse + shift) times the softmax of the scores, over its keys.

    `score` is over pairs, `shift` over rows (None: 0).
    """

    score: Node
    shift: Node | None
    condition: Node
    value: Node


@dataclass(frozen=True)
class Associated:
    """A reduction over the keys as the sum of `parts` and `exponentials`, over disjoint keys or of the same ones.

    `options`: eps and floor of a normaliser, None without one.
    """

    node: Node
    parts: tuple[Part, ...]
    exponentials: tuple[Exponential, ...]
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
    carried: list[Part] = []
    exponentials: list[Exponential] = []
    try:
        for weight, where in pieces(graph, body, condition):
            exponential = None if value is None else as_exponential(graph, weight, where, value)
            if exponential is not None:
                exponentials.append(exponential)
                continue
            carried += parts(graph, weight, value, Reaches(graph, algebra).read(where))
    except Inseparable as reason:
        return Declined(reason.reason, reason.node)
    return Associated(node, tuple(carried), tuple(exponentials), options)


def pieces(graph: Graph, body: Node, condition: Node) -> list[tuple[Node, Node]]:
    """A weight that pairs choose, `if c then x else y`, as x over the keys of c and y over the others."""
    if body.op != "select" or not is_mixed(body.args[0]):
        return [(body, condition)]
    chosen, accepted, otherwise = body.args
    return [
        *pieces(graph, accepted, graph.all_of([condition, chosen])),
        *pieces(graph, otherwise, graph.all_of([condition, negate(graph, chosen)])),
    ]


def as_exponential(graph: Graph, weight: Node, condition: Node, value: Node) -> Exponential | None:
    """A weight that is exp of a score, where no state can carry it."""
    if weight.op != "exp":
        return None
    try:
        Separator(graph).separate(weight)
    except Inseparable:
        pass
    else:
        return None
    pairs: list[Node] = []
    rows: list[Node] = []
    for sign, term in addends(weight.args[0]):
        signed = term if sign > 0 else graph.make("neg", term)
        (pairs if term.depends_on("j") else rows).append(signed)
    return Exponential(_added(graph, pairs), _added(graph, rows) if rows else None, condition, value)


def addends(node: Node, sign: int = 1) -> list[tuple[int, Node]]:
    """The terms of a sum with their signs."""
    if node.op in ("add", "sub"):
        x, y = node.args
        return addends(x, sign) + addends(y, sign if node.op == "add" else -sign)
    return addends(node.args[0], -sign) if node.op == "neg" else [(sign, node)]


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
            score = made.score if is_plain(reach) else None
            found.append(Part(made.query, made.key, values, made.decay, reach, own, score))
    return found


def is_plain(reach: Reach) -> bool:
    """Whether a row sees every key up to its own."""
    own = reach.amount is not None and reach.amount.op == "literal" and reach.amount.attribute == 0
    return reach.kind == "lag" and own and reach.same is None and not reach.masks


def check_decay(reach: Reach, body: Node) -> None:
    """A decay runs from the key up to the row: keys behind the row would grow."""
    if reach.kind == "all" or looks_ahead(reach.amount):
        raise Inseparable("its decay has no bound where keys lie behind the row; let the condition hold j <= i", body)


def finish(graph: Graph, associated: Associated, sums: Sequence[Node], totals: Sequence[Node]) -> Node:
    """The reduction, from each part's `times` its sum (b, h, i; e) and, under a normaliser, its weights' total."""
    node, result = associated.node, _added(graph, list(sums))
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


def _added(graph: Graph, nodes: Sequence[Node]) -> Node:
    result = nodes[0]
    for node in nodes[1:]:
        result = graph.make("add", result, node)
    return result

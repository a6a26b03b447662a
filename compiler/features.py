"""The terms of a separated weight as vectors: query features, key features and a decay, whose dot is the weight.

Terms with the same decay share one vector: their features stand end to end. A power of a dot product is the dot of the
operands' symmetric powers, of which each distinct monomial is kept once; a product of different dots is the dot of
Kronecker products.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from attnc.compiler.ir import Graph, Node
from attnc.compiler.separate import Inseparable, Separator, Term
from attnc.dsl.types import Base, Type


@dataclass(frozen=True)
class Features:
    """w(i, j) = sum over features of query(i) * key(j) * exp(sum of decay(u) for j < u <= i).

    `query`, `key`: vectors over one axis. `decay`: None, a log decay a step, or a vector of them over that axis.
    `score`: see `score_of`.
    """

    query: Node
    key: Node
    decay: Node | None
    score: Score | None = None


@dataclass(frozen=True)
class Score:
    """w(i, j) = sum over n of coefficients[n] * (query(i) @ key(j)) ** n, with numbers that all pairs share."""

    query: Node
    key: Node
    coefficients: tuple[Node, ...]


def features(separator: Separator, terms: Sequence[Term]) -> list[Features]:
    """The vectors of some terms, one `Features` for every different decay. Raises Inseparable."""
    groups: dict[tuple[tuple[int, ...], bool], list[Term]] = {}
    for term in terms:
        vector = any(dot.decay is not None for dot in term.dots)
        groups.setdefault((tuple(sorted(map(id, term.decays))), vector), []).append(term)
    return [_joined(separator, group) for group in groups.values()]


def _joined(separator: Separator, terms: Sequence[Term]) -> Features:
    """Terms of the same scalar decays end to end."""
    graph = separator.graph
    made = [_of_term(separator, term) for term in terms]
    query, key = end_to_end(graph, [one for one, _, _ in made]), end_to_end(graph, [one for _, one, _ in made])
    steady = separator.total(terms[0].decays)
    vectors = [decay for _, _, decay in made if decay is not None]
    if not vectors:
        return Features(query, key, steady, score_of(separator, terms))
    decay = vectors[0] if len(made) == 1 else end_to_end(graph, vectors)
    return Features(query, key, decay if steady is None else graph.make("add", decay, steady))


def score_of(separator: Separator, terms: Sequence[Term]) -> Score | None:
    """A weight as powers of one dot product, of which the lowest is a square; None where it is none, or decays.

    Such a weight vanishes faster than the features whose products cancel to it: near 0 nothing of it is left in their
    sums, and a row may be divided by it. So pairs that are near one another are weighed by the score itself.
    """
    dots = {dot for term in terms for dot in term.dots}
    powers = [len(term.dots) for term in terms]
    own = [factor for term in terms for factor in term.factors if factor.type.indices or factor.type.axes]
    if len(dots) != 1 or min(powers) < 2 or own or any(term.decays for term in terms):
        return None
    (dot,) = dots
    found: list[Node] = []
    for power in range(max(powers) + 1):
        parts = [separator.node(replace(term, dots=())) for term in terms if len(term.dots) == power]
        found.append(separator.total(parts) or separator.graph.literal(0.0))
    return Score(dot.query, dot.key, tuple(found))


def _of_term(separator: Separator, term: Term) -> tuple[Node, Node, Node | None]:
    """Query features, key features and decay of each channel of one term; scalars where it has no dots."""
    graph = separator.graph
    counted = Counter(term.dots)
    decays = [dot.decay for dot in term.dots if dot.decay is not None]
    if decays and len(term.dots) > 1:
        raise Inseparable("a product of dots of which one has a decay for each channel", decays[0])
    pairs = [(powered(graph, dot.query, n), powered(graph, dot.key, n)) for dot, n in counted.items()]
    query, key = (_kronecker(graph, [pair[side] for pair in pairs]) for side in (0, 1))
    own = [factor for factor in term.factors if not factor.depends_on("j")]
    theirs = [factor for factor in term.factors if factor.depends_on("j")]
    scale = [graph.literal(term.coefficient)] if term.coefficient != 1.0 else []
    sides = [
        separator.product([*([vector] if vector is not None else []), *scalars])
        for vector, scalars in ((query, [*own, *scale]), (key, theirs))
    ]
    one = graph.literal(1.0)
    return sides[0] or one, sides[1] or one, decays[0] if decays else None


def powered(graph: Graph, vector: Node, power: int) -> Node:
    """The symmetric power of a vector: <x, y> ** n is the dot of x's and y's."""
    if power == 1:
        return vector
    (axis,) = vector.type.axes
    type = Type(Base.REAL, vector.type.indices, (f"{axis}^{power}",))
    return graph.make("symmetric", vector, type=type, attribute=power, span=vector.span)


def _kronecker(graph: Graph, vectors: Sequence[Node]) -> Node | None:
    """All products of elements of some vectors over one axis; None of no vectors."""
    result: Node | None = None
    for vector in vectors:
        if result is None:
            result = vector
            continue
        (left,), (right,) = result.type.axes, vector.type.axes
        type = Type(Base.REAL, result.type.indices | vector.type.indices, (f"({left}*{right})",))
        result = graph.make("kronecker", result, vector, type=type, span=vector.span)
    return result


def end_to_end(graph: Graph, parts: Sequence[Node]) -> Node:
    """Vectors and scalars (each one long) over one axis; a single vector is itself."""
    if len(parts) == 1 and parts[0].type.axes:
        return parts[0]
    axis = "+".join(part.type.axes[0] if part.type.axes else "1" for part in parts)
    indices = frozenset[str]().union(*(part.type.indices for part in parts))
    return graph.make("features", *parts, type=Type(Base.REAL, indices, (axis,)))

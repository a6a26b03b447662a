"""A weight between positions as a finite sum of products: a value of the row, times one of the key, times a decay.

    w(i, j) = sum over terms of  c * rows(i) * keys(j) * dots(q(i), k(j)) * exp(sum of g(u) for j < u <= i)

Found by algebra on the graph: products and sums multiply out, small powers repeat, a dot product of vectors over pairs
contracts term by term, exp of a difference of prefix sums is a decay, a power of the distance is one too, cos and sin
of a sum follow the addition theorems. What is no such sum raises `Inseparable`, which says why and where.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from attnc.compiler.ir import Graph, Node, substitute, walk
from attnc.dsl.types import Base, Type

MOST_TERMS = 64
HIGHEST_POWER = 4


class Inseparable(Exception):  # noqa: N818  # an answer, not a mistake
    """Why a weight is no finite sum of products, and which part of it."""

    def __init__(self, reason: str, node: Node) -> None:
        super().__init__(reason)
        self.reason = reason
        self.node = node


@dataclass(frozen=True)
class Dot:
    """sum over the vector axis `axis` of query * key, each feature with its decay."""

    query: Node
    key: Node
    axis: str
    decay: Node | None = None


@dataclass(frozen=True)
class Term:
    """One product. `factors` are values of the row, of the key or of neither; `decays` log decays a step."""

    coefficient: float = 1.0
    factors: tuple[Node, ...] = ()
    dots: tuple[Dot, ...] = ()
    decays: tuple[Node, ...] = ()

    def times(self, other: Term) -> Term:
        return Term(
            self.coefficient * other.coefficient,
            self.factors + other.factors,
            self.dots + other.dots,
            self.decays + other.decays,
        )

    def scaled(self, by: float) -> Term:
        return replace(self, coefficient=self.coefficient * by)


Terms = list[Term]


def is_mixed(node: Node) -> bool:
    """Whether a value belongs to a pair: it varies over rows and keys."""
    return {"i", "j"} <= node.type.indices


class Separator:
    """Separates weights of one graph."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph

    def separate(self, weight: Node) -> Terms:
        """The terms of a weight. Raises Inseparable."""
        return self.expand(weight, deep=False)

    def expand(self, node: Node, *, deep: bool) -> Terms:
        """`deep`: values of one side are multiplied out too, so that an exponent's parts can be told apart."""
        if node.op == "literal" and node.type.base is not Base.BOOL:
            return [Term(float(node.attribute))]  # type: ignore[arg-type]
        if not is_mixed(node) and not (deep and node.op in LINEAR):
            return [Term(factors=(self.real(node),))]
        rule = RULES.get(node.op)
        if node.op == "softmax" and node.attribute == ("i", None):
            raise Inseparable("this `softmax` is along the queries `i`; along the keys it is `softmax[j]`", node)
        if rule is None:
            raise Inseparable(f"`{node.op}` of a value of row and key together is no sum of products", node)
        terms = rule(self, node, deep)
        if len(terms) > MOST_TERMS:
            raise Inseparable(f"it multiplies out to more than {MOST_TERMS} products", node)
        return terms

    def real(self, node: Node) -> Node:
        return node if node.type.base is Base.REAL else self.graph.make("to_real", node)

    def product(self, nodes: Iterable[Node]) -> Node | None:
        """The product of some values; None of none."""
        result: Node | None = None
        for node in nodes:
            result = node if result is None else self.graph.make("mul", result, node)
        return result

    def total(self, nodes: Iterable[Node]) -> Node | None:
        """The sum of some values; None of none."""
        result: Node | None = None
        for node in nodes:
            result = node if result is None else self.graph.make("add", result, node)
        return result

    def node(self, term: Term) -> Node:
        """A term without dots and decays as one value."""
        factors = list(term.factors)
        if term.coefficient != 1.0 or not factors:
            factors.append(self.graph.literal(float(term.coefficient)))
        found = self.product(factors)
        assert found is not None
        return found

    def multiply(self, left: Terms, right: Terms) -> Terms:
        return [x.times(y) for x in left for y in right]

    # Exponents

    def exponents(self, node: Node) -> tuple[Terms, list[Node]]:
        """An exponent as values of one side and the log decays that pairs of them make.

        F(i) - F(j) is the sum of F's steps over j < u <= i, whatever F; where F is a prefix sum or the position, the
        steps are known, and nothing large has to be formed: exp(-F(j)) alone would overflow.
        """
        terms = merged(self.expand(node, deep=True))
        for term in terms:
            if term.dots or term.decays or {"i", "j"} <= _indices(term.factors):
                raise Inseparable("it grows with a product of row and key: only a feature map can separate that", node)
        rows = [term for term in terms if "i" in _indices(term.factors)]
        keys = [term for term in terms if "j" in _indices(term.factors)]
        rest = [term for term in terms if term not in rows and term not in keys]
        decays: list[Node] = []
        for key in keys:
            twin = self.twin(key)
            match = next((row for row in rows if twin is not None and _same(row, twin)), None)
            step = None if match is None else self.step(key)
            if match is None or step is None:
                rest.append(key)
                continue
            rows.remove(match)
            decays.append(step)
        return rows + rest, decays

    def twin(self, key: Term) -> Term | None:
        """What is read at i in place of j, negated; None where the value is one of keys only."""
        factors = tuple(at_row(self.graph, factor) for factor in key.factors)
        if any("j" in factor.type.indices for factor in factors):
            return None
        return replace(key, coefficient=-key.coefficient, factors=factors)

    def step(self, key: Term) -> Node | None:
        """The step g(u) of -c * F(u), where F is a prefix sum or the position times values that do not move."""
        moving = [factor for factor in key.factors if "j" in factor.type.indices]
        still = [factor for factor in key.factors if factor not in moving]
        if len(moving) != 1:
            return None
        source = moving[0]
        inner = source.args[0] if source.op in ("to_real", "rename") else source
        if inner.op == "index":
            steps: list[Node] = []
        elif source.op == "rename" and source.attribute == ("t", "j") and _is_prefix_sum(inner):
            body, condition = inner.args
            zero = self.graph.literal(0.0)
            steps = [body if is_literal_true(condition) else self.graph.make("select", condition, body, zero)]
        else:
            return None
        return self.node(Term(-key.coefficient, (*steps, *still)))

    def exponential(self, node: Node) -> Terms:
        """exp of an exponent that falls apart."""
        sides, decays = self.exponents(node)
        rows = [term for term in sides if "j" not in _indices(term.factors)]
        keys = [term for term in sides if term not in rows]
        parts = [self.total(self.node(term) for term in side) for side in (rows, keys)]
        factors = tuple(self.graph.make("exp", part) for part in parts if part is not None)
        return [Term(factors=factors, decays=tuple(decays))]

    def angles(self, node: Node) -> tuple[Node, Node]:
        """An angle as the sum of one of the row and one of the key."""
        terms = merged(self.expand(node, deep=True))
        for term in terms:
            if term.dots or term.decays or {"i", "j"} <= _indices(term.factors):
                raise Inseparable("its angle is no sum of one of the row and one of the key", node)
        keys = [term for term in terms if "j" in _indices(term.factors)]
        rows = [term for term in terms if term not in keys]
        x, y = (self.total(self.node(term) for term in side) or self.graph.literal(0.0) for side in (rows, keys))
        return x, y


def _add(at: Separator, node: Node, deep: bool) -> Terms:
    x, y = (at.expand(arg, deep=deep) for arg in node.args)
    return x + y


def _sub(at: Separator, node: Node, deep: bool) -> Terms:
    x, y = (at.expand(arg, deep=deep) for arg in node.args)
    return x + [term.scaled(-1.0) for term in y]


def _neg(at: Separator, node: Node, deep: bool) -> Terms:
    return [term.scaled(-1.0) for term in at.expand(node.args[0], deep=deep)]


def _mul(at: Separator, node: Node, deep: bool) -> Terms:
    x, y = (at.expand(arg, deep=deep) for arg in node.args)
    return at.multiply(x, y)


def _div(at: Separator, node: Node, deep: bool) -> Terms:
    x, divisor = node.args
    if is_mixed(divisor):
        raise Inseparable("it divides by a value of row and key together", divisor)
    terms = at.expand(x, deep=deep)
    if divisor.op == "literal" and divisor.attribute:
        return [term.scaled(1.0 / float(divisor.attribute)) for term in terms]  # type: ignore[arg-type]
    inverse = at.graph.make("div", at.graph.literal(1.0), at.real(divisor))
    return at.multiply(terms, [Term(factors=(inverse,))])


def _to_real(at: Separator, node: Node, deep: bool) -> Terms:
    return at.expand(node.args[0], deep=True)


def _exp(at: Separator, node: Node, deep: bool) -> Terms:
    return at.exponential(node.args[0])


def _pow(at: Separator, node: Node, deep: bool) -> Terms:
    """x ** n multiplies out; base ** (i - j) is exp((i - j) * log base)."""
    base, exponent = node.args
    if is_mixed(base):
        if exponent.op != "literal":
            raise Inseparable("its exponent must be a number for the power to multiply out", exponent)
        power = float(exponent.attribute)  # type: ignore[arg-type]
        if power != int(power) or not 0 <= power <= HIGHEST_POWER:
            raise Inseparable(f"only whole powers up to {HIGHEST_POWER} multiply out", exponent)
        terms, result = at.expand(base, deep=False), [Term()]
        for _ in range(int(power)):
            result = merged(at.multiply(result, terms))
        return result
    if {"i", "j"} & base.type.indices:
        raise Inseparable("the base of a power of the distance must be the same at all positions", base)
    log = at.graph.make("log", at.real(base))
    return at.exponential(at.graph.make("mul", at.real(exponent), log))


def _cos(at: Separator, node: Node, deep: bool) -> Terms:
    """cos(x + y) = cos x cos y - sin x sin y"""
    x, y = at.angles(node.args[0])
    cos = Term(factors=(at.graph.make("cos", x), at.graph.make("cos", y)))
    return [cos, Term(-1.0, (at.graph.make("sin", x), at.graph.make("sin", y)))]


def _sin(at: Separator, node: Node, deep: bool) -> Terms:
    """sin(x + y) = sin x cos y + cos x sin y"""
    x, y = at.angles(node.args[0])
    left = Term(factors=(at.graph.make("sin", x), at.graph.make("cos", y)))
    return [left, Term(factors=(at.graph.make("cos", x), at.graph.make("sin", y)))]


def _select(at: Separator, node: Node, deep: bool) -> Terms:
    """if c then x else y, c of one side: 1[c] x + 1[not c] y."""
    condition, accepted, otherwise = node.args
    if is_mixed(condition):
        raise Inseparable("it is chosen by row and key together", condition)
    one, zero = at.graph.literal(1.0), at.graph.literal(0.0)
    taken = Term(factors=(at.graph.make("select", condition, one, zero),))
    left = Term(factors=(at.graph.make("select", condition, zero, one),))
    first, second = (at.expand(part, deep=False) for part in (accepted, otherwise))
    return at.multiply(first, [taken]) + at.multiply(second, [left])


def _dot(at: Separator, node: Node, deep: bool) -> Terms:
    """A dot product of vectors over pairs, term by term."""
    axis = str(node.attribute)
    x, y = (at.expand(arg, deep=False) for arg in node.args)
    return [_contract(at, node, axis, term) for term in merged(at.multiply(x, y))]


def _contract(at: Separator, node: Node, axis: str, term: Term) -> Term:
    """The sum of one product over a vector axis."""
    vectors = [factor for factor in term.factors if factor.type.axes]
    decays = [decay for decay in term.decays if decay.type.axes]
    if any(value.type.axes != (axis,) for value in (*vectors, *decays)):
        raise Inseparable("a matrix for every pair is contracted", node)
    keys = [vector for vector in vectors if vector.depends_on("j")]
    query, key = at.product(vector for vector in vectors if vector not in keys), at.product(keys)
    scalars = tuple(factor for factor in term.factors if factor not in vectors)
    steady = tuple(decay for decay in term.decays if decay not in decays)
    if query is None or key is None:
        if decays or (query or key) is None:
            raise Inseparable("a decay for each channel needs a vector of the row and one of the key", node)
        return replace(term, factors=(*scalars, _summed(at, axis, query or key)), decays=steady)
    dot = Dot(query, key, axis, at.total(decays))
    return Term(term.coefficient, scalars, (*term.dots, dot), steady)


def _summed(at: Separator, axis: str, vector: Node | None) -> Node:
    assert vector is not None
    type = Type(Base.REAL, vector.type.indices)
    return at.graph.make("sum", vector, at.graph.literal(True), type=type, attribute=(axis, None), span=vector.span)


LINEAR = frozenset({"add", "sub", "neg", "mul", "div", "to_real"})
RULES: dict[str, Callable[[Separator, Node, bool], Terms]] = {
    "add": _add,
    "sub": _sub,
    "neg": _neg,
    "mul": _mul,
    "div": _div,
    "to_real": _to_real,
    "exp": _exp,
    "pow": _pow,
    "cos": _cos,
    "sin": _sin,
    "select": _select,
    "dot": _dot,
}


def merged(terms: Sequence[Term]) -> Terms:
    """Terms that differ in their number only, as one."""
    found: dict[tuple[object, ...], Term] = {}
    for term in terms:
        key = _key(term)
        held = found.get(key)
        found[key] = term if held is None else replace(held, coefficient=held.coefficient + term.coefficient)
    return [term for term in found.values() if term.coefficient]


def _key(term: Term) -> tuple[object, ...]:
    def ordered(nodes: Iterable[Node]) -> tuple[int, ...]:
        return tuple(sorted(map(id, nodes)))

    dots = tuple(sorted((id(dot.query), id(dot.key), dot.axis, id(dot.decay)) for dot in term.dots))
    return ordered(term.factors), dots, ordered(term.decays)


def _same(row: Term, twin: Term) -> bool:
    """Whether two terms are equal, up to rounding of their numbers."""
    near = abs(row.coefficient - twin.coefficient) <= 1e-12 * abs(row.coefficient)
    return near and _key(row) == _key(twin)


def _indices(factors: Iterable[Node]) -> frozenset[str]:
    return frozenset[str]().union(*(factor.type.indices for factor in factors))


def is_literal_true(node: Node) -> bool:
    """Whether a condition is the number true."""
    return node.op == "literal" and node.attribute is True


def _is_prefix_sum(node: Node) -> bool:
    return node.op == "cumsum" and node.attribute == ("t", None)


def at_row(graph: Graph, node: Node) -> Node:
    """A value of the key, read at the row: j becomes i where what is read is a token's, or the position."""
    replacements: dict[Node, Node] = {}
    for leaf in walk(node):
        if leaf.op == "index" and leaf.attribute == "j":
            replacements[leaf] = graph.index("i")
        if leaf.op == "rename" and leaf.attribute == ("t", "j"):
            type = replace(leaf.type, indices=(leaf.type.indices - {"j"}) | {"i"})
            replacements[leaf] = graph.make("rename", *leaf.args, type=type, attribute=("t", "i"), span=leaf.span)
    return substitute(graph, node, replacements)

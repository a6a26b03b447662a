"""What decoding must keep of the past, derived from a composition: which old keys can any later query still see?

A key j may be dropped before query n when no query i >= n sees it. Each way to fulfil a condition (a conjunction of its
disjunction) is solved for i: `i - j < window` ends at j + window, so the last `window` keys suffice. A way that is
never over is solved for j: `j < sinks` keeps the first ones, `j % stride == c` every stride-th. What no rule bounds is
kept for good, with the reason. States, prefix sums, pools and shifted reads keep what their recurrences need.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import sympy

from attnc.compiler.algebra import Algebra, Congruence, Coordinate, Expr, Interval, largest, solve
from attnc.compiler.conditions import Conjunction, disjunction
from attnc.compiler.describe import formula
from attnc.compiler.domains import DomainBuilder, Keys
from attnc.compiler.ir import Graph, Node
from attnc.compiler.membership import Roles, Tables

CONSTANT = frozenset({"literal", "parameter"})


@dataclass(frozen=True)
class Every:
    """Positions with low <= j % period < high, for good."""

    period: Node
    low: Node
    high: Node


@dataclass(frozen=True)
class Retention:
    """Which positions of an index a later query may still see: a union of classes, ints of parameters.

    `window`: the last so many, the query's own among them. `first`: the first so many, for good. `every`: classes of
    remainders, for good. `reasons`: why everything is kept, if it is; the classes are then empty.
    """

    window: Node | None = None
    first: Node | None = None
    every: tuple[Every, ...] = ()
    reasons: tuple[str, ...] = ()

    @property
    def everything(self) -> bool:
        return bool(self.reasons)


def retained(graph: Graph, conditions: Sequence[Node]) -> Retention:
    """What is kept of keys j that queries i see under any of the conditions, over (b, h, i, j)."""
    found = [_of_conjunction(graph, atoms) for condition in conditions for atoms in disjunction(graph, condition)]
    return union(graph, found)


def union(graph: Graph, parts: Sequence[Retention]) -> Retention:
    """Enough for all of them."""
    reasons = tuple(dict.fromkeys(reason for part in parts for reason in part.reasons))
    if reasons:
        return Retention(reasons=reasons)
    return Retention(
        _most(graph, [part.window for part in parts if part.window is not None]),
        _most(graph, [part.first for part in parts if part.first is not None]),
        tuple(dict.fromkeys(every for part in parts for every in part.every)),
    )


def _most(graph: Graph, counts: Sequence[Node]) -> Node | None:
    distinct = list(dict.fromkeys(counts))
    if not distinct:
        return None
    most = distinct[0]
    for count in distinct[1:]:
        most = graph.make("maximum", most, count)
    return most


def _of_conjunction(graph: Graph, atoms: Conjunction) -> Retention:
    """One way to see a key: a window, else the first ones, else a class of remainders, else everything."""
    algebra = Algebra(graph)
    if _solved(graph, algebra, atoms, Roles.forward(graph)) is None:
        return Retention()  # never fulfilled
    transposed = _solved(graph, algebra, atoms, Roles.transposed(graph))
    if transposed is None:
        return Retention()
    widths = [width for high in transposed.highs if (width := _beyond(algebra, high)) is not None]
    if widths:
        return Retention(window=_least(graph, widths))
    forward = _solved(graph, algebra, atoms, Roles.forward(graph))
    assert forward is not None
    firsts = [high for high in forward.highs if _constant(high)]
    if firsts:
        return Retention(first=_least(graph, firsts))
    for atom in atoms:
        every = _every(graph, algebra, atom)
        if every is not None:
            return Retention(every=(every,))
    return Retention(reasons=(_reason(atoms),))


def _solved(graph: Graph, algebra: Algebra, atoms: Conjunction, roles: Roles) -> Keys | None:
    """What the atoms say of one side; None where they contradict each other."""
    builder = DomainBuilder(graph, algebra, Tables(graph, algebra, {}), roles)
    known = builder.solve_atoms(tuple(atom for atom in atoms if atom.op != "member"))
    return None if builder.empty(known) else known


def _least(graph: Graph, counts: Sequence[Node]) -> Node:
    least, *others = dict.fromkeys(counts)
    for count in others:
        least = graph.make("minimum", least, count)
    return least


def _beyond(algebra: Algebra, high: Node) -> Node | None:
    """A bound of high - j by parameters alone, where i < high(j): how far a key is seen, its own position included."""
    distance: Expr = algebra.difference(high, algebra.graph.index("j"))
    for _ in range(4):
        if all(_constant(algebra.node(symbol)) for symbol in distance.free_symbols):
            return algebra.node(distance)
        larger = sympy.expand(sum(largest(term) for term in sympy.Add.make_args(distance)))
        if larger == distance:
            return None
        distance = larger
    return None


def _every(graph: Graph, algebra: Algebra, atom: Node) -> Every | None:
    """`j % p == c` or `j % p` in an interval, of parameters."""
    if not atom.depends_on("j"):
        return None
    constraint = solve(algebra, atom, "j")
    if isinstance(constraint, Congruence) and constraint.coordinate == Coordinate():
        phase, step = constraint.phase, constraint.step
        if _constant(phase) and _constant(step):
            low = graph.make("mod", phase, step)
            return Every(step, low, graph.make("add", low, graph.literal(1)))
    if isinstance(constraint, Interval) and constraint.coordinate.digit == "low":
        period = constraint.coordinate.period
        assert period is not None
        low, high = constraint.lo or graph.literal(0), constraint.hi or period
        if all(_constant(bound) for bound in (period, low, high)):
            held = graph.make("maximum", low, graph.literal(0))
            return Every(period, held, graph.make("minimum", high, period))
    return None


def _constant(node: Node) -> bool:
    """Whether an int is one of parameters and numbers."""
    if node.args:
        return not node.type.indices and all(_constant(arg) for arg in node.args)
    return node.op in CONSTANT


def _reason(atoms: Conjunction) -> str:
    written = " and ".join(_text(atom) for atom in atoms) or "true"
    return f"nothing ends how long a key is seen where {written}"


def _text(atom: Node) -> str:
    return " ".join(atom.span.text.split()) if atom.span else formula(atom)


def counted(retention: Retention) -> Iterator[str]:
    """What is kept of one index, in words, class by class."""
    if retention.everything:
        yield "everything"
    if retention.window is not None:
        yield f"the last {formula(retention.window)}"
    if retention.first is not None:
        yield f"the first {formula(retention.first)}"
    for every in retention.every:
        yield f"{formula(every.low)} <= position % {formula(every.period, 7)} < {formula(every.high)}"

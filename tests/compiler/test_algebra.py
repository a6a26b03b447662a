"""The integer algebra: round trips through sympy, comparisons solved for an index, certain orders."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnc.compiler.algebra import Algebra, Congruence, Constraint, Coordinate, Interval, at_most, solve
from attnc.compiler.describe import formula
from attnc.compiler.ir import Graph, Node
from attnc.compiler.reach import reach
from attnc.dsl.types import Base, Type
from tests.compiler.graphs import At, Maker, graphs, places, value

PLACES = st.lists(places(), min_size=6, max_size=12)


def text_of(constraint: Constraint | None) -> str:
    """A constraint as an inequality or congruence."""
    if constraint is None:
        return "none"
    at = constraint.coordinate
    view = {"all": "x", "high": "x // {}", "low": "x % {}"}[at.digit].format(at.period and formula(at.period, 7))
    if isinstance(constraint, Congruence):
        sign = "==" if constraint.exact else "~="
        return f"{view} {sign} {formula(constraint.phase)} mod {formula(constraint.step)}"
    lo, hi = (bound and formula(bound) for bound in (constraint.lo, constraint.hi))
    return " ".join([f"{lo} <="] * bool(lo) + [view] + [f"< {hi}"] * bool(hi))


class Written:
    """Builds comparisons in Python's own notation."""

    def __init__(self) -> None:
        self.graph = Graph()
        names = {"i": self.graph.index("i"), "j": self.graph.index("j"), "M": self.graph.size("j")}
        names |= {n: self.graph.make("parameter", type=Type(Base.INT), attribute=n) for n in ("w", "p", "s")}
        names |= {"x": self.graph.make("input", type=Type(Base.INT, frozenset({"j"})), attribute="x")}
        self.names = {name: Operand(self.graph, node) for name, node in names.items()}

    def read(self, text: str) -> Node:
        calls = {
            "min": self.call("minimum"),
            "max": self.call("maximum"),
            "abs": self.call("abs"),
            "eq": self.call("eq"),
        }
        made = eval(text, {**self.names, **calls})
        assert isinstance(made, Operand)
        return made.node

    def call(self, op: str) -> Callable[..., Operand]:
        def make(*args: Operand | int) -> Operand:
            return Operand(self.graph, self.graph.make(op, *(Operand.lift(self.graph, arg) for arg in args)))

        return make


class Operand:
    """A node with Python's operators."""

    def __init__(self, graph: Graph, node: Node) -> None:
        self.graph, self.node = graph, node

    @staticmethod
    def lift(graph: Graph, other: Operand | int) -> Node:
        return other.node if isinstance(other, Operand) else graph.literal(other)

    def _make(self, op: str, other: Operand | int) -> Operand:
        return Operand(self.graph, self.graph.make(op, self.node, self.lift(self.graph, other)))

    def _turned(self, op: str, other: int) -> Operand:
        return Operand(self.graph, self.graph.make(op, self.graph.literal(other), self.node))

    def __add__(self, other: Operand | int) -> Operand:
        return self._make("add", other)

    def __sub__(self, other: Operand | int) -> Operand:
        return self._make("sub", other)

    def __rsub__(self, other: int) -> Operand:
        return self._turned("sub", other)

    def __mul__(self, other: Operand | int) -> Operand:
        return self._make("mul", other)

    def __rmul__(self, other: int) -> Operand:
        return self._turned("mul", other)

    def __floordiv__(self, other: Operand | int) -> Operand:
        return self._make("floordiv", other)

    def __mod__(self, other: Operand | int) -> Operand:
        return self._make("mod", other)

    def __lt__(self, other: Operand | int) -> Operand:
        return self._make("lt", other)

    def __le__(self, other: Operand | int) -> Operand:
        return self._make("le", other)


@pytest.mark.parametrize(("comparison", "expected"), [
    ("j <= i", "x < i + 1"),
    ("i - j < w", "i + 1 - w <= x"),
    ("eq(j, i)", "i <= x < i + 1"),
    ("3 * j < i", "x < -(-i // 3)"),
    ("i < 2 * j + w", "-((w - i - 1) // 2) <= x"),
    ("abs(i - j) < w", "i + 1 - w <= x < i + w"),
    ("eq(j // p, i // p)", "p * (i // p) <= x < p + p * (i // p)"),
    ("j // p <= 3", "x < 4 * p"),
    ("eq((i - j) % s, 0)", "x == i mod s"),
    ("eq((i - j) % s, w)", "x ~= i - w mod s"),
    ("eq(j % p, p - 1)", "x == p - 1 mod p"),
    ("eq(j // p % s, i // p % s)", "x // p == i // p mod s"),
    ("eq(j % p % s, 0)", "x % p == 0 mod s"),
    ("p - w <= j % p", "p - w <= x % p"),
    ("max(j, w) < i", "x < if not w < i then 0 else i"),
    ("w * j < i", "none"),
    ("j * j < i", "none"),
    ("j < x", "none"),
    ("x < i", "none"),
    ("min(j, 2 * j) < i", "none"),
    ("j % i < 3", "none"),
])  # fmt: skip
def test_solved(comparison: str, expected: str) -> None:
    written = Written()
    found = text_of(solve(Algebra(written.graph), written.read(comparison), "j"))
    assert found == expected


@settings(max_examples=150, deadline=None)
@given(made=graphs("integer"), at=PLACES)
def test_nodes_survive_sympy(made: tuple[Graph, Node], at: list[At]) -> None:
    graph, node = made
    algebra = Algebra(graph)
    back = algebra.node(algebra.expression(node))
    assert all(value(node, one) == value(back, one) for one in at)


@settings(max_examples=300, deadline=None)
@given(made=graphs("comparison", depth=3), at=PLACES, index=st.sampled_from("ij"))
def test_solutions_are_those_of_the_comparison(made: tuple[Graph, Node], at: list[At], index: str) -> None:
    graph, comparison = made
    found = solve(Algebra(graph), comparison, index)
    if found is None:
        return
    for one in at:
        for position in range(one.sizes[index]):
            here = At({**one.positions, index: position}, one.parameters, one.sizes, one.inputs)
            holds = value(comparison, here)
            if isinstance(found, Interval):
                assert inside(found, position, here) == holds
            else:
                congruent = (digit(found.coordinate, position, here) - value(found.phase, here)) % value(
                    found.step, here
                ) == 0
                assert congruent or not holds
                assert holds or not congruent or not found.exact


def digit(coordinate: Coordinate, position: int, at: At) -> int:
    if coordinate.period is None:
        return position
    period = int(value(coordinate.period, at))
    return position // period if coordinate.digit == "high" else position % period


def inside(interval: Interval, position: int, at: At) -> bool:
    here = digit(interval.coordinate, position, at)
    lo = interval.lo is None or value(interval.lo, at) <= here
    return lo and (interval.hi is None or here < value(interval.hi, at))


@settings(max_examples=200, deadline=None)
@given(made=graphs("comparison", depth=3), at=PLACES)
def test_what_is_certain_holds(made: tuple[Graph, Node], at: list[At]) -> None:
    graph, comparison = made
    x, y = comparison.args
    algebra = Algebra(graph)
    for low, high in ((x, y), (y, x)):
        if at_most(algebra, low, high):
            assert all(value(low, one) <= value(high, one) for one in at)


def test_orders_that_domains_rely_on_are_certain() -> None:
    written = Written()
    algebra = Algebra(written.graph)
    for low, high in [("i", "i"), ("i - 3", "i"), ("i // p * p", "i"), ("i - p + 1", "i // p * p"), ("i * 0", "M * 0")]:
        assert at_most(algebra, written.read(low), written.read(high)), f"{low} <= {high}"
    for low, high in [("i", "j"), ("i", "i - 1"), ("i", "i // p * p"), ("w", "M")]:
        assert not at_most(algebra, written.read(low), written.read(high)), f"{low} <= {high}"


@settings(max_examples=200, deadline=None)
@given(made=graphs("integer"), at=PLACES)
def test_values_stay_within_reach(made: tuple[Graph, Node], at: list[At]) -> None:
    low, high = reach(made[1])
    for one in at:
        length = max(one.sizes["i"], one.sizes["j"])
        assert -low * length <= value(made[1], one) <= high * length


@pytest.mark.parametrize(("text", "expected"), [
    ("j", (0, 1)),
    ("i - j", (1, 1)),
    ("i - j + M", (1, 2)),
    ("2 * j", (0, 2)),
    ("-3 * j + 1", (3, 1)),
    ("j // p", (0, 1)),
    ("j % p", (0, 1)),
    ("abs(i - j)", (0, 1)),
    ("max(min(j, w), 0)", (0, 1)),
])  # fmt: skip
def test_reach_is_tight_where_lists_are_read(text: str, expected: tuple[int, int]) -> None:
    assert reach(Written().read(text)) == expected


def test_random_comparisons_hold_what_the_algebra_has_rules_for() -> None:
    seen: set[str] = set()

    @settings(max_examples=100, deadline=None, database=None)
    @given(st.composite(lambda draw: Maker(draw).comparison(3))())
    def collect(node: Node) -> None:
        stack = [node]
        while stack:
            one = stack.pop()
            seen.add(one.op)
            stack.extend(one.args)

    collect()
    assert {"add", "sub", "mul", "neg", "floordiv", "mod", "minimum", "maximum", "abs", "lt", "le", "eq"} <= seen

"""Conditions as disjunctions of conjunctions: the same pairs, whatever the form."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from attnc.compiler.conditions import CONJUNCTIONS, disjunction, negate, split_absolute, split_unequal
from attnc.compiler.describe import formula
from attnc.compiler.ir import Graph, Node
from attnc.dsl.types import Base, Type
from tests.compiler.graphs import At, graphs, places, value

PLACES = st.lists(places(), min_size=6, max_size=10)


def holds(conjunctions: list[tuple[Node, ...]], at: At) -> bool:
    return any(all(value(atom, at) for atom in conjunction) for conjunction in conjunctions)


@settings(max_examples=200, deadline=None)
@given(made=graphs("boolean", depth=5), at=PLACES)
def test_a_disjunction_means_the_condition(made: tuple[Graph, Node], at: list[At]) -> None:
    graph, condition = made
    conjunctions = disjunction(graph, condition)
    assert len(conjunctions) <= CONJUNCTIONS
    assert all(holds(conjunctions, one) == value(condition, one) for one in at)


@settings(max_examples=200, deadline=None)
@given(made=graphs("boolean", depth=4), at=PLACES)
def test_a_negation_is_the_opposite(made: tuple[Graph, Node], at: list[At]) -> None:
    graph, condition = made
    negated = negate(graph, condition)
    assert all(value(negated, one) != value(condition, one) for one in at)


@settings(max_examples=200, deadline=None)
@given(made=graphs("comparison", depth=3), at=PLACES)
def test_parts_of_a_comparison_are_all_of_it(made: tuple[Graph, Node], at: list[At]) -> None:
    graph, comparison = made
    unequal = graph.make("not", comparison)
    for atom in (comparison, negate(graph, unequal), negate(graph, comparison)):
        sides = split_unequal(graph, atom)
        if sides is not None:
            assert all(any(value(side, one) for side in sides) == value(atom, one) for one in at)
        both = split_absolute(graph, atom)
        if both is not None:
            assert all(value(both, one) == value(atom, one) for one in at)


class Atoms:
    def __init__(self) -> None:
        self.graph = Graph()
        self.i, self.j = self.graph.index("i"), self.graph.index("j")
        self.w = self.graph.make("parameter", type=Type(Base.INT), attribute="w")
        self.distance = self.graph.make("abs", self.graph.make("sub", self.i, self.j))

    def flag(self, number: int) -> Node:
        return self.graph.make("parameter", type=Type(Base.BOOL), attribute=f"f{number}")

    def written(self, condition: Node) -> list[list[str]]:
        return [[formula(atom) for atom in one] for one in disjunction(self.graph, condition)]


def test_true_is_one_empty_conjunction_and_false_none() -> None:
    atoms = Atoms()
    assert atoms.written(atoms.graph.literal(True)) == [[]]
    assert atoms.written(atoms.graph.literal(False)) == []


def test_an_absolute_value_becomes_two_inequalities() -> None:
    atoms = Atoms()
    assert atoms.written(atoms.graph.make("le", atoms.distance, atoms.w)) == [["i - j <= w", "-(i - j) <= w"]]


def test_an_absolute_value_of_a_real_stays() -> None:
    atoms = Atoms()
    graph = atoms.graph
    real = graph.make("abs", graph.make("to_real", atoms.i))
    assert split_absolute(graph, graph.make("le", real, graph.literal(2.0))) is None


def test_far_is_on_either_side() -> None:
    atoms = Atoms()
    sides = split_unequal(atoms.graph, atoms.graph.make("lt", atoms.w, atoms.distance))
    assert sides is not None
    assert [formula(side) for side in sides] == ["w < i - j", "w < -(i - j)"]


def test_what_another_conjunction_covers_is_dropped() -> None:
    atoms = Atoms()
    one, two = atoms.flag(1), atoms.flag(2)
    covered = atoms.graph.make("or", one, atoms.graph.make("and", one, two))
    assert atoms.written(covered) == [["f1"]]


def test_a_condition_that_grows_too_far_is_one_atom() -> None:
    """(a1 or b1) and .. and (a6 or b6) has 64 conjunctions."""
    atoms = Atoms()
    pairs = [atoms.graph.make("or", atoms.flag(2 * n), atoms.flag(2 * n + 1)) for n in range(6)]
    assert len(disjunction(atoms.graph, atoms.graph.all_of(pairs[:5]))) == CONJUNCTIONS
    whole = atoms.graph.all_of(pairs)
    assert disjunction(atoms.graph, whole) == [(whole,)]

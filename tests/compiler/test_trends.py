"""What is said to grow with an index does, at every pair of positions."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnc.compiler.ir import Graph, Node
from attnc.compiler.pipeline import lower, transpose
from attnc.compiler.trends import DOWN, LEVEL, UP, trend
from tests.compiler.graphs import At, graphs, places, value
from tests.compiler.pairs import example


@settings(max_examples=300, deadline=None)
@given(made=graphs("integer"), at=places(), index=st.sampled_from("ij"))
def test_a_trend_holds(made: tuple[Graph, Node], at: At, index: str) -> None:
    way = trend(made[1], index)
    if way is None:
        return
    values = [value(made[1], At({**at.positions, index: n}, at.parameters, at.sizes, at.inputs)) for n in range(12)]
    for one, other in pairwise(values):
        assert one * way <= other * way
        assert way != LEVEL or one == other


@pytest.mark.parametrize(
    ("name", "ways"), [("causal", (LEVEL, UP)), ("sliding_window", (UP, UP)), ("bigbird", (UP, UP))]
)
def test_bounds_move_one_way(name: str, ways: tuple[int, int]) -> None:
    """What saves the reductions is found where it matters."""
    outer = lower(example(name)).branches[0].domain.key_sets[0].runs[0].outer
    assert (trend(outer.lo, "i"), trend(outer.hi, "i")) == ways


def test_what_turns_or_is_looked_up_has_no_trend() -> None:
    graph = Graph()
    i = graph.index("i")
    assert trend(graph.make("mod", i, graph.literal(4)), "i") is None
    assert trend(graph.make("sub", i, graph.make("floordiv", i, graph.literal(2))), "i") is None
    assert trend(graph.make("mul", i, graph.literal(-2)), "i") == DOWN
    documents = lower(example("documents")).branches[0].domain.key_sets[0].runs[0].outer
    assert trend(documents.lo, "i") is None
    strided = transpose(lower(example("strided"))).branches[0].transposed[1].key_sets[0].runs[0].outer
    assert trend(strided.hi, "j") is None

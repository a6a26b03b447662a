"""What the compiler makes of every example, stage by stage, as reviewed text."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from attnc.compiler.ir import Graph, text, uses, walk
from attnc.compiler.pipeline import Stage, lower, trace
from attnc.compiler.plan import Diagonals, Grid, Listed, Plan, Stepped
from tests.compiler.pairs import EXAMPLES, example, names, pattern_of

STAGES = ("simplify", "steps", "domains", "transposed domains")


def shown(stage: Stage) -> str:
    notes = "".join(f"note: {note}\n" for note in stage.notes)
    return f"== {stage.name}\n{stage.text}\n{notes}"


@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("*.attn")))
def test_trace(name: str, golden: Callable[[str], None]) -> None:
    golden("\n".join(shown(stage) for stage in trace(example(name)) if stage.name in STAGES))


def walks(plan: Plan) -> list[list[type | None]]:
    return [
        [None if one.walk is None else type(one.walk) for one in branch.domain.key_sets] for branch in plan.branches
    ]


@pytest.mark.parametrize(("name", "expected"), [
    ("causal", [None]),
    ("sliding_window", [None]),
    ("longformer", [None]),
    ("documents", [None]),
    ("dilated_window", [Stepped]),
    ("strided", [None, Stepped]),
    ("sparse_fixed", [None, Grid]),
    ("neighborhood", [Grid]),
    ("swin", [Grid]),
    ("vertical_slash", [Listed, Diagonals]),
    ("bigbird", [None, Listed]),
])  # fmt: skip
def test_structure_that_is_written_is_found(name: str, expected: list[type | None]) -> None:
    """No example of a sparse pattern is left to a mask over all keys."""
    plan = lower(example(name))
    assert walks(plan) == [expected]
    assert plan.branches[0].domain.notes == ()


@pytest.mark.parametrize("name", names())
def test_compiling_again_gives_the_same_text(name: str) -> None:
    assert [shown(stage) for stage in trace(example(name))] == [shown(stage) for stage in trace(example(name))]


def test_what_could_not_be_solved_is_said_with_its_place() -> None:
    plan = lower(pattern_of("pattern p:\n    out = softmax[j](q @ k where i * j <= 9 and j <= i) @ v\n"))
    assert plan.branches[0].domain.notes == (
        "a condition (p.attn:2: `i * j <= 9`) could not be solved for j: every tile it may touch evaluates it",
    )


def test_equal_values_are_one_node() -> None:
    graph = Graph()
    i = graph.index("i")
    assert graph.make("mul", i, i) is graph.make("mul", i, i)
    assert graph.literal(1) is not graph.literal(True)
    assert graph.literal(1) is not graph.literal(1.0)
    assert graph.make("add", i, graph.literal(1)) is not graph.make("sub", i, graph.literal(1))


def test_a_node_used_twice_by_one_has_two_edges() -> None:
    graph = Graph()
    i = graph.index("i")
    square = graph.make("mul", i, i)
    assert sorted(uses(square).edges(keys=True), key=lambda edge: edge[2]) == [(i, square, 0), (i, square, 1)]
    assert list(walk(square)) == [i, square]
    assert text(graph.make("add", square, square)) == "%0: int[i] = mul(i, i)\n%1: int[i] = add(%0, %0)\nreturn %1"

"""What a cache keeps, against all pairs at small sizes: a key is dropped only when no later query sees it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

import attnc
from attnc.compiler.cache_plan import cache_of, describe_cache
from attnc.compiler.causality import leaks
from attnc.compiler.composition import Attend
from attnc.compiler.plan import Plan
from attnc.compiler.retention import Every, Retention, counted, retained
from attnc.dsl.diagnostics import AttnError
from attnc.runtime.call import make_call
from attnc.runtime.decoding.slots import Class, Slots
from attnc.runtime.pattern import CompiledPattern
from attnc.runtime.tools.comparison import defaults
from attnc.runtime.tools.inputs import Shape, made_inputs
from tests.compiler.pairs import Pairs

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.attn"))
LENGTH = 23
SMALL = {
    "window": 5,
    "sinks": 2,
    "block": 6,
    "summary": 2,
    "local": 4,
    "stride": 5,
    "dilation": 3,
    "size": 10,
    "segment": 7,
    "page": 5,
    "top": 2,
    "horizon": 64,
    "height": 5,
    "width": 5,
}


@cache
def pattern_of(name: str) -> CompiledPattern:
    path = next(path for path in EXAMPLES if path.stem == name)
    found: CompiledPattern = getattr(attnc.load(path), name)
    return found


def decodable() -> list[str]:
    """Examples that are causal whatever their parameters."""
    return [path.stem for path in EXAMPLES if not leaks(pattern_of(path.stem).pattern)]


def parameters_of(pattern: CompiledPattern) -> dict[str, int]:
    names = {p.name for p in pattern.program.parameters}
    return {name: value for name, value in SMALL.items() if name in names}


def live(pattern: CompiledPattern, plan: Plan, parameters: Mapping[str, object]) -> Tensor:
    """(N, M): whether some branch, row of the batch or head sees the pair."""
    shape = Shape(2, 2, 2, LENGTH, LENGTH, 4, 4)
    values = {**defaults(pattern), **parameters, "scale": 1.0}
    made = made_inputs(pattern.pattern, shape, values)
    sizes = {"b": 2, "h": 2, "i": LENGTH, "j": LENGTH, "t": LENGTH}
    arrays = {
        entry.name: made.inputs[entry.name]
        if entry.name in made.inputs
        else torch.zeros([sizes.get(axis, 3) for axis in entry.axes])
        for entry in plan.inputs
    }
    call = make_call(plan, made.q, made.k, torch.zeros(2, 2, LENGTH, 4), values, arrays)  # type: ignore[arg-type]
    seen = torch.zeros(LENGTH, LENGTH, dtype=torch.bool)
    for branch in plan.branches:
        pairs = Pairs(plan, replace(branch, domain=branch.domain), call)
        seen |= pairs.value(branch.condition).expand(pairs.shape).flatten(0, 1).any(0)
    return seen


def steps_over_keys(pattern: CompiledPattern) -> list[Attend]:
    return [step for step in pattern.program.composition.steps if isinstance(step, Attend) and step.keys == "j"]


def dropped_too_early(seen: Tensor, slots: Slots) -> list[tuple[int, int]]:
    """(query, key) pairs that are live though the key's place held another one, or nothing, when the query came."""
    found = []
    for query in range(LENGTH):
        kept = set(slots.positions(torch.tensor([query + 1]), slots.count)[0].tolist())
        found += [(query, key) for key in range(query + 1) if seen[query, key] and key not in kept]
    return found


@pytest.mark.parametrize("name", decodable())
def test_no_key_is_dropped_that_a_later_query_sees(name: str) -> None:
    pattern = pattern_of(name)
    graph = pattern.program.composition.graph
    assert graph is not None
    parameters = parameters_of(pattern)
    values = {**defaults(pattern), **parameters}
    for step in steps_over_keys(pattern):
        retention = retained(graph, [branch.condition for branch in step.plan.branches])
        slots = Slots.of(retention, values, LENGTH)  # type: ignore[arg-type]
        if slots.everything:
            continue
        seen = live(pattern, step.plan, parameters)
        assert seen.any()
        assert dropped_too_early(seen, slots) == []


@pytest.mark.parametrize(
    "name", ["streaming", "sliding_window", "block_local", "strided", "sparse_fixed", "demo_hybrid"]
)
def test_one_place_less_would_drop_a_live_key(name: str) -> None:
    """The closed forms keep no more than they must: a ring that is one shorter is too short."""
    pattern = pattern_of(name)
    graph = pattern.program.composition.graph
    assert graph is not None
    parameters = parameters_of(pattern)
    (step,) = steps_over_keys(pattern)
    retention = retained(graph, [branch.condition for branch in step.plan.branches])
    slots = Slots.of(retention, parameters, LENGTH)
    assert not slots.everything
    seen = live(pattern, step.plan, parameters)
    assert dropped_too_early(seen, replace(slots, window=slots.window - 1))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("streaming", ["the last window", "the first sinks"]),
        ("block_local", ["the last block"]),
        ("dilated_window", ["the last dilation * window"]),
        ("causal", ["everything"]),
        ("duo", ["everything"]),
    ],
)
def test_what_is_kept_in_words(name: str, words: list[str]) -> None:
    composition = pattern_of(name).program.composition
    assert composition.graph is not None
    assert composition.attention is not None
    branches = composition.attention.plan.branches
    assert list(counted(retained(composition.graph, [one.condition for one in branches]))) == words


def test_the_reason_for_everything_is_the_text() -> None:
    composition = pattern_of("duo").program.composition
    plan = cache_of(pattern_of("duo").pattern, composition)
    assert "    - nothing ends how long a key is seen where j <= i and dense[h] == 1" in describe_cache(plan)


# Places


@pytest.mark.parametrize(
    "slots",
    [
        Slots(40, everything=True),
        Slots(40, False, 0, 1),
        Slots(40, False, 3, 7),
        Slots(40, False, 9, 4, (Class(5, 4, 5),)),
        Slots(40, False, 0, 6, (Class(6, 4, 6),)),
        Slots(40, False, 2, 5, (Class(4, 0, 1), Class(6, 3, 5))),
    ],
    ids=str,
)
def test_a_place_holds_the_last_position_that_has_it(slots: Slots) -> None:
    """Written one by one, the places hold what the closed form says, and none is held twice.

    A place of the ring whose turn came for a position of a class still holds an older one; that one is said to be gone.
    """
    held = [-1] * slots.count
    for tokens in range(slots.length + 1):
        found = slots.positions(torch.tensor([tokens]), slots.count)[0].tolist()
        for said, there in zip(found, held, strict=True):
            assert said == there or (said == -1 and there < tokens - slots.window)
        assert slots.used(tokens) <= slots.count
        assert all(position < 0 for position in found[slots.used(tokens) :])
        if tokens < slots.length:
            held[int(slots.place(torch.tensor(tokens)))] = tokens


def test_places_are_no_more_than_tokens() -> None:
    graph = pattern_of("streaming").program.composition.graph
    assert graph is not None
    five = graph.literal(5)
    retention = Retention(window=five, first=five, every=(Every(five, graph.literal(0), graph.literal(1)),))
    assert Slots.of(retention, {}, 12).everything
    assert Slots.of(retention, {}, 20).count == 14


# What cannot be decoded


@pytest.mark.parametrize(
    ("text", "place", "reason"),
    [
        ("out = softmax[j](q @ k * scale) @ v", "softmax[j](q @ k * scale)", "nothing keeps j at or before the query"),
        ("out = softmax[j](q @ k * scale where j <= i and j < M - 3) @ v", "M", "the length of the sequence"),
        (
            "axis s = blocks(j, 4)\n    kc = mean[j in s](k)\n    vc = mean[j in s](v)\n"
            "    out = softmax[s](q @ kc * scale where s.stop <= i + 1) @ vc",
            "s.stop",
            "the last block ends with the sequence",
        ),
    ],
)
def test_refusals_are_located(text: str, place: str, reason: str) -> None:
    pattern = attnc.compile(f"pattern p:\n    {text}\n").p
    with pytest.raises(AttnError) as refused:
        pattern.cache(10)
    (diagnostic,) = refused.value.diagnostics
    assert diagnostic.code == "decoding"
    assert diagnostic.span.text == place
    assert reason in diagnostic.message


def test_a_lag_is_causal_for_the_values_it_is_given() -> None:
    pattern = pattern_of("half_and_half")
    with pytest.raises(AttnError, match="later tokens"):
        pattern.cache(10, window=-1)
    assert pattern.cache(10, window=0).plan.states

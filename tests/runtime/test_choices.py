"""Choices of members against brute force, row by row."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnc.runtime.steps.choices import choose_argmax, choose_mass, choose_threshold, choose_topk, listed, marked

# Few values, so that ties are common.
VALUES = st.sampled_from([-math.inf, -1.5, -0.0, 0.0, 0.25, 1.0, 3.0, math.inf, math.nan])
SHARES = st.sampled_from([0.0, 0.125, 0.25, 0.5, 1.0])


@st.composite
def ballots(draw: st.DrawFn, values: st.SearchStrategy[float] = VALUES) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, candidates and forced members (rows, members)."""
    rows, members = draw(st.integers(1, 3)), draw(st.integers(0, 6))
    size = rows * members
    scores = draw(st.lists(values, min_size=size, max_size=size))
    flags = st.lists(st.booleans(), min_size=size, max_size=size)
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    table = torch.tensor(scores, dtype=dtype).view(rows, members)
    allowed, forced = (torch.tensor(draw(flags), dtype=torch.bool).view(rows, members) for _ in range(2))
    return table, allowed, forced


def order(score: list[float], allowed: list[bool], forced: list[bool]) -> list[int]:
    """Candidates in the order of choice."""
    places = [place for place, candidate in enumerate(allowed) if candidate]
    worth = [-math.inf if math.isnan(value) else value for value in score]
    return sorted(places, key=lambda place: (not forced[place], -worth[place], place))


def rows(scores: Tensor, allowed: Tensor, forced: Tensor) -> list[tuple[list[float], list[bool], list[bool]]]:
    return list(zip(scores.tolist(), allowed.tolist(), forced.tolist(), strict=True))


def sets(members: Tensor) -> list[list[int]]:
    """Lists without their padding; checks that they ascend and are padded at the end."""
    assert members.dtype == torch.int32
    found = []
    for line in members.tolist():
        taken = [entry for entry in line if entry >= 0]
        assert line == sorted(taken) + [-1] * (len(line) - len(taken))
        assert len(set(taken)) == len(taken)
        found.append(taken)
    return found


@settings(deadline=None)
@given(ballots(), st.integers(-1, 8))
def test_topk_takes_forced_members_then_the_best(ballot: tuple[Tensor, Tensor, Tensor], count: int) -> None:
    scores, allowed, forced = ballot
    expected = [sorted(order(*row)[: max(count, 0)]) for row in rows(scores, allowed, forced)]
    members = choose_topk(scores, count, allowed, forced)
    assert members.shape[-1] == min(max(count, 0), scores.shape[-1])
    assert sets(members) == expected


@settings(deadline=None)
@given(ballots(), st.lists(st.integers(-1, 8), min_size=3, max_size=3))
def test_topk_with_a_count_for_each_row(ballot: tuple[Tensor, Tensor, Tensor], counts: list[int]) -> None:
    scores, allowed, forced = ballot
    wanted = torch.tensor(counts[: len(scores)])
    found = sets(choose_topk(scores, wanted, allowed, forced))
    for row, count, taken in zip(rows(scores, allowed, forced), counts, found, strict=False):
        assert taken == sorted(order(*row)[: max(count, 0)])


@settings(deadline=None)
@given(ballots(), VALUES)
def test_threshold_takes_what_reaches_it_and_forced_members(
    ballot: tuple[Tensor, Tensor, Tensor], bound: float
) -> None:
    scores, allowed, forced = ballot
    expected = [
        [n for n, value in enumerate(score) if candidate[n] and (value >= bound or must[n])]
        for score, candidate, must in rows(scores, allowed, forced)
    ]
    members = choose_threshold(scores, bound, allowed, forced)
    assert sets(members) == expected
    assert members.shape[-1] == max(len(line) for line in expected)


@settings(deadline=None)
@given(ballots(st.sampled_from([0.0, 0.25, 0.5, 1.0, 4.0, math.nan])), SHARES)
def test_mass_takes_the_shortest_prefix_that_covers_the_share(
    ballot: tuple[Tensor, Tensor, Tensor], share: float
) -> None:
    scores, allowed, forced = ballot
    for row, taken in zip(
        rows(scores, allowed, forced), sets(choose_mass(scores, share, allowed, forced)), strict=True
    ):
        ranked = order(*row)
        worth = [0.0 if math.isnan(value) else value for value in row[0]]
        total = sum(worth[place] for place in ranked)
        prefix = next(n for n in range(len(ranked) + 1) if sum(worth[p] for p in ranked[:n]) >= share * total)
        must = [place for place in ranked if row[2][place]]
        assert taken == sorted({*ranked[:prefix], *must})


@settings(deadline=None)
@given(ballots())
def test_argmax_is_the_lowest_of_the_best(ballot: tuple[Tensor, Tensor, Tensor]) -> None:
    scores, allowed, _ = ballot
    nothing = torch.zeros_like(allowed)
    expected = [(order(*row) or [-1])[0] for row in rows(scores, allowed, nothing)]
    assert choose_argmax(scores, allowed).tolist() == expected


@settings(deadline=None)
@given(ballots())
def test_lists_and_masks_turn_into_each_other(ballot: tuple[Tensor, Tensor, Tensor]) -> None:
    _, mask, _ = ballot
    assert torch.equal(marked(listed(mask), mask.shape[-1]), mask)


def test_a_choice_has_no_gradient() -> None:
    scores = torch.randn(2, 5, requires_grad=True)
    allowed = torch.ones(5, dtype=torch.bool)
    assert not choose_topk(scores, 2, allowed).requires_grad
    assert not choose_argmax(scores, allowed).requires_grad


@pytest.mark.parametrize("heads", [1, 3])
def test_flags_broadcast_against_scores(heads: int) -> None:
    scores = torch.tensor([[0.0, 2.0, 1.0], [3.0, 2.0, 1.0], [0.0, 0.0, 5.0]])[:heads]
    members = choose_topk(scores, 2, torch.tensor([True, True, False]), torch.tensor([True, False, False]))
    assert members.tolist() == [[0, 1]] * heads

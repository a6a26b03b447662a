"""The kernels that choose among few members and put first who takes part, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attnc.runtime.arrangement import placed
from attnc.runtime.choices import mask_topk
from attnc.runtime.launch_ordering import CHUNK, FEW, choose_few, few, place_live

SHAPES = ((1,), (3, 5), (2, 3, 17), (4, 2, 3, 16), (7, FEW))


def drawn(shape: tuple[int, ...], seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scores with ties, NaN and infinities, counts, candidates and forced members."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(-3, 3, shape, generator=generator).float()
    odd = torch.rand(shape, generator=generator)
    scores = torch.where(odd < 0.1, torch.nan, torch.where(odd < 0.2, -torch.inf, torch.where(odd < 0.25, -0.0, scores)))
    count = torch.randint(-1, shape[-1] + 2, shape[:-1], generator=generator)
    allowed, forced = (torch.rand(shape, generator=generator) < share for share in (0.8, 0.3))
    return scores, count, allowed, forced


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("forcing", [False, True])
def test_few_members_are_chosen_as_by_a_sort(shape: tuple[int, ...], forcing: bool) -> None:
    scores, count, allowed, forced = drawn(shape)
    held = forced if forcing else None
    assert few(scores)
    assert torch.equal(choose_few(scores, count, allowed, held), mask_topk(scores, count, allowed, held))


def test_operands_of_any_strides() -> None:
    scores, _, allowed, _ = drawn((6, 5, 4))
    turned = scores.permute(2, 1, 0)
    count = torch.tensor(2).expand(4, 5)
    assert torch.equal(
        choose_few(turned, count, allowed[:1, :, :1].expand(4, 5, 6), None),
        mask_topk(turned, count, allowed[:1, :, :1].expand(4, 5, 6)),
    )


def test_many_members_are_left_to_a_sort() -> None:
    assert not few(torch.zeros(2, FEW + 1))
    assert not few(torch.zeros(0, 4))
    assert not few(torch.zeros(2, 4, dtype=torch.float64))


@pytest.mark.parametrize("length", [0, 1, 5, CHUNK, 2 * CHUNK + 7])
@pytest.mark.parametrize("dead", [0.0, 0.6, 1.0])
def test_who_takes_part_comes_first(length: int, dead: float) -> None:
    live = torch.rand(2, length, 3, generator=torch.Generator().manual_seed(1)).movedim(2, 1) >= dead
    places, count = place_live(live)
    expected = placed(None, live)
    assert torch.equal(places.to(torch.int64), expected.places)
    assert torch.equal(count.to(torch.int64), expected.count)

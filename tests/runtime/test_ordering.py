"""The kernels that choose among few members and put first who takes part, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attnc.runtime.cuda.launch_ordering import CHUNK, FEW, choose_few, few, order_rows, place_live, weigh_few
from attnc.runtime.steps.arrangement import Placement, placed
from attnc.runtime.steps.choices import mask_topk

SHAPES = ((1,), (3, 5), (2, 3, 17), (4, 2, 3, 16), (7, FEW))


def drawn(shape: tuple[int, ...], seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scores with ties, NaN and infinities, counts, candidates and forced members."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(-3, 3, shape, generator=generator).float()
    odd = torch.rand(shape, generator=generator)
    scores = torch.where(
        odd < 0.1, torch.nan, torch.where(odd < 0.2, -torch.inf, torch.where(odd < 0.25, -0.0, scores))
    )
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
    assert torch.equal(places, expected.places)
    assert torch.equal(count, expected.count)
    assert torch.equal(Placement(places, count).slots, expected.slots)


def exact_weights(scores: Tensor, allowed: Tensor) -> Tensor:
    """By torch, from the definition; 0 where no candidate has more than -inf."""
    live = scores.masked_fill(~allowed, -torch.inf)
    top = live.detach().amax(-1, keepdim=True)
    weights = (live - torch.where(top == -torch.inf, 0, top)).exp()
    total = weights.sum(-1, keepdim=True)
    return weights / torch.where(total == 0, 1, total)


@pytest.mark.parametrize("shape", SHAPES)
def test_weights_of_few_members_and_their_gradient(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(2)
    scores = torch.randn(shape, generator=generator)
    scores = torch.where(torch.rand(shape, generator=generator) < 0.2, -torch.inf, scores).requires_grad_()
    allowed = torch.rand(shape, generator=generator) < 0.6
    cotangent = torch.randn(shape, generator=generator).movedim(-1, 0).contiguous().movedim(0, -1)
    (gradient,) = torch.autograd.grad(weigh_few(scores, allowed), scores, cotangent)
    exact = scores.detach().double().requires_grad_()
    made = exact_weights(exact, allowed)
    assert torch.allclose(weigh_few(scores, allowed).double(), made, atol=1e-6)
    finite = torch.where(scores == -torch.inf, -1e3, exact.detach()).requires_grad_()  # no NaN in torch's own chain
    (expected,) = torch.autograd.grad(
        exact_weights(finite, allowed & (scores > -torch.inf)), finite, cotangent.double()
    )
    assert torch.allclose(gradient.double(), expected, atol=1e-6)


@pytest.mark.parametrize(("length", "heads"), [(1, 1), (5, 3), (130, 2), (300, 4)])
@pytest.mark.parametrize("dead", [0.0, 0.7, 1.0])
def test_rows_in_their_order(length: int, heads: int, dead: float) -> None:
    live = torch.rand(2, heads, length, generator=torch.Generator().manual_seed(3)) >= dead
    order = placed(None, live)
    q, do = torch.randn(2, length, heads, 5).transpose(1, 2), torch.randn(2, heads, length, 3)
    lse, delta = torch.randn(2, heads, length), torch.randn(2, heads, length)
    places = order.places.transpose(1, 2).contiguous().transpose(1, 2)
    count = order.count
    made = order_rows(places, count, q, do, lse, delta)
    for batch in range(2):
        for head in range(heads):
            taken = int(count[batch, head])
            rest = slice(taken, min(-(-taken // 128) * 128, length))
            for one, given in zip(made, (q, do, lse, delta), strict=True):
                expected = given[batch, head][order.places[batch, head, :taken]]
                assert torch.equal(one[batch, head, :taken], expected)
            assert not made[0][batch, head, rest].any()
            assert not made[1][batch, head, rest].any()
            assert (made[2][batch, head, rest] == torch.inf).all()

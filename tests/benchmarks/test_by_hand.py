"""Hybrids written by hand against the reference, put together from dense torch where a GPU has libraries."""

import time
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from attnc.runtime.tolerance import error
from benchmarks.by_hand import HYBRIDS, TILE, F
from benchmarks.ready import UnavailableError, within
from benchmarks.suites import hybrids, routing
from benchmarks.work import Mask, Problem, Work


class Plain:
    """What `benchmarks.by_hand` is put together from, by dense torch."""

    def glue(self, function: F) -> F:
        return function

    def masked(self, mask: Mask, problem: Problem) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        rows, keys = (-(-one.shape[2] // TILE) for one in (problem.q, problem.k))
        return partial(self.chosen, mask, torch.ones(1, 1, rows, keys, dtype=torch.bool))

    def selected(self, q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, width: int) -> Tensor:
        q, k, v = (one.transpose(1, 2) for one in (q, k, v))
        number, group = torch.arange(k.shape[2]) // width, q.shape[1] // k.shape[1]
        picked = (blocks.transpose(1, 2).unsqueeze(-1) == number).any(3).repeat_interleave(group, 1)
        live = picked & (torch.arange(k.shape[2]) <= torch.arange(q.shape[2])[:, None])
        return self.softmax(live, q, k, v).transpose(1, 2)

    def chosen(self, mask: Mask, touched: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        b, h, i, j = (torch.arange(size) for size in (*q.shape[:3], k.shape[2]))
        live = mask(b[:, None, None, None], h[:, None, None], i[:, None], j)
        whole = touched.repeat_interleave(TILE, 2).repeat_interleave(TILE, 3)[:, :, : len(i), : len(j)]
        assert bool((whole | ~live).all())
        return self.softmax(live, q, k, v)

    def softmax(self, live: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        score = q @ k.mT * float(q.shape[-1] ** -0.5)
        return score.masked_fill(~live, float("-inf")).softmax(-1) @ v

    def linear(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = (q.transpose(1, 2) @ k.transpose(1, 2).mT).tril()
        return (weights / weights.sum(-1, keepdim=True) @ v.transpose(1, 2)).transpose(1, 2)

    def gated(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float) -> Tensor:
        sums = g.transpose(1, 2).cumsum(-1)
        decay = (sums[..., :, None] - sums[..., None, :]).tril().exp()
        weights = (q.transpose(1, 2) @ k.transpose(1, 2).mT * scale * decay).tril()
        return (weights @ v.transpose(1, 2)).transpose(1, 2)


WORKS = [work for suite in (hybrids, routing) for work in suite.works("cpu") if "by_hand" in work.peers]


@pytest.mark.parametrize("work", WORKS, ids=lambda work: work.name)
def test_a_hybrid_by_hand_is_the_pattern(work: Work) -> None:
    problem = Problem(work, work.small, "cpu", torch.float64)
    expected = problem.pattern.reference(problem.q, problem.k, problem.v, **problem.settings)
    assert error(HYBRIDS[work.pattern](problem, Plain())(), expected) <= 1e-6  # inside, float32


def test_a_peer_that_takes_too_long_is_left() -> None:
    with pytest.raises(UnavailableError, match=r"not ready within 0.1 s"), within(0.1):
        time.sleep(5)

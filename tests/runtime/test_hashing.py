"""The hash behind `uniform`, and the random projection that is made from it."""

from __future__ import annotations

import math

import pytest
import torch

from attnc.runtime.compute.gaussian import orthogonal_gaussian
from attnc.runtime.compute.hashing import mix, uniform


def plain_uniform(*words: int) -> float:
    """The documented formula in Python's own integers."""
    state = 0
    for word in words:
        h = ((state ^ (word % 2**32)) + 0x9E3779B9) % 2**32
        h ^= h >> 16
        h = h * 0x85EBCA6B % 2**32
        h ^= h >> 13
        h = h * 0xC2B2AE35 % 2**32
        state = h ^ (h >> 16)
    return (state >> 8) / 2**24


def test_mix_is_the_published_finaliser() -> None:
    # fmix32(1) of MurmurHash3, a value quoted in many places.
    assert mix(torch.tensor(1)).item() == 0x514E28B7


@pytest.mark.parametrize("words", [(0,), (0, 0), (1, 2, 3), (2**40 + 5, -1, 77), (-(2**63), 2**63 - 1)])
def test_uniform_equals_the_documented_formula(words: tuple[int, ...]) -> None:
    assert uniform([torch.tensor(word) for word in words]).item() == plain_uniform(*words)


def test_uniform_broadcasts_and_fills_the_unit_interval() -> None:
    values = uniform([torch.tensor(3), torch.arange(200)[:, None], torch.arange(100)[None, :]])
    assert values.shape == (200, 100)
    assert values.min() >= 0
    assert values.max() < 1
    assert abs(values.mean() - 0.5) < 0.01
    counts = torch.histc(values, bins=10, min=0, max=1)
    assert (counts - 2000).abs().max() < 5 * math.sqrt(2000)
    assert abs(torch.corrcoef(torch.stack([values[:-1].flatten(), values[1:].flatten()]))[0, 1]) < 0.03


def test_projection_has_orthogonal_rows_with_gaussian_norms() -> None:
    w = orthogonal_gaussian(20, 8, 3)
    assert w.shape == (20, 8)
    for rows in (w[:8], w[8:16], w[16:]):
        gram = rows @ rows.T
        torch.testing.assert_close(gram, torch.diag(gram.diagonal()), atol=1e-12, rtol=0)
    many = orthogonal_gaussian(4000, 8, 1)
    assert abs((many**2).sum(1).mean() - 8) < 0.3  # chi-square with 8 degrees of freedom
    assert abs(many.mean()) < 0.02


def test_projection_estimates_the_softmax_kernel_without_bias() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(8, generator=generator, dtype=torch.float64) * 0.4 for _ in range(2))
    w = orthogonal_gaussian(20000, 8, 5)
    estimate = (torch.exp(w @ x - x @ x / 2) * torch.exp(w @ y - y @ y / 2)).mean()
    torch.testing.assert_close(estimate, torch.exp(x @ y), rtol=0.03, atol=0)


def test_projection_repeats_by_seed_and_is_a_fresh_tensor() -> None:
    first = orthogonal_gaussian(6, 4, 1)
    kept = first.clone()
    first.zero_()
    assert torch.equal(orthogonal_gaussian(6, 4, 1), kept)
    assert not torch.equal(orthogonal_gaussian(6, 4, 2), kept)
    assert orthogonal_gaussian(0, 4).shape == (0, 4)
    assert orthogonal_gaussian(6, 4, 1, dtype=torch.float32).dtype is torch.float32


def test_projection_refuses_impossible_sizes() -> None:
    with pytest.raises(ValueError, match="width >= 1"):
        orthogonal_gaussian(3, 0)

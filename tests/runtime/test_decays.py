"""Decays near 0 and near 1, for one token and for many, against a float64 recurrence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import attnc
from attnc.runtime.tolerance import error, tolerance
from tests.runtime.decays import PATTERNS, STRENGTHS, Call, call, recurrences

EXAMPLES = Path(__file__).parents[2] / "examples"


def off(one: Call, expected: torch.Tensor, device: str, dtype: torch.dtype) -> float:
    """The error of a pattern's call as a share of what is allowed."""
    pattern = getattr(attnc.load(EXAMPLES / f"{one.pattern}.attn"), one.pattern)
    given: dict[str, Any] = {
        name: tensor.to(device, dtype if name in ("q", "k", "v") else torch.float32)
        for name, tensor in one.tensors.items()
    }
    q, k, v = (given.pop(name) for name in "qkv")
    found = pattern(q, k, v, **given)
    return error(found, expected.cpu()) / tolerance(dtype, q.shape[2])


@pytest.mark.parametrize("tokens", [1, 63, 1000])
@pytest.mark.parametrize("strength", STRENGTHS)
def test_decays(strength: str, tokens: int) -> None:
    calls = [call(pattern, strength, tokens) for pattern in PATTERNS]
    errors = {
        one.pattern: off(one, expected, "cpu", torch.float32)
        for one, expected in zip(calls, recurrences(calls), strict=True)
    }
    assert {name: found for name, found in errors.items() if not found <= 1} == {}


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 63, 1000, 32768])
@pytest.mark.parametrize("strength", STRENGTHS)
def test_decays_on_a_gpu(strength: str, tokens: int) -> None:
    calls = [call(pattern, strength, tokens, width=64) for pattern in PATTERNS]
    errors = {
        one.pattern: off(one, expected, "cuda", torch.float32)
        for one, expected in zip(calls, recurrences(calls, "cuda"), strict=True)
    }
    assert {name: found for name, found in errors.items() if not found <= 1} == {}

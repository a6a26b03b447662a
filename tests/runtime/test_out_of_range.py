"""Ints that point nowhere: lists, tables, prefixes, documents and parameters beyond every position.

What is outside of an axis reads 0 or is no member, in the reference, the executor and the kernels alike.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import attnc
from attnc.runtime.pattern import CompiledPattern
from attnc.runtime.tolerance import error, tolerance

FAR = 2**40
LIMIT = 2**63 - 1
PLACES = ["executor", "triton", pytest.param("cuda", marks=pytest.mark.gpu)]
KEYS = 41  # more than a tile of the interpreter, and no multiple of one

PATTERNS: dict[str, tuple[str, dict[str, Any]]] = {
    "columns": (
        "input columns: int[h, y]\nout = softmax[j](q @ k * scale where j <= i and j in columns[h]) @ v",
        {"columns": torch.tensor([[3, -1, FAR, LIMIT], [-LIMIT, KEYS, KEYS - 1, 0]])},
    ),
    "shifted_columns": (
        "input columns: int[h, y]\nout = softmax[j](q @ k * scale where j + 2 in columns[h]) @ v",
        {"columns": torch.tensor([[3, -1, FAR, LIMIT], [-LIMIT - 1, KEYS, 1, 0]])},
    ),
    "offsets": (
        "input offsets: int[h, y]\nout = softmax[j](q @ k * scale where i - j in offsets[h]) @ v",
        {"offsets": torch.tensor([[0, -1, FAR, LIMIT], [-LIMIT - 1, KEYS, 7, 0]])},
    ),
    "table": (
        "input table: real[h, n]\ninput at: int[b, t]\nout = softmax[j](q @ k * scale + table[at[j]] where j <= i) @ v",
        {"table": torch.arange(10.0).view(2, 5), "at": torch.tensor([[0, 4, 5, -1, FAR, LIMIT, -LIMIT - 1, 2**31]])},
    ),
    "table_of_distances": (
        "input table: real[h, n]\nout = softmax[j](q @ k * scale + table[i - j - 3]) @ v",
        {"table": torch.arange(10.0).view(2, 5)},
    ),
    "prefix": (
        "input prefix: int[b]\nout = softmax[j](q @ k * scale where j <= i or j < prefix) @ v",
        {"prefix": torch.tensor([FAR])},
    ),
    "negative_prefix": (
        "input prefix: int[b]\nout = softmax[j](q @ k * scale where j <= i and j >= prefix) @ v",
        {"prefix": torch.tensor([-LIMIT - 1])},
    ),
    "documents": (
        "input doc: int[b, t]\nout = softmax[j](q @ k * scale where doc[i] == doc[j]) @ v",
        {"doc": torch.tensor([[FAR, FAR, FAR + 1, 2**32 + 5, 5, LIMIT, -LIMIT - 1, -LIMIT - 1]])},
    ),
    "documents_beside_another": (
        "input doc: int[b, t]\nout = softmax[j](q @ k * scale where doc[i] == doc[j] or j == 0) @ v",
        {"doc": torch.tensor([[FAR, FAR, FAR + 1, 2**32 + 5, 5, LIMIT, -LIMIT - 1, -LIMIT - 1]])},
    ),
    "masked_by_value": (
        "input mark: int[b, t]\nout = softmax[j](q @ k * scale where j <= i and mark[j] > 4294967296) @ v",
        {"mark": torch.tensor([[0, 2**32, 2**32 + 1, LIMIT, -LIMIT - 1, 5, 2**33, 1]])},
    ),
}
WINDOWS = {
    "window": "out = softmax[j](q @ k * scale where 0 <= i - j < n) @ v",
    "stride": "out = softmax[j](q @ k * scale where j <= i and (i - j) % n == 0) @ v",
    "blocks": "out = softmax[j](q @ k * scale where i // n == j // n) @ v",
    "globals": "out = softmax[j](q @ k * scale where j < n and j <= i) @ v",
}


def pattern(body: str, parameters: str = "") -> CompiledPattern:
    text = f"pattern p{parameters}:\n    " + body.replace("\n", "\n    ") + "\n"
    return attnc.compile(text).patterns["p"]


def tensors() -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, KEYS, 8, generator=draw)
    return q, k, v


def settings_of(given: dict[str, Any]) -> dict[str, Any]:
    """Inputs over tokens are repeated to their length."""
    return {
        name: value.repeat(1, KEYS)[:, :KEYS] if value.ndim == 2 and value.shape[0] == 1 else value
        for name, value in given.items()
    }


def compare(compiled: CompiledPattern, place: str, given: dict[str, Any]) -> None:
    """`place`: a back end on the CPU, where Triton is interpreted, or a device of its own."""
    q, k, v = tensors()
    real = [q, k, v, *(x for x in given.values() if isinstance(x, Tensor) and x.is_floating_point())]
    for x in real:
        x.requires_grad_()
    expected = compiled.reference(q, k, v, **given)
    if place == "cuda":
        out = compiled(
            *(x.cuda() for x in (q, k, v)),
            **{name: x.cuda() if isinstance(x, Tensor) else x for name, x in given.items()},
        ).cpu()
    else:
        out, _ = compiled.outputs(q, k, v, given, place)
    assert error(out.detach(), expected.detach()) <= tolerance(out.dtype, KEYS)
    weight = torch.linspace(-1, 1, out.numel()).view(out.shape)
    gradients = (torch.autograd.grad((result * weight).sum(), real) for result in (out, expected))
    for found, exact in zip(*gradients, strict=True):
        assert error(found, exact) <= tolerance(found.dtype, KEYS)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", PATTERNS)
def test_ints_of_inputs(name: str, place: str) -> None:
    body, given = PATTERNS[name]
    compare(pattern(body), place, settings_of(given))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", WINDOWS)
def test_parameters_beyond_every_position(name: str, place: str) -> None:
    largest = 2**24 if name in ("stride", "blocks") else 2**30
    compare(pattern(WINDOWS[name], "(n: int)"), place, {"n": largest})


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", ["window", "globals"])
@pytest.mark.parametrize("size", [0, -1, -(2**30)])
def test_parameters_below_every_position(name: str, size: int, place: str) -> None:
    compare(pattern(WINDOWS[name], "(n: int)"), place, {"n": size})


@pytest.mark.parametrize("size", [2**30 + 1, 2**31, 2**62, -(2**31), -(2**63)])
@pytest.mark.parametrize("name", ["window", "globals"])
def test_parameters_that_kernels_cannot_count_with_are_refused(name: str, size: int) -> None:
    with pytest.raises(attnc.AttnError, match=f"parameter `n` is {size}, where at most"):
        pattern(WINDOWS[name], "(n: int)")(*tensors(), n=size)


@pytest.mark.parametrize("place", PLACES)
def test_a_seed_may_be_any_int(place: str) -> None:
    body = "axis s = blocks(j, 8)\nout = softmax[j](q @ k where j in topk[s](uniform(seed, i // 8, s.index), 2)) @ v"
    compare(pattern(body, "(seed: int)"), place, {"seed": 2**62 + 1})


@pytest.mark.parametrize("name", ["stride", "blocks"])
def test_divisors_beyond_what_kernels_step_by_are_refused(name: str) -> None:
    with pytest.raises(attnc.AttnError, match=f"`n` is {2**24 + 1} in this call, where at most"):
        pattern(WINDOWS[name], "(n: int)")(*tensors(), n=2**24 + 1)


@pytest.mark.parametrize("name", ["stride", "blocks"])
@pytest.mark.parametrize("size", [0, -1, -(2**62)])
def test_divisors_that_are_not_positive_are_refused(name: str, size: int) -> None:
    q, k, v = tensors()
    for call in (pattern(WINDOWS[name], "(n: int)"), pattern(WINDOWS[name], "(n: int)").reference):
        with pytest.raises(attnc.AttnError, match=f"`n` is {size} in this call"):
            call(q, k, v, n=size)


def test_a_parameter_beyond_64_bits_is_refused() -> None:
    with pytest.raises(attnc.AttnError, match="parameter `n` does not fit 64 bits"):
        pattern(WINDOWS["window"], "(n: int)")(*tensors(), n=2**63)

"""Where torch's fused kernel runs an attention on a CPU, and that it gives the same."""

from __future__ import annotations

from unittest.mock import Mock

import pytest
import torch

import attnc
from attnc.runtime.call import make_call
from attnc.runtime.cpu import executor, executor_backward
from attnc.runtime.cpu.dense import dense_output
from attnc.runtime.tolerance import error, tolerance

ALL = "out = softmax[j](q @ k * scale) @ v"
CAUSAL = "out = softmax[j](q @ k * 0.3 where j <= i) @ v"
OTHERS = (
    "out = softmax[j](q @ k * scale where j % 4 < 3) @ v",
    "out = softmax[j](q @ k * -0.3 where j <= i) @ v",
    "out = softmax[j](q @ k * scale where j < i) @ v",
    "out = softmax[j](q @ k * scale + 1.0 * (j - i)) @ v",
    "out = softmax[j](tanh(q @ k)) @ v",
)
# text, (heads, key heads, queries, keys, D, E), whether torch's kernel takes it
CASES = [
    (ALL, (2, 2, 7, 9, 5, 5), True),
    (ALL, (4, 1, 1, 33, 8, 8), True),
    (ALL, (4, 2, 3, 5, 8, 8), False),
    ("out = softmax[j](q @ k * scale where j * 3 < M + 20) @ v", (2, 2, 7, 9, 5, 5), True),
    (ALL, (2, 2, 7, 9, 5, 6), False),
    (CAUSAL, (2, 1, 9, 9, 4, 4), True),
    (CAUSAL, (2, 2, 3, 9, 4, 4), False),
    *((text, (2, 2, 6, 6, 4, 4), False) for text in OTHERS),
]


@pytest.mark.parametrize(("text", "sizes", "taken"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dense_attention(text: str, sizes: tuple[int, ...], taken: bool, dtype: torch.dtype) -> None:
    pattern = attnc.compile(f"pattern p:\n    {text}\n").patterns["p"]
    heads, key_heads, queries, keys, width, value_width = sizes
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, queries, heads, width, generator=generator, dtype=dtype).transpose(1, 2)
    k = torch.randn(2, key_heads, keys, width, generator=generator, dtype=dtype)
    v = torch.randn(2, key_heads, keys, value_width, generator=generator, dtype=dtype)
    plan = pattern.program.plan
    call = make_call(plan, q, k, v, {"scale": width**-0.5}, {})
    assert (dense_output(plan, plan.branches[0], call) is not None) == taken
    out, lse = executor.execute(plan, call)
    expected, statistics = pattern.reference_with_lse(q, k, v)
    assert error(out, expected) <= tolerance(dtype, keys)
    assert torch.equal(lse.isinf(), statistics.isinf())
    assert error(lse.nan_to_num(0, 0, 0), statistics.nan_to_num(0, 0, 0)) <= tolerance(dtype, keys)


@pytest.mark.parametrize(("text", "sizes", "taken"), CASES)
def test_gradients_of_dense_attention(
    text: str, sizes: tuple[int, ...], taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By torch's kernel where it ran forward; not where a log-sum-exp has a cotangent of its own."""
    runs = Mock(side_effect=executor_backward.BackwardRun)
    monkeypatch.setattr(executor_backward, "BackwardRun", runs)
    pattern = attnc.compile(f"pattern p:\n    {text}\n").patterns["p"]
    heads, key_heads, queries, keys, width, value_width = sizes
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, queries, heads, width, generator=generator).transpose(1, 2)
    k = torch.randn(2, key_heads, keys, width, generator=generator)
    v = torch.randn(2, key_heads, keys, value_width, generator=generator)
    leaves = [one.requires_grad_() for one in (q, k, v)]
    for with_lse in (False, True):
        out, lse = pattern.with_lse(q, k, v)
        expected, statistics = pattern.reference_with_lse(q, k, v)
        results = [(out, expected), (lse, statistics)][: 1 + with_lse]
        weights = [torch.randn(one.shape, generator=generator) for one, _ in results]
        found = torch.autograd.grad([one for one, _ in results], leaves, weights)
        wanted = torch.autograd.grad([one for _, one in results], leaves, [one.double() for one in weights])
        for one, other in zip(found, wanted, strict=True):
            assert error(one, other) <= tolerance(torch.float32, keys)
        assert runs.called == (with_lse or not taken)

"""Every pointwise op inside a score, its derivative too, on both back ends."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import attnc
from attnc.compiler.differentiate import without_gradient
from attnc.compiler.ir import walk
from attnc.compiler.ops import POINTWISE

# Scores stay small, and away from where a derivative jumps: 0 for abs and relu, ties for min and max.
TEXT = """
pattern every(n: int = 3):
    input x: real[h]
    s = q @ k * scale
    smooth = exp(s / 4) + tanh(s) * sigmoid(s) - elu(s + x) + silu(s) + softplus(-s)
    waves  = sin(s) + cos(s - x) + log(2 + s ** 2) + sqrt(s * s + 1) + (1.5 + x) ** (s / 3)
    bent   = abs(s) + relu(s) + min(s, x) + max(s, 2 * x)
    steps  = floor(s * 8) * 0.125 + (i - j) // n + (i + j) % n
    cases  = if s < x and not (i == j or j % n != 1) or i - j <= 2 then s else 2 * s
    out = softmax[j](smooth / 2 + waves / 2 + bent + steps / 8 + cases where j <= i) @ v
"""


def tokens(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def test_every_op_has_a_derivative() -> None:
    assert without_gradient() == set()


def test_the_pattern_has_every_op() -> None:
    branch = attnc.compile(TEXT).every.program.plan.branches[0]
    assert {node.op for node in walk(branch.score)} >= POINTWISE.keys()


@pytest.mark.parametrize(("backend", "dtype"), [("executor", torch.float64), ("triton", torch.float32)])
def test_values_and_derivatives(backend: str, dtype: torch.dtype) -> None:
    every = attnc.compile(TEXT).every
    arrays = [tokens(1, 2, 21, 8, seed=0), tokens(1, 2, 21, 8, seed=1), tokens(1, 2, 21, 8, seed=2)]
    arrays.append(torch.tensor([0.3, -0.7], dtype=torch.float64))
    q, k, v, x = (array.to(dtype).requires_grad_() for array in arrays)
    out, _ = every.outputs(q, k, v, {"x": x}, backend)
    exact = every.reference(q, k, v, x=x)
    weight = tokens(*out.shape, seed=3)
    found = torch.autograd.grad((out * weight).sum(), (q, k, v, x))
    expected = torch.autograd.grad((exact * weight).sum(), (q, k, v, x))
    most = 1e-10 if dtype == torch.float64 else 2e-4
    torch.testing.assert_close(out.double(), exact, atol=most, rtol=most)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other.double(), atol=most, rtol=most)


@pytest.mark.parametrize("score", ["floor(3 * (q @ k)) * x", "x * (j - i)"])
@pytest.mark.parametrize(("backend", "dtype"), [("executor", torch.float64), ("triton", torch.float32)])
def test_queries_that_a_score_rounds_or_leaves_out_have_gradient_zero(
    score: str, backend: str, dtype: torch.dtype
) -> None:
    text = f"pattern p:\n    input x: real[h]\n    out = softmax[j]({score} where j <= i) @ v\n"
    pattern = attnc.compile(text).p
    q, k, v = (tokens(1, 2, 9, 4, seed=seed).to(dtype).requires_grad_() for seed in range(3))
    x = torch.tensor([0.5, 1.0], dtype=dtype, requires_grad=True)
    out, _ = pattern.outputs(q, k, v, {"x": x}, backend)
    by_q, by_k, by_v, by_x = torch.autograd.grad(out.square().sum(), (q, k, v, x), allow_unused=True)
    exact = pattern.reference(q, k, v, x=x)
    expected = torch.autograd.grad(exact.square().sum(), (v, x))
    assert not any(part.any() for part in (by_q, by_k) if part is not None)
    torch.testing.assert_close(
        (by_v.double(), by_x.double()), tuple(part.double() for part in expected), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize(
    ("score", "condition"),
    [
        ("q @ k * x - log(i - j)", "j < i"),
        ("q @ k + sqrt(x * (i - j))", "j < i"),
        ("q @ k + exp(200 * x * (j - i))", "j <= i"),
        ("exp(200 * (j - i) * x * (2 + tanh(q @ k)))", "j <= i"),
    ],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, from Triton's interpreter: what is asked for here
@pytest.mark.parametrize("backend", ["executor", "triton"])
def test_derivatives_that_are_not_finite_on_dead_pairs_do_no_harm(score: str, condition: str, backend: str) -> None:
    text = f"pattern p:\n    input x: real[h]\n    out = softmax[j]({score} where {condition}) @ v\n"
    pattern = attnc.compile(text).p
    q, k, v = (tokens(1, 2, 21, 4, seed=seed).float().requires_grad_() for seed in range(3))
    x = torch.tensor([0.5, 1.0], requires_grad=True)
    out, _ = pattern.outputs(q, k, v, {"x": x}, backend)
    found, expected = (
        torch.autograd.grad(result.square().sum(), (q, k, v, x)) for result in (out, pattern.reference(q, k, v, x=x))
    )
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("place", ["i - j", "(j - i) // 2", "j % 7 - 3", "i - 2"])
@pytest.mark.parametrize(("backend", "dtype"), [("executor", torch.float64), ("triton", torch.float32)])
def test_reads_outside_of_a_table_give_0(place: str, backend: str, dtype: torch.dtype) -> None:
    text = f"pattern p:\n    input table: real[h, x]\n    out = softmax[j](q @ k + table[{place}] where j <= i) @ v\n"
    pattern = attnc.compile(text).p
    q, k, v = (tokens(1, 2, 21, 4, seed=seed).to(dtype) for seed in range(3))
    table = tokens(2, 5, seed=3).to(dtype).requires_grad_()
    out, _ = pattern.outputs(q, k, v, {"table": table}, backend)
    exact = pattern.reference(q, k, v, table=table)
    (found,), (expected,) = (torch.autograd.grad(result.square().sum(), table) for result in (out, exact))
    torch.testing.assert_close((out.double(), found.double()), (exact, expected.double()), atol=1e-4, rtol=1e-4)

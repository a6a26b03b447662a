"""Generated kernels of values of rows, in Triton's interpreter, against float64: forward and backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import attnc
from attnc.compiler.composition import Compute
from attnc.compiler.fuse import groups, segments
from attnc.runtime.compute.arrays import Arrays
from attnc.runtime.compute.row_steps import compute, smooth_inputs
from attnc.runtime.cuda import launch_pointwise, row_layout
from attnc.runtime.operator import choose_engine
from attnc.runtime.pattern import CompiledPattern
from attnc.runtime.steps.composition import with_arrays

# What is beside the sum over keys is rows: of queries, of keys, of results. All sums converge, none is near 0.
TEXT = """
pattern every(n: int = 3, c: real = 0.7):
    input w: real[h, e]
    input u: real[d]
    input mix: real[h]
    input beta: real[b, h, t]
    input gate: real[b, t, d]
    near = softmax[j](q @ k * scale where j <= i) @ v
    size = sqrt(sum[e](near * near) + 1) + mean[e](abs(near)) + max[e](near) - min[e](near)
    part = normalize[e](exp(near), floor=0.5) + softmax[e](near * c + w)
    step = 0.01 * i + 0.1 * (i % n) + (if h < H // 2 then 1 else 2)
    gain = sigmoid(mix) + beta[i] * c + tanh(u @ gate[i]) * 0.1 + step
    out = near * gain / size + part * w + silu(near) * cos(0.3 * i) + softplus(near) ** 2 + near ** c
"""
FEATURES = """
pattern maps:
    input beta: real[b, h, t]
    phi(x) = concat(softmax[d](x), softmax[d](-x) * 0.5)
    psi(x) = (elu(x) + 1) / (1 + x @ x)
    far  = normalize[j](phi(q) @ phi(k) where j <= i) @ (v * sigmoid(beta[j]))
    near = sum[j]((psi(q) @ psi(k)) * v where j <= i)
    out = far + relu(near) + min(far, near) * 0.1
"""


def tokens(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that run, by name; one that is declined is `torch`."""
    found: list[str] = []
    value, gradients = launch_pointwise.Rows.value, launch_pointwise.Rows.gradients

    def forward(rows: Any, dtype: torch.dtype) -> Tensor | None:
        made = value(rows, dtype)
        found.append("torch" if made is None else str(made.dtype).removeprefix("torch."))
        return made

    def backward(rows: Any, *given: Any) -> dict[str, Tensor]:
        found.append("gradients")
        return gradients(rows, *given)

    monkeypatch.setattr(launch_pointwise.Rows, "value", forward)
    monkeypatch.setattr(launch_pointwise.Rows, "gradients", backward)
    return found


def agree(pattern: CompiledPattern, arrays: Sequence[Tensor], settings: dict[str, Any], allowed: float) -> None:
    """Result and gradients of the kernels against the float64 reference."""
    leaves = [*arrays, *(one for one in settings.values() if isinstance(one, Tensor))]
    for one in leaves:
        one.requires_grad_()
    q, k, v = arrays
    out, _ = pattern.outputs(q, k, v, settings, "triton")
    weight = tokens(*out.shape, seed=9)
    found = torch.autograd.grad((out * weight).sum(), leaves)
    exact = pattern.reference(*arrays, **settings)
    expected = torch.autograd.grad((exact * weight.double()).sum(), leaves)
    for one, other in zip([out, *found], [exact, *expected], strict=True):
        bound = allowed * max(1.0, float(other.detach().abs().max()))
        torch.testing.assert_close(one.double(), other.double(), atol=bound, rtol=0)


@pytest.mark.parametrize(
    ("heads", "n", "m", "d", "e"), [((4, 2), 19, 37, 24, 7), ((2, 2), 1, 1, 16, 1), ((3, 3), 33, 33, 8, 40)]
)
def test_every_op_of_rows(heads: tuple[int, int], n: int, m: int, d: int, e: int, launches: list[str]) -> None:
    pattern = attnc.compile(TEXT).every
    h, shared = heads
    arrays = [tokens(2, h, n, d, seed=0), tokens(2, shared, m, d, seed=1), 2 + tokens(2, shared, m, e, seed=2).abs()]
    settings = {
        "w": tokens(h, e, seed=3),
        "u": tokens(d, seed=4) / d,
        "mix": tokens(h, seed=5),
        "beta": tokens(2, h, m, seed=6),
        "gate": tokens(2, m, d, seed=7),
    }
    agree(pattern, arrays, settings, 3e-5)
    assert launches == ["float32", "gradients"]


def test_features_of_strided_tensors(launches: list[str]) -> None:
    arrays = [tokens(1, 18, 4, 12, seed=0), tokens(1, 18, 2, 12, seed=1), tokens(1, 18, 2, 20, seed=2)]
    arrays = [one.transpose(1, 2).detach() for one in arrays]
    settings = {"beta": tokens(1, 18, 4, seed=3).transpose(1, 2).detach()}
    agree(attnc.compile(FEATURES).maps, arrays, settings, 3e-5)
    assert "torch" not in launches
    assert launches.count("gradients") == 6  # of both features of q and of k, of values, of the result


def test_no_array_is_cast_by_another_kernel(launches: list[str]) -> None:
    """Operands of products and the result are made in bfloat16."""
    arrays = [tokens(1, 2, 17, 16, seed=seed, dtype=torch.bfloat16).requires_grad_() for seed in range(3)]
    beta = tokens(1, 2, 17, seed=3, dtype=torch.bfloat16)
    pattern = attnc.compile(FEATURES).maps
    q, k, v = arrays
    out, _ = pattern.outputs(q, k, v, {"beta": beta}, "triton")
    assert launches == ["bfloat16"] * 6
    prepared = pattern.prepared(q, k, v, {"beta": beta})
    frame, composition = prepared.frame(), prepared.composition
    for step in composition.steps:
        if isinstance(step, Compute) and smooth_inputs(step.node) <= frame.tensors.keys():
            made = compute(composition, step, frame, choose_engine("triton", out.device))
            frame = with_arrays(frame, {step.name: made})
            assert made.dtype == torch.bfloat16
            torch.testing.assert_close(made, Arrays(frame).value(step.node).bfloat16(), atol=0, rtol=2**-7)


def test_equal_calls_have_equal_bits() -> None:
    pattern = attnc.compile(TEXT).every
    arrays = [tokens(1, 2, 20, 8, seed=0), tokens(1, 2, 20, 8, seed=1), 2 + tokens(1, 2, 20, 8, seed=2).abs()]
    settings = {"w": tokens(2, 8, seed=3), "u": tokens(8, seed=4), "mix": tokens(2, seed=5)}
    settings |= {"beta": tokens(1, 2, 20, seed=6), "gate": tokens(1, 20, 8, seed=7)}
    leaves = [one.requires_grad_() for one in (*arrays, *settings.values())]
    made = []
    q, k, v = arrays
    for _ in range(2):
        out, _ = pattern.outputs(q, k, v, settings, "triton")
        made.append(torch.autograd.grad(out.sum(), leaves))
    assert all(torch.equal(one, other) for one, other in zip(*made, strict=True))


def test_nan_is_not_hidden() -> None:
    """Not by relu, minimum and maximum either."""
    arrays = [tokens(1, 1, 5, 4, seed=seed) for seed in range(3)]
    arrays[0][0, 0, 2, 1] = torch.nan
    text = "pattern kept:\n    out = normalize[j]((relu(q) + 1) @ (max(k, 0.1) + 1) where j <= i) @ min(v, 1)\n"
    for at in range(3):
        given = [one.clone() for one in arrays]
        given[0] = tokens(1, 1, 5, 4, seed=0)
        given[at][0, 0, 2, 1] = torch.nan
        out, _ = attnc.compile(text).kept.outputs(given[0], given[1], given[2], {}, "triton")
        assert out[0, 0, 2:].isnan().any()


def test_what_is_no_row_is_made_before() -> None:
    """Products with matrices, sums over tokens: torch makes them, kernels what is around."""
    text = """
pattern mixed:
    input w: real[h, f, d]
    phi(x) = exp(w @ elu(x) / 8)
    out = normalize[j](phi(q) @ phi(k) where j <= i) @ v
"""
    pattern = attnc.compile(text).mixed
    steps = [step for step in pattern.program.composition.steps if isinstance(step, Compute)]
    made = [groups(step.node) for step in steps]
    assert [len(one) for one in made] == [2, 2, 1]  # elu, then exp of the product
    assert [operand.node.op for operand in made[0][1].operands] == ["dot"]
    arrays = [tokens(1, 2, 19, 8, seed=seed) for seed in range(3)]
    agree(pattern, arrays, {"w": tokens(2, 5, 8, seed=4)}, 3e-5)


@pytest.mark.parametrize("widest", [row_layout.WIDEST, 7])
def test_what_no_kernel_takes_has_its_gradient(widest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sum over tokens of a kernel's values; rows too long for a program."""
    monkeypatch.setattr(row_layout, "WIDEST", widest)
    text = """
pattern pooled(block: int = 4):
    axis s = blocks(j, block)
    member = mean[j in s](elu(k) + 1)
    phi(x) = elu(x) + 1
    out = softmax[s](phi(q) @ member * scale where s.start <= i) @ mean[j in s](relu(v))
"""
    arrays = [tokens(1, 1, 9, 8, seed=seed) for seed in range(3)]
    agree(attnc.compile(text).pooled, arrays, {}, 3e-5)


def test_segments() -> None:
    assert segments("d+d") == ("d", "d")
    assert segments("(d*d+d)+1") == ("(d*d+d)", "1")

"""Attention over landmarks on the generated kernels: operands of two types, products of float32."""

from __future__ import annotations

import pytest
import torch

import attnc
from attnc.runtime import operator
from attnc.runtime.tolerance import error, tolerance
from attnc.runtime.tools.inputs import Shape, made_inputs
from tests.runtime.hopper_kernels import EXAMPLES


@pytest.mark.parametrize(("length", "landmarks", "width"), [(61, 7, 20), (64, 16, 16), (5, 8, 16), (1, 1, 8)])
def test_landmarks_of_16_bit_tensors(length: int, landmarks: int, width: int) -> None:
    pattern = attnc.load(EXAMPLES / "nystrom.attn").nystrom
    plans = [step.plan for step in pattern.program.composition.steps if hasattr(step, "plan")]
    assert [plan.exact for plan in plans] == [True, True]
    shape = Shape(1, 2, 1, length, length, width, width + 4)
    made = made_inputs(pattern.pattern, shape, {}, dtype=torch.bfloat16)
    leaves = [tensor.requires_grad_() for tensor in (made.q, made.k, made.v)]
    out, _ = pattern.outputs(*leaves, {"landmarks": landmarks}, backend="triton")
    expected = pattern.reference(*leaves, landmarks=landmarks)
    allowed = tolerance(torch.bfloat16, length)
    assert error(out, expected) <= allowed
    cotangent = torch.randn_like(out)
    found = torch.autograd.grad(out, leaves, cotangent)
    wanted = torch.autograd.grad(expected, leaves, cotangent.double())
    assert max(error(one, other) for one, other in zip(found, wanted, strict=True)) <= allowed


@pytest.mark.parametrize(("queries", "dtype"), [(1, torch.float32), (2, torch.bfloat16)])
def test_few_queries_take_a_wide_latent_as_it_is(
    queries: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward on vectors of the latent's width; gradients through keys and values that are projected first."""
    monkeypatch.setattr(operator.Prepared, "on_cuda", True)
    pattern = attnc.load(EXAMPLES / "mla.attn").mla
    shape = Shape(1, 3, 1, queries, 70, 16, 8)
    weights = {"w_k": (-0.1, 0.1), "w_v": (-0.1, 0.1)}  # scores of about 1
    made = made_inputs(pattern.pattern, shape, {}, dtype=dtype, axes={"c": 300, "x": 6}, ranges=weights)
    leaves = [one.requires_grad_() for one in (made.q, made.k, *made.inputs.values())]
    prepared = pattern.prepared(made.q, made.k, None, made.inputs)
    assert prepared.composition is prepared.program.absorbed
    assert prepared.differentiated is prepared.program.composition
    out, _ = pattern.outputs(made.q, made.k, None, made.inputs, backend="triton")
    expected = pattern.reference(made.q, made.k, None, **made.inputs)
    allowed = tolerance(dtype, 300)
    assert error(out, expected) <= allowed
    cotangent = torch.linspace(-1, 1, out.numel(), dtype=dtype).view(out.shape)
    found = torch.autograd.grad(out, leaves, cotangent)
    wanted = torch.autograd.grad(expected, leaves, cotangent.double())
    assert max(error(one, other) for one, other in zip(found, wanted, strict=True)) <= allowed

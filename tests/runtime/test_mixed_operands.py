"""Attention over landmarks on the generated kernels: operands of two types, products of float32."""

from __future__ import annotations

import pytest
import torch

import attnc
from attnc.runtime.inputs import Shape, made_inputs
from attnc.runtime.tolerance import error, tolerance
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

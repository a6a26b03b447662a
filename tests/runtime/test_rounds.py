"""A fixed number of rounds on small matrices in one kernel: against float64, forward and every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import attnc
from attnc.runtime.compute import rounds
from attnc.runtime.recording import repeated
from attnc.runtime.tolerance import error, tolerance
from attnc.runtime.tools.inputs import Shape, made_inputs

NEWTON = """
pattern newton(steps: int = 3):
    input A: real[b, h, x, y]
    input w: real[h]
    Z = transpose(A) / 9
    repeat steps:
        Y = Z @ (2 * identity[x] - A @ Z)
        Z = Y * w - Z / (w + 2)
    out = softmax[j](q @ k * scale) @ v + sum[x](sum[y](transpose(Z)))
"""
TWO_STATES = """
pattern twice(steps: int = 4):
    input A: real[x, y]
    input B: real[b, h, x, y]
    C = B
    D = A @ transpose(A) / 20
    repeat steps:
        C = C + D @ B / 3
        D = -D @ transpose(D) / 2
    out = softmax[j](q @ k * scale) @ v + sum[x](sum[y](C))
"""


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many programs the kernels were run with."""
    seen: list[int] = []
    run = rounds.Launch.run

    def watched(self: Any, kernel: Any, given: Any, tensors: Any, programs: int, heads: int, **flags: bool) -> None:
        seen.append(programs)
        run(self, kernel, given, tensors, programs, heads, **flags)

    monkeypatch.setattr(rounds.Launch, "run", watched)
    return seen


@pytest.mark.parametrize(("text", "name"), [(NEWTON, "newton"), (TWO_STATES, "twice")])
@pytest.mark.parametrize("axes", [{"x": 5, "y": 3}, {"x": 1, "y": 17}, {"x": 16, "y": 16}])
def test_rounds_and_their_gradients(text: str, name: str, axes: dict[str, int], launched: list[int]) -> None:
    pattern = attnc.compile(text).patterns[name]
    made = made_inputs(pattern.pattern, Shape(2, 2, 2, 3, 4, 8, 8), {"steps": 3}, axes=axes)
    inputs = list(made.inputs.values())
    for one in inputs:
        one.requires_grad_()
    out = pattern(made.q, made.k, made.v, **made.inputs)
    expected = pattern.reference(made.q, made.k, made.v, **made.inputs)
    assert error(out, expected) <= tolerance(torch.float32, 64)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out.dtype)
    found = torch.autograd.grad(out, inputs, cotangent)
    wanted = torch.autograd.grad(expected, inputs, cotangent.double())
    assert max(error(one, other) for one, other in zip(found, wanted, strict=True)) <= tolerance(torch.float32, 64)
    assert launched == [4, 4, 4]  # forward; again for the gradient, with what it keeps; back


def test_no_rounds_leave_the_start(launched: list[int]) -> None:
    pattern = attnc.compile(NEWTON).patterns["newton"]
    made = made_inputs(pattern.pattern, Shape(1, 2, 2, 3, 4, 8, 8), {"steps": 0}, axes={"x": 4, "y": 3})
    out = pattern(made.q, made.k, made.v, steps=0, **made.inputs)
    assert error(out, pattern.reference(made.q, made.k, made.v, steps=0, **made.inputs)) < 1e-5
    assert launched == [2]


def test_large_matrices_and_vectors_run_by_torch(launched: list[int]) -> None:
    pattern = attnc.compile(NEWTON).patterns["newton"]
    made = made_inputs(pattern.pattern, Shape(1, 1, 1, 3, 4, 8, 8), {"steps": 1}, axes={"x": 65, "y": 2})
    out = pattern(made.q, made.k, made.v, steps=1, **made.inputs)
    assert error(out, pattern.reference(made.q, made.k, made.v, steps=1, **made.inputs)) < 1e-5
    assert launched == []


@pytest.mark.parametrize(("text", "name"), [(NEWTON, "newton"), (TWO_STATES, "twice")])
def test_rounds_by_torch_in_float64(text: str, name: str, launched: list[int]) -> None:
    pattern = attnc.compile(text).patterns[name]
    made = made_inputs(pattern.pattern, Shape(2, 2, 2, 3, 4, 8, 8), {}, axes={"x": 5, "y": 3}, dtype=torch.float64)
    for one in made.inputs.values():
        one.requires_grad_()
    out = pattern(made.q, made.k, made.v, **made.inputs)
    expected = pattern.reference(made.q, made.k, made.v, **made.inputs)
    inputs = list(made.inputs.values())
    found = torch.autograd.grad(out.sum(), inputs)
    wanted = torch.autograd.grad(expected.sum(), inputs)
    assert error(out, expected) <= 1e-12
    assert max(error(one, other) for one, other in zip(found, wanted, strict=True)) <= 1e-12
    assert launched == []


def test_rounds_are_recorded(launched: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A repeated call launches the kernel without any of what decided on it, on other contents."""
    monkeypatch.setattr(repeated, "devices", {"cpu"})
    pattern = attnc.compile(NEWTON).patterns["newton"]
    made = made_inputs(pattern.pattern, Shape(1, 2, 2, 3, 4, 8, 8), {}, axes={"x": 4, "y": 3})
    for _ in range(4):
        made.inputs["A"].mul_(-0.7)
        out, _ = pattern.outputs(made.q, made.k, made.v, made.inputs, backend="triton")
        assert error(out, pattern.reference(made.q, made.k, made.v, **made.inputs)) <= tolerance(torch.float32, 64)
    assert launched == [2, 2]

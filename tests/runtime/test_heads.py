"""Branches that some heads show: computed, kept and differentiated for those alone."""

from __future__ import annotations

import pytest
import torch

import attnc
from attnc.runtime.operator import choose_engine
from attnc.runtime.steps.composition import run
from attnc.runtime.tools.comparison import Case, Target, compare
from attnc.runtime.tools.inputs import Shape
from attnc.runtime.tools.settings import Setting

EXACT = Target("executor", "executor", "cpu", torch.float64)
KERNELS = Target("interpreter", "triton", "cpu", torch.float32)
# A softmax with an input of each head, a state with a sum, both with gradients through rows that some heads have.
APART = """pattern p(n: int = 1):
    input slope: real[h]
    near = softmax[j](q @ k * scale - slope * (i - j) where 0 <= i - j < 3) @ v
    far = normalize[j]((elu(q) + 1) @ (elu(k) + 1) where j <= i) @ v
    out = if h < n then far else rms_norm(near, 0.1)
"""
MIXED = """pattern p(n: int = 1):
    input mix: real[h]
    near = softmax[j](q @ k * scale where 0 <= i - j < 3) @ v
    far = softmax[j](q @ k * scale where j <= i) @ v
    out = if h < n then mix * far + near else (if h >= 3 then near else mix / (2 + near))
"""
SHAPES = (
    Shape(1, 4, 4, 7, 9, 8, 6),
    Shape(2, 4, 2, 5, 5, 4, 4),
    Shape(1, 4, 1, 3, 3, 4, 4),
    Shape(1, 6, 3, 1, 1, 4, 4),
)


@pytest.mark.parametrize("text", [APART, MIXED])
@pytest.mark.parametrize("n", [0, 1, 2, 3, 9])
def test_results_and_gradients(text: str, n: int) -> None:
    for shape in SHAPES:
        for outcome in compare(Case(attnc.compile(text).p, shape, Setting({"n": n})), EXACT):
            assert outcome.agrees, f"{shape} {outcome.of}: {outcome.error} > {outcome.allowed}"


@pytest.mark.parametrize(("text", "n"), [(APART, 1), (APART, 3), (MIXED, 2)])
def test_kernels(text: str, n: int) -> None:
    for shape in SHAPES[:3]:
        for outcome in compare(Case(attnc.compile(text).p, shape, Setting({"n": n})), KERNELS):
            assert outcome.agrees, f"{shape} {outcome.of}: {outcome.error} > {outcome.allowed}"


KEPT = [
    (4, 4, 1, 3, 1),
    (4, 2, 1, 4, 2),
    (8, 2, 3, 8, 4),
    (8, 2, 4, 4, 4),
    (4, 1, 1, 3, 1),  # all heads have one key head, which is not narrowed
    (4, 4, 0, 4, 1),
    (4, 4, 9, 1, 4),
]


@pytest.mark.parametrize(("heads", "key_heads", "n", "near", "far"), KEPT)
def test_what_steps_leave_has_their_heads(heads: int, key_heads: int, n: int, near: int, far: int) -> None:
    """Whole groups of key heads; where no head is left, a group stands for it."""
    q, k = torch.randn(1, heads, 5, 4), torch.randn(1, key_heads, 5, 4)
    prepared = attnc.compile(APART).p.prepared(q, k, k, {"n": n, "slope": torch.rand(heads)})
    with torch.no_grad():
        found = run(prepared.composition, prepared.frame(), choose_engine("executor", q.device))
    assert sorted(one.shape[1] for one in found.saved) == sorted([near, near, far, far])

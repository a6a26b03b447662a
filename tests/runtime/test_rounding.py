"""How rounding moves a result, and that a gradient is held against what rounds in it."""

from __future__ import annotations

import torch

import attnc
from attnc.runtime.tools.comparison import Case, Target, compare
from attnc.runtime.tools.inputs import Shape
from attnc.runtime.tools.rounding import moved
from attnc.runtime.tools.settings import Setting

EXACT = Target("executor", "executor", "cpu", torch.float64)
# With one key the softmaxes add nothing to the gradient of q but the rounding of p (dp - delta); the state adds little.
CANCELS = """pattern p:
    input z: real[h, m, d]
    near = softmax[j](q @ k * scale where j <= i) @ v
    far = softmax[m](q @ z * scale) @ (softmax[j](z @ k * scale) @ v)
    out = near + far + sum[j]((q @ k) * 0.001 * v where j <= i)
"""


def test_what_cancels_moves_by_the_size_of_its_terms() -> None:
    x = torch.randn(1000, dtype=torch.float64)
    small = 1e-3 * x
    (plain, cancelled) = moved(lambda: [x + small, (x + small) - x])
    assert 0.1 < plain / float(x.abs().max()) <= 1.1
    assert cancelled / float(small.abs().max()) > 100
    assert moved(lambda: [x.clone(), x[::2], torch.where(x > 0, x, 0.0)]) == [0.0, 0.0, 0.0]


def test_a_gradient_is_held_against_what_rounds_in_it() -> None:
    pattern = attnc.compile(CANCELS).p
    shape = Shape(1, 2, 2, 1, 1, 4, 4)
    for seed in range(20):
        assert all(one.agrees for one in compare(Case(pattern, shape, Setting()), EXACT, seed))

"""Which heads a step is needed for."""

from __future__ import annotations

import pytest

import attnc
from attnc.compiler.composition import Attend, Carry
from attnc.compiler.describe import formula
from attnc.compiler.pipeline import compose, trace

BRANCHES = """pattern p(n: int = 3):
    input slope: real[h]
    near = softmax[j](q @ k * scale - slope * (i - j) where 0 <= i - j < n) @ v
    far = sum[j]((q @ k) * v where j <= i)
    out = {}
"""


def heads(out: str) -> dict[str, str | None]:
    """The heads of the softmax and of the state."""
    found: dict[str, str | None] = {}
    for step in compose(attnc.compile(BRANCHES.format(out)).p.pattern).steps:
        if isinstance(step, Attend | Carry):
            name = "near" if isinstance(step, Attend) else "far"
            heads = step.heads
            found[name] = None if heads is None else f"{formula(heads.first)} .. {formula(heads.last)}"
    return found


@pytest.mark.parametrize(
    ("out", "near", "far"),
    [
        ("if h < n then near else far", "0 .. n", "n .. H"),
        ("if h >= H // 2 then near else far + near", None, "0 .. H // 2"),
        ("if h < 2 * n then rms_norm(near, 0.1) / 2 else far", "0 .. 2 * n", "2 * n .. H"),
        ("if h == n then near else far", "n .. n + 1", None),
        ("if 1 <= h and h < n then near else 2 * near + far", None, None),
        ("if h < n and i > 3 then near else far", "0 .. n", None),
        ("if h % 2 == 0 then near else far", None, None),
        ("(if h < n then near else 0 * far) + far", "0 .. n", None),
        ("if slope > 0 then near else far", None, None),
        ("near + far", None, None),
    ],
)
def test_heads_of_branches(out: str, near: str | None, far: str | None) -> None:
    assert heads(out) == {"near": near, "far": far}


def test_what_counts_heads_runs_on_all() -> None:
    text = """pattern p:
    near = softmax[j](q @ k * scale - (i - j) / (h + 1) where j <= i) @ v
    far = softmax[j](q @ k * scale where j <= i) @ v
    out = if h < 2 then near else far
"""
    stages = {stage.name: stage for stage in trace(attnc.compile(text).p.pattern)}
    assert any("runs on all heads" in note for note in stages["steps"].notes)
    assert stages["steps"].text.count(" alone") == 1

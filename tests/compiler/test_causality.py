"""What is said to be causal, against the reference with later tokens changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import attnc
from attnc.compiler.causality import causality, describe_causality, leaks
from attnc.runtime.pattern import CompiledPattern
from attnc.runtime.tools.comparison import defaults, shrunken
from attnc.runtime.tools.inputs import Shape, made_inputs
from attnc.runtime.tools.settings import settings

ROOT = Path(__file__).parents[2]
FILES = sorted([*(ROOT / "examples").glob("*.attn"), *(ROOT / "tests" / "zoo").glob("*.attn")])
TOKENS = ("i", "j", "t")
KEPT = 21  # rows that must not change


def pattern_of(file: Path) -> CompiledPattern:
    found: CompiledPattern = getattr(attnc.load(file), file.stem)
    return found


def changed_rows(pattern: CompiledPattern, seeds: int = 1) -> list[int]:
    """Rows up to KEPT that change in the reference where all later tokens do, in a small setting of the file."""
    found: set[int] = set()
    line = next(iter(settings(pattern.pattern, "check", pattern.known)), None)
    values = defaults(pattern) | shrunken(pattern) | (line.parameters if line else {})
    shape = Shape(1, 2, 2, 40, 40, 6, 6).updated(line.sizes if line else {})
    ranges = line.ranges if line else None
    for seed in range(seeds):
        made = made_inputs(pattern.pattern, shape, values, dtype=torch.float64, seed=seed, ranges=ranges)
        given = {"q": made.q, "k": made.k, "v": made.v, **made.inputs}
        layouts = {name: tuple(axes) for name, axes in (("q", "bhid"), ("k", "bhjd"), ("v", "bhje"))}
        layouts |= {one.name: one.axes for one in pattern.pattern.inputs}
        other = {name: later(tensor, layouts[name]) for name, tensor in given.items()}
        settings_of: list[dict[str, Any]] = [{**values, **tensors} for tensors in (given, other)]
        before, after = (pattern.reference(**one) for one in settings_of)
        if before.dim() != 4 or before.shape[2] != shape.queries:
            return [0]
        differs = ((before - after).abs() > 1e-9).flatten(3).any(-1).any(0).any(0)
        found |= {row for row in range(KEPT + 1) if differs[row]}
    return sorted(found)


def later(tensor: Tensor, axes: tuple[str, ...]) -> Tensor:
    """The tensor with other values at the tokens after KEPT."""
    generator = torch.Generator().manual_seed(5)
    for at, axis in enumerate(axes):
        if axis in TOKENS:
            tensor = tensor.clone()
            rest = tensor.narrow(at, KEPT + 1, tensor.shape[at] - KEPT - 1)
            if tensor.is_floating_point():
                rest.copy_(torch.randn(rest.shape, generator=generator) * 3)
            else:
                rest.add_(1)
    return tensor


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_what_is_proven_causal_does_not_change_with_later_tokens(file: Path) -> None:
    pattern = pattern_of(file)
    if not leaks(pattern.pattern):
        assert changed_rows(pattern) == []


@pytest.mark.parametrize("name", ["seer", "xattention", "full", "mosa", "bigbird", "linformer"])
def test_a_leak_is_one(name: str) -> None:
    pattern = pattern_of(next(file for file in FILES if file.stem == name))
    assert leaks(pattern.pattern)
    assert changed_rows(pattern, seeds=8)


@pytest.mark.parametrize(
    "name", ["moba", "nsa", "quest", "dsa", "window_plus_blocks", "compressed", "gated_delta", "gla"]
)
def test_a_causal_pattern_is_proven_to_be(name: str) -> None:
    assert leaks(pattern_of(next(file for file in FILES if file.stem == name)).pattern) == []


@pytest.mark.parametrize(
    ("candidates", "causal"),
    [
        ("s.stop <= i", True),
        ("s.stop <= i + 1", True),
        ("s.stop < i + 2", True),
        ("s.stop <= i + 2", False),
        ("s.start <= i", False),
        ("s.index < i // block", True),
        ("s.index <= i // block", False),
        ("s.index < i // block and s.stop <= M", True),
        ("s.index < i // block or s.index == 0", False),
        ("s.index < i // 4", False),
        ("s.index >= 0", False),
    ],
)
def test_candidates_decide_whether_pooled_keys_leak(candidates: str, causal: bool) -> None:
    text = f"""
pattern p(block: int = 8):
    axis s = blocks(j, block)
    picked = topk[s](q @ mean[j in s](k), 2 where {candidates})
    out = softmax[j](q @ k * scale where j <= i and j in picked) @ v
"""
    pattern = attnc.compile(text).p
    assert (leaks(pattern.pattern) == []) is causal
    if causal:
        assert changed_rows(pattern) == []


@pytest.mark.parametrize(
    ("line", "causal"),
    [
        ("softmax[j](q @ k where i - j in offsets and j <= i) @ v", True),
        ("softmax[j](q @ k * y[i - 1] where j <= i) @ v", True),
        ("softmax[j](q @ k * y[i + 1] where j <= i) @ v", False),
        ("softmax[j](q @ k * cumsum[t](y)[i] where j <= i) @ v", True),
        ("softmax[j](q @ k * sum[j](x) where j <= i) @ v", False),
        ("softmax[j](q @ k where j <= i - 3 or j == i) @ v", True),
        ("softmax[j](q @ k where j <= i or h == 0) @ v", False),
    ],
)
def test_reads_of_positions(line: str, causal: bool) -> None:
    text = f"""
pattern p:
    input offsets: int[z]
    input x: real[b, j]
    input y: real[b, t]
    out = {line}
"""
    pattern = attnc.compile(text).p
    assert (leaks(pattern.pattern) == []) is causal
    assert (changed_rows(pattern) == []) is causal


def test_the_place_of_a_leak_is_named() -> None:
    seer = pattern_of(ROOT / "examples" / "seer.attn")
    ((span, reason),) = leaks(seer.pattern)
    assert span.text == "mean[i in a](q)"
    assert "`a`" in reason
    first, second = describe_causality(seer.pattern)
    assert first == "causal: no, because"
    assert "mean[i in a](q)" in second


@pytest.mark.parametrize(
    ("name", "verdict"), [("half_and_half", "by default"), ("causal", "yes"), ("longformer", "no"), ("full", "no")]
)
def test_default_values_may_prove_what_others_do_not(name: str, verdict: str) -> None:
    pattern = pattern_of(ROOT / "examples" / f"{name}.attn")
    assert causality(pattern.pattern) == verdict
    if verdict == "by default":
        first, second = describe_causality(pattern.pattern)
        assert first == "causal: yes for window = 512, but not for all values, because"
        assert "i - j >= window" in second
        assert changed_rows(pattern) == []

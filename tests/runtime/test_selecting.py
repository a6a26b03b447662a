"""Kernels of selections in Triton's interpreter: the lists that torch makes in float64, and the rules for ties."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import attnc
from attnc.compiler.composition import Choose
from attnc.compiler.pipeline import compose
from attnc.compiler.schedule_selecting import HELD, held, selecting_shape
from attnc.runtime.compute.arrays import Frame
from attnc.runtime.cuda import launch_selecting
from attnc.runtime.cuda.launch_selecting import most_places
from attnc.runtime.operator import choose_engine
from attnc.runtime.steps.choices import choose_topk
from attnc.runtime.steps.choose import choose, selected
from attnc.runtime.steps.composition import each, frame_of
from attnc.runtime.tools.comparison import Case, Target, compare, defaults
from attnc.runtime.tools.inputs import Shape, made_inputs
from attnc.runtime.tools.settings import Setting

TEXT = """
pattern past(block: int = 4, top: int = 3):
    axis s = blocks(j, block)
    picked = topk[s](q @ mean[j in s](k), top where s.stop <= i)
    out = softmax[j](q @ k * scale where j <= i and j in picked) @ v
pattern held(block: int = 2, top: int = 12):      # more members than a tile has, and some forced
    axis s = blocks(j, block)
    picked = topk[s](q @ max[j in s](k) - s.index / 8, top where s.start < i, force = s.index % 5 == 2)
    out = softmax[j](q @ k * scale where j <= i and j in picked) @ v
pattern pooled(size: int = 6, stride: int = 4, block: int = 8, top: int = 3):
    axis c = blocks(j, size, stride)
    axis s = blocks(j, block)
    kc = mean[j in c](k)
    p = softmax[c](q @ kc * scale where c.stop <= i + 1)
    picked = topk[s](group_sum(sum[c in s](p)), top where s.start <= i, force = s.index == 0)
    out = softmax[j](q @ k * scale where j in picked and j <= i) @ v + p @ mean[j in c](v)
pattern tight(size: int = 3, stride: int = 4, block: int = 8, top: int = 3):      # no place is of two members
    axis c = blocks(j, size, stride)
    axis s = blocks(j, block)
    p = softmax[c](q @ mean[j in c](k) where c.stop <= i + 1)
    picked = topk[s](group_sum(sum[c in s](p)), top where s.start <= i)
    out = softmax[j](q @ k * scale where j in picked and j <= i) @ v + p @ mean[j in c](v)
pattern loose(size: int = 9, stride: int = 4, block: int = 6, top: int = 3):      # places begin unevenly in members
    axis c = blocks(j, size, stride)
    axis s = blocks(j, block)
    p = softmax[c](q @ mean[j in c](k) where c.stop <= i + 1)
    picked = topk[s](group_sum(sum[c in s](p)), top where s.start <= i and i < s.start + 60)
    out = softmax[j](q @ k * scale where j in picked and j <= i) @ v + p @ mean[j in c](v)
pattern late_start(size: int = 2, stride: int = 1, block: int = 1, top: int = 3):  # far from the first members
    axis c = blocks(j, size, stride)
    axis s = blocks(j, block)
    p = softmax[c](q @ mean[j in c](k) where c.stop <= i + 1)
    picked = topk[s](group_sum(sum[c in s](p)), top where s.start <= i and i < s.start + 20)
    out = softmax[j](q @ k * scale where j in picked and j <= i) @ v + p @ mean[j in c](v)
pattern weighed(block: int = 4, top: int = 3):    # by weights over the blocks themselves, summed or as they are
    axis s = blocks(j, block)
    p = softmax[s](q @ mean[j in s](k) where s.stop <= i)
    picked = topk[s](group_sum(p), top where s.start <= i)
    out = softmax[j](q @ k * scale where j in picked and j <= i) @ v + p @ mean[j in s](v)
pattern likeliest(block: int = 4, top: int = 3):
    axis s = blocks(j, block)
    picked = topk[s](softmax[s](q @ mean[j in s](k) where s.stop <= i), top where s.stop <= i)
    out = softmax[j](q @ k * scale where j in picked and j <= i) @ v
pattern tokens(top: int = 9):                     # an indexer with heads of its own
    input iq: real[b, n, i, x]
    input ik: real[b, j, x]
    input iw: real[b, n, i]
    picked = topk[j](iw @ relu(iq @ ik), top where j <= i)
    out = softmax[j](q @ k * scale where j in picked) @ v
pattern summed(block: int = 5, top: int = 2):     # over the tokens of a block, one choice for a block of queries
    axis a = blocks(i, 4)
    axis s = blocks(j, block)
    score = sum[j in s](mean[i in a](q) @ k)
    own = i // 4
    picked = topk[s](score[own], top where s.start <= 4 * own)
    out = softmax[j](q @ k * scale where j <= i and j in picked) @ v
pattern bounds(page: int = 3, top: int = 4):
    axis s = blocks(j, page)
    bound = sum[d](max(q * min[j in s](k), q * max[j in s](k)))
    picked = topk[s](bound, top where s.stop <= i)
    out = softmax[j](q @ k * scale where j <= i and j in picked) @ v
pattern given(top: int = 5, each: int = 3):       # scores as they are given
    input worth: real[b, h, j]
    picked = topk[j](worth, top where j <= i, force = j % each == 1)
    out = softmax[j](q @ k * scale where j in picked) @ v
pattern worths(block: int = 6, top: int = 3):     # summed over the tokens of a block
    input worth: real[b, h, j]
    axis s = blocks(j, block)
    picked = topk[s](sum[j in s](worth * worth), top where s.start <= i)
    out = softmax[j](q @ k * scale where j in picked) @ v
pattern late(block: int = 4, top: int = 2):       # what no kernel takes: weights that nothing else sums by
    axis s = blocks(j, block)
    picked = topk[s](group_sum(sum[j in s](softmax[j](q @ k where j <= i))), top)
    out = softmax[j](q @ k * scale where j in picked) @ v
"""
PATTERNS = attnc.compile(TEXT)
SHAPES = {
    "plain": Shape(2, 4, 2, 35, 35, 7, 3),
    "last queries": Shape(1, 2, 1, 9, 77, 20, 5),
    "one": Shape(1, 1, 1, 1, 1, 3, 3),
    "even": Shape(1, 4, 4, 32, 64, 16, 16),
}
KERNEL = (
    *("past", "held", "pooled", "tight", "loose", "late_start", "weighed", "likeliest"),
    *("tokens", "summed", "bounds", "given", "worths"),
)
INTERPRETER = Target("interpreter", "triton", "cpu", torch.float32)


@dataclass
class Found:
    """A selection of a call: its step and what the step finds."""

    step: Choose
    frame: Frame


def found(name: str, shape: Shape, dtype: torch.dtype, worth: Tensor | None = None, **parameters: int) -> Found:
    """The selection of a pattern with drawn tensors, none of which is contiguous."""
    pattern = getattr(PATTERNS, name)
    values = {"scale": shape.width**-0.5, **defaults(pattern), **parameters}
    made = made_inputs(pattern.pattern, shape, values, dtype=torch.float32)
    tensors = {"q": made.q, "k": made.k, "v": made.v, **made.inputs, **({} if worth is None else {"worth": worth})}
    tensors = {key: torch.stack([one, one], -1)[..., 0].to(dtype) for key, one in tensors.items() if one is not None}
    composition = compose(pattern.pattern)
    sizes = {"b": shape.batch, "h": shape.heads, "i": shape.queries, "j": shape.keys, "t": shape.keys}
    sizes |= {"d": shape.width, "e": shape.value_width}
    for entry in composition.inputs:
        sizes |= dict(zip(entry.axes, tensors[entry.name].shape, strict=True))
    frame = frame_of(composition, tensors, values, sizes | {"offset": max(shape.keys - shape.queries, 0)})
    engine = choose_engine("auto", torch.device("cpu"))
    return next(Found(step, at) for step, at, _ in each(composition, frame, engine) if isinstance(step, Choose))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", KERNEL)
def test_lists_are_those_that_torch_makes_in_float64(name: str, shape: str) -> None:
    kernel, exact = (found(name, SHAPES[shape], dtype) for dtype in (torch.float32, torch.float64))
    lists = selected(kernel.step, kernel.frame)
    assert lists is not None
    assert torch.equal(lists, choose(exact.step, exact.frame))


@pytest.mark.parametrize("keys", [29, 300])
@pytest.mark.parametrize("each", [2, 100])
@pytest.mark.parametrize("top", [3, 11, 120])
def test_ties_and_numbers_that_are_none(keys: int, each: int, top: int) -> None:
    """Few values, so that most tie; -0.0 is 0.0, a NaN comes last, many are forced."""
    values = torch.tensor([0.0, -0.0, 1.0, -1.0, math.nan, math.inf, -math.inf, 1e-40, -2.5])
    worth = values[torch.randint(len(values), (1, 2, keys), generator=torch.Generator().manual_seed(keys))]
    kernel = found("given", Shape(1, 2, 1, 20, keys, 4, 4), torch.float32, worth, top=top, each=each)
    lists = selected(kernel.step, kernel.frame)
    i = torch.arange(20)[:, None] + keys - 20
    j = torch.arange(keys)
    allowed = (j <= i).expand(1, 2, 20, keys)
    assert lists is not None
    assert torch.equal(lists, choose_topk(worth[:, :, None].expand(allowed.shape), top, allowed, j % each == 1))


def test_scores_without_ties_that_are_cut_down() -> None:
    worth = torch.randn(1, 2, 700, generator=torch.Generator().manual_seed(1))
    kernel = found("given", Shape(1, 2, 2, 33, 700, 4, 4), torch.float32, worth, top=40, each=50)
    lists = selected(kernel.step, kernel.frame)
    allowed = (torch.arange(700) <= torch.arange(33)[:, None] + 667).expand(1, 2, 33, 700)
    assert lists is not None
    forced = torch.arange(700) % 50 == 1
    assert torch.equal(lists, choose_topk(worth[:, :, None].expand(allowed.shape), 40, allowed, forced))


def test_what_a_line_holds_does_not_grow_with_the_members() -> None:
    for width in range(1, 5000, 7):
        for members in (40, 2**20):
            kept = held(selecting_shape(128, 2, 2, members), members, width)
            assert kept.capacity <= 4 * width + HELD


@pytest.mark.parametrize("name", ["pooled", "tokens", "bounds"])
def test_whole_patterns(name: str) -> None:
    case = Case(getattr(PATTERNS, name), Shape(1, 2, 1, 19, 37, 5, 3), Setting({}, {}, {}))
    assert not [outcome for outcome in compare(case, INTERPRETER) if not outcome.agrees]


def test_lists_that_no_kernel_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    made = found("past", SHAPES["plain"], torch.float32)
    monkeypatch.setattr(launch_selecting, "MOST", 2)
    assert selected(made.step, made.frame) is None
    assert choose(made.step, made.frame).shape[-1] == 3


def test_what_no_kernel_takes_says_why() -> None:
    made = found("late", SHAPES["plain"], torch.float32)
    assert selected(made.step, made.frame) is None
    assert made.step.reason == "no attention before it sums values by the weights of its score"


@pytest.mark.parametrize("member", [1, 4, 6, 64])
@pytest.mark.parametrize("width", [1, 3, 32, 64])
@pytest.mark.parametrize("stride", [1, 4, 16, 64])
def test_the_most_places_that_overlap_a_member(member: int, width: int, stride: int) -> None:
    def overlapping(start: int) -> int:
        places = range(start + member)
        return sum(place * stride < start + member and place * stride + width > start for place in places)

    # Members that begin width or more tokens in have all of theirs, and begin in every way within lcm(member, stride)
    starts = [member * n for n in range(-(-width // member), -(-width // member) + stride)]
    assert most_places(member, width, stride) == max(map(overlapping, starts))

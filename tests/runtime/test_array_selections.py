"""Selections over whole arrays, asked in every way, against the float64 reference."""

from __future__ import annotations

import pytest
import torch

import attnc
from attnc.compiler.composition import Compute
from attnc.runtime.tools.comparison import Case, Target, compare
from attnc.runtime.tools.inputs import Shape
from attnc.runtime.tools.settings import Setting

HEAD = """pattern p(n: int = 3, block: int = 4, share: real = 0.4):
    input by_head: real[b, i, h]
    input by_token: real[b, h, t]
    input gate: real[b, i, 5]
    input counts: int[h]
    input columns: int[h, y]
    axis s = blocks(j, block)
    axis c = blocks(j, block, 2)
    blocks_by = mean[j in s](k @ k)
    strided_by = mean[j in c](k @ k)
    out = (if {} then 2.0 else 0.5) * mean[j](v)
"""
ASKED = [
    "h in topk[h](by_head, 2)",
    "h in topk[h](by_head, 2 where by_head > 0, force = h == 1)",
    "h in topk[h](by_head, 1 + i % 3)",
    "h in threshold[h](by_head, 0.25, force = h == 0)",
    "h in mass[h](sigmoid(by_head), share)",
    "h in mass[h](sigmoid(by_head), share where h > 0, force = h == 2)",
    "i in topk[t](by_token, n)",
    "i in topk[t](by_token, counts[h] % 5)",
    "i + 1 in topk[t](by_token, n)",
    "i in threshold[t](by_token, 0.5 where t % 2 == 0)",
    "2 in topk[5](gate, n)",
    "argmax[5](gate where gate > 0) == 2",
    "argmax[5](gate where gate > 1000) == -1",
    "argmax[h](by_head) == h",
    "argmax[t](by_token) == i",
    "i in topk[s](blocks_by, 2)",
    "i // block in topk[s](blocks_by, 2)",
    "i in topk[c](strided_by, 2)",
    "i in columns[h]",
]
SHAPES = (Shape(1, 1, 1, 1, 1, 4, 4), Shape(2, 4, 2, 23, 23, 4, 6), Shape(1, 4, 4, 5, 17, 4, 4))


@pytest.mark.parametrize("asked", ASKED)
def test_agrees_with_the_reference(asked: str) -> None:
    pattern = attnc.compile(HEAD.format(asked)).p
    assert all(isinstance(step, Compute) for step in pattern.program.composition.steps)
    for shape in SHAPES:
        target = Target("executor", "executor", "cpu", torch.float64)
        outcomes = compare(Case(pattern, shape, Setting()), target)
        assert [outcome for outcome in outcomes if not outcome.agrees] == []


def test_ties_go_to_the_lowest_and_nan_comes_last() -> None:
    pattern = attnc.compile(HEAD.format("h in topk[h](by_head, 2)")).p
    q = torch.zeros(1, 5, 1, 2)
    v = torch.ones(1, 5, 1, 1)
    router = torch.tensor([1.0, torch.nan, 1.0, -torch.inf, 1.0]).view(1, 1, 5)
    inputs = {
        "by_head": router,
        "by_token": torch.zeros(1, 5, 1),
        "gate": torch.zeros(1, 1, 5),
        "counts": torch.zeros(5, dtype=torch.int64),
        "columns": torch.zeros(5, 1, dtype=torch.int64),
    }
    assert pattern(q, q, v, **inputs).flatten().tolist() == [2.0, 0.5, 2.0, 0.5, 0.5]

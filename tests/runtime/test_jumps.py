"""Tensors at which a function jumps say nothing, so others are drawn; what is wrong stays wrong."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import attnc
from attnc.runtime.pattern import CompiledPattern
from attnc.runtime.tools.comparison import Case, Outcome, Target, compare, compare_all
from attnc.runtime.tools.inputs import Shape
from attnc.runtime.tools.settings import Setting

EXAMPLES = Path(__file__).parents[2] / "examples"
BFLOAT16 = Target("executor", "executor", "cpu", torch.bfloat16)
FLOAT32 = Target("executor", "executor", "cpu", torch.float32)


def tied() -> Case:
    """The first tensors of this case have two blocks whose scores differ by 8e-9 of their size."""
    pattern = attnc.load(EXAMPLES / "routed_by_state.attn").patterns["routed_by_state"]
    return Case(pattern, Shape(2, 4, 4, 131, 131, 64, 64), Setting({"block": 16, "top": 2}))


def test_a_tie_between_blocks_is_a_jump_and_is_passed_over() -> None:
    case = tied()
    off = [one for one in compare(case, BFLOAT16, gradients=False) if not one.agrees]
    assert off
    assert all(one.at_a_jump for one in off)
    passed_over: list[Outcome] = []
    assert all(one.agrees for one in compare_all([case], BFLOAT16, passed_over=passed_over))
    assert {one.of for one in passed_over} >= {"out"}


@pytest.mark.parametrize("name", ["causal", "routed_by_state"])
def test_what_is_wrong_is_told(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pattern = attnc.load(EXAMPLES / f"{name}.attn").patterns[name]
    outputs = CompiledPattern.outputs

    def wrong(self: CompiledPattern, *given: Any) -> tuple[Tensor, Tensor]:
        out, lse = outputs(self, *given)
        return out * 1.1, lse

    monkeypatch.setattr(CompiledPattern, "outputs", wrong)
    setting = Setting({} if name == "causal" else {"block": 16, "top": 2})
    passed_over: list[Outcome] = []
    found = compare_all([Case(pattern, Shape(1, 2, 2, 60, 60, 16, 16), setting)], FLOAT32, passed_over=passed_over)
    assert {one.of for one in found if not one.agrees} >= {"out"}
    assert passed_over == []

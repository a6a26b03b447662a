"""The generated kernels, forward and backward, in Triton's interpreter: leaves of every side, rows in parts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import attnc
from attnc.compiler import schedule
from attnc.runtime.cuda import kernel_call, launch, launch_backward, work
from attnc.runtime.tools.comparison import Case, Target, compare
from attnc.runtime.tools.inputs import Shape
from attnc.runtime.tools.settings import Setting
from tests.runtime.test_gradients import NAMES, TEXT

EXAMPLES = Path(__file__).parents[2] / "examples"
TARGET = Target("interpreter", "triton", "cpu", torch.float32)
CUT: list[tuple[str, dict[str, Any], Shape]] = [
    ("causal", {}, Shape(1, 4, 2, 150, 150, 16, 24)),
    ("longformer", {"radius": 5, "globals": 3}, Shape(2, 2, 1, 130, 130, 24, 16)),
    ("strided", {"local": 6, "stride": 5}, Shape(1, 2, 2, 97, 131, 16, 16)),
    ("bigbird", {"block": 40, "randoms": 1}, Shape(1, 1, 1, 90, 90, 16, 16)),
    ("prefix_lm", {}, Shape(2, 2, 2, 70, 70, 16, 16)),
]


LOOPS: list[tuple[str, dict[str, Any], Shape]] = [
    ("causal", {}, Shape(1, 4, 2, 77, 131, 16, 24)),
    ("causal", {}, Shape(1, 1, 1, 1, 1, 16, 16)),
    ("sliding_window", {"window": 70}, Shape(1, 2, 1, 150, 150, 24, 16)),
    ("dilated_window", {"window": 40, "dilation": 3}, Shape(1, 1, 1, 201, 201, 16, 16)),
]


@pytest.mark.filterwarnings("ignore:(divide by zero|invalid value) encountered:RuntimeWarning")  # on dead pairs
@pytest.mark.parametrize("name", [name for name in NAMES if name != "tables"])
def test_leaves_of_every_side(name: str) -> None:
    pattern = getattr(attnc.compile(TEXT, name="gradients.attn"), name)
    case = Case(pattern, Shape(1, 4, 2, 45, 45, 16, 24), Setting())
    assert [outcome for outcome in compare(case, TARGET) if not outcome.agrees] == []


def test_a_gradient_that_no_kernel_gives_is_refused() -> None:
    pattern = attnc.compile(TEXT, name="gradients.attn").tables
    with pytest.raises(attnc.AttnError, match="varies over tokens"):
        compare(Case(pattern, Shape(1, 2, 2, 20, 20, 16, 16), Setting()), TARGET)


@pytest.mark.parametrize("scale", [1.5, -0.5])
def test_a_condition_reads_the_products_themselves(scale: float) -> None:
    """Not what the score made of them: the kernel scales, or adds to, the products of its tile."""
    for score in ("q @ k * scale", "q @ k * scale + 0.1 * (i - j)"):
        text = f"pattern p:\n    out = softmax[j]({score} where j <= i and q @ k > 0.3) @ v\n"
        case = Case(attnc.compile(text).p, Shape(1, 2, 2, 40, 40, 16, 16), Setting({"scale": scale}))
        assert [outcome for outcome in compare(case, TARGET) if not outcome.agrees] == []


@pytest.mark.parametrize(
    ("name", "parameters", "shape"), LOOPS, ids=lambda given: given if isinstance(given, str) else ""
)
def test_other_orders(name: str, parameters: dict[str, Any], shape: Shape, monkeypatch: pytest.MonkeyPatch) -> None:
    """Full tiles in a loop of their own; the products of a tile of queries the other way round."""
    tile = replace(kernel_call.INTERPRETED, block_n=16, overlap=True, apart=True)
    for module in (launch, launch_backward):
        monkeypatch.setattr(module, "INTERPRETED", tile)
    pattern = getattr(attnc.load(EXAMPLES / f"{name}.attn"), name)
    outcomes = compare(Case(pattern, shape, Setting(parameters)), TARGET)
    assert [outcome for outcome in outcomes if not outcome.agrees] == []


@pytest.mark.parametrize(
    ("name", "parameters", "shape"), CUT, ids=lambda given: given if isinstance(given, str) else ""
)
def test_parts_of_long_rows_add_up(
    name: str, parameters: dict[str, Any], shape: Shape, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every tile of a few key tiles is cut, of queries and of keys."""
    monkeypatch.setattr(schedule, "SMALLEST_PART", 1)
    monkeypatch.setattr(schedule, "PARTS_PER_PROCESSOR", 100)
    lists: list[Any] = []

    def noted(*arguments: Any) -> Any:
        lists.append(made(*arguments))
        return lists[-1]

    made = work.program_list
    for module in (launch, launch_backward):
        monkeypatch.setattr(module, "program_list", noted)
    pattern = getattr(attnc.load(EXAMPLES / f"{name}.attn"), name)
    outcomes = compare(Case(pattern, shape, Setting(parameters)), TARGET)
    assert [outcome for outcome in outcomes if not outcome.agrees] == []
    cut = [listed for listed in lists if listed is not None and listed.slots]
    assert bool(cut) == (name != "prefix_lm"), "what a tensor steers is not cut"
    assert len(cut) >= 3 or name == "prefix_lm", "forward, rows and keys"

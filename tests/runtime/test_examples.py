"""Every example on every back end of this machine, at one awkward shape (`attnc check` tries many)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import attnc
from attnc.runtime.tools.comparison import Case, Target, cases, compare
from attnc.runtime.tools.settings import Setting, settings

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.attn"))
TARGETS = [
    Target("executor", "executor", "cpu", torch.float64),
    Target("executor", "executor", "cpu", torch.bfloat16),
    Target("interpreter", "triton", "cpu", torch.float32),
]


def small_case(path: Path) -> Case:
    """The first case of several heads and rows, with the first setting that the file or `shrunken` gives."""
    found = attnc.load(path).main
    assert found is not None
    lines = settings(found.pattern, "check", found.known)
    return next(case for case in cases(found, Setting(), lines) if case.shape.heads == 3)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_agrees_with_the_reference(path: Path) -> None:
    case = small_case(path)
    for target in TARGETS:
        outcomes = compare(case, target, gradients=target.label == "executor")
        assert [outcome for outcome in outcomes if not outcome.agrees] == []


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_interpreted_gradients_agree(path: Path) -> None:
    assert [outcome for outcome in compare(small_case(path), TARGETS[-1]) if not outcome.agrees] == []


@pytest.mark.gpu
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_agrees_on_a_gpu(path: Path, dtype: torch.dtype) -> None:
    found = attnc.load(path).main
    assert found is not None
    for case in cases(found, Setting(), settings(found.pattern, "check", found.known)):
        outcomes = compare(case, Target("cuda", "triton", "cuda", dtype))
        assert [outcome for outcome in outcomes if not outcome.agrees] == []

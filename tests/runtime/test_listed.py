"""Listed branches against dense softmax, forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from attnc.compiler.plan import Plan
from attnc.runtime import launch, launch_backward, launch_listed, listed_executor, listed_tiles
from attnc.runtime.backward import Engine, Gradients, differentiable
from attnc.runtime.call import Call
from attnc.runtime.executor import execute
from attnc.runtime.executor_backward import branch_backward
from tests.runtime.listed_cases import Case, Made, listed_plan, sources

Execute = Callable[[Plan, Call], tuple[Tensor, Tensor]]

CASES = {
    "own_heads": Case(2, 4, 2, 13, 13, 5, 3, 4, 1, 3, 4),
    "group": Case(1, 4, 2, 17, 17, 4, 4, 4, 1, 2, 2),
    "all_heads": Case(2, 2, 1, 9, 30, 4, 6, 1, 1, 7, 1),
    "wide": Case(1, 2, 2, 40, 50, 4, 4, 16, 1, 2, 2),
    "wide_group": Case(1, 4, 2, 41, 50, 4, 4, 16, 1, 2, 2),
    "row_blocks": Case(1, 2, 1, 21, 30, 4, 4, 4, 4, 2, 2),
    "wide_rows": Case(1, 2, 1, 21, 40, 4, 4, 16, 4, 2, 2),
    "more_rows": Case(1, 1, 1, 20, 9, 4, 4, 2, 1, 2, 1),
    "one": Case(1, 1, 1, 1, 1, 1, 1, 4, 1, 1, 1),
}
TEXTS = {
    "plain": dict(condition="PICKED", score="q @ k * scale"),
    "causal": dict(condition="PICKED and j <= i", score="q @ k * scale"),
    "union": dict(condition="PICKED and j <= i", score="q @ k * scale", near="0 <= i - j and i - j < 3"),
    "leaves": dict(
        condition="PICKED and j <= i",
        score="2 * tanh(q @ k * scale * r[h] + x[j] - slope * (i - j) / 16) + table[min(abs(i - j), 4)]",
        inputs="    input r: real[h]\n    input slope: real[b, h, i]\n    input x: real[b, h, t]\n"
        "    input table: real[h, y]\n",
    ),
}


def extras(text: str, case: Case) -> dict[str, Tensor]:
    """The inputs of a text."""
    if text != "leaves":
        return {}
    generator = torch.Generator().manual_seed(7)
    b, h = case.batch, case.heads
    shapes = {"r": (h,), "slope": (b, h, case.rows), "x": (b, h, case.keys), "table": (h, 5)}
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


def made(name: str, text: str) -> Made:
    case = CASES[name]
    dense, pattern = sources(**TEXTS[text])
    plan = listed_plan(pattern, blocks=case.block > 1, lines=case.lines > 1)
    return Made(case, dense, plan, case.members(3), {**case.tensors(), **extras(text, case)})


def check(one: Made, run: Execute, engine: Engine, dtype: torch.dtype) -> None:
    """Result and gradients against the reference."""
    case, call = one.case, one.call(dtype)
    shape = (case.batch, case.heads, case.rows, case.value)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected, gradients = one.expected(weight.double())
    out, lse = run(one.plan, call)
    close(out, expected)
    assert set(gradients) == set(differentiable(one.plan))
    found = Gradients(one.plan, call, engine, list(gradients)).of(out, lse, weight, None)
    for name, gradient in gradients.items():
        close(found[name], gradient)


def close(found: Tensor, expected: Tensor) -> None:
    if found.dtype == torch.float64:
        torch.testing.assert_close(found, expected)
    else:
        torch.testing.assert_close(found.double(), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", CASES)
def test_executor(name: str, text: str) -> None:
    check(made(name, text), execute, Engine(execute, branch_backward), torch.float64)


@pytest.mark.parametrize("name", CASES)
def test_executor_in_small_steps(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listed_tiles, "ELEMENTS", 64)
    monkeypatch.setattr(listed_executor, "CHUNK", 500)
    check(made(name, "leaves"), execute, Engine(execute, branch_backward), torch.float64)


KERNELS = Engine(launch.execute, launch_backward.branch_backward)


# The interpreter is slow: each case with one text, each text with both ways of gathering.
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("own_heads", "plain"),
        ("group", "leaves"),
        ("all_heads", "causal"),
        ("wide", "leaves"),
        ("wide_group", "union"),
        ("row_blocks", "union"),
        ("wide_rows", "leaves"),
        ("more_rows", "plain"),
        ("one", "union"),
    ],
)
def test_kernels(name: str, text: str) -> None:
    check(made(name, text), launch.execute, KERNELS, torch.float32)


def test_kernels_in_small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_listed, "PARTS", 500)
    check(made("wide_rows", "union"), launch.execute, KERNELS, torch.float32)

"""Listed branches against dense softmax, forward and backward."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from attnc.runtime.backward import Engine, Gradients, differentiable
from attnc.runtime.executor import execute
from attnc.runtime.executor_backward import branch_backward, branch_outputs

SPEC = importlib.util.spec_from_file_location("listed_cases", Path(__file__).with_name("listed.py"))
assert SPEC is not None and SPEC.loader is not None
import sys
listed = importlib.util.module_from_spec(SPEC)
sys.modules["listed_cases"] = listed
SPEC.loader.exec_module(listed)
Case = listed.Case

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
        score="2 * tanh(q @ k * scale * r[h] + x[j] - slope * (i - j)) + table[min(abs(i - j), 4)]",
        inputs="    input r: real[h]\n    input slope: real[b, h, i]\n    input x: real[b, h, t]\n"
        "    input table: real[h, y]\n",
    ),
}


def extras(name: str, case: Case) -> dict[str, torch.Tensor]:  # type: ignore[valid-type]
    if name != "leaves":
        return {}
    g = torch.Generator().manual_seed(7)
    b, h, n, m = case.batch, case.heads, case.rows, case.keys
    shapes = {"r": (h,), "slope": (b, h, n), "x": (b, h, m), "table": (h, 5)}
    return {key: torch.randn(shape, generator=g, dtype=torch.float64) for key, shape in shapes.items()}


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", CASES)
def test_result_and_gradients_are_those_of_dense_softmax(name: str, text: str) -> None:
    case = CASES[name]
    dense, pattern = listed.sources(**TEXTS[text])
    plan = listed.listed_plan(pattern, case.block > 1, case.lines > 1)
    members = case.members(3)
    qkv = tuple(x.requires_grad_() for x in case.tensors(torch.float64))
    extra = {key: value.requires_grad_() for key, value in extras(text, case).items()}
    want = listed.expected(dense, case, members, qkv, extra)
    weight = torch.randn(want.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    given = [*qkv, *extra.values()]
    wanted = torch.autograd.grad((want * weight).sum(), given, allow_unused=True, materialize_grads=True)
    call = listed.listed_call(plan, case, members, tuple(x.detach() for x in qkv), {k: v.detach() for k, v in extra.items()})
    out, lse = execute(plan, call)
    torch.testing.assert_close(out, want.detach())
    names = ["q", "k", "v", *extra]
    assert set(names) == set(differentiable(plan))
    engine = Engine(branch_outputs, branch_backward)
    whole = lse.logsumexp(0, keepdim=True) if plan.merged else lse
    made = Gradients(plan, call, engine, names).of(out, whole, weight, None)
    for key, gradient in zip(names, wanted, strict=True):
        torch.testing.assert_close(made[key], gradient, msg=lambda m, key=key: f"{key}: {m}")

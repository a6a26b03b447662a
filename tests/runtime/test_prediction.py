"""The cost model against what is counted pair by pair, and what `explain` prints of it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

import attnc
from attnc.compiler.loads import KNOWN, Amount
from attnc.runtime.clock import Launched
from attnc.runtime.cpu.executor import live_pairs
from attnc.runtime.operator import Prepared
from attnc.runtime.tools.explanation import explain
from attnc.runtime.tools.measured import Measured, read_rates
from attnc.runtime.tools.prediction import aligned, branch_live, lines, table

EXAMPLES = Path(__file__).parents[2] / "examples"
H100 = KNOWN["NVIDIA H100 80GB HBM3"]
FIXED = ("causal", "sliding_window", "strided", "dilated_window", "streaming", "longformer", "bigbird", "prefix_lm")


def prepared(name: str, rows: int = 70, keys: int = 90, **settings: Any) -> Prepared:
    pattern = attnc.load(EXAMPLES / f"{name}.attn").patterns[name]
    q, k = torch.randn(2, 4, rows, 8), torch.randn(2, 2, keys, 8)
    return pattern.prepared(q, k, torch.randn(2, 2, keys, 4), settings)


@pytest.mark.parametrize("name", FIXED)
def test_live_pairs_are_those_that_tiles_count(name: str) -> None:
    call = prepared(name, prefix=torch.tensor([3, 50])) if name == "prefix_lm" else prepared(name)
    plan = call.program.plan
    found = call.call(plan)
    assert sum(branch_live(plan, branch, found) for branch in plan.branches) == live_pairs(plan, found)


def test_operations_and_bytes_of_causal_attention() -> None:
    live = 2 * 4 * sum(i + 1 for i in range(20, 90))
    rows, keys = 2 * 4 * 70, 2 * 2 * 90
    found = {line.load: line.amount for line in lines(prepared("causal"))}
    read = 4 * (rows + keys) * (8 + 4)
    assert found["forward_0"] == Amount(2 * (8 + 4) * live, live, read + 4 * rows, 1)
    assert found["backward_rows_0"] == Amount((4 * 8 + 2 * 4) * live, live, read + 8 * rows + 4 * rows * 8, 1)
    assert found["backward_keys_0"] == Amount(4 * (8 + 4) * live, live, read + 8 * rows + 4 * keys * (8 + 4), 1)


@pytest.mark.parametrize("name", ["causal", "strided", "half_and_half", "gated_delta", "moba"])
def test_a_prediction_is_not_below_its_floor(name: str) -> None:
    pattern = attnc.load(EXAMPLES / f"{name}.attn").patterns[name]
    shape = {"b": 2, "h": 4, "i": 90, "j": 90, "t": 90}
    extra = [entry for entry in pattern.pattern.inputs if entry.name not in "qkv"]
    given = {entry.name: -torch.rand([shape[axis] for axis in entry.axes]) for entry in extra}
    found = list(lines(prepared(name, 90, 90, **given)))
    assert found
    for line in found:
        assert line.tiles is None or line.tiles.waste >= 1
        assert line.amount.moved > 0
        assert H100.predicted(line.amount, line.itemsize, line.tiles) > H100.floor(line.amount, line.itemsize) > 0


def test_measured_times_stand_beside_their_lines() -> None:
    found = list(lines(prepared("causal")))
    step = found[0].step
    times = Measured(
        [Launched("", "forward_0", 1.0), Launched("", "combine_parts", 0.25)],
        [
            Launched("", "row_products", 0.5),
            Launched("", "backward_rows_0", 2.0),
            Launched("", "backward_keys_0_0", 3.0),
            Launched("", "backward_keys_0_1", 4.0),
        ],
        5.0,
        11.0,
        step,
    )
    rows = {row[0]: row[-1] for row in table(found, H100, times)}
    assert rows == {
        "step": "measured",
        f"{step} forward_0": "1.0000",
        f"{step} row_products": "0.5000",
        f"{step} backward_rows_0": "2.0000",
        f"{step} backward_keys_0": "7.0000",
        f"{step} combine_parts": "0.2500",
        "a call, repeated": "5.0000",
        "its gradients, repeated": "11.0000",
    }


def test_without_rates_there_are_no_times() -> None:
    head, *rows = table(list(lines(prepared("causal"))), None, None)
    assert head == ["step", "launches", "GFLOP", "MB"]
    assert len(rows) == 4
    assert len({len(line) for line in aligned([["a", "bc"], ["def", "g"]])}) == 1


def test_explain_names_the_device() -> None:
    pattern = attnc.compile("pattern c:\n    out = softmax[j](q @ k where j <= i) @ v\n").c
    text = pattern.explain(*torch.randn(3, 1, 1, 9, 8))
    assert "milliseconds of float32 on NVIDIA H100 80GB HBM3 (the CPU's executor is not predicted)" in text
    assert "predicted" in text


def test_steps_without_a_model_are_named() -> None:
    call = prepared("lolcats", 20, 20, w=torch.randn(4, 8, 8))
    assert explain(call).endswith("not in the model: 6_extreme")


def test_kernels_take_no_float64() -> None:
    pattern = attnc.compile("pattern c:\n    out = softmax[j](q @ k where j <= i) @ v\n").c
    text = pattern.explain(*torch.randn(3, 1, 1, 9, 8, dtype=torch.float64))
    assert "not predicted: kernels take no float64" in text


def test_rates_survive_the_disk() -> None:
    assert read_rates(json.dumps(asdict(H100))) == H100

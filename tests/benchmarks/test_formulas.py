"""The formulas that low-rank patterns are timed beside mean the same, and every row of the suite has one."""

from __future__ import annotations

import pytest
import torch

from benchmarks.formulas import FORMULAS, mla_absorbed
from benchmarks.suites import lowrank
from benchmarks.work import Problem, Work

WORKS = lowrank.works("cpu")


@pytest.mark.parametrize("work", WORKS, ids=lambda work: work.name)
def test_the_formula_is_the_pattern(work: Work) -> None:
    problem = Problem(work, work.small, "cpu", torch.float64)
    v = None if work.pattern == "mla" else problem.v
    expected = problem.pattern.reference(problem.q, problem.k, v, **problem.settings)
    found = FORMULAS[work.pattern](problem.q, problem.k, v, **problem.settings)
    torch.testing.assert_close(found, expected)
    if work.pattern == "mla":
        torch.testing.assert_close(mla_absorbed(problem.q, problem.k, None, **problem.settings), expected)


def test_rows_for_a_gpu_are_32k_long() -> None:
    works = lowrank.works("cuda")
    assert {work.timed.shape.keys for work in works} == {32768}
    assert {work.pattern for work in works} == set(FORMULAS)
    assert all(work.peers == lowrank.GPU_PEERS for work in works)

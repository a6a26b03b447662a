"""Conditions taken apart: what groups rows and keys, who takes part, and what is left; which patterns are regrouped."""

from __future__ import annotations

import pytest

from attnc.compiler.build import build
from attnc.compiler.composition import Attend, Regroup
from attnc.compiler.describe import formula
from attnc.compiler.grouping import Partition, partition
from attnc.compiler.ir import Graph
from attnc.compiler.pipeline import compose
from attnc.compiler.simplify import simplify
from attnc.dsl.check import check
from attnc.dsl.source import Source
from attnc.dsl.terms import Pattern

HEAD = """pattern p(n: int = 3):
    input route: real[b, t, 4]
    input worth: real[b, h, t]
    input doc: int[b, t]
    input columns: int[h, y]
    input router: real[b, i, 3]
    group = argmax[4](route)
    kept = topk[t](worth, n)
    chosen = argmax[3](router)
"""


def pattern(body: str) -> Pattern:
    return check(Source("<text>", HEAD + body))["p"]


def taken_apart(condition: str) -> Partition:
    graph = Graph()
    root = simplify(graph, build(graph, pattern(f"    out = softmax[j](q @ k where {condition}) @ v\n")))
    weights = next(arg for arg in root.args if arg.op == "softmax")
    return partition(graph, weights.args[1], graph.literal(True), "i", "j")


@pytest.mark.parametrize(
    ("condition", "same", "rows", "keys", "rest"),
    [
        ("j <= i", False, 0, 0, [1]),
        ("j <= i and group[i] == group[j]", True, 0, 0, [1]),
        ("group[j] == group[i] and (i - j < n or j % n == 0)", True, 0, 0, [1, 1]),
        ("group[i] == group[j] or i == j", False, 0, 0, [1, 1]),  # not of every live pair
        ("i in kept and j in kept and j <= i", False, 1, 1, [1]),
        ("group[i] == group[j] and j in kept", True, 0, 1, [0]),
        ("worth[i] > 0.5 and j <= i", False, 1, 0, [1]),
        ("doc[i] == doc[j] and j <= i", False, 0, 0, [2]),  # packed documents are in order already
        ("j in columns[h] and h > 0", False, 0, 0, [2]),
        ("group[i] == group[j] and group[i] == 2 * group[j]", True, 0, 0, [1]),  # the second is a mask
    ],
)
def test_a_condition_is_taken_apart(condition: str, same: bool, rows: int, keys: int, rest: list[int]) -> None:
    found = taken_apart(condition)
    assert (found.same is not None) is same
    assert (len(found.rows), len(found.keys)) == (rows, keys)
    assert [len(one) for one in found.rest] == rest


ATTEND = "(softmax[j](q @ k{}) @ v)"


@pytest.mark.parametrize(
    ("result", "moves"),
    [
        (ATTEND.format(""), [None]),
        (f"if h < H // 2 then {ATTEND.format('')} else {ATTEND.format(' where j <= i')}", [None, None]),
        (f"if chosen == 0 then {ATTEND.format('')} else {ATTEND.format(' where j <= i')}", ["rows", "rows"]),
        (f"router[0] * {ATTEND.format('')}", [None]),
        (ATTEND.format(" where j in kept"), ["keys"]),
        (ATTEND.format(" where group[i] == group[j]"), ["both"]),
        (ATTEND.format(" where i - j in columns[h] and worth[i] > 0"), [None]),  # a list of distances stays a list
    ],
)
def test_what_moves(result: str, moves: list[str | None]) -> None:
    steps = compose(pattern(f"    out = {result}\n")).steps
    found: list[str | None] = []
    for step in steps:
        if isinstance(step, Attend):
            found.append(None)
        if isinstance(step, Regroup):
            both = step.rows is not None and step.keys is not None
            found.append("both" if both else "rows" if step.rows is not None else "keys")
    assert found == moves


def test_bounds_of_positions_become_bounds_of_slots() -> None:
    body = "    out = softmax[j](q @ k where group[i] == group[j] and 0 <= i - j < n and j % 2 == 0) @ v\n"
    (step,) = (step for step in compose(pattern(body)).steps if isinstance(step, Regroup))
    (one,) = step.ranges
    assert one.low is not None
    assert one.high is not None
    assert (formula(one.low), formula(one.high)) == ("i + 1 - n", "i + 1")
    (key_set,) = step.attend.plan.branches[0].domain.key_sets
    assert one.first in formula(key_set.runs[0].outer.lo)
    assert one.last in formula(key_set.runs[0].outer.hi)
    assert "% 2 == 0" in formula(key_set.mask)

"""Live pairs in closed form are those of the condition, pair by pair."""

from __future__ import annotations

import random

import pytest

import attnc
from attnc.compiler.plan import Domain, Plan
from attnc.compiler.totals import total_keys, value_of

CONDITIONS = (
    "0 <= j",
    "j <= i",
    "i <= j",
    "0 <= i - j < w",
    "abs(i - j) <= w",
    "0 <= i - j < w * s and (i - j) % s == 0",
    "j <= i and j % s == s - 1",
    "j <= i and j % s == s - 1 and i - j >= w",
    "j <= i and (i - j < w or j % s == s - 1)",
    "j <= i and (j < s or i - j < w)",
    "j < s or abs(i - j) <= w",
    "0 <= j - i < w and j < 3 * s",
    "i - w <= j < i + s",
)
NONE = ("i // s == j // s", "j <= i and (i < s or j < w)", "(i + j) % s == 0 and j < i - w", "j <= i and j % s == 1")


def domain_of(condition: str) -> Domain:
    text = f"pattern x(w: int = 4, s: int = 3):\n    out = softmax[j](q @ k where {condition}) @ v\n"
    plan: Plan = attnc.compile(text).x.program.plan
    return plan.branches[0].domain


@pytest.mark.parametrize("condition", CONDITIONS)
def test_live_pairs(condition: str) -> None:
    total = total_keys(domain_of(condition))
    assert total is not None
    draw = random.Random(condition)
    for _ in range(60):
        keys, w, s = draw.randint(0, 24), draw.randint(0, 30), draw.randint(1, 9)
        rows = draw.randint(0, keys)
        names = {"M": keys, "N": rows, "w": w, "s": s, "abs": abs}
        pairs = ((i, j) for i in range(keys - rows, keys) for j in range(keys))
        live = sum(bool(eval(condition, names | {"i": i, "j": j})) for i, j in pairs)
        assert value_of(total, {"N": rows, "offset": keys - rows, "w": w, "s": s}) == live, names


@pytest.mark.parametrize("condition", NONE)
def test_what_has_no_such_form_says_so(condition: str) -> None:
    assert total_keys(domain_of(condition)) is None

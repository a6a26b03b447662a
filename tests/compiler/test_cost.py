"""Cost formulas: short, and true of every row."""

from __future__ import annotations

import math

import pytest

import attnc
from attnc.compiler.cost import cost_formulas, row_keys

# condition -> keys of row i
FORMULAS = {
    "j <= i": "i + 1",
    "0 <= j": "M",
    "0 <= i - j < w": "min(i + 1, w)",
    "0 <= i - j < w * s and (i - j) % s == 0": "ceil(min(i + 1, s * w) / s)",
    "j <= i and j % s == s - 1": "ceil((i + 2 - s) / s)",
    "abs(i - j) <= w": "at most 2 * w + 1",
    "j <= i and (j < s or i - j < w)": "at most min(i + 1, s) + min(i + 1, w)",
}


@pytest.mark.parametrize("condition", list(FORMULAS))
def test_keys_of_a_row(condition: str) -> None:
    text = f"pattern x(w: int = 4, s: int = 3):\n    out = softmax[j](q @ k where {condition}) @ v\n"
    (branch,) = attnc.compile(text).x.program.plan.branches
    (formula,) = row_keys(branch.domain)
    assert formula == FORMULAS[condition]
    for length, w, s in ((1, 4, 3), (9, 4, 3), (9, 20, 2), (14, 5, 1)):
        for i in range(length):
            names = {"i": i, "w": w, "s": s, "M": length, "abs": abs}
            live = sum(bool(eval(condition, names | {"j": j})) for j in range(length))
            value = eval(formula.removeprefix("at most "), names | {"min": min, "ceil": math.ceil})
            assert value == live or (formula.startswith("at most") and value >= live)


def test_every_branch_is_counted() -> None:
    near = "softmax[j](q @ k where 0 <= i - j < {}) @ v"
    text = f"pattern x:\n    out = merge({near.format(4)}, {near.format(8)})\n"
    assert cost_formulas(attnc.compile(text).x.program.plan) == [
        "live_0 = B*H * sum over i of the keys of row i:",
        "    min(i + 1, 4)",
        "live_1 = B*H * sum over i of the keys of row i:",
        "    min(i + 1, 8)",
        "FLOPs = 2*(D + E) * (live_0 + live_1)",
        "bytes = (B*H*N*(D + 2*E) + B*Hk*M*(D + E)) * itemsize + 8*B*H*N",
    ]

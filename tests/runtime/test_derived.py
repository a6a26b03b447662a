"""The tables that a prologue makes."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from attnc.compiler.pipeline import lower
from attnc.compiler.plan import Plan
from attnc.dsl.check import check
from attnc.dsl.source import Source
from attnc.runtime.call import Call, make_call
from attnc.runtime.compute.hashing import uniform
from attnc.runtime.derived import PADDING, best

BATCH, HEADS = 2, 2


@cache
def plan(text: str) -> Plan:
    return lower(check(Source("<text>", text))["p"])


def call(text: str, queries: int, keys: int, parameters: dict[str, int] | None = None, **inputs: Tensor) -> Call:
    q, k = torch.zeros(BATCH, HEADS, queries, 1), torch.zeros(BATCH, HEADS, keys, 1)
    return make_call(plan(text), q, k, k, {"scale": 1.0, **(parameters or {})}, inputs)


def table(made: Call, kind: str, part: str) -> Tensor:
    (found,) = [name for name in made.derived if name.startswith(kind) and name.endswith(f".{part}")]
    assert made.derived[found].dtype == torch.int32
    return made.derived[found]


ORDERED = """pattern p(gap: int = 0):
    input rank: int[b, t]
    out = softmax[j](q @ k where rank[j] + gap < rank[i]) @ v
"""


@given(
    st.lists(st.integers(-3, 3), min_size=1, max_size=12),
    st.sampled_from(["as drawn", "ascending", "descending"]),
    st.integers(0, 5),
    st.integers(-2, 2),
)
def test_ordered_bounds(numbers: list[int], order: str, dropped: int, gap: int) -> None:
    """The hull of the keys, all of them inside of the inner bounds; exact for a sequence that ascends or descends."""
    numbers = numbers if order == "as drawn" else sorted(numbers, reverse=order == "descending")
    keys = len(numbers)
    rows = max(keys - dropped, 1)
    rank = torch.tensor([numbers, numbers])
    made = call(ORDERED, rows, keys, {"gap": gap}, rank=rank)
    lo, hi, inner_lo, inner_hi = (table(made, "ordered_bounds", part) for part in ("lo", "hi", "inner_lo", "inner_hi"))
    for b in range(BATCH):
        for row in range(rows):
            live = [j for j in range(keys) if numbers[j] + gap < numbers[keys - rows + row]]
            hull = range(int(lo[b, row]), int(hi[b, row]))
            assert list(hull) == (list(range(live[0], live[-1] + 1)) if live else list(hull)[:0])
            inner = range(int(inner_lo[b, row]), int(inner_hi[b, row]))
            assert set(inner) <= set(live)
            if order != "as drawn":
                assert list(inner) == live


EQUAL = """pattern p:
    input doc: int[b, t]
    out = softmax[j](q @ k where doc[i] == doc[j]) @ v
"""


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=12), st.booleans(), st.integers(0, 5))
def test_equal_bounds(numbers: list[int], ordered: bool, dropped: int) -> None:
    """Sound for any sequence, exact for a sorted one."""
    numbers = sorted(numbers) if ordered else numbers
    keys = len(numbers)
    rows = max(keys - dropped, 1)
    doc = torch.tensor([numbers, numbers[::-1] if not ordered else numbers])
    made = call(EQUAL, rows, keys, doc=doc)
    lo, hi, inner_lo, inner_hi = (table(made, "equal_bounds", part) for part in ("lo", "hi", "inner_lo", "inner_hi"))
    assert lo.shape == (BATCH, rows)
    for b in range(BATCH):
        for row in range(rows):
            equal = {j for j in range(keys) if doc[b, j] == doc[b, keys - rows + row]}
            assert equal <= set(range(int(lo[b, row]), int(hi[b, row])))
            inner = set(range(int(inner_lo[b, row]), int(inner_hi[b, row])))
            assert inner <= equal
            assert not ordered or inner == equal == set(range(int(lo[b, row]), int(hi[b, row])))


LISTED = """pattern p:
    input columns: int[h, x]
    out = softmax[j](q @ k where j in columns[h]) @ v
"""


@given(st.lists(st.integers(-3, 20), min_size=3, max_size=9), st.integers(1, 15))
def test_listing(numbers: list[int], keys: int) -> None:
    columns = torch.tensor([numbers, numbers[::-1]])
    made = call(LISTED, 1, keys, columns=columns)
    listed, rank = table(made, "listing", "list"), table(made, "listing", "rank")
    entries = sorted({number for number in numbers if 0 <= number <= keys})
    padded = entries + [PADDING] * (len(numbers) - len(entries))
    ranks = [sum(entry < p for entry in entries) for p in range(keys + 2)]
    assert listed.tolist() == [padded, padded]
    assert rank.tolist() == [ranks, ranks]


def test_tabulated_is_exact_in_float64() -> None:
    """Where float32 would round a logarithm to the bucket beside."""
    text = """pattern p:
    input table: real[h, 40]
    out = softmax[j](q @ k + table[floor(log(real(max(i - j, 1))) / log(2.0) * 3.0)]) @ v
"""
    made = call(text, 9, 70, table=torch.zeros(HEADS, 40))
    found = table(made, "tabulated", "table")
    expected = [math.floor(math.log(max(distance, 1)) / math.log(2.0) * 3.0) for distance in range(-70, 71)]
    assert found.tolist() == expected
    wide = call(text, 200, 70, table=torch.zeros(HEADS, 40))
    assert len(table(wide, "tabulated", "table")) == 70 + 200 + 1


RANDOM = """pattern p(block: int = 4, n: int = 2):
    axis s = blocks(j, block)
    a = i // block
    picked = topk[s](uniform(7, a, s.index), n where abs(a - s.index) > 1 and s.stop <= M, force = s.start == 0)
    out = softmax[j](q @ k where j in picked) @ v
"""


@pytest.mark.parametrize(("queries", "keys", "count"), [(26, 26, 2), (5, 26, 3), (26, 26, 9), (26, 26, 0), (3, 3, 1)])
def test_block_list(queries: int, keys: int, count: int) -> None:
    block = 4
    made = call(RANDOM, queries, keys, {"block": block, "n": count})
    found = table(made, "block_list", "list")
    for row, line in enumerate(found.tolist()):
        candidates = [s for s in range(-(-keys // block)) if abs(row - s) > 1]
        worth = {s: float(uniform([torch.tensor(7), torch.tensor(row), torch.tensor(s)])) for s in candidates}
        ranked = sorted(candidates, key=lambda s: (s != 0, -worth[s], s))
        expected = sorted(ranked[:count])
        assert [entry for entry in line if entry >= 0] == expected
        assert line == sorted(expected) + [-1] * (len(line) - len(expected))
    assert len(found) == -(-max(queries, keys) // block)


def test_ties_go_to_the_lowest_and_forced_ones_first() -> None:
    worth = torch.tensor([[1.0, 3.0, 3.0, 3.0, 0.0]])
    allowed = torch.tensor([[True, True, True, True, True]])
    forced = torch.tensor([[False, False, False, False, True]])
    assert best(worth, allowed, forced, 3).tolist() == [[1, 2, 4]]
    assert best(worth, allowed & ~forced, forced, 5).tolist() == [[0, 1, 2, 3, -1]]

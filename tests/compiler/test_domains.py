"""Domains against brute force over all pairs: live ones are visited once, others never."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnc.runtime.cpu import executor
from attnc.runtime.cuda import launch
from tests.compiler.pairs import Case, check_domains, check_execution, example, names, pattern_of

SIZES = [(24, 24), (9, 23), (1, 17), (23, 14), (1, 1)]  # N = M, N < M, N > M

SETTINGS: dict[str, list[dict[str, int]]] = {
    "bigbird": [{"block": 4, "randoms": 2}, {"block": 5, "randoms": 1, "seed": 3}, {"block": 1}, {"block": 64}],
    "block_local": [{"block": 5}, {"block": 1}, {"block": 100}],
    "demo_hybrid": [{"sinks": 2, "window": 3, "stride": 4}, {"sinks": 0, "window": 1, "stride": 1}],
    "dilated_window": [{"window": 3, "dilation": 4}, {"window": 2, "dilation": 1}, {"window": 9, "dilation": 30}],
    "duo": [{"window": 4, "sinks": 2}, {"window": 0, "sinks": 0}],
    "local_window": [{"radius": 3}, {"radius": 0}, {"radius": 99}],
    "longformer": [{"radius": 2, "globals": 3}, {"radius": 0, "globals": 0}, {"radius": 1, "globals": 50}],
    "longnet": [{}],
    "neighborhood": [
        {"height": 4, "width": 6, "kernel": 3},
        {"height": 6, "width": 4, "kernel": 2, "dilation": 2},
        {"height": 5, "width": 5, "kernel": 5},
    ],
    "relative_bias": [{"buckets": 8, "distance": 16}],
    "sliding_window": [{"window": 5}, {"window": 1}, {"window": 0}, {"window": 1000}],
    "sparse_fixed": [{"block": 6, "summary": 2}, {"block": 5, "summary": 5}, {"block": 1, "summary": 1}],
    "streaming": [{"sinks": 2, "window": 4}, {"sinks": 0, "window": 1}, {"sinks": 9, "window": 3}],
    "strided": [{"local": 4, "stride": 5}, {"local": 1, "stride": 1}, {"local": 0, "stride": 3}],
    "swin": [{"height": 4, "width": 6, "window": 3}, {"height": 5, "width": 5, "window": 3, "shift": 2}],
}
TUPLES = {"longnet": {"segments.0": 6, "segments.1": 12, "rates.0": 1, "rates.1": 3}}
TOKENS = {"documents"}  # read a token's value at i: not with more queries than keys


def integers(keys: int) -> dict[str, dict[str, Tensor]]:
    """The int inputs of the examples."""
    return {
        "documents": {"doc": torch.arange(keys).div(7, rounding_mode="floor").view(1, -1)},
        "duo": {"dense": torch.tensor([1, 0])},
        "prefix_lm": {"prefix": torch.tensor([min(5, keys)])},
        "sink_logit": {"sink": torch.full((2,), -1.0e4)},
        "vertical_slash": {
            "columns": torch.tensor([[0, 3, 3, -1], [keys - 1, 2, 9, 1]]),
            "offsets": torch.tensor([[0, 1, 8], [4, -1, 4]]),
        },
    }


def example_cases() -> list[Any]:
    return [
        pytest.param(name, rows, keys, setting | TUPLES.get(name, {}), id=f"{name}-{number}-{rows}x{keys}")
        for name in names()
        for number, setting in enumerate(SETTINGS.get(name, [{}]))
        for rows, keys in SIZES
        if rows <= keys or name not in TOKENS
    ]


def example_case(name: str, rows: int, keys: int, setting: Mapping[str, int]) -> Case:
    return Case(example(name), rows, keys, setting, integers(keys).get(name, {}))


@pytest.mark.parametrize(("name", "rows", "keys", "setting"), example_cases())
def test_every_live_pair_of_an_example_is_visited_once(
    name: str, rows: int, keys: int, setting: Mapping[str, int]
) -> None:
    check_domains(example_case(name, rows, keys, setting))


def test_unsorted_documents_are_told_apart() -> None:
    doc = torch.tensor([[3, 0, 3, 3, 1, 0, 2, 2, 3, 0, 1, 1, 5]])
    check_domains(Case(example("documents"), 13, 13, {}, {"doc": doc}))
    check_domains(Case(example("documents"), 5, 13, {}, {"doc": doc.expand(3, -1)}, batch=3))


# Conditions of every form that the language can write over positions, parameters, inputs of ints and of tokens

HEAD = """pattern p(w: int = 3, p: int = 4, f: bool = true):
    input doc: int[b, t]
    input level: int[b, h]
    input columns: int[h, x]
    input offsets: int[x]
    out = softmax[j](q @ k * scale where {}) @ v
"""
SMALL = st.integers(-4, 9)
DIVISOR = st.sampled_from(["1", "2", "3", "5", "p", "p + 1"])
COMPARE = st.sampled_from(["<", "<=", ">", ">=", "==", "!="])
TERM = st.sampled_from(["i", "j", "h", "b", "w", "N", "M", "i - j", "level"])
POSITION = st.sampled_from(["i", "j", "(i - j)", "(j + 1)", "(i + w)", "(2 * j)", "(M - 1 - j)", "(i + j)", "(j - h)"])


def _join(*parts: st.SearchStrategy[Any], form: str) -> st.SearchStrategy[str]:
    return st.tuples(*parts).map(lambda given: form.format(*given))


SUMS = st.one_of(
    TERM,
    SMALL.map(str),
    _join(st.integers(-3, 3), TERM, form="{} * {}"),
    _join(st.integers(-3, 3), TERM, SMALL, form="{} * {} + {}"),
    _join(POSITION, DIVISOR, form="{} // ({})"),
    _join(POSITION, DIVISOR, form="{} % ({})"),
    _join(POSITION, DIVISOR, DIVISOR, form="{} // ({}) % ({})"),
    _join(POSITION, DIVISOR, DIVISOR, form="{} % ({}) // ({})"),
    _join(POSITION, form="abs({})"),
    _join(st.sampled_from(["min", "max"]), POSITION, st.sampled_from(["w", "5", "i", "h", "M - 3"]), form="{}({}, {})"),
    _join(POSITION, form="clamp({}, w, M - 2)"),
)
ATOMS = st.one_of(
    _join(SUMS, COMPARE, SUMS, form="{} {} {}"),
    _join(st.integers(-3, 3), st.integers(-3, 3), COMPARE, SMALL, form="{} * i + {} * j {} {}"),
    _join(POSITION, SMALL, form="abs({} - i) <= {}"),
    _join(DIVISOR, form="i // ({0}) == j // ({0})"),
    _join(DIVISOR, SMALL, form="(i - j) % ({}) == {}"),
    _join(DIVISOR, SMALL, form="i // ({0}) - j // ({0}) <= {1}"),
    _join(DIVISOR, DIVISOR, form="i // ({0}) % ({1}) == j // ({0}) % ({1})"),
    _join(DIVISOR, SMALL, form="abs(i % ({0}) - j % ({0})) <= {1}"),
    _join(DIVISOR, SMALL, form="j % ({}) >= {}"),
    _join(DIVISOR, SMALL, form="j % ({}) == {}"),
    _join(SMALL, SMALL, form="{} <= i - j < {}"),
    st.sampled_from(
        [
            "doc[i] == doc[j]",
            "doc[i] != doc[j]",
            "doc[j] == 1",
            "doc[i] <= doc[j]",
            "j <= i",
            "j in columns[h]",
            "j not in columns[h]",
            "j - 2 in columns[h]",
            "i in columns[h]",
            "i - j in offsets",
            "i - j + 1 in offsets",
            "j in offsets",
            "f",
            "h == 1",
            "level == 2",
            "i == h",
            "true",
            "false",
        ]
    ),
)
CONDITIONS = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        _join(inner, inner, form="({} and {})"),
        _join(inner, inner, form="({} or {})"),
        _join(inner, form="not ({})"),
    ),
    max_leaves=5,
)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    condition = draw(CONDITIONS)
    keys = draw(st.integers(1, 18))
    rows = draw(st.integers(1, keys if "doc[i]" in condition else 18))
    values = {
        "doc": torch.tensor([draw(st.lists(st.integers(0, 2), min_size=keys, max_size=keys)) for _ in range(2)]),
        "level": torch.tensor(draw(st.lists(st.integers(0, 3), min_size=4, max_size=4))).view(2, 2),
        "columns": torch.tensor(draw(st.lists(st.integers(-1, keys), min_size=6, max_size=6))).view(2, 3),
        "offsets": torch.tensor(draw(st.lists(st.integers(-3, 9), min_size=3, max_size=3))),
    }
    parameters: dict[str, int | bool] = {"w": draw(SMALL), "p": draw(st.integers(1, 6)), "f": draw(st.booleans())}
    return Case(pattern_of(HEAD.format(condition)), rows, keys, parameters, values, batch=2)


@settings(max_examples=150, deadline=None)
@given(case=cases())
def test_every_live_pair_of_a_random_condition_is_visited_once(case: Case) -> None:
    check_domains(case)


@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_the_executor_visits_random_conditions(case: Case) -> None:
    check_execution(case, executor.execute)


@settings(max_examples=12, deadline=None)
@given(case=cases())
def test_the_kernels_visit_random_conditions(case: Case) -> None:
    check_execution(case, launch.execute)

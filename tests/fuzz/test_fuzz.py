"""Random programs give patterns and kernels or located errors, nothing else, and in bounded time."""

from __future__ import annotations

import re
from time import process_time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.outcome import outcome
from tests.fuzz.programs import HEADER, Programs

LONGEST = 20.0  # seconds of this process; a usual program takes some milliseconds
SLOW = settings(deadline=None, suppress_health_check=list(HealthCheck))

# What the fuzzer found, each once.
FOUND = [
    # a membership inside of a bound
    "softmax[j](q @ k * scale where min((if (N * 7 // stride) in columns[h] then N else h) + j, N) > window) @ v",
    # a high power, taken back from sympy
    f"softmax[j](q @ k * scale where {' * '.join(['BUCKETS'] * 30)} in columns[h]) @ v",
    # an op whose text holds its operand twice
    "softmax[j](" + "elu(" * 40 + "q @ k" + ")" * 40 + ") @ v",
]


def timed(text: str) -> str:
    start = process_time()
    found = outcome(text)
    assert process_time() - start < LONGEST
    return found


def drawn(data: st.DataObject, budget: int) -> str:
    """One program; hypothesis shrinks towards the plainest choices."""
    return Programs(lambda count: data.draw(st.integers(0, count - 1)), budget).program()


@settings(SLOW, max_examples=60)
@given(data=st.data())
def test_programs_compile_or_are_refused(data: st.DataObject) -> None:
    timed(drawn(data, 40))


@settings(SLOW, max_examples=100)
@given(text=st.text() | st.text('pattern p:\n    out = softmax[j](q @ k)v\t"#if then 0.9{}[]'))
def test_any_text_is_read_or_refused(text: str) -> None:
    timed(text)


@pytest.mark.nightly
@settings(SLOW, max_examples=20_000)
@given(data=st.data(), budget=st.integers(1, 200))
def test_many_programs_compile_or_are_refused(data: st.DataObject, budget: int) -> None:
    timed(drawn(data, budget))


@pytest.mark.parametrize("out", FOUND, ids=range(len(FOUND)))
def test_findings_stay_fixed(out: str) -> None:
    assert timed(f"{HEADER}    out = {out}\n") == "compiled"


def test_most_programs_are_well_formed() -> None:
    """A fuzzer whose programs are all refused would find nothing."""
    numbers = iter(range(10**9))
    codes = [timed(Programs(lambda count: next(numbers) * 7919 % 104729 % count, 40).program()) for _ in range(40)]
    assert codes.count("compiled") > 10


NAME = r"\bx\b"
# Values that refer to one before them twice: written out, they would double with each.
DOUBLING = {
    "score": ("q @ k", "tanh(x) + x", "softmax[j](x) @ v"),
    "row": ("real(i)", "x + x * 0.5", "softmax[j](q @ k * x) @ v"),
    "sum": ("i - j", "x + x * window", "softmax[j](q @ k where x < 3) @ v"),
    "product": ("i - j", "x * x", "softmax[j](q @ k where x < 3) @ v"),
    "remainder": ("i - j", "x // 3 + x % 3", "softmax[j](q @ k where x < 3) @ v"),
    "bound": ("window", "x // 3 + x % stride", "softmax[j](q @ k where j < x) @ v"),
    "choice": ("j", "if x > 3 then x + 1 else x", "softmax[j](q @ k where x < i) @ v"),
    "smaller": ("j", "min(x + 1, max(x, window))", "softmax[j](q @ k where x < i) @ v"),
    "condition": ("j < i", "(x and j < window) or (not x and i < window)", "softmax[j](q @ k where x) @ v"),
    "result": ("softmax[j](q @ k) @ v", "x + x * 0.5", "x"),
}


@pytest.mark.parametrize("name", DOUBLING)
def test_shared_values_do_not_double(name: str) -> None:
    first, step, out = DOUBLING[name]
    lines = [f"x0 = {first}", *(f"x{n + 1} = {re.sub(NAME, f'x{n}', step)}" for n in range(60))]
    last = re.sub(NAME, "x60", out)
    assert timed(HEADER + "".join(f"    {line}\n" for line in [*lines, f"out = {last}"])) == "compiled"

"""Random mixtures of branches of every family, in every combination, against the reference, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import attnc
from attnc.runtime.tools.comparison import Case, Target, compare
from attnc.runtime.tools.inputs import Shape
from attnc.runtime.tools.settings import Setting

TARGET = Target("executor", "executor", "cpu", torch.float64)


@dataclass(frozen=True)
class Branch:
    """A branch of a program: lines before it, its expression, and the condition of one that is a softmax over j."""

    lines: tuple[str, ...]
    value: str
    condition: str | None = None
    causal: bool = True


@dataclass
class Names:
    """Names that no other branch of the program has."""

    count: int = 0
    inputs: list[str] = field(default_factory=list)

    def fresh(self, what: str) -> str:
        self.count += 1
        return f"{what}_{self.count}"

    def input(self, what: str, type: str) -> str:
        name = self.fresh(what)
        self.inputs.append(f"input {name}: {type}")
        return name


def softmax(condition: str, lines: tuple[str, ...] = ()) -> Branch:
    return Branch(lines, f"softmax[j](q @ k * scale where {condition}) @ v", condition)


def fixed(draw: Callable[..., Any], names: Names) -> Branch:
    size = draw(st.integers(1, 9))
    conditions = (
        "j <= i",
        f"0 <= i - j < {size}",
        f"j <= i and (i - j) % {size} == 0",
        f"j <= i and i // {size} == j // {size}",
        f"j < {size} and j <= i",
        f"abs(i - j) <= {size}",
    )
    return softmax(draw(st.sampled_from(conditions)))


def biased(draw: Callable[..., Any], names: Names) -> Branch:
    slope = names.input("slope", "real[h]")
    return Branch((), f"softmax[j](q @ k * scale - {slope} * (i - j) where j <= i) @ v")


def pooled(draw: Callable[..., Any], names: Names) -> Branch:
    axis, size, stride = names.fresh("c"), draw(st.integers(2, 6)), draw(st.integers(1, 4))
    pool = draw(st.sampled_from(("mean", "max", "sum")))
    return Branch(
        (f"axis {axis} = blocks(j, {size}, {stride})",),
        f"softmax[{axis}](q @ mean[j in {axis}](k) * scale where {axis}.stop <= i + 1) @ {pool}[j in {axis}](v)",
    )


def latents(draw: Callable[..., Any], names: Names) -> Branch:
    axis = names.fresh("m")
    rows = names.input("z", f"real[h, {axis}, d]")
    return Branch((), f"softmax[{axis}](q @ {rows} * scale) @ (softmax[j]({rows} @ k * scale) @ v)")


def linear(draw: Callable[..., Any], names: Names) -> Branch:
    feature = draw(st.sampled_from(("elu({}) + 1", "relu({}) + 0.1", "softmax[d]({})", "exp({} / 4)")))
    condition = draw(st.sampled_from(("j <= i", "i - j >= 3", "i - j >= 0 and i - j >= 2", "j // 4 < i // 4")))
    weight = f"({feature.format('q')}) @ ({feature.format('k')})"
    return Branch((), f"normalize[j]({weight} where {condition}, eps = 1e-6) @ v")


def decayed(draw: Callable[..., Any], names: Names) -> Branch:
    if draw(st.booleans()):
        gamma = names.input("gamma", "real[h]")
        return Branch((), f"sum[j]((0.5 + 0.4 * {gamma}) ** (i - j) * (q @ k) * scale * v where j <= i)")
    gate = names.input("g", "real[b, h, t]")
    total = names.fresh("G")
    lines = (f"{total} = cumsum[t](-abs({gate}))",)
    return Branch(lines, f"sum[j](exp({total}[i] - {total}[j]) * (q @ k) * scale * v where j <= i)")


def delta(draw: Callable[..., Any], names: Names) -> Branch:
    beta, state, out = names.input("beta", "real[b, h, t]"), names.fresh("S"), names.fresh("o")
    lines = (
        "scan t:",
        f"    {state} = {state} + outer(k / 4, sigmoid({beta}) * (v - k / 4 @ {state}))",
        f"    {out} = q * scale @ {state}",
    )
    return Branch(lines, f"{out}[i]")


def routed(draw: Callable[..., Any], names: Names) -> Branch:
    axis, picked, block = names.fresh("s"), names.fresh("picked"), draw(st.integers(2, 5))
    lines = (
        f"axis {axis} = blocks(j, {block})",
        f"{picked} = topk[{axis}](q @ mean[j in {axis}](k), {draw(st.integers(1, 3))} where {axis}.stop <= i)",
    )
    condition = f"j <= i and (j in {picked} or i // {block} == j // {block})"
    return Branch(lines, f"softmax[j](q @ k * scale where {condition}) @ v", condition)


FAMILIES = (fixed, biased, pooled, latents, linear, decayed, delta, routed)


@st.composite
def programs(draw: Callable[..., Any]) -> str:
    """The text of a pattern of two to four branches."""
    names = Names()
    branches = [draw(st.sampled_from(FAMILIES))(draw, names) for _ in range(draw(st.integers(2, 4)))]
    lines = [line for branch in branches for line in branch.lines]
    values = [names.fresh("branch") for _ in branches]
    lines += [f"{name} = {branch.value}" for name, branch in zip(values, branches, strict=True)]
    way = draw(st.sampled_from(("gates", "heads", "norms", "rows", "union", "merge")))
    conditions = [branch.condition for branch in branches]
    routed = [condition for condition in conditions if condition and "picked" in condition]
    if way == "union" and all(conditions) and len(routed) < 2:  # a second selection in one softmax is refused
        whole = " or ".join(f"({condition})" for condition in conditions)
        lines = [line for branch in branches for line in branch.lines]
        out = f"softmax[j](q @ k * scale where {whole}) @ v"
    elif way == "merge" and all(conditions):
        lines = [line for branch in branches for line in branch.lines]
        out = f"merge({', '.join(branch.value for branch in branches)})"
    elif way == "heads":
        own = draw(st.sampled_from(("h % 2 == 0", "h < 1", "h >= H // 2", "1 <= h < 2")))
        out = f"if {own} then {values[0]} else {' + '.join(values[1:])}"
    elif way == "rows":
        out = f"if i % 3 == 0 then {values[0]} else {' - '.join(values[1:])}"
    elif way == "norms":
        out = " + ".join(f"rms_norm({value}, 0.1)" for value in values)
    else:
        gate = names.input("gate", f"real[b, h, i, {len(values)}]")
        out = " + ".join(f"sigmoid({gate}[{n}]) * {value}" for n, value in enumerate(values))
    body = "\n".join(f"    {line}" for line in (*names.inputs, *lines, f"out = {out}"))
    return f"pattern hybrid:\n{body}\n"


SHAPES = (Shape(1, 2, 1, 23, 23, 8, 6), Shape(2, 2, 2, 5, 19, 4, 4), Shape(1, 2, 2, 1, 1, 4, 4))


def agrees(text: str) -> None:
    hybrid = attnc.compile(text).patterns["hybrid"]
    for shape in SHAPES:
        for outcome in compare(Case(hybrid, shape, Setting()), TARGET):
            assert outcome.agrees, f"{text}\n{shape} {outcome.of}: {outcome.error} > {outcome.allowed}"


QUIET = (HealthCheck.too_slow, HealthCheck.data_too_large)


@settings(max_examples=50, deadline=None, suppress_health_check=QUIET, derandomize=True)
@given(programs())
def test_random_hybrids(text: str) -> None:
    agrees(text)


@pytest.mark.nightly
@settings(max_examples=500, deadline=None, suppress_health_check=QUIET)
@given(programs())
def test_many_random_hybrids(text: str) -> None:
    agrees(text)

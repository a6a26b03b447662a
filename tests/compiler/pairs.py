"""Which pairs (query, key) a plan visits, counted one by one at small sizes.

The truth is the float64 reference with every score 0 and the identity matrix as values: a row of its result is
1 / n at each of its n live keys. `visits` reads a plan's key sets row by row, without any tiles; `weights` runs a
back end, tiles and all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnc.compiler.ir import Node
from attnc.compiler.pipeline import compose, lower
from attnc.compiler.plan import Branch, Diagonals, Grid, KeySet, Listed, Plan, Stepped
from attnc.dsl.check import check
from attnc.dsl.source import Source
from attnc.dsl.terms import Pattern
from attnc.dsl.types import Base
from attnc.runtime.call import Call, make_call
from attnc.runtime.derived import PADDING
from attnc.runtime.evaluate import Environment
from attnc.runtime.reference.meaning import reference

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
Settings = Mapping[str, int | float | bool]
Execute = Callable[[Plan, Call], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Case:
    """A pattern at one size. `values`: of its inputs; real ones that are left out are 0, so that every score is 0."""

    pattern: Pattern
    rows: int
    keys: int
    settings: Settings = field(default_factory=dict)
    values: Mapping[str, Tensor] = field(default_factory=dict)
    batch: int = 1
    heads: int = 2

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """What hypothesis prints of a failure."""
        printer.text(repr(self))

    def __repr__(self) -> str:
        values = {name: value.tolist() for name, value in self.values.items()}
        return f"N={self.rows} M={self.keys} B={self.batch} H={self.heads} {dict(self.settings)} {values}\n{self.text}"

    @property
    def text(self) -> str:
        return self.pattern.source.text

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k of zeros and v the identity: (B, H, N or M, ..)."""
        shape = (self.batch, self.heads)
        q, k = torch.zeros(*shape, self.rows, 4), torch.zeros(*shape, self.keys, 4)
        return q, k, torch.eye(self.keys).expand(*shape, -1, -1)

    def inputs(self) -> dict[str, Tensor]:
        found = dict(self.values)
        sizes = {"b": self.batch, "h": self.heads, "i": self.rows, "j": self.keys, "t": self.keys}
        for one in self.pattern.inputs:
            if one.name not in found:
                assert one.base is Base.REAL, f"{one.name} needs a value"
                lengths = {**sizes, **{axis: int(value) for axis, value in self.parameters().items()}}
                found[one.name] = torch.zeros(*(lengths[axis] for axis in one.axes))
        return found

    def parameters(self) -> dict[str, int | float | bool]:
        """Every parameter by name: the settings, else the defaults; elements of a tuple apart."""
        found: dict[str, int | float | bool] = {"scale": 1.0}
        for one in self.pattern.parameters:
            if isinstance(one.default, tuple):
                found |= {f"{one.name}.{n}": value for n, value in enumerate(one.default)}
            elif one.default is not None:
                found[one.name] = one.default
        return {**found, **self.settings}

    def call(self, plan: Plan) -> Call:
        return make_call(plan, *self.tensors(), self.parameters(), self.inputs())

    def truth(self) -> Tensor:
        """(B, H, N, M): each live key's share of its row."""
        return reference(self.pattern, *self.tensors(), self.arguments(), self.inputs())

    def arguments(self) -> dict[str, object]:
        """The parameters as a caller gives them: tuples whole."""
        given: dict[str, object] = {}
        for name, value in self.parameters().items():
            stem, dot, _ = name.partition(".")
            if dot:
                given[stem] = (*given.get(stem, ()), value)  # type: ignore[misc]
            else:
                given[name] = value
        return given


def pattern_of(text: str, name: str = "p.attn") -> Pattern:
    """The last pattern of a text."""
    return list(check(Source(name, text)).values())[-1]


@cache
def example(name: str) -> Pattern:
    """The pattern of examples/NAME.attn."""
    path = EXAMPLES / f"{name}.attn"
    return check(Source(path.name, path.read_text("utf-8")))[name]


@cache
def names() -> list[str]:
    """The examples that are one attention over q, k and v as they are given: what domains are tested with."""
    found = sorted(path.stem for path in EXAMPLES.glob("*.attn"))
    return [name for name in found if compose(example(name)).attention is not None]


class Pairs:
    """The key sets of a branch over every pair of a call: values are (B, H, N, M), 1 long where constant."""

    def __init__(self, plan: Plan, branch: Branch, call: Call) -> None:
        sizes = call.sizes
        self.plan, self.branch, self.call = plan, branch, call
        self.shape = tuple(sizes[index] for index in "bhij")
        positions = {
            index: torch.arange(sizes[index]).view([-1 if at == slot else 1 for at in range(4)])
            for slot, index in enumerate("bhij")
        }
        positions["i"] = positions["i"] + call.offset
        self.i, self.j = positions["i"], positions["j"]
        self.environment = Environment(plan, call, positions, torch.float64)

    def value(self, node: Node) -> Tensor:
        value = self.environment.value(node)
        return value if value.dim() else value.view(1, 1, 1, 1)

    def within(self, bounds: Sequence[tuple[Node, Node]]) -> Tensor:
        """Whether j lies in one of the intervals."""
        found = torch.zeros((1, 1, 1, 1), dtype=torch.bool)
        for lo, hi in bounds:
            found = found | ((self.value(lo) <= self.j) & (self.j < self.value(hi)))
        return found.expand(self.shape)

    def outer(self, key_set: KeySet) -> Tensor:
        return self.within([(run.outer.lo, run.outer.hi) for run in key_set.runs])

    def inner(self, key_set: KeySet) -> Tensor:
        return self.within([(run.inner.lo, run.inner.hi) for run in key_set.runs if run.inner is not None])

    def mask(self, key_set: KeySet) -> Tensor:
        return self.value(key_set.mask).expand(self.shape)

    def walk(self, key_set: KeySet) -> Tensor:
        """Whether the walk comes by a key. Columns of a grid: those that any row asks for, as a tile of rows would."""
        walk = key_set.walk
        if isinstance(walk, Stepped):
            found = (self.j - self.value(walk.phase)) % self.value(walk.step) == 0
        elif isinstance(walk, Grid):
            found = self._grid(walk)
        elif isinstance(walk, Listed):
            found = self._listed(walk)
        elif isinstance(walk, Diagonals):
            found = self._contains(walk.table, self.i - self.j + self.value(walk.offset))
        else:
            found = torch.ones(self.shape, dtype=torch.bool)
        return found.expand(self.shape)

    def _grid(self, walk: Grid) -> Tensor:
        period = self.value(walk.period)
        high, low = torch.div(self.j, period, rounding_mode="floor"), self.j % period
        found = (self.value(walk.low.lo).amin(2, True) <= low) & (low < self.value(walk.low.hi).amax(2, True))
        for digit, phase, step in ((high, walk.high_phase, walk.high_step), (low, walk.low_phase, walk.low_step)):
            if phase is not None and step is not None:
                found = found & ((digit - self.value(phase)) % self.value(step) == 0)
        return found

    def _listed(self, walk: Listed) -> Tensor:
        if walk.row_block is None:
            return self._contains(walk.table, self.j - self.value(walk.offset))
        table = self.call.derived[walk.table].long()
        lines = table[torch.div(self.i, self.value(walk.row_block), rounding_mode="floor")]
        block = torch.div(self.j - self.value(walk.offset), self.value(walk.width), rounding_mode="floor")
        return ((lines == block.unsqueeze(-1)) & (lines >= 0)).any(-1)

    def _contains(self, name: str, element: Tensor) -> Tensor:
        """Whether an element is among the entries below M of a list over (b, h)."""
        table = self.call.derived[name].long()
        collection = next(one.args[0] for one in self.plan.derived if name == f"{one.name}.list")
        for at, index in enumerate("bh"):
            if index not in collection.type.indices:
                table = table.unsqueeze(at)
            elif index == "h":  # an input may have the heads of the keys
                table = table.repeat_interleave(self.shape[1] // table.shape[1], 1)
        entries = table[:, :, None, None, :]
        return ((entries == element.unsqueeze(-1)) & (entries < PADDING)).any(-1)


def visits(plan: Plan, call: Call) -> list[Tensor]:
    """How often each branch visits each pair, (B, H, N, M): on the walk, inside the bounds, let through by the mask."""
    found = []
    for branch in plan.branches:
        pairs = Pairs(plan, branch, call)
        count = torch.zeros(pairs.shape, dtype=torch.int64)
        for key_set in branch.domain.key_sets:
            count += pairs.walk(key_set) & pairs.outer(key_set) & pairs.mask(key_set)
        found.append(count)
    return found


def shares(counts: Sequence[Tensor]) -> Tensor:
    """What all scores 0 give: each key's part of its row's visits."""
    total = torch.stack(list(counts)).sum(0).double()
    return total / total.sum(-1, keepdim=True).clamp(min=1)


def check_domains(case: Case, plan: Plan | None = None) -> None:
    """Every live pair once, no other; inner bounds and shared phases hold. AssertionError says what does not."""
    plan = plan or lower(case.pattern)
    call = case.call(plan)
    counts = visits(plan, call)
    assert all(int(count.max()) <= 1 for count in counts if count.numel()), "a pair is visited twice by one branch"
    assert torch.allclose(shares(counts), case.truth()), "live pairs and visited pairs differ"
    for branch in plan.branches:
        pairs = Pairs(plan, branch, call)
        for key_set in branch.domain.key_sets:
            walk, mask, outer = pairs.walk(key_set), pairs.mask(key_set), pairs.outer(key_set)
            assert not bool((pairs.inner(key_set) & walk & ~mask).any()), "a dead pair inside of the inner bounds"
            # A tile masks its rows' hull: the mask must know by itself what lies outside of a row's own bounds
            assert not bool((walk & mask & ~outer).any()), "a live pair outside of the bounds"
            check_phases(pairs, key_set)


def check_phases(pairs: Pairs, key_set: KeySet) -> None:
    """Rows of one tile share the residues that the walk follows."""
    rows, walk = pairs.branch.domain.rows, key_set.walk
    number = pairs.value
    if isinstance(walk, Listed) and walk.row_block is not None:
        assert rows.period is walk.row_block, "rows of several lines of a list in one tile"
    if isinstance(walk, Stepped):
        classes = pairs.i % number(rows.step) if rows.step is not None else pairs.i * 0
        assert_shared(number(walk.phase) % number(walk.step), classes)
    if isinstance(walk, Grid):
        if rows.period is None:
            high = low = pairs.i * 0
        else:
            high = torch.div(pairs.i, number(rows.period), rounding_mode="floor")
            low = pairs.i % number(rows.period)
            low = low % number(rows.low_step) if rows.low_step is not None else low * 0
            if rows.high_step is not None:
                high = high % number(rows.high_step)
            elif rows.square:
                high = high * 0  # a square takes several lines
        for phase, step in ((walk.high_phase, walk.high_step), (walk.low_phase, walk.low_step)):
            if phase is not None and step is not None:
                assert_shared(number(phase) % number(step), high * 10**6 + low)


def assert_shared(residues: Tensor, classes: Tensor) -> None:
    """Rows (axis 2) of one class have one residue, in every batch row and head."""
    batch, heads, rows, _ = torch.broadcast_shapes(residues.shape, classes.shape)
    residues, classes = (x[..., 0].expand(batch, heads, rows).reshape(-1, rows) for x in (residues, classes))
    for line, tags in zip(residues.tolist(), classes.tolist(), strict=True):
        held: dict[int, int] = {}
        assert all(held.setdefault(tag, one) == one for tag, one in zip(tags, line, strict=True)), (
            "rows of one tile are of several classes"
        )


def check_execution(case: Case, execute: Execute, plan: Plan | None = None) -> None:
    """A back end gives every live pair its share, and the logarithm of their number as statistic."""
    plan = plan or lower(case.pattern)
    call = case.call(plan)
    out, lse = execute(plan, call)
    truth = case.truth()
    assert torch.allclose(out.double(), truth, atol=1e-6), "weights differ from those of the live pairs"
    if len(plan.branches) == 1 and plan.branches[0].sink is None:
        count = (truth > 0).sum(-1).double()
        assert torch.allclose(lse.double().exp(), count, rtol=1e-5), "the statistic counts other pairs"


def check_values(case: Case, execute: Execute, plan: Plan | None = None) -> None:
    """A back end agrees with the reference on random scores, values and real inputs."""
    plan = plan or lower(case.pattern)
    generator = torch.Generator().manual_seed(0)

    def random(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator) if tensor.is_floating_point() else tensor

    q, k, v = (random(tensor) for tensor in case.tensors())
    inputs = {name: random(tensor) for name, tensor in case.inputs().items()}
    out, _ = execute(plan, make_call(plan, 4.0 * q, k, v, case.parameters(), inputs))
    expected = reference(case.pattern, 4.0 * q, k, v, case.arguments(), inputs)
    assert torch.allclose(out.double(), expected, atol=1e-4), "results differ from the reference"

"""Walks a domain in numpy, as a kernel would: which pairs its tiles visit, and how often each counts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from attnc.compiler.ir import Node
from attnc.compiler.plan import Diagonals, Domain, Grid, KeySet, Listed, Plan, Run, Stepped
from attnc.runtime.call import Call
from attnc.runtime.derived import PADDING, scalar
from attnc.runtime.evaluate import Environment

Positions = NDArray[np.int64]
ROWS, KEYS, LINES = 8, 8, 2  # rows and keys of a tile, lines of the grid in a square one


@dataclass
class Count:
    """Per row and key: how often a pair was visited, and how often it counted as live."""

    visited: Positions
    live: Positions


class Walker:
    """Walks one domain for one batch row and head. `row`: the index that numbers the rows, i or j."""

    def __init__(self, plan: Plan, call: Call, domain: Domain, row: str, batch: int, head: int) -> None:
        self.plan, self.call, self.domain = plan, call, domain
        self.row, self.key = row, "j" if row == "i" else "i"
        first = {"i": call.offset, "j": 0}
        self.rows = np.arange(first[row], first[row] + call.sizes[row])
        self.first, self.end = first[self.key], first[self.key] + call.sizes[self.key]
        self.fixed = {"b": torch.tensor([batch]), "h": torch.tensor([head])}
        self.environment = Environment(plan, call, {**self.fixed, row: torch.from_numpy(self.rows)}, torch.float64)

    def by_row(self, node: Node, rows: Positions) -> Positions:
        """An int of the row at some rows."""
        value = self.environment.value(node).expand(len(self.rows)).numpy()
        return value[rows - self.rows[0]]  # type: ignore[no-any-return]

    def number(self, node: Node | None) -> int:
        return 1 if node is None else int(scalar(self.plan, self.call, node))

    def count(self) -> Count:
        shape = (len(self.rows), self.end - self.first)
        count = Count(np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64))
        for rows in self.tiles():
            for key_set in self.domain.key_sets:
                for keys, full in self.visits(key_set, rows):
                    self.add(count, key_set, rows, keys, full=full)
        return count

    def add(self, count: Count, key_set: KeySet, rows: Positions, keys: Positions, *, full: bool) -> None:
        """One tile: `keys` are shared by the rows, or one a row (of two dimensions)."""
        if keys.ndim == 1:
            keys = np.broadcast_to(keys, (len(rows), len(keys)))
        own = np.broadcast_to(rows[:, None], keys.shape)
        there = (keys >= self.first) & (keys < self.end)
        own, keys = own[there], keys[there]
        if not len(keys):
            return
        positions = {self.row: torch.from_numpy(own.copy()), self.key: torch.from_numpy(keys.copy())}
        mask = Environment(self.plan, self.call, {**self.fixed, **positions}, torch.float64).value(key_set.mask)
        live = mask.expand(len(keys)).numpy() | full
        at = (own - self.rows[0], keys - self.first)
        np.add.at(count.visited, at, 1)
        np.add.at(count.live, at, live.astype(np.int64))

    # Rows

    def tiles(self) -> Iterator[Positions]:
        """The row tiles, without rows outside of the sequence."""
        for tile in self.all_tiles():
            rows = tile[(tile >= self.rows[0]) & (tile <= self.rows[-1])] if len(self.rows) else tile[:0]
            if len(rows):
                yield rows

    def all_tiles(self) -> Iterator[Positions]:
        rows = self.domain.rows
        if rows.listed is not None:
            entries = self.table(rows.listed.table)
            yield from cut(entries[entries < len(self.rows)] + self.number(rows.listed.offset))
        elif rows.packed:
            yield from self.packed()
        elif rows.period is not None:
            yield from self.grid()
        else:
            step = self.number(rows.step)
            phases = range(step) if rows.phase is None else [(self.number(rows.phase) - self.rows[0]) % step]
            for phase in phases:
                yield from cut(self.rows[phase::step])

    def lines(self) -> tuple[int, Positions]:
        period = self.number(self.domain.rows.period)
        return period, np.arange(self.rows[0] // period, self.rows[-1] // period + 1)

    def packed(self) -> Iterator[Positions]:
        """What is left of the grid, class after class, in order."""
        rows = self.domain.rows
        period, lines = self.lines()
        low = np.arange(period)
        if rows.low is not None:
            low = np.arange(max(self.number(rows.low.lo), 0), min(self.number(rows.low.hi), period))
        high_phase, low_phase = (
            None if node is None else self.number(node) for node in (rows.high_phase, rows.low_phase)
        )
        for high_class in classes(lines, self.number(rows.high_step), high_phase):
            for low_class in classes(low, self.number(rows.low_step), low_phase):
                yield from cut((high_class[:, None] * period + low_class).ravel())

    def grid(self) -> Iterator[Positions]:
        """Squares, or parts of one line."""
        rows = self.domain.rows
        period, lines = self.lines()
        high = LINES if rows.square else 1
        for high_class in classes(lines, self.number(rows.high_step), None):
            for low_class in classes(np.arange(period), self.number(rows.low_step), None):
                for top in range(0, len(high_class), high):
                    for left in range(0, len(low_class), ROWS // high):
                        part = high_class[top : top + high, None] * period
                        yield (part + low_class[left : left + ROWS // high]).ravel()

    # Keys

    def hull(self, run: Run, rows: Positions) -> tuple[int, int]:
        """Least lo and largest hi of the rows that have keys."""
        lo, hi = self.by_row(run.outer.lo, rows), self.by_row(run.outer.hi, rows)
        some = lo < hi
        return (int(lo[some].min()), int(hi[some].max())) if some.any() else (0, 0)

    def inner(self, run: Run, rows: Positions) -> tuple[int, int]:
        """The interval in which every key is live for every row."""
        if run.inner is None:
            return 0, 0
        return int(self.by_row(run.inner.lo, rows).max()), int(self.by_row(run.inner.hi, rows).min())

    def visits(self, key_set: KeySet, rows: Positions) -> Iterator[tuple[Positions, bool]]:
        """The key tiles of one row tile, and whether each is full."""
        walk = key_set.walk
        if walk is None:
            yield from self.consecutive(key_set, rows)
            return
        (run,) = key_set.runs
        lo, hi = self.hull(run, rows)
        if lo >= hi:
            return
        if isinstance(walk, Diagonals):
            entries = self.table(walk.table)
            entries = entries[entries < PADDING] - self.number(walk.offset)
            yield (rows[:, None] - entries if self.row == "i" else rows[:, None] + entries), False
            return
        keys = self.listed_keys(walk, rows, lo, hi) if isinstance(walk, Listed) else self.walked(walk, rows, lo, hi)
        start, stop = self.inner(run, rows)
        for tile in cut(keys, KEYS):
            yield tile, bool((tile >= start).all() and (tile < stop).all())

    def consecutive(self, key_set: KeySet, rows: Positions) -> Iterator[tuple[Positions, bool]]:
        tiles: dict[int, bool] = {}
        for run in key_set.runs:
            lo, hi = self.hull(run, rows)
            start, stop = self.inner(run, rows)
            for tile in range(lo // KEYS, -(-hi // KEYS)):
                full = start <= tile * KEYS and (tile + 1) * KEYS <= stop
                tiles[tile] = tiles.get(tile, False) or full
        for tile, full in tiles.items():
            yield np.arange(tile * KEYS, (tile + 1) * KEYS), full

    def walked(self, walk: Stepped | Grid, rows: Positions, lo: int, hi: int) -> Positions:
        """Keys by a step or on a grid; all rows of the tile must agree on the phase."""
        if isinstance(walk, Stepped):
            step = self.number(walk.step)
            return np.arange(lo + (self.phase(walk.phase, step, rows) - lo) % step, hi, step)
        period = self.number(walk.period)
        digits = []
        low = self.hull(Run(walk.low, None), rows)
        spans = (
            (lo // period, -(-hi // period), walk.high_phase, walk.high_step),
            (max(low[0], 0), min(low[1], period), walk.low_phase, walk.low_step),
        )
        for start, stop, phase, step_node in spans:
            step = self.number(step_node)
            if phase is not None:
                start += (self.phase(phase, step, rows) - start) % step
            digits.append(np.arange(start, max(start, stop), step))
        return (digits[0][:, None] * period + digits[1]).ravel()

    def phase(self, node: Node, step: int, rows: Positions) -> int:
        found = np.unique(self.by_row(node, rows) % step)
        assert len(found) == 1, "rows of a tile differ in the residue of their keys"
        return int(found[0])

    def listed_keys(self, walk: Listed, rows: Positions, lo: int, hi: int) -> Positions:
        table, width = self.table(walk.table), self.number(walk.width)
        if walk.row_block is not None:
            lines = np.unique(rows // self.number(walk.row_block))
            assert len(lines) == 1, "rows of a tile have different lists"
            if walk.starts is not None:
                starts = self.table(walk.starts)
                table = table[starts[lines[0]] : starts[lines[0] + 1]]
            else:
                table = table[lines[0]]
            table = table[table >= 0]
        else:
            table = table[table < PADDING]
        keys = (table[:, None] * width + np.arange(width)).ravel() + self.number(walk.offset)
        return keys[(keys >= lo) & (keys < hi)] if walk.row_block is None else keys

    def table(self, name: str) -> Positions:
        """The table, at the batch row and head."""
        derived = next(
            one for one in (*self.plan.derived, *self.plan.transposed_derived) if name.startswith(f"{one.name}.")
        )
        table = self.call.derived[name]
        if derived.kind == "listing":
            for index in derived.args[0].type.ordered_indices():
                table = table[int(self.fixed[index])]
        return table.to(torch.int64).numpy()


def cut(positions: Positions, size: int = ROWS) -> Iterator[Positions]:
    for start in range(0, len(positions), size):
        yield positions[start : start + size]


def classes(digits: Positions, step: int, phase: int | None) -> Iterator[Positions]:
    """The residue classes of some digits, or the one of the phase."""
    for residue in range(step) if phase is None else [phase % step]:
        yield digits[digits % step == residue]


@pytest.fixture(scope="session")
def walk() -> Callable[..., Count]:
    """`walk(plan, call, domain, row, batch, head)`: what a kernel over the domain visits."""

    def count(plan: Plan, call: Call, domain: Domain, row: str, batch: int = 0, head: int = 0) -> Count:
        return Walker(plan, call, domain, row, batch, head).count()

    return count


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """The tensors are tiny: threads would only wait for one another."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Generated kernels go to a folder of the test run."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATTNC_CACHE_DIR", str(folder))
        yield folder

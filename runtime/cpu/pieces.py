"""The keys of one tile, by kind of walk (see `plan.KeySet`): from its hull to pieces."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from attnc.runtime.cpu.rows import Positions, Progression, compact

Spans = tuple[tuple[int, int], ...]
ALIGNED = 16  # keys; vector units take such numbers whole


@dataclass(frozen=True)
class Piece:
    """Keys visited in one step. `masked`: columns [start, stop) on which the key set's mask decides.

    `keys` are the same for every row of the tile, or, `per_row`, an array (rows, columns), -1 for no key.
    """

    key_set: int
    keys: Progression | Positions
    masked: Spans
    per_row: bool = False

    @property
    def count(self) -> int:
        return self.keys.count if isinstance(self.keys, Progression) else int(self.keys.shape[-1])


@dataclass(frozen=True)
class Tile:
    """One row tile: places of its rows among all rows, and the keys that they visit."""

    rows: Progression | Positions
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Hull:
    """Bounds of a run, one number a tile."""

    lo: list[int]
    hi: list[int]
    inner_lo: list[int] | None
    inner_hi: list[int] | None

    def inner(self, tile: int) -> tuple[int, int]:
        """The interval that is live for every row, possibly empty."""
        if self.inner_lo is None or self.inner_hi is None:
            return 0, 0
        return self.inner_lo[tile], self.inner_hi[tile]


class Maker:
    """Makes the pieces of one key set, tile by tile."""

    def pieces(self, tile: int) -> Iterator[Piece]:
        raise NotImplementedError


@dataclass(frozen=True)
class Consecutive(Maker):
    """The union of intervals, each key once."""

    key_set: int
    hulls: Sequence[Hull]

    def pieces(self, tile: int) -> Iterator[Piece]:
        outer = sorted((hull.lo[tile], hull.hi[tile]) for hull in self.hulls)
        inner = sorted(hull.inner(tile) for hull in self.hulls)
        reached = 0
        for start, stop in union(outer):
            before = (start - stop) % ALIGNED  # masked keys that round the number up: products are quicker then
            start, reached = start - (before if start - before >= reached else 0), stop
            yield Piece(self.key_set, Progression(start, 1, stop - start), gaps(start, stop, inner))


@dataclass(frozen=True)
class Stepping(Maker):
    """One residue class."""

    key_set: int
    hull: Hull
    phases: NDArray[np.int64]
    step: int

    def pieces(self, tile: int) -> Iterator[Piece]:
        lo, hi = self.hull.lo[tile], self.hull.hi[tile]
        if lo >= hi:
            return
        first = lo + (int(self.phases[tile]) - lo) % self.step
        count = -((first - hi) // self.step)
        if count > 0:
            start, stop = (-((first - bound) // self.step) for bound in self.hull.inner(tile))
            yield Piece(self.key_set, Progression(first, self.step, count), gaps(0, count, [(start, stop)]))


@dataclass(frozen=True)
class Lattice(Maker):
    """Keys high * period + low; phases and steps of the digits (high, low)."""

    key_set: int
    hull: Hull
    low: Hull
    period: int
    phases: tuple[NDArray[np.int64] | None, NDArray[np.int64] | None]
    steps: tuple[int, int]

    def pieces(self, tile: int) -> Iterator[Piece]:
        lo, hi = self.hull.lo[tile], self.hull.hi[tile]
        if lo >= hi:
            return
        high = self.digits(0, tile, lo // self.period, (hi - 1) // self.period + 1)
        low = self.digits(1, tile, max(self.low.lo[tile], 0), min(self.low.hi[tile], self.period))
        keys = (high[:, None] * self.period + low).ravel()
        keys = keys[(keys >= lo) & (keys < hi)]
        if len(keys):
            yield Piece(self.key_set, compact(keys), inside(keys, self.hull.inner(tile)))

    def digits(self, which: int, tile: int, start: int, stop: int) -> Positions:
        phases, step = self.phases[which], self.steps[which]
        if phases is not None:
            start += (int(phases[tile]) - start) % step
        return np.arange(start, max(start, stop), step if phases is not None else 1, dtype=np.int64)


@dataclass(frozen=True)
class Selected(Maker):
    """Blocks of `width` keys from a line of a table, ascending, -1 for none."""

    key_set: int
    hull: Hull
    table: NDArray[np.int64]
    lines: NDArray[np.int64]
    width: int
    offset: int

    def pieces(self, tile: int) -> Iterator[Piece]:
        entries = self.table[self.lines[tile]]
        entries = entries[entries >= 0]
        keys = (entries[:, None] * self.width + np.arange(self.width)).ravel() + self.offset
        keys = keys[np.searchsorted(keys, self.hull.lo[tile]) : np.searchsorted(keys, self.hull.hi[tile])]
        if len(keys):
            yield Piece(self.key_set, compact(keys), inside(keys, self.hull.inner(tile)))


@dataclass(frozen=True)
class Slashes(Maker):
    """Key i - entry + offset for every row and entry. The mask decides everywhere."""

    key_set: int
    hull: Hull
    entries: Positions
    diagonals: Sequence[Positions]  # by tile and row: the key of entry 0

    def pieces(self, tile: int) -> Iterator[Piece]:
        lo, hi = self.hull.lo[tile], self.hull.hi[tile]
        position = self.diagonals[tile]
        entries = self.entries[(self.entries > position.min() - hi) & (self.entries <= position.max() - lo)]
        if lo >= hi or not len(entries):
            return
        keys = position[:, None] - entries
        keys = np.where((keys >= lo) & (keys < hi), keys, -1)
        yield Piece(self.key_set, keys, ((0, len(entries)),), per_row=True)


def union(intervals: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Disjoint intervals with the same members; sorted by start, the given ones too."""
    merged: list[tuple[int, int]] = []
    for start, stop in intervals:
        if start >= stop:
            continue
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], stop))
        else:
            merged.append((start, stop))
    return merged


def gaps(start: int, stop: int, covered: Sequence[tuple[int, int]]) -> Spans:
    """What of [start, stop) no interval covers (sorted by start), counted from `start`."""
    found, at = [], start
    for low, high in covered:
        if high <= at or low >= high:
            continue
        if low > at:
            found.append((at - start, min(low, stop) - start))
        at = high
        if at >= stop:
            break
    if at < stop:
        found.append((at - start, stop - start))
    return tuple((low, high) for low, high in found if low < high)


def inside(keys: Positions, inner: tuple[int, int]) -> Spans:
    """Columns of ascending keys outside of an interval."""
    start, stop = (int(np.searchsorted(keys, bound)) for bound in inner)
    return gaps(0, len(keys), [(start, stop)])

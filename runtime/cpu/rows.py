"""Row tiles: which rows of queries are worked on together (see `plan.Rows`)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Positions = NDArray[np.int64]


@dataclass(frozen=True)
class Progression:
    """start, start + step, .. (`count` of them, step positive)."""

    start: int
    step: int
    count: int

    def numbers(self) -> Positions:
        return self.start + self.step * np.arange(self.count, dtype=np.int64)

    def part(self, first: int, count: int) -> Progression:
        return Progression(self.start + self.step * first, self.step, count)


def compact(positions: Positions) -> Progression | Positions:
    """Positions as a progression where they are one, which is read in place."""
    if len(positions) == 1:
        return Progression(int(positions[0]), 1, 1)
    if len(positions) > 1:
        steps = np.diff(positions)
        if steps[0] > 0 and bool((steps == steps[0]).all()):
            return Progression(int(positions[0]), int(steps[0]), len(positions))
    return positions


def numbers(rows: Progression | Positions) -> Positions:
    """Row numbers as an array."""
    return rows.numbers() if isinstance(rows, Progression) else rows


@dataclass(frozen=True)
class Grouping:
    """`plan.Rows` with its numbers known."""

    step: int = 1
    period: int | None = None
    high_step: int = 1
    low_step: int = 1
    square: bool = False


def row_tiles(grouping: Grouping, rows: int, offset: int, size: int) -> list[Progression | Positions]:
    """Tiles of at most `size` rows that cover 0 .. rows once. Row r lies at global position offset + r."""
    if rows == 0:
        return []
    if grouping.period is None:
        return list(_classes(rows, grouping.step, size))
    if grouping.square:
        return list(_squares(grouping, rows, offset, size))
    return list(_lines(grouping, rows, offset, size))


def _classes(rows: int, step: int, size: int) -> Iterator[Progression]:
    """Residue classes modulo `step`, in turn, so that neighbours in the list are neighbours in memory."""
    step = min(step, rows)
    longest = -(-rows // step)
    for first in range(0, longest, size):
        for start in range(step):
            count = min(size, len(range(start + first * step, rows, step)))
            if count:
                yield Progression(start + first * step, step, count)


def _lines(grouping: Grouping, rows: int, offset: int, size: int) -> Iterator[Progression]:
    """Parts of one line of the grid (rows with the same high digit), low digits by their step."""
    assert grouping.period is not None
    period = grouping.period
    for line in range(offset // period, (offset + rows - 1) // period + 1):
        start, stop = max(line * period, offset), min((line + 1) * period, offset + rows)
        for phase in range(min(grouping.low_step, stop - start)):
            members = range(start + phase - offset, stop - offset, grouping.low_step)
            for first in range(0, len(members), size):
                part = members[first : first + size]
                yield Progression(part.start, grouping.low_step, len(part))


def _squares(grouping: Grouping, rows: int, offset: int, size: int) -> Iterator[Progression | Positions]:
    """Rectangles of high and low digits, as square as the grid allows."""
    assert grouping.period is not None
    period = grouping.period
    highs = _digits(offset // period, (offset + rows - 1) // period + 1, grouping.high_step)
    lows = _digits(0, period, grouping.low_step)
    width = min(max(int(size**0.5), 1), max(len(low) for low in lows))
    height = max(size // width, 1)
    for high in highs:
        for low in lows:
            for top in range(0, len(high), height):
                for left in range(0, len(low), width):
                    line = np.array(high[top : top + height], dtype=np.int64)[:, None] * period
                    tile = (line + np.array(low[left : left + width], dtype=np.int64)).ravel() - offset
                    tile = tile[(tile >= 0) & (tile < rows)]
                    if len(tile):
                        yield compact(tile)


def _digits(start: int, stop: int, step: int) -> list[range]:
    """Residue classes of start .. stop modulo `step`."""
    return [range(start + phase, stop, step) for phase in range(min(step, stop - start))]

"""Key sets to loops: which tiles of keys a row tile visits, and which of them need a mask.

The runs of a consecutive key set are sorted and swept, so that each tile is visited once. A key set is one loop,
so that its copies are under way together; the mask stands behind a branch that a full tile does not take.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from attnc.compiler.emit.bounds import Exact, Loop, TileBounds
from attnc.compiler.emit.expressions import Expressions
from attnc.compiler.emit.listed_ranges import ListedRanges
from attnc.compiler.emit.writer import Writer
from attnc.compiler.plan import Diagonals, Grid, KeySet, Listed, Rows, Run, Stepped

Piece = tuple[str, str]  # first tile, number of tiles
Interval = tuple[str, str]  # first tile, the one after the last


class Ranges(TileBounds):
    """Writes the loop of a key set in closed form."""

    def consecutive(self) -> Loop:
        runs = self.key_set.runs
        stems = [str(number) for number in range(len(runs))]
        intervals = [self.interval(run, stem) for run, stem in zip(runs, stems, strict=True)]
        full = [self.full(run, stem) for run, stem in zip(runs, stems, strict=True) if run.inner is not None]
        exact = self.exact(stems)
        if len(intervals) > 1:
            self.sort(intervals)
            self.sweep(intervals)
        return self.pieces([(first, f"({last} - {first})") for first, last in intervals], full, exact)

    def interval(self, run: Run, stem: str) -> Interval:
        """First tile touched, and the one after the last."""
        lo, hi = self.outer(run.outer, stem)
        first = self.let(f"tile{stem}", f"{lo} // BLOCK_N")
        return first, self.let(f"end{stem}", f"tl.maximum(tl.cdiv({hi}, BLOCK_N), {first})")

    def full(self, run: Run, stem: str) -> Interval:
        """First full tile, and the one after the last."""
        assert run.inner is not None
        lo, hi = self.inner(run.inner, stem)
        return self.let(f"full{stem}", f"tl.cdiv({lo}, BLOCK_N)"), self.let(f"full_end{stem}", f"{hi} // BLOCK_N")

    def sort(self, intervals: Sequence[Interval]) -> None:
        """Order the intervals by their first tile: an exchange network on scalars."""
        for end in range(len(intervals) - 1, 0, -1):
            for at in range(end):
                left, right = intervals[at], intervals[at + 1]
                self.writer.let("swap", f"{left[0]} > {right[0]}")
                for one, other in zip(left, right, strict=True):
                    self.writer.let("held", one)
                    self.writer.let(one, f"tl.where(swap, {other}, {one})")
                    self.writer.let(other, f"tl.where(swap, held, {other})")

    def sweep(self, intervals: Sequence[Interval]) -> None:
        """Cut what an earlier interval visits."""
        for (_, reached), (first, last) in pairwise(intervals):
            self.writer.let(first, f"tl.maximum({first}, {reached})")
            self.writer.let(last, f"tl.maximum({last}, {first})")

    def pieces(self, pieces: Sequence[Piece], full: Sequence[Interval], exact: Exact | None) -> Loop:
        """One loop over several stretches of tiles."""
        ends: list[str] = []
        for number, (_, count) in enumerate(pieces):
            before = f"{ends[-1]} + " if ends else ""
            ends.append(self.let(f"visited{number}", f"{before}{count}"))
        place = f"{pieces[-1][0]} + n" + (f" - {ends[-2]}" if len(pieces) > 1 else "")
        for number in range(len(pieces) - 2, -1, -1):
            here = f"{pieces[number][0]} + n" + (f" - {ends[number - 1]}" if number else "")
            place = f"tl.where(n < {ends[number]}, {here}, {place})"

        def keys(writer: Writer) -> None:
            writer.let("tile_n", place)
            writer.let("start", "tile_n * BLOCK_N")
            writer.let(self.at, "start + lanes_n")
            writer.let(self.ok, self.inside)

        partial = " & ".join(f"((tile_n < {first}) | (tile_n >= {end}))" for first, end in full)
        return Loop(
            *self.share(ends[-1]),
            keys,
            partial or None,
            exact,
            contiguous=True,
            view="",
            place=f"start{self.shift}",
            full=self.turns(full[0], pieces[0][0]) if len(pieces) == len(full) == 1 else None,
        )

    def turns(self, tiles: Interval, first: str) -> Interval:
        """Which turns visit these tiles where the first one is that of tile `first`."""
        return f"{tiles[0]} - {first}", f"{tiles[1]} - {first}"

    # Keys by a step

    def stepped(self, walk: Stepped) -> Loop:
        run = self.key_set.runs[0]
        lo, hi = self.outer(run.outer)
        step = self.let("step", self.row_text(walk.step))
        phase = self.phase("phase", self.row_text(walk.phase), step)
        first = self.let("origin", f"{lo} + _floor_mod({phase} - {lo}, {step})")
        if self.at == "i":  # statistics are copied from aligned places: a few more rows, which the mask takes out
            first = self.let("origin", f"{first} - {step} * (({first} - OFFSET) // {step} % ALIGNED)")
        count = self.let("count", f"tl.maximum(tl.cdiv({hi} - {first}, {step}), 0)")
        tiles = self.let("tiles", f"tl.cdiv({count}, BLOCK_N)")
        partial = full = None
        if run.inner is not None:
            full_lo, full_hi = self.inner(run.inner)
            begin = self.let("full", f"tl.cdiv(tl.maximum({full_lo} - {first}, 0), {step} * BLOCK_N)")
            reached = f"tl.maximum(tl.cdiv(tl.maximum({full_hi} - {first}, 0), {step}), 0)"
            full = begin, self.let("full_end", f"{reached} // BLOCK_N")
            partial = f"((n < {full[0]}) | (n >= {full[1]}))"

        def keys(writer: Writer) -> None:
            writer.let(self.at, f"{first} + {step} * (n * BLOCK_N + lanes_n)")
            writer.let(self.ok, self.inside)

        begin = self.let("begin", f"{first}{self.shift}")
        place = f"{begin} % {step}, {begin} // {step} + n * BLOCK_N"
        return Loop(*self.share(tiles), keys, partial, self.exact(), view=str(self.number), place=place, full=full)

    # Keys of a grid

    def grid(self, walk: Grid) -> Loop:
        lo, hi = self.outer(self.key_set.runs[0].outer)
        low_lo, low_hi = self.outer(walk.low, "_low")
        period = self.let("period", self.row_text(walk.period))
        self.let("low_from", f"tl.maximum({low_lo}, 0)")
        self.let("low_to", f"tl.minimum({low_hi}, {period})")
        self.let("high_from", f"{lo} // {period}")
        self.let("high_to", f"tl.cdiv({hi}, {period})")
        steps = {}
        for digit, phase, step in (
            ("low", walk.low_phase, walk.low_step),
            ("high", walk.high_phase, walk.high_step),
        ):
            steps[digit] = "1"
            if phase is not None and step is not None:
                steps[digit] = self.let(f"{digit}_step", self.row_text(step))
                residue = self.phase(f"{digit}_phase", self.row_text(phase), steps[digit])
                start = self.name(f"{digit}_from")
                self.writer.let(start, f"{start} + _floor_mod({residue} - {start}, {steps[digit]})")
            span = f"{self.name(f'{digit}_to')} - {self.name(f'{digit}_from')}"
            self.let(f"{digit}_count", f"tl.maximum(tl.cdiv({span}, {steps[digit]}), 0)")
        total = self.let("count", f"{self.name('low_count')} * {self.name('high_count')}")
        width = self.let("width", f"tl.maximum({self.name('low_count')}, 1)")

        def keys(writer: Writer) -> None:
            writer.let("at", "n * BLOCK_N + lanes_n")
            writer.let("high", f"{self.name('high_from')} + {steps['high']} * (at // {width})")
            writer.let(self.at, f"high * {period} + {self.name('low_from')} + {steps['low']} * (at % {width})")
            writer.let(self.ok, f"(at < {total}) & {self.inside}")

        tiles = self.let("tiles", f"tl.cdiv({total}, BLOCK_N)")
        inner = self.key_set.runs[0].inner
        if inner is None:
            return Loop(*self.share(tiles), keys)
        # Where every row sees the whole box, its tiles are full, the last one apart
        full_lo, full_hi = self.inner(inner)
        corner = f"{self.name('high_from')} * {period} + {self.name('low_from')}"
        opposite = f"({self.name('high_to')} - 1) * {period} + {self.name('low_to')}"
        clean = self.let("clean", f"({full_lo} <= {corner}) & ({full_hi} >= {opposite})")
        whole = self.let("whole", f"tl.where({clean}, {total} // BLOCK_N, 0)")
        return Loop(*self.share(tiles), keys, f"(n >= {whole})", self.exact())


def emit_ranges(writer: Writer, expressions: Expressions, key_set: KeySet, number: int, rows: Rows) -> Loop:
    """Write the bounds of a key set's tiles; the loop that visits them. `rows`: how the domain groups its rows."""
    writer.comment(f"keys {number}")
    given = (writer, expressions, key_set, number, rows)
    match key_set.walk:
        case None:
            return Ranges(*given).consecutive()
        case Stepped():
            return Ranges(*given).stepped(key_set.walk)
        case Grid():
            return Ranges(*given).grid(key_set.walk)
        case Listed():
            return ListedRanges(*given).listed(key_set.walk)
        case Diagonals():
            return ListedRanges(*given).diagonals(key_set.walk)

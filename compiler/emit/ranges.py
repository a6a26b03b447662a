"""Key sets to loops: which tiles of keys a row tile visits, and which of them need a mask.

Bounds are functions of the row. Their extremes over a tile's rows give the tiles that any row touches and the tiles
that every row sees whole: from the first and the last row where a bound moves one way, else by a reduction over all
rows. The runs of a consecutive key set are sorted and swept, so that each tile is visited once. A key set is one loop,
so that its copies are under way together; the mask stands behind a branch that a full tile does not take.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from attnc.compiler.emit.expressions import ROWS, Array, Expressions, View
from attnc.compiler.emit.rows import TableLine, ordered
from attnc.compiler.emit.writer import Writer
from attnc.compiler.ir import Node
from attnc.compiler.plan import Bounds, Diagonals, Grid, KeySet, Listed, Rows, Run, Stepped
from attnc.compiler.trends import DOWN, trend

LOW, HIGH = View(i="_low", j="_low"), View(i="_high", j="_high")  # the first and the last row of a tile


@dataclass(frozen=True)
class Limits:
    """Bounds lo <= x < hi of one run as the kernel names them; whether each is a vector over the rows."""

    lo: str | None  # None: nothing below
    hi: str
    lo_rows: bool
    hi_rows: bool


@dataclass(frozen=True)
class Exact:
    """Bounds that say which pairs are live, without the condition itself: a pair is if it lies in one of them.

    `when`: a scalar of the kernel that says whether they do in this tile; None: always.
    """

    limits: tuple[Limits, ...]
    when: str | None = None


@dataclass(frozen=True)
class Loop:
    """`for n in range(first, last)`; `keys` writes the positions of the n-th tile and which are real."""

    first: str
    last: str
    keys: Callable[[Writer], None]
    partial: str | None = None  # whether the tile needs its mask, a scalar of the kernel; None: every tile does
    exact: Exact | None = None
    contiguous: bool = False  # positions are start + 0 .. BLOCK_N
    view: str | None = None  # suffix of the tensor descriptors that hold its tiles
    place: str = ""  # the tile's place in them, after batch and head


Piece = tuple[str, str]  # first tile, number of tiles
Interval = tuple[str, str]  # first tile, the one after the last


class Ranges:
    """Writes the loops of one key set; names carry its number."""

    def __init__(self, writer: Writer, expressions: Expressions, key_set: KeySet, number: int, rows: Rows) -> None:
        self.at = expressions.streamed  # the streamed position: j, or i where the rows are keys
        self.ok = f"{self.at}_ok"
        self.row = "i" if self.at == "j" else "j"
        self.row_ok = f"{self.row}_ok"
        self.end = "M" if self.at == "j" else "(OFFSET + N)"
        self.inside = "(j < M)" if self.at == "j" else "((i >= OFFSET) & (i < OFFSET + N))"
        self.shift = "" if self.at == "j" else " - OFFSET"  # from a position to a place in its tensor
        self.writer = writer
        self.expressions = expressions
        # At one row: nothing is hoisted.
        self.scalars = Expressions(writer, expressions.arrays, expressions.streamed, numbers=expressions.numbers)
        self.key_set = key_set
        self.number = number
        self.ordered = ordered(rows)

    def name(self, stem: str) -> str:
        return f"{stem}_{self.number}"

    def let(self, stem: str, value: str) -> str:
        return self.writer.let(self.name(stem), value)

    def row_text(self, node: Node) -> str:
        return self.expressions.once(node, ROWS)

    def loop(self) -> Loop:
        walk = self.key_set.walk
        self.writer.comment(f"keys {self.number}")
        if walk is None:
            return self.consecutive()
        if isinstance(walk, Stepped):
            return self.stepped(walk)
        if isinstance(walk, Grid):
            return self.grid(walk)
        if isinstance(walk, Listed):
            return self.listed(walk)
        return self.diagonals(walk)

    # Bounds of the tile

    def by_head(self, node: Node) -> bool:
        """Whether a value differs by row because its head does."""
        return self.expressions.head_rows and node.depends_on("h")

    def extreme(self, node: Node, largest: bool) -> str | None:
        """The largest (smallest) value over the rows, if the last or the first has it for sure; else None."""
        way = trend(node, self.row) if not self.by_head(node) else None
        if way is None or (way and not self.ordered):
            return None
        at = HIGH if largest != (way == DOWN) else LOW
        text = self.scalars.once(node, at)
        return f"_int32({text})"

    def outer(self, bounds: Bounds, stem: str = "") -> tuple[str, str]:
        """Least lo and largest hi over the rows; those without a key may be left out."""
        lo = self.let(f"lo{stem}", self.row_text(bounds.lo))
        hi = self.let(f"hi{stem}", self.row_text(bounds.hi))
        first, last = self.extreme(bounds.lo, largest=False), self.extreme(bounds.hi, largest=True)
        if first is None or last is None:
            some = self.let(f"some{stem}", f"{self.row_ok} & ({lo} < {hi})")
            first = first or f"tl.min(tl.where({some}, {lo}, {self.end}), 0).to(tl.int32)"
            last = last or f"tl.max(tl.where({some}, {hi}, 0), 0).to(tl.int32)"
        return self.let(f"first{stem}", first), self.let(f"last{stem}", last)

    def inner(self, bounds: Bounds, stem: str = "") -> tuple[str, str]:
        """Largest lo and least hi: keys between them are live in every row."""
        first, last = self.extreme(bounds.lo, largest=True), self.extreme(bounds.hi, largest=False)
        if first is None:
            first = f"tl.max(tl.where({self.row_ok}, {self.row_text(bounds.lo)}, 0), 0).to(tl.int32)"
        if last is None:
            last = f"tl.min(tl.where({self.row_ok}, {self.row_text(bounds.hi)}, {self.end}), 0).to(tl.int32)"
        return self.let(f"full_first{stem}", first), self.let(f"full_last{stem}", last)

    def exact(self, stems: Sequence[str] = ("",)) -> Exact | None:
        """The bounds of the runs where they say all: none but inner pairs lie in the outer bounds, always or here."""
        runs = self.key_set.runs
        limits: list[Limits] = []
        agree: list[str] = []
        for run, stem in zip(runs, stems, strict=True):
            if run.inner is None:
                return None
            for side in ("lo", "hi"):
                outer, inner = getattr(run.outer, side), getattr(run.inner, side)
                if inner is not outer:
                    agree.append(f"({self.name(side + stem)} == {self.row_text(inner)})")
            lo, hi = run.outer.lo, run.outer.hi
            below = None if self.at == "j" and lo.op == "literal" and lo.attribute == 0 else self.name(f"lo{stem}")
            rows = tuple(one.depends_on(self.row) or self.by_head(one) for one in (lo, hi))
            limits.append(Limits(below, self.name(f"hi{stem}"), *rows))
        if not agree:
            return Exact(tuple(limits))
        when = f"tl.min(tl.where({self.row_ok}, ({' & '.join(agree)}).to(tl.int32), 1), 0)"
        return Exact(tuple(limits), self.let("exact", f"{when} == 1"))

    def share(self, count: str) -> tuple[str, str]:
        """The part of `count` iterations that this program runs."""
        return f"{count} * part // parts", f"{count} * (part + 1) // parts"

    # Consecutive keys

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
        )

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
        partial = None
        if run.inner is not None:
            full_lo, full_hi = self.inner(run.inner)
            begin = self.let("full", f"tl.cdiv(tl.maximum({full_lo} - {first}, 0), {step} * BLOCK_N)")
            reached = f"tl.maximum(tl.cdiv(tl.maximum({full_hi} - {first}, 0), {step}), 0)"
            partial = f"((n < {begin}) | (n >= {self.let('full_end', f'{reached} // BLOCK_N')}))"

        def keys(writer: Writer) -> None:
            writer.let(self.at, f"{first} + {step} * (n * BLOCK_N + lanes_n)")
            writer.let(self.ok, self.inside)

        begin = self.let("begin", f"{first}{self.shift}")
        place = f"{begin} % {step}, {begin} // {step} + n * BLOCK_N"
        return Loop(*self.share(tiles), keys, partial, self.exact(), view=str(self.number), place=place)

    def phase(self, stem: str, phase: str, step: str) -> str:
        """The one residue of a tile's rows."""
        return self.let(stem, f"tl.max(tl.where({self.row_ok}, _floor_mod({phase}, {step}), 0), 0)")

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

    # Listed keys

    def table(self, attribute: str) -> tuple[str, str, str]:
        """Pointer to the table's line for this batch and head, stride and length of its last axis."""
        line = table_line(self.expressions.arrays[attribute])
        return line.pointer, line.stride, line.length

    def listed(self, walk: Listed) -> Loop:
        run = self.key_set.runs[0]
        lo, hi = self.outer(run.outer)
        table, stride, length = self.table(walk.table)
        offset = self.let("offset", self.row_text(walk.offset))
        if walk.starts is not None:
            return self.listed_lines(walk, table, stride, walk.starts)
        if walk.rank is None:
            return self.listed_blocks(walk, table, stride, length)
        rank, rank_stride, rank_length = self.table(walk.rank)

        def ranked(position: str) -> str:
            return f"tl.load({rank} + tl.minimum(tl.maximum({position}, 0), {rank_length} - 1) * {rank_stride})"

        begin = self.let("begin", ranked(f"{lo} - {offset}"))
        end = self.let("stop", f"tl.maximum({ranked(f'{hi} - {offset}')}, {begin})")
        tiles = self.let("tiles", f"tl.cdiv({end} - {begin}, BLOCK_N)")

        def keys(writer: Writer) -> None:
            writer.let("at", f"{begin} + n * BLOCK_N + lanes_n")
            writer.let("listed", f"at < {end}")
            writer.let(self.at, f"tl.load({table} + at * {stride}, mask=listed, other=0) + {offset}")
            writer.let(self.ok, f"listed & ({self.at} >= 0) & {self.inside}")

        return Loop(*self.share(tiles), keys, exact=self.exact())

    def listed_blocks(self, walk: Listed, table: str, stride: str, length: str) -> Loop:
        """One line of the table per block of rows; the tile lies within one block."""
        array = self.expressions.arrays[walk.table]
        width = self.let("width", self.row_text(walk.width))
        line = self.let("line", f"tl.min(tl.where({self.row_ok}, {self.row}, FAR), 0) // {width}")
        line = self.let("line", f"tl.minimum({line}, {array.name}_n0 - 1)")
        total = self.let("count", f"{length} * {width}")

        def keys(writer: Writer) -> None:
            writer.let("at", "n * BLOCK_N + lanes_n")
            entry = f"{array.name} + {line} * {array.name}_s0 + at // {width} * {stride}"
            writer.let("entry_n", f"tl.load({entry}, mask=at < {total}, other=-1)")
            writer.let(self.at, f"entry_n * {width} + at % {width}")
            writer.let(self.ok, f"(entry_n >= 0) & {self.inside}")

        return Loop(*self.share(f"tl.cdiv({total}, BLOCK_N)"), keys, exact=self.exact())

    def listed_lines(self, walk: Listed, table: str, stride: str, starts: str) -> Loop:
        """Lines of any length, one after the other, one per block of rows; the tile lies within one block."""
        offsets, offset_stride, length = self.table(starts)
        width = self.let("width", self.row_text(walk.width))
        line = self.let("line", f"tl.min(tl.where({self.row_ok}, {self.row}, FAR), 0) // {width}")
        line = self.let("line", f"tl.minimum({line}, {length} - 2)")
        begin = self.let("begin", f"tl.load({offsets} + {line} * {offset_stride})")
        stop = self.let("stop", f"tl.load({offsets} + ({line} + 1) * {offset_stride})")
        total = self.let("count", f"({stop} - {begin}) * {width}")

        def keys(writer: Writer) -> None:
            writer.let("at", "n * BLOCK_N + lanes_n")
            writer.let(
                "entry_n", f"tl.load({table} + ({begin} + at // {width}) * {stride}, mask=at < {total}, other=-1)"
            )
            writer.let(self.at, f"entry_n * {width} + at % {width}")
            writer.let(self.ok, f"(entry_n >= 0) & {self.inside}")

        return Loop(*self.share(f"tl.cdiv({total}, BLOCK_N)"), keys, exact=self.exact())

    # One key a row

    def diagonals(self, walk: Diagonals) -> Loop:
        self.let("offset", self.row_text(walk.offset))
        table, stride, _ = self.table(walk.table)
        rank, rank_stride, rank_length = self.table(walk.rank)
        count = self.let("count", f"tl.load({rank} + ({rank_length} - 1) * {rank_stride})")

        def keys(writer: Writer) -> None:
            entry = f"tl.load({table} + n * {stride})"
            turned = f"j + {entry} - {self.name('offset')}"
            writer.let(self.at, f"i - {entry} + {self.name('offset')}" if self.at == "j" else turned)
            writer.let(self.ok, f"{self.row_ok} & ({self.at} >= 0) & {self.inside}")

        return Loop(*self.share(count), keys)


def table_line(array: Array) -> TableLine:
    """The line of a derived table for the program's batch and head."""
    last = len(array.axes) - 1
    offsets = [
        f"({'h // ' + array.name + '_group' if axis == 'h' else axis}) * {array.name}_s{slot}"
        for slot, axis in enumerate(array.axes[:-1])
        if axis in ("b", "h")
    ]
    return TableLine(" + ".join([array.name, *offsets]), f"{array.name}_s{last}", f"{array.name}_n{last}")


def emit_ranges(writer: Writer, expressions: Expressions, key_set: KeySet, number: int, rows: Rows) -> Loop:
    """Write the bounds of a key set's tiles; the loop that visits them. `rows`: how the domain groups its rows."""
    return Ranges(writer, expressions, key_set, number, rows).loop()


__all__ = ["Diagonals", "Exact", "Limits", "Loop", "emit_ranges"]

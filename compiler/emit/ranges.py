"""Key sets to loops: which tiles of keys a row tile visits, full ones apart from partial ones.

Bounds are vectors over the rows; reducing them gives the tiles that any row touches and the tiles that every row
sees whole. The runs of a consecutive key set are sorted and swept, so that each tile is visited once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from attnc.compiler.emit.expressions import ROWS, Array, Expressions
from attnc.compiler.emit.rows import TableLine
from attnc.compiler.emit.writer import Writer
from attnc.compiler.ir import Node
from attnc.compiler.plan import Bounds, Diagonals, Grid, KeySet, Listed, Run, Stepped


@dataclass(frozen=True)
class Loop:
    """`for n in range(first, last)`; `keys` writes the positions of the n-th tile and which are real."""

    first: str
    last: str
    masked: bool
    keys: Callable[[Writer], None]
    contiguous: bool = False  # positions are start + 0 .. BLOCK_N
    view: str | None = None  # suffix of the tensor descriptors that hold its tiles
    place: str = ""  # the tile's place in them, after batch and head


Piece = tuple[str, str]  # first tile, number of tiles


class Ranges:
    """Writes the loops of one key set; names carry its number."""

    def __init__(self, writer: Writer, expressions: Expressions, key_set: KeySet, number: int) -> None:
        self.at = expressions.streamed  # the streamed position: j, or i where the rows are keys
        self.ok = f"{self.at}_ok"
        self.row = "i" if self.at == "j" else "j"
        self.row_ok = f"{self.row}_ok"
        self.end = "M" if self.at == "j" else "(OFFSET + N)"
        self.inside = "(j < M)" if self.at == "j" else "((i >= OFFSET) & (i < OFFSET + N))"
        self.shift = "" if self.at == "j" else " - OFFSET"  # from a position to a place in its tensor
        self.writer = writer
        self.expressions = expressions
        self.key_set = key_set
        self.number = number

    def name(self, stem: str) -> str:
        return f"{stem}_{self.number}"

    def let(self, stem: str, value: str) -> str:
        return self.writer.let(self.name(stem), value)

    def row_text(self, node: Node) -> str:
        return self.expressions.text(node, ROWS)

    def loops(self) -> list[Loop]:
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

    def outer(self, bounds: Bounds, stem: str = "") -> tuple[str, str]:
        """Least lo and largest hi over the rows that have a key."""
        lo = self.let(f"lo{stem}", self.row_text(bounds.lo))
        hi = self.let(f"hi{stem}", self.row_text(bounds.hi))
        some = self.let(f"some{stem}", f"{self.row_ok} & ({lo} < {hi})")
        first = self.let(f"first{stem}", f"tl.min(tl.where({some}, {lo}, {self.end}), 0).to(tl.int32)")
        last = self.let(f"last{stem}", f"tl.max(tl.where({some}, {hi}, 0), 0).to(tl.int32)")
        return first, last

    def inner(self, bounds: Bounds, stem: str = "") -> tuple[str, str]:
        """Largest lo and least hi: keys between them are live in every row."""
        lo, hi = self.row_text(bounds.lo), self.row_text(bounds.hi)
        first = self.let(f"full_first{stem}", f"tl.max(tl.where({self.row_ok}, {lo}, 0), 0).to(tl.int32)")
        last = self.let(f"full_last{stem}", f"tl.min(tl.where({self.row_ok}, {hi}, {self.end}), 0).to(tl.int32)")
        return first, last

    def share(self, count: str) -> tuple[str, str]:
        """The part of `count` iterations that this program runs."""
        return f"{count} * part // parts", f"{count} * (part + 1) // parts"

    # Consecutive keys

    def consecutive(self) -> list[Loop]:
        intervals = [self.interval(run, number) for number, run in enumerate(self.key_set.runs)]
        if len(intervals) > 1:
            self.sort(intervals)
            self.sweep(intervals)
        full, partial = [], list[Piece]()
        for number, (first, last, full_first, full_last) in enumerate(intervals):
            if self.key_set.runs[0].inner is None and len(intervals) == 1:
                partial.append((first, f"({last} - {first})"))
                continue
            self.writer.let(full_first, f"tl.minimum(tl.maximum({full_first}, {first}), {last})")
            self.writer.let(full_last, f"tl.minimum(tl.maximum({full_last}, {full_first}), {last})")
            full.append((full_first, self.let(f"whole{number}", f"{full_last} - {full_first}")))
            partial.append((first, self.let(f"before{number}", f"{full_first} - {first}")))
            partial.append((full_last, self.let(f"after{number}", f"{last} - {full_last}")))
        loops = [self.pieces(full, masked=False)] if full else []
        return [*loops, self.pieces(partial, masked=True)]

    def interval(self, run: Run, number: int) -> tuple[str, str, str, str]:
        """First and last tile touched, first and last full tile."""
        stem = str(number)
        lo, hi = self.outer(run.outer, stem)
        first = self.let(f"tile{stem}", f"{lo} // BLOCK_N")
        last = self.let(f"end{stem}", f"tl.maximum(tl.cdiv({hi}, BLOCK_N), {first})")
        if run.inner is None:
            return first, last, self.let(f"full{stem}", last), self.let(f"full_end{stem}", last)
        full_lo, full_hi = self.inner(run.inner, stem)
        full_first = self.let(f"full{stem}", f"tl.cdiv({full_lo}, BLOCK_N)")
        return first, last, full_first, self.let(f"full_end{stem}", f"{full_hi} // BLOCK_N")

    def sort(self, intervals: Sequence[tuple[str, str, str, str]]) -> None:
        """Order the intervals by their first tile: an exchange network on scalars."""
        for end in range(len(intervals) - 1, 0, -1):
            for at in range(end):
                left, right = intervals[at], intervals[at + 1]
                self.writer.let("swap", f"{left[0]} > {right[0]}")
                for one, other in zip(left, right, strict=True):
                    self.writer.let("held", one)
                    self.writer.let(one, f"tl.where(swap, {other}, {one})")
                    self.writer.let(other, f"tl.where(swap, held, {other})")

    def sweep(self, intervals: Sequence[tuple[str, str, str, str]]) -> None:
        """Cut what an earlier interval visits."""
        for (_, reached, *_), (first, last, *_) in pairwise(intervals):
            self.writer.let(first, f"tl.maximum({first}, {reached})")
            self.writer.let(last, f"tl.maximum({last}, {first})")

    def pieces(self, pieces: Sequence[Piece], *, masked: bool) -> Loop:
        """One loop over several stretches of tiles."""
        kind = "partial" if masked else "whole"
        ends: list[str] = []
        for number, (_, count) in enumerate(pieces):
            before = f"{ends[-1]} + " if ends else ""
            ends.append(self.let(f"{kind}_end{number}", f"{before}{count}"))
        place = f"{pieces[-1][0]} + n" + (f" - {ends[-2]}" if len(pieces) > 1 else "")
        for number in range(len(pieces) - 2, -1, -1):
            here = f"{pieces[number][0]} + n" + (f" - {ends[number - 1]}" if number else "")
            place = f"tl.where(n < {ends[number]}, {here}, {place})"

        def keys(writer: Writer) -> None:
            writer.let("start", f"({place}) * BLOCK_N")
            writer.let(self.at, "start + lanes_n")
            writer.let(self.ok, self.inside)

        return Loop(*self.share(ends[-1]), masked, keys, contiguous=True, view="", place=f"start{self.shift}, 0")

    # Keys by a step

    def stepped(self, walk: Stepped) -> list[Loop]:
        run = self.key_set.runs[0]
        lo, hi = self.outer(run.outer)
        step = self.let("step", self.row_text(walk.step))
        phase = self.phase("phase", self.row_text(walk.phase), step)
        first = self.let("origin", f"{lo} + _floor_mod({phase} - {lo}, {step})")
        count = self.let("count", f"tl.maximum(tl.cdiv({hi} - {first}, {step}), 0)")
        tiles = self.let("tiles", f"tl.cdiv({count}, BLOCK_N)")

        def keys(writer: Writer) -> None:
            writer.let(self.at, f"{first} + {step} * (tile_n * BLOCK_N + lanes_n)")
            writer.let(self.ok, self.inside)

        return self.split_full(run, first, step, tiles, keys)

    def split_full(self, run: Run, first: str, step: str, tiles: str, keys: Callable[[Writer], None]) -> list[Loop]:
        """Full tiles of an ordered walk in a loop of their own."""

        def at(place: str) -> Callable[[Writer], None]:
            def write(writer: Writer) -> None:
                writer.let("tile_n", place)
                keys(writer)

            return write

        view = str(self.number)
        begin = f"({first}{self.shift})"
        place = f"{begin} % {step}, {begin} // {step} + tile_n * BLOCK_N, 0"
        if run.inner is None:
            return [Loop(*self.share(tiles), True, at("n"), view=view, place=place)]
        lo, hi = self.inner(run.inner)
        begin = self.let("full", f"tl.cdiv(tl.maximum({lo} - {first}, 0), {step} * BLOCK_N)")
        end = self.let("full_end", f"tl.maximum(tl.cdiv(tl.maximum({hi} - {first}, 0), {step}), 0) // BLOCK_N")
        begin = self.let("full", f"tl.minimum({begin}, {tiles})")
        end = self.let("full_end", f"tl.minimum(tl.maximum({end}, {begin}), {tiles})")
        whole = self.let("whole", f"{end} - {begin}")
        rest = self.let("rest", f"{tiles} - {whole}")
        return [
            Loop(*self.share(whole), False, at(f"{begin} + n"), view=view, place=place),
            Loop(*self.share(rest), True, at(f"tl.where(n < {begin}, n, {whole} + n)"), view=view, place=place),
        ]

    def phase(self, stem: str, phase: str, step: str) -> str:
        """The one residue of a tile's rows."""
        return self.let(stem, f"tl.max(tl.where({self.row_ok}, _floor_mod({phase}, {step}), 0), 0)")

    # Keys of a grid

    def grid(self, walk: Grid) -> list[Loop]:
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
            writer.let("at", "tile_n * BLOCK_N + lanes_n")
            writer.let("high", f"{self.name('high_from')} + {steps['high']} * (at // {width})")
            writer.let(self.at, f"high * {period} + {self.name('low_from')} + {steps['low']} * (at % {width})")
            writer.let(self.ok, f"(at < {total}) & {self.inside}")

        def first(writer: Writer) -> None:
            writer.let("tile_n", "n")
            keys(writer)

        tiles = self.let("tiles", f"tl.cdiv({total}, BLOCK_N)")
        if self.key_set.runs[0].inner is None:
            return [Loop(*self.share(tiles), True, first)]
        # Where every row sees the whole box, its tiles are full, the last one apart
        full_lo, full_hi = self.inner(self.key_set.runs[0].inner)
        corner = f"{self.name('high_from')} * {period} + {self.name('low_from')}"
        opposite = f"({self.name('high_to')} - 1) * {period} + {self.name('low_to')}"
        clean = self.let("clean", f"({full_lo} <= {corner}) & ({full_hi} >= {opposite})")
        whole = self.let("whole", f"tl.where({clean}, {total} // BLOCK_N, 0)")

        def rest(writer: Writer) -> None:
            writer.let("tile_n", f"{whole} + n")
            keys(writer)

        return [
            Loop(*self.share(whole), False, first),
            Loop(*self.share(f"({tiles} - {whole})"), True, rest),
        ]

    # Listed keys

    def table(self, attribute: str) -> tuple[str, str, str]:
        """Pointer to the table's line for this batch and head, stride and length of its last axis."""
        line = table_line(self.expressions.arrays[attribute])
        return line.pointer, line.stride, line.length

    def listed(self, walk: Listed) -> list[Loop]:
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

        return [Loop(*self.share(tiles), True, keys)]

    def listed_blocks(self, walk: Listed, table: str, stride: str, length: str) -> list[Loop]:
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

        return [Loop(*self.share(f"tl.cdiv({total}, BLOCK_N)"), True, keys)]

    def listed_lines(self, walk: Listed, table: str, stride: str, starts: str) -> list[Loop]:
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

        return [Loop(*self.share(f"tl.cdiv({total}, BLOCK_N)"), True, keys)]

    # One key a row

    def diagonals(self, walk: Diagonals) -> list[Loop]:
        self.let("offset", self.row_text(walk.offset))
        table, stride, _ = self.table(walk.table)
        rank, rank_stride, rank_length = self.table(walk.rank)
        count = self.let("count", f"tl.load({rank} + ({rank_length} - 1) * {rank_stride})")

        def keys(writer: Writer) -> None:
            entry = f"tl.load({table} + n * {stride})"
            turned = f"j + {entry} - {self.name('offset')}"
            writer.let(self.at, f"i - {entry} + {self.name('offset')}" if self.at == "j" else turned)
            writer.let(self.ok, f"{self.row_ok} & ({self.at} >= 0) & {self.inside}")

        return [Loop(*self.share(count), True, keys)]


def table_line(array: Array) -> TableLine:
    """The line of a derived table for the program's batch and head."""
    last = len(array.axes) - 1
    offsets = [
        f"({'h // ' + array.name + '_group' if axis == 'h' else axis}) * {array.name}_s{slot}"
        for slot, axis in enumerate(array.axes[:-1])
        if axis in ("b", "h")
    ]
    return TableLine(" + ".join([array.name, *offsets]), f"{array.name}_s{last}", f"{array.name}_n{last}")


def emit_ranges(writer: Writer, expressions: Expressions, key_set: KeySet, number: int) -> list[Loop]:
    """Write the bounds of a key set's tiles; the loops that visit them."""
    return Ranges(writer, expressions, key_set, number).loops()


__all__ = ["Diagonals", "Loop", "emit_ranges"]

"""Loops over keys that a table lists, by lines or by one key a row."""

from __future__ import annotations

from attnc.compiler.emit.bounds import Loop, TileBounds
from attnc.compiler.emit.expressions import Array
from attnc.compiler.emit.rows import TableLine
from attnc.compiler.emit.writer import Writer
from attnc.compiler.plan import Diagonals, Listed


class ListedRanges(TileBounds):
    """Writes the loop of a key set that a table lists."""

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

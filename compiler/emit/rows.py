"""Which rows a program works on: writes `row`, its global position `i` (or `j`) and `row_ok`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType

from attnc.compiler.emit.writer import Writer
from attnc.compiler.ir import Node
from attnc.compiler.plan import Rows

SQUARE_HIGH = 8  # lines of the grid in a square tile; its width is BLOCK_M / 8


@dataclass(frozen=True)
class Side:
    """What rows are: the name of their position, the first one and their number, as the kernel spells them."""

    position: str
    first: str
    count: str


SIDES = {"i": Side("i", "OFFSET", "N"), "j": Side("j", "0", "M")}


@dataclass(frozen=True)
class TableLine:
    """A line of a derived table: a pointer to its first entry, the stride and the number of its entries."""

    pointer: str
    stride: str
    length: str


@lru_cache(maxsize=1024)
def row_nodes(rows: Rows) -> Mapping[str, Node]:
    """What the grouping of rows depends on, by name."""
    names = ("period", "step", "high_step", "low_step", "phase", "high_phase", "low_phase")
    found: dict[str, Node | None] = {name: getattr(rows, name) for name in names}
    if rows.low is not None:
        found |= {"low_lo": rows.low.lo, "low_hi": rows.low.hi}
    if rows.listed is not None:
        found["listed_offset"] = rows.listed.offset
    return MappingProxyType({name: node for name, node in found.items() if node is not None})


def emit_rows(
    writer: Writer, rows: Rows, steps: dict[str, str], position: str = "i", listed: TableLine | None = None
) -> None:
    """The program's tile. `steps`: the text of `row_nodes`; `position`: i, or j where keys stay; `listed`: its line.

    Later queries and earlier keys go first: under a causal condition they are the long ones. With SPLIT, a schedule
    says which tile and which part of its keys a program has. Where rows follow each other (`ordered`), the positions
    of the first and the last one are `i_low` and `i_high`.
    """
    with writer.block("if SPLIT:"):
        writer.let("entry", "schedule + tl.program_id(0) * 4")
        for slot, name in enumerate(("tile", "part", "parts", "slot")):
            writer.let(name, f"tl.load(entry + {slot})")
    with writer.block("else:"):
        later_first = position == "i" and rows.step is None
        writer.let("tile", "tl.num_programs(0) - 1 - tl.program_id(0)" if later_first else "tl.program_id(0)")
        writer.let("part", "0")
        writer.let("parts", "1")
        writer.let("slot", "-1")
    writer.let("lane", "tl.arange(0, BLOCK_M)")
    side = SIDES[position]
    if listed is not None:
        listed_rows(writer, steps, side, listed)
    elif rows.packed:
        packed_rows(writer, rows, steps, side)
    elif rows.period is not None:
        grid_rows(writer, rows, steps, side)
    else:
        class_rows(writer, rows, steps, side)


def ordered(rows: Rows) -> bool:
    """Whether the positions of a tile's rows grow with their place in it."""
    return rows.listed is None and rows.period is None


def class_rows(writer: Writer, rows: Rows, steps: dict[str, str], side: Side) -> None:
    """Consecutive rows, or those of one residue class: of every class in turn, or only of the phase's."""
    if rows.step is None:
        writer.let("row_tile", "tile * BLOCK_M")
        writer.let("row", "row_tile + lane")
    elif rows.phase is not None:
        writer.let("step", steps["step"])
        writer.let("row_class", f"_floor_mod({steps['phase']} - {side.first}, step)")
        writer.let("row_tile", "tile * BLOCK_M")
        writer.let("row", "row_class + step * (row_tile + lane)")
    else:
        writer.let("step", steps["step"])
        writer.let("class_tiles", f"tl.cdiv(tl.cdiv({side.count}, step), BLOCK_M)")
        writer.let("row_class", "tile // class_tiles")
        writer.let("row_tile", "tile % class_tiles * BLOCK_M")
        writer.let("row", "row_class + step * (row_tile + lane)")
    writer.let("row_ok", f"row < {side.count}")
    writer.let(side.position, f"row + {side.first}")
    last = f"tl.minimum(row_tile + BLOCK_M, {side.count}) - 1"
    first, step = "row_tile", ""
    if rows.step is not None:
        last = f"tl.minimum(row_tile + BLOCK_M - 1, ({side.count} - 1 - row_class) // step)"
        first, step = "row_class + step * row_tile", "row_class + step * "
    writer.let(f"{side.position}_low", f"{first} + {side.first}")
    writer.let(f"{side.position}_high", f"{step}({last}) + {side.first}")


def listed_rows(writer: Writer, steps: dict[str, str], side: Side, listed: TableLine) -> None:
    """The entries of a table; those that don't count are not below the number of rows."""
    writer.let("row_tile", "tile * BLOCK_M")
    within = f"row_tile + lane < {listed.length}"
    pointer = f"{listed.pointer} + (row_tile + lane) * {listed.stride}"
    writer.let("entry_of_row", f"tl.load({pointer}, mask={within}, other={side.count})")
    writer.let(side.position, f"entry_of_row + {steps['listed_offset']}")
    writer.let("row", f"{side.position} - {side.first}")
    writer.let("row_ok", f"(entry_of_row < {side.count}) & (row >= 0) & (row < {side.count})")


def grid_lines(writer: Writer, steps: dict[str, str], side: Side) -> None:
    """`period`, the steps of both digits, and the lines of the grid that hold rows."""
    writer.let("period", steps["period"])
    writer.let("high_step", steps.get("high_step", "1"))
    writer.let("low_step", steps.get("low_step", "1"))
    writer.let("first_line", f"{side.first} // period")
    writer.let("lines", f"({side.first} + {side.count} - 1) // period - first_line + 1")


def grid_rows(writer: Writer, rows: Rows, steps: dict[str, str], side: Side) -> None:
    """A rectangle of high and low digits, each by its step."""
    high = str(SQUARE_HIGH) if rows.square else "1"
    writer.let("WIDE", f"BLOCK_M // {high}")
    grid_lines(writer, steps, side)
    writer.let("low_tiles", "tl.cdiv(tl.cdiv(period, low_step), WIDE)")
    writer.let("high_tiles", f"tl.cdiv(tl.cdiv(lines, high_step), {high})")
    writer.let("low_tile", "tile % low_tiles")
    writer.let("rest", "tile // low_tiles")
    writer.let("low", "rest % low_step + low_step * (low_tile * WIDE + lane % WIDE)")
    writer.let("rest", "rest // low_step")
    writer.let("line", f"rest // high_tiles + high_step * (rest % high_tiles * {high} + lane // WIDE)")
    place_on_grid(writer, side, "(low < period)")


def packed_rows(writer: Writer, rows: Rows, steps: dict[str, str], side: Side) -> None:
    """The columns and classes that are left, one after the other: a tile may take several lines.

    A digit with a phase has one class, else the classes of its step come in turn.
    """
    grid_lines(writer, steps, side)
    writer.let("low_from", f"tl.maximum({steps.get('low_lo', '0')}, 0)")
    writer.let("low_to", f"tl.minimum({steps.get('low_hi', 'period')}, period)")
    writer.let("columns", "tl.maximum(tl.cdiv(low_to - low_from, low_step), 1)")
    writer.let("class_tiles", "tl.cdiv(tl.cdiv(lines, high_step) * columns, BLOCK_M)")
    writer.let("row_class", "tile // class_tiles")
    writer.let("at", "tile % class_tiles * BLOCK_M + lane")
    if rows.low_phase is not None:
        writer.let("low_class", f"_floor_mod({steps['low_phase']} - low_from, low_step)")
    else:
        writer.let("low_class", "row_class % low_step")
        writer.let("row_class", "row_class // low_step")
    if rows.high_phase is not None:
        writer.let("row_class", f"_floor_mod({steps['high_phase']} - first_line, high_step)")
    writer.let("low", "low_from + low_class + low_step * (at % columns)")
    writer.let("line", "row_class + high_step * (at // columns)")
    place_on_grid(writer, side, "(low < low_to) & (row_class < high_step)")


def place_on_grid(writer: Writer, side: Side, inside: str) -> None:
    """From the digits to the position."""
    writer.let(side.position, "(first_line + line) * period + low")
    writer.let("row", f"{side.position} - {side.first}")
    writer.let("row_ok", f"{inside} & (line < lines) & (row >= 0) & (row < {side.count})")


def row_tiles(rows: Rows, values: dict[str, int], rows_count: int, offset: int, block_m: int) -> int:
    """Number of row tiles that `emit_rows` enumerates, given the values of `row_nodes`.

    `values["entries"]`: the length of the table that lists the rows.
    """

    def over(x: int, y: int) -> int:
        return -(-x // y)

    if rows_count == 0:
        return 0
    if rows.listed is not None:
        return over(values["entries"], block_m)
    if rows.period is not None:
        period, high_step, low_step = values["period"], values.get("high_step", 1), values.get("low_step", 1)
        lines = (offset + rows_count - 1) // period - offset // period + 1
        if rows.packed:
            span = min(values.get("low_hi", period), period) - max(values.get("low_lo", 0), 0)
            classes = (1 if rows.low_phase else low_step) * (1 if rows.high_phase else high_step)
            return classes * over(over(lines, high_step) * max(over(span, low_step), 1), block_m)
        high = SQUARE_HIGH if rows.square else 1
        return over(over(period, low_step), block_m // high) * low_step * over(over(lines, high_step), high) * high_step
    if rows.step is not None:
        classes = 1 if rows.phase is not None else min(values["step"], rows_count)  # later ones are empty
        return classes * over(over(rows_count, values["step"]), block_m)
    return over(rows_count, block_m)

"""Which rows a program works on: writes `row`, `i` and `row_ok`."""

from __future__ import annotations

from attnc.compiler.emit.writer import Writer
from attnc.compiler.plan import Rows

SQUARE_HIGH = 8  # lines of the grid in a square tile; its width is BLOCK_M / 8


def emit_rows(writer: Writer, rows: Rows, steps: dict[str, str]) -> None:
    """The program's tile. `steps`: the text of the rows' period and steps.

    Later tiles go first: under a causal condition they are the long ones. With SPLIT, a schedule says which tile
    and which part of its keys a program has.
    """
    with writer.block("if SPLIT:"):
        writer.let("entry", "schedule + tl.program_id(0) * 4")
        for slot, name in enumerate(("tile", "part", "parts", "slot")):
            writer.let(name, f"tl.load(entry + {slot})")
    with writer.block("else:"):
        writer.let("tile", "tl.num_programs(0) - 1 - tl.program_id(0)")
        writer.let("part", "0")
        writer.let("parts", "1")
        writer.let("slot", "-1")
    writer.let("lane", "tl.arange(0, BLOCK_M)")
    if rows.period is not None:
        grid_rows(writer, rows, steps)
    elif rows.step is not None:
        writer.let("step", steps["step"])
        writer.let("class_tiles", "tl.cdiv(tl.cdiv(N, step), BLOCK_M)")
        writer.let("row_tile", "tile % class_tiles * BLOCK_M")
        writer.let("row", "tile // class_tiles + step * (row_tile + lane)")
        writer.let("row_ok", "row < N")
        writer.let("i", "row + OFFSET")
    else:
        writer.let("row_tile", "tile * BLOCK_M")
        writer.let("row", "row_tile + lane")
        writer.let("row_ok", "row < N")
        writer.let("i", "row + OFFSET")


def grid_rows(writer: Writer, rows: Rows, steps: dict[str, str]) -> None:
    """A rectangle of high and low digits, each by its step."""
    writer.let("period", steps["period"])
    writer.let("high_step", steps.get("high_step", "1"))
    writer.let("low_step", steps.get("low_step", "1"))
    high = str(SQUARE_HIGH) if rows.square else "1"
    writer.let("WIDE", f"BLOCK_M // {high}")
    writer.let("first_line", "OFFSET // period")
    writer.let("lines", "(OFFSET + N - 1) // period - first_line + 1")
    writer.let("low_tiles", "tl.cdiv(tl.cdiv(period, low_step), WIDE)")
    writer.let("high_tiles", f"tl.cdiv(tl.cdiv(lines, high_step), {high})")
    writer.let("low_tile", "tile % low_tiles")
    writer.let("rest", "tile // low_tiles")
    writer.let("low", "rest % low_step + low_step * (low_tile * WIDE + lane % WIDE)")
    writer.let("rest", "rest // low_step")
    writer.let("line", f"rest // high_tiles + high_step * (rest % high_tiles * {high} + lane // WIDE)")
    writer.let("i", "(first_line + line) * period + low")
    writer.let("row", "i - OFFSET")
    writer.let("row_ok", "(low < period) & (line < lines) & (row >= 0) & (row < N)")


def row_tiles(rows: Rows, values: dict[str, int], rows_count: int, offset: int, block_m: int) -> int:
    """Number of row tiles that `emit_rows` enumerates, given the values of the period and the steps."""

    def over(x: int, y: int) -> int:
        return -(-x // y)

    if rows.period is not None:
        period, high_step, low_step = values["period"], values.get("high_step", 1), values.get("low_step", 1)
        high = SQUARE_HIGH if rows.square else 1
        lines = (offset + rows_count - 1) // period - offset // period + 1
        return over(over(period, low_step), block_m // high) * low_step * over(over(lines, high_step), high) * high_step
    if rows.step is not None:
        return values["step"] * over(over(rows_count, values["step"]), block_m)
    return over(rows_count, block_m)

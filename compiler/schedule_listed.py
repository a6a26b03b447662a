"""Tile shapes of the listed kernels, and into how many pieces the rows of a block of keys are cut."""

from __future__ import annotations

from attnc.compiler.schedule import TileShape

PIECES_PER_PROCESSOR = 12  # programs of the kernel that keeps keys, relative to the processors: the most named are cut
SHORTEST_PIECE = 512  # rows; less is not worth a slot
FULL_ROWS = 64  # what a group of four warps multiplies at a time
TOGETHER_ENTRIES = 128  # of the lines of a tile: more are not compared with one another
MARKED = 31  # lines at most, a bit each
WIDE_KEYS = 128  # keys of an entry from which on two such groups share the rows that they read


def listed_shape(kernel: str, width: int, itemsize: int, rows: int, keys: int) -> TileShape:
    """The shape for vectors of `width` (the larger of D and E, padded) of `itemsize` bytes. Measured on an H100.

    `kernel`: `forward`, `rows` or `keys`. `rows`: of a line, where a tile has those of one line alone; else 0.
    `keys`: of an entry.
    """
    if kernel == "keys":
        shape, most = keys_shape(width, itemsize, keys), power(keys)
    else:
        shape, most = rows_shape(kernel, width, itemsize, rows), power(rows or FULL_ROWS)
    return TileShape(min(shape.block_m, most), shape.block_n, shape.warps, shape.stages)


def rows_shape(kernel: str, width: int, itemsize: int, rows: int) -> TileShape:
    """Rows stay, as many as there may be."""
    forward = kernel == "forward"
    if itemsize > 2:
        return TileShape(64, 32, 4, 1) if width <= 64 else TileShape(32, 32, 4, 1)
    if width > 128:
        return TileShape(FULL_ROWS, 32, 4 if forward else 8, 1)
    if rows and rows < FULL_ROWS:
        return TileShape(FULL_ROWS, 64, 2 if rows <= 16 else 4, 3)
    return TileShape(FULL_ROWS, 64, 4, 3 if forward else 2)


def lines_together(rows: int, entries: int, keys: int, shape: TileShape) -> int:
    """How many lines a tile takes, of `rows` rows and `entries` entries of `keys` keys each: what several of them name
    is loaded once. `shape`: of a tile of as many rows as there may be. One where an entry is not whole tiles of keys.
    """
    if keys % shape.block_n:
        return 1
    return max(min(shape.block_m // max(rows, 1), TOGETHER_ENTRIES // max(entries, 1), MARKED), 1)


def keys_shape(width: int, itemsize: int, keys: int) -> TileShape:
    """Keys stay."""
    if itemsize > 2:
        return TileShape(64, 32, 4, 1) if width <= 64 else TileShape(32, 32, 4, 1)
    if width > 128:
        return TileShape(64, 32, 8, 1)
    return TileShape(128, 64, 8, 3) if keys >= WIDE_KEYS else TileShape(64, 32, 4, 3)


def power(number: int) -> int:
    """The power of two that holds a number, at least what a matrix product needs."""
    return max(16, 1 << (max(number, 1) - 1).bit_length())


def piece_rows(rows: int, tiles: int, processors: int, step: int) -> int:
    """Rows of a piece, a multiple of `step`: `rows` is what all blocks are named by, each of `tiles` programs.

    Pieces with slots for their sums are 2 * processors * PIECES_PER_PROCESSOR / tiles at most, whatever the length.
    """
    wanted = max(rows * tiles // (processors * PIECES_PER_PROCESSOR), SHORTEST_PIECE)
    return -(-wanted // step) * step

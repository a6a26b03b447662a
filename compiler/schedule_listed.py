"""Tile shapes of the listed kernels, and into how many pieces the rows of a block of keys are cut."""

from __future__ import annotations

from attnc.compiler.schedule import TileShape

PIECES_PER_PROCESSOR = 12  # programs of the kernel that keeps keys, relative to the processors: the most named are cut
SHORTEST_PIECE = 512  # rows; less is not worth a slot


def listed_shape(kernel: str, width: int, itemsize: int, rows: int, keys: int) -> TileShape:
    """The shape for vectors of `width` (the larger of D and E, padded) of `itemsize` bytes.

    `kernel`: `forward`, `rows` or `keys`. `rows`: of a line, where a tile has those of one line alone; else 0.
    `keys`: of an entry.
    """
    if kernel == "keys":
        return keys_shape(width, itemsize, keys)
    if itemsize > 2:
        shape = TileShape(64, 32, 4, 1) if width <= 64 else TileShape(32, 32, 4, 1)
    elif width > 128:
        shape = TileShape(64, 32, 4 if kernel == "forward" else 8, 1)
    elif rows and rows < 64:
        shape = TileShape(64, 64, 4, 3 if kernel == "forward" else 2)
    elif kernel == "forward":
        shape = TileShape(128, 128 if keys >= 128 else 64, 8, 2)
    else:
        shape = TileShape(128, 64, 8, 2)
    most = power(rows) if rows else shape.block_m
    return TileShape(min(shape.block_m, most), shape.block_n, shape.warps, shape.stages)


def keys_shape(width: int, itemsize: int, keys: int) -> TileShape:
    """Keys stay: no more of them than an entry has."""
    if itemsize > 2:
        shape = TileShape(64, 32, 4, 1) if width <= 64 else TileShape(32, 32, 4, 1)
    elif width > 128:
        shape = TileShape(64, 32, 8, 1)
    elif keys >= 128:
        shape = TileShape(128, 64, 8, 2)
    else:
        shape = TileShape(64, 64, 4, 2)
    return TileShape(min(shape.block_m, power(keys)), shape.block_n, shape.warps, shape.stages)


def power(number: int) -> int:
    """The power of two that holds a number, at least what a matrix product needs."""
    return max(16, 1 << (max(number, 1) - 1).bit_length())


def piece_rows(rows: int, tiles: int, processors: int, step: int) -> int:
    """Rows of a piece, a multiple of `step`: `rows` is what all blocks are named by, each of `tiles` programs."""
    wanted = max(rows * tiles // (processors * PIECES_PER_PROCESSOR), SHORTEST_PIECE)
    return -(-wanted // step) * step

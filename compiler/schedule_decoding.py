"""Tile shapes of decoding kernels, and how many programs share a row's keys."""

from __future__ import annotations

from attnc.compiler.schedule import TileShape

LEAST = 16  # the smallest side of a product
WIDE = 256  # vectors from which on more rows do not fit beside the keys (an absorbed latent)
PROGRAMS = 32  # for each processor, so that none waits long for the last
FEWEST_KEYS = 256  # of a part: less is not worth its sum
MOST_PARTS = 64


def decoded_shape(width: int, group: int, itemsize: int, interpreted: bool = False) -> TileShape:
    """The shape for vectors of `width` (padded) and `group` query heads that share a key head: what is read counts."""
    rows = LEAST
    while rows < min(group, 64 if width <= WIDE else LEAST):
        rows *= 2
    if interpreted:
        return TileShape(LEAST, 32, 1, 1)
    keys = 64
    while keys > LEAST and keys * width * itemsize > 32768:
        keys //= 2
    return TileShape(rows, keys, 4, 3)


def parts_of(tiles: int, most: int, processors: int, shape: TileShape) -> int:
    """Programs, a power of two, that share the keys of a row, `most` at most, where there are so many tiles of heads.

    Measured on an H100 at 64,000 keys: from 2 to 32 parts of 128 tiles differ by 4.5 per cent, as repeats do.
    """
    wanted = -(-PROGRAMS * processors // max(tiles, 1))
    found = max(1, min(wanted, most // max(FEWEST_KEYS, shape.block_n), MOST_PARTS))
    return 1 << (found.bit_length() - 1)


def advance_shape(features: int, columns: int) -> tuple[int, int]:
    """Features and columns of a block of a state: some ten thousand bytes."""
    block_f = max(16, min(1 << (max(features, 1) - 1).bit_length(), 256))
    block_e = 32 if block_f > 64 else 64
    return block_f, min(block_e, max(16, 1 << (max(columns, 1) - 1).bit_length()))

"""Tile shapes, and how long row tiles are split over programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

PARTS_PER_PROCESSOR = 4  # pieces that the longest tile may be cut into, relative to an even share
SMALLEST_PART = 8  # key tiles; less is not worth a workspace


@dataclass(frozen=True)
class TileShape:
    """Rows and keys of a tile, warps and pipeline stages of a program.

    `apart`: whether full tiles have a loop of their own, which has no branch. `overlap`: whether keys that stay have
    their product with the weights run while the gradient of the scores is made.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int
    overlap: bool = False
    apart: bool = False


def tile_shape(width: int, itemsize: int, kind: str, keys: int | None = None) -> TileShape:
    """The shape for vectors of `width` (the larger of D and E, padded) of `itemsize` bytes.

    `kind`: how many keys a row sees in order: `long` (all of them, or all before it), `local` (a window), `blocks`
    (listed ones), `sparse` (by a step, a grid or a list). `keys`: how many there are. Measured on an H100, see
    benchmarks/results/.
    """
    if itemsize == 2 and width <= 64 and kind == "long" and keys is not None and keys <= 64:
        return TileShape(64, 64, 4, 3)
    if 128 < width <= 192 and itemsize == 2 and kind == "long":
        return TileShape(128, 64, 8, 4)
    if width > 256:  # few rows that share an absorbed latent
        return TileShape(16, 16, 4, 1 if itemsize > 2 else 2)
    if itemsize > 2:
        return WIDE[128 if width <= 128 else 256] if width > 64 else TileShape(128, 64, 8, 2)
    if width > 128 or kind == "sparse":
        return TileShape(64, 32, 4, 3)
    if kind == "long":
        return TileShape(64, 128, 4, 3) if width <= 64 else TileShape(128, 128, 8, 3, apart=True)
    return TileShape(64, 64, 4, 2 if width <= 64 else 3)


WIDE = {128: TileShape(128, 32, 8, 2), 256: TileShape(64, 16, 8, 2)}  # four-byte elements


def backward_shape(width: int, itemsize: int, side: str, kind: str) -> TileShape:
    """The shape of a gradient kernel; `side`: which side stays (`rows` or `keys`). Other arguments as in tile_shape."""
    if itemsize > 2:
        return TileShape(64, 32, 4, 1) if width <= 64 else TileShape(32, 32, 4, 1)
    if width > 192 or (width > 128 and kind not in ("long", "local")):
        return TileShape(64, 32, 8, 1)
    if width > 128:
        return TileShape(128, 64, 8, 3) if side == "rows" else TileShape(64, 32, 4, 3)
    if side == "rows":
        if kind in ("sparse", "blocks"):
            return TileShape(64, 32, 4, 2, apart=width > 64)
        if width <= 64:
            return TileShape(128, 64, 8, 3) if kind == "long" else TileShape(64, 64, 4, 2)
        return TileShape(128, 64, 8, 4, apart=True) if kind == "long" else TileShape(64, 64, 4, 2, apart=True)
    if kind == "blocks":
        return TileShape(64, 32, 4, 2)
    if width <= 64:
        return TileShape(64, 64, 4, 3, apart=True) if kind == "long" else TileShape(64, 32, 4, 2)
    return TileShape(64, 64, 4, 2, overlap=kind != "sparse")  # a step's bookkeeping leaves no registers for it


def fused_shape(width: int, itemsize: int, side: str, count: int, *, pieces: bool = False) -> TileShape | None:
    """The shape of a gradient kernel whose tile holds all `count` rows of the side that stays; None: they don't fit.

    Sums of what stays are kept in registers: two a key, one a query. `pieces`: products of float32 numbers as pairs
    in bfloat16. Other arguments as in backward_shape.
    """
    rows = LEAST_ROWS
    while rows < count:
        rows *= 2
    sums = rows * width * (2 if side == "keys" else 1)
    if itemsize > 2:
        if width > 64 or rows > LEAST_ROWS:
            return None
        return TileShape(rows, 64, 4, 2) if pieces else TileShape(rows, 32, 8, 1)
    if sums > FUSED_SUMS or rows > MOST_ROWS:
        return None
    return TileShape(rows, 64, 8 if sums > FUSED_SUMS // 2 or rows > 128 else 4, 3 if width <= 64 else 2)


LEAST_ROWS, MOST_ROWS = 64, 256  # of a tile that stays: what a warp group multiplies, what the scores leave room for
FUSED_SUMS = 16384  # numbers that a program of eight warps keeps beside its weights


SHARED_ROWS = 16  # rows that share a line of a selection from which on they stay, however wide its entries
WIDE_ENTRY = 16  # keys of an entry from which on keys stay where fewer rows share


def rows_stay(rows: int, width: int) -> bool:
    """How listed pairs are gathered: a tile keeps the `rows` that share a line, or the `width` keys of one entry.

    Rows that stay have all their keys in one softmax, but each tile gathers its own; keys that stay are shared by all
    rows that name them, whose parts are joined afterwards. A tile of fewer than 16 on its own side wastes a product.
    """
    return rows >= SHARED_ROWS or width < WIDE_ENTRY


@dataclass(frozen=True)
class Split:
    """A program list: (tile, part, parts, slot) each; slot -1 writes the result itself.

    `long_tiles`: the tiles that were cut, with their first slot and number of parts.
    """

    entries: tuple[tuple[int, int, int, int], ...]
    long_tiles: tuple[tuple[int, int, int], ...]
    slots: int


def split_rows(work: Sequence[int], heads: int, processors: int) -> Split | None:
    """Cut row tiles whose number of key tiles would outlast the others; None where none does.

    `work`: key tiles of every row tile. A tile may take a quarter of an even share of all work.
    """
    total = sum(work)
    share = max(total * heads / (processors * PARTS_PER_PROCESSOR), 1.0)
    limit = max(int(share), SMALLEST_PART)
    if not work or max(work) <= 2 * limit:
        return None
    entries: list[tuple[int, int, int, int, int]] = []
    long_tiles: list[tuple[int, int, int]] = []
    slots = 0
    for tile, tiles in enumerate(work):
        parts = -(-tiles // limit) if tiles > 2 * limit else 1
        if parts > 1:
            long_tiles.append((tile, slots, parts))
        for part in range(parts):
            entries.append((-(tiles // parts), tile, part, parts, slots if parts > 1 else -1))
            slots += parts > 1
    entries.sort()
    return Split(tuple(entry[1:] for entry in entries), tuple(long_tiles), slots)

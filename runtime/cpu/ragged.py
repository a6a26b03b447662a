"""Row tiles whose keys tensors decide: widths rounded up, so that many tiles have one shape and are worked on at once.

Where a table bounds the keys, every tile has a start and a width of its own, and a step a tile costs more than its
products. Here a tile's keys become a list of a round number of them; what is too many, the mask takes out.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from itertools import groupby

import numpy as np

from attnc.runtime.cpu.pieces import Piece, Tile
from attnc.runtime.cpu.rows import Progression, numbers

ROUND = 64  # keys; widths are multiples
WIDEST = 1024  # keys; a step of more is long enough by itself


def aligned(tiles: Iterable[Tile], keys: int, masked: Collection[int]) -> Iterator[Tile]:
    """The tiles, narrow ones rounded up and in the order of their shapes. `keys`: how many there are.

    `masked`: the key sets whose mask alone says which pairs are live; on another the walk decides too, so none of its
    keys may be added to.
    """
    held = list(tiles)
    narrow = [rounded(tile, keys) for tile in held if fits(tile, masked)]
    yield from (tile for tile in held if not fits(tile, masked))
    for _, some in groupby(sorted(narrow, key=widths), key=widths):
        yield from some


def fits(tile: Tile, masked: Collection[int]) -> bool:
    """Whether every key set has a mask that says all and one narrow run of keys at most: it is true of no key twice."""
    sets = [piece.key_set for piece in tile.pieces]
    narrow = (isinstance(piece.keys, Progression) and piece.keys.step == 1 for piece in tile.pieces)
    whole = bool(sets) and len(sets) == len(set(sets)) and set(sets) <= set(masked)
    return whole and all(narrow) and sum(p.count for p in tile.pieces) <= WIDEST


def widths(tile: Tile) -> tuple[int, ...]:
    """What tiles are sorted by."""
    return (len(numbers(tile.rows)), *(part for piece in tile.pieces for part in (piece.key_set, piece.count)))


def rounded(tile: Tile, keys: int) -> Tile:
    """Its rows and keys as lists, keys a round number of them."""
    pieces = []
    for piece in tile.pieces:
        assert isinstance(piece.keys, Progression)
        width = min(-(-piece.count // ROUND) * ROUND, keys)
        start = min(piece.keys.start, keys - width)
        pieces.append(Piece(piece.key_set, np.arange(start, start + width), ((0, width),)))
    return Tile(numbers(tile.rows), tuple(pieces))

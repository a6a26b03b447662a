"""Tile shapes of selection kernels, and how much a line holds."""

from __future__ import annotations

from dataclasses import dataclass

from attnc.compiler.schedule import TileShape

WIDEST = 256  # numbers of a product's vector, padded
MOST = 8192  # entries of a list: what is held of one line has to fit in registers
SHARED_BYTES = 192 * 1024  # of the tiles that are under way
ONE_TILE = 256  # members that are taken from registers
LINES = 64  # of a tile
AHEAD = 3  # heads whose lines are held at a time
TILE = 128  # members of a tile, where there are several
HELD = 4 * TILE  # members that a line holds at most beyond four times the entries of its list
TAKEN_ONE_BY_ONE = 8  # entries up to which the best are found one after the other
REGISTERS = 8192  # ranks and members of the lines that are taken from at once, for four warps


@dataclass(frozen=True)
class Held:
    """How a kernel holds the best: all members in one tile (`resident`), or `capacity` a line, `at_once` lines taken
    from together."""

    resident: bool
    capacity: int
    at_once: int


def power(number: int) -> int:
    """The power of two that holds a number."""
    return 1 << (max(number, 1) - 1).bit_length()


def selecting_shape(width: int, itemsize: int, parts: int, members: int, heads: int = 1) -> TileShape:
    """The shape for vectors of `width` (padded; 0: no product) of `parts` numbers of `itemsize` bytes each.

    `heads`: how many of them a score sums over; of 16-bit vectors those of the next two are on their way.
    """
    vector = width * itemsize * (2 if itemsize > 2 else 1)  # a product of float32 takes its operands in two parts
    ahead = heads > 1 and itemsize <= 2
    lines = LINES * vector * (AHEAD if ahead else 1)
    fitting = power(max(SHARED_BYTES - lines, 1) // max(vector * parts, 1) + 1) // 2
    if members <= min(ONE_TILE, fitting):
        block = max(power(members), 16)
        return TileShape(LINES, block, 8 if block > TILE else 4, AHEAD if ahead else 1)
    return TileShape(LINES, max(min(TILE, fitting // 2), 16), 4, AHEAD if ahead else 2)


def held(shape: TileShape, members: int, width: int) -> Held:
    """What lines hold in a tile shape, for lists of `width` entries."""
    if members <= shape.block_n:
        return Held(True, 1, 1)
    capacity = power(width + max(width, 2 * shape.block_n))
    at_once = max(min(REGISTERS * shape.warps // 4 // capacity, shape.block_m), 1)
    return Held(False, capacity, at_once)

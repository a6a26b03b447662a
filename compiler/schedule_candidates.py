"""Tile shapes worth measuring beside those that `schedule` picks by rule."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from attnc.compiler.schedule import TileShape

# Rows that stay: (rows, keys, warps, stages) in bfloat16; the most likely first.
FORWARD = (
    (128, 128, 8, 3),
    (64, 64, 4, 3),
    (128, 64, 8, 3),
    (64, 128, 4, 3),
    (64, 32, 4, 3),
    (128, 64, 4, 3),
    (64, 64, 4, 2),
    (128, 32, 4, 4),
)
GRADIENTS = (
    (64, 64, 4, 2),
    (128, 64, 8, 3),
    (64, 32, 4, 2),
    (64, 64, 4, 3),
    (64, 64, 8, 2),
    (64, 128, 8, 2),
    (128, 32, 8, 3),
)
WIDE = ((64, 32, 4, 2), (64, 32, 8, 2), (64, 16, 4, 2), (64, 64, 8, 2), (128, 32, 8, 2))  # vectors beyond 128
SINGLE = ((128, 32, 8, 2), (64, 32, 4, 2), (64, 64, 4, 2), (128, 64, 8, 2), (32, 32, 4, 1))  # elements of four bytes


@lru_cache(maxsize=256)
def candidates(role: str, width: int, itemsize: int, rule: TileShape) -> tuple[TileShape, ...]:
    """Shapes to try, `rule` first.

    `role`: `forward`, `rows`, `keys` (gradients where that side stays) or `listed`, whose tiles hold no more of what
    stays than the rule says. `width`: the larger of D and E, padded; `itemsize`: bytes of an element.
    """
    families: tuple[tuple[int, int, int, int], ...]
    if itemsize > 2:
        families = SINGLE
    elif width > 128:
        families = WIDE
    else:
        families = FORWARD if role == "forward" else GRADIENTS
    if role == "listed":
        found = [TileShape(min(m, rule.block_m), n, warps, stages) for m, n, warps, stages in families]
        return tuple(dict.fromkeys([rule, *found]))
    found = [rule, replace(rule, apart=not rule.apart)]
    if role == "keys":
        found.append(replace(rule, overlap=not rule.overlap))
    found += [TileShape(m, n, warps, stages, rule.overlap, rule.apart) for m, n, warps, stages in families]
    return tuple(dict.fromkeys(found))

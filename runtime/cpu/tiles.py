"""Which keys each row tile visits: a plan's key sets, worked out for one call.

Bounds are evaluated for all rows at once and reduced to a tile's hull (no key outside of it is live for any of its
rows) and inner interval (every key inside is live for all of them). A piece is a run of keys that a tile
visits in one step; the mask is asked only about its columns that are not fully live. Everything here is linear in
the sequence and in the live keys' intervals.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256

import numpy as np
import torch
from numpy.typing import NDArray

from attnc.compiler.ir import Node, walk
from attnc.compiler.plan import Bounds, Diagonals, Domain, Grid, KeySet, Listed, Plan, Run, Stepped
from attnc.runtime.call import Call
from attnc.runtime.cpu.pieces import Consecutive, Hull, Lattice, Maker, Piece, Selected, Slashes, Stepping, Tile
from attnc.runtime.cpu.ragged import aligned
from attnc.runtime.cpu.rows import Grouping, Positions, Progression, numbers, row_tiles
from attnc.runtime.derived import PADDING, scalar
from attnc.runtime.evaluate import Environment

LONG = 2048  # average keys a row from which larger row tiles pay


@dataclass(frozen=True)
class Group:
    """Heads that share one tile plan: batch rows, key heads and query heads of each key head, as slices."""

    batch: slice
    key_heads: slice
    members: slice


class Tiling:
    """The tiles of one branch in one call. `columns`: the most keys a piece takes."""

    def __init__(self, plan: Plan, domain: Domain, call: Call, columns: int = 1024) -> None:
        self.plan = plan
        self.domain = domain
        self.call = call
        self.columns = columns
        self.shared = call.sizes["h"] // max(call.k.shape[1], 1)
        self._bounds: dict[Node, NDArray[np.int64]] = {}

    @cached_property
    def grouping(self) -> Grouping:
        rows = self.domain.rows
        return Grouping(
            self.number(rows.step),
            None if rows.period is None else self.number(rows.period),
            self.number(rows.high_step),
            self.number(rows.low_step),
            rows.square,
        )

    @cached_property
    def environment(self) -> Environment:
        """Every (batch, head, row), 1 long where a value is constant."""
        sizes, offset = self.call.sizes, self.call.offset
        positions = {
            "b": torch.arange(sizes["b"]).view(-1, 1, 1),
            "h": torch.arange(sizes["h"]).view(1, -1, 1),
            "i": torch.arange(sizes["i"]).view(1, 1, -1) + offset,
        }
        return Environment(self.plan, self.call, positions, torch.float64)

    def by_row(self, node: Node) -> NDArray[np.int64]:
        """An int of the row, (B or 1, H or 1, N or 1)."""
        if node not in self._bounds:
            value = self.environment.value(node)
            self._bounds[node] = (value if value.dim() else value.expand(1, 1, 1)).numpy()
        return self._bounds[node]

    @cached_property
    def deciding(self) -> list[NDArray[np.int64]]:
        """What decides which keys rows see, each (B or 1, H or 1, ..)."""
        walks = [key_set.walk for key_set in self.domain.key_sets]
        bounds = [self.by_row(node) for key_set in self.domain.key_sets for node in row_values(key_set)]
        return bounds + [self.listed(walk) for walk in walks if isinstance(walk, Listed | Diagonals)]

    @cached_property
    def varying(self) -> tuple[bool, bool]:
        """Whether the keys of a row differ between batch rows, and between heads."""
        shapes = [array.shape for array in self.deciding]
        return any(shape[0] > 1 for shape in shapes), any(shape[1] > 1 for shape in shapes)

    def groups(self) -> Iterator[Group]:
        """Heads and batch rows in few groups: those that see the same keys are worked on together."""
        by_batch, by_head = self.varying
        everything, rows = slice(None), range(self.call.sizes["b"])
        single = [slice(b, b + 1) for b in rows]
        if not by_head:
            yield from (Group(batch, everything, everything) for batch in (single if by_batch else [everything]))
            return
        if by_batch:
            yield from (Group(single[b], *heads) for b in rows for heads in shares(self.kinds(b)))
            return
        # Lanes are batch rows times key heads as views on one axis: of several rows one key head, or else one row.
        found = shares(self.kinds(0))
        apart = [Group(everything, one, members) for heads, members in found for one in singles(heads)]
        together = [Group(batch, *heads) for batch in single for heads in found]
        yield from min(apart, together, key=len)

    def kinds(self, batch: int) -> NDArray[np.int64]:
        """(key heads, query heads of each): equal numbers where the rows of heads see the same keys."""
        seen = [b"" for _ in range(self.call.sizes["h"])]
        for array in self.deciding:
            if array.shape[1] > 1:
                rows = array[batch if array.shape[0] > 1 else 0]
                seen = [before + sha256(row.tobytes()).digest() for before, row in zip(seen, rows, strict=True)]
        numbers = {kind: number for number, kind in enumerate(dict.fromkeys(seen))}
        return np.array([numbers[kind] for kind in seen]).reshape(-1, self.shared)

    # Tiles

    def tiles(self, group: Group) -> Iterator[Tile]:
        """The tiles of a group that have keys, and of those without: a tile with no piece."""
        made = self.made_tiles(group)
        masked = [number for number, key_set in enumerate(self.domain.key_sets) if key_set.walk is None]
        return made if self.closed_form else aligned(made, self.call.sizes["j"], masked)

    @cached_property
    def closed_form(self) -> bool:
        """Whether no tensor bounds the keys of a row: neighbours are then alike."""
        nodes = [node for key_set in self.domain.key_sets for node in row_values(key_set)]
        return not any(node.op in ("input", "derived") for node in walk(*nodes))

    def made_tiles(self, group: Group) -> Iterator[Tile]:
        """Tile by tile, in the order of the rows."""
        size = self.tile_size(group)
        rows = row_tiles(self.grouping, self.call.sizes["i"], self.call.offset, size)
        if not rows:
            return
        lines = matrix(rows)
        makers = [self.maker(n, key_set, group, rows, lines) for n, key_set in enumerate(self.domain.key_sets)]
        for at, one in enumerate(rows):
            pieces: list[Piece] = []
            for maker in makers:
                for piece in maker.pieces(at):
                    pieces += [piece] if piece.count <= self.columns and not piece.per_row else self.split(piece)
            yield Tile(one, tuple(pieces))

    def tile_size(self, group: Group) -> int:
        """Rows a tile: more where rows see many keys, so that fewer steps do the same work."""
        runs = [run for key_set in self.domain.key_sets for run in key_set.runs if key_set.walk is None]
        keys = 0.0
        for run in runs:
            lo, hi = (self.pick(self.by_row(bound), group) for bound in (run.outer.lo, run.outer.hi))
            keys = max(keys, float(np.maximum(hi - lo, 0).mean()) if hi.size and lo.size else 0.0)
        return 256 if keys >= LONG else 64

    def split(self, piece: Piece) -> Iterator[Piece]:
        """Parts of at most `columns` keys."""
        columns = 64 if piece.per_row else self.columns
        if piece.count <= columns:
            yield piece
            return
        for first in range(0, piece.count, columns):
            count = min(columns, piece.count - first)
            keys = piece.keys
            keys = keys.part(first, count) if isinstance(keys, Progression) else keys[..., first : first + count]
            masked = tuple(
                (max(start - first, 0), min(stop - first, count))
                for start, stop in piece.masked
                if stop > first and start < first + count
            )
            yield Piece(piece.key_set, keys, masked, piece.per_row)

    def pick(self, values: NDArray[np.int64], group: Group) -> NDArray[np.int64]:
        """The values of one group, over rows (N or 1)."""
        batch = group.batch.start or 0
        head = (group.key_heads.start or 0) * self.shared + (group.members.start or 0)
        return values[batch if values.shape[0] > 1 else 0, head if values.shape[1] > 1 else 0]  # type: ignore[no-any-return]

    def listed(self, walk: Listed | Diagonals) -> NDArray[np.int64]:
        """The table of a listed walk with axes (b, h) in front, 1 long where it does not vary."""
        table = self.call.derived[walk.table]
        if isinstance(walk, Listed) and walk.row_block is not None:
            return table[None, None].to(torch.int64).numpy()
        collection = next(one.args[0] for one in self.plan.derived if walk.table == f"{one.name}.list")
        if "h" not in collection.type.indices:
            table = table.unsqueeze(-2)
        if "b" not in collection.type.indices:
            table = table.unsqueeze(0)
        return table.to(torch.int64).numpy()

    def maker(
        self, number: int, key_set: KeySet, group: Group, tiles: Sequence[Progression | Positions], rows: Positions
    ) -> Maker:
        """What makes the pieces of one key set. `rows`: the rows of the tiles as a matrix."""
        hulls = [self.hull(run, group, rows) for run in key_set.runs]
        walk = key_set.walk
        if walk is None:
            return Consecutive(number, hulls)
        if isinstance(walk, Stepped):
            phases = self.first(walk.phase, group, rows)
            return Stepping(number, hulls[0], phases, self.number(walk.step))
        if isinstance(walk, Grid):
            low = self.hull(Run(walk.low, None), group, rows, live=key_set.runs[0].outer)
            high_phase, low_phase = (
                self.first(phase, group, rows) if phase else None for phase in (walk.high_phase, walk.low_phase)
            )
            steps = (self.number(walk.high_step), self.number(walk.low_step))
            return Lattice(number, hulls[0], low, self.number(walk.period), (high_phase, low_phase), steps)
        offset = int(self.pick(self.by_row(walk.offset), group)[0])
        entries = self.pick(self.listed(walk), group)
        if isinstance(walk, Diagonals):
            valid = entries[entries < PADDING]
            return Slashes(number, hulls[0], valid, [numbers(one) + self.call.offset + offset for one in tiles])
        if walk.row_block is not None:
            block = self.number(walk.row_block)
            line = (rows[:, 0] + self.call.offset) // block
            return Selected(number, hulls[0], entries, line, self.number(walk.width), offset)
        valid = entries[entries < PADDING]
        return Selected(number, hulls[0], valid[None], np.zeros(len(rows), dtype=np.int64), 1, offset)

    def number(self, node: Node | None) -> int:
        """An int of parameters and sizes; 1 where there is none."""
        return 1 if node is None else int(scalar(self.plan, self.call, node))

    def first(self, node: Node, group: Group, rows: Positions) -> NDArray[np.int64]:
        """A value that all rows of a tile share (modulo a step): that of the first."""
        return np.broadcast_to(self.pick(self.by_row(node), group), (self.call.sizes["i"],))[rows[:, 0]]

    def hull(self, run: Run, group: Group, rows: Positions, live: Bounds | None = None) -> Hull:
        """A run's bounds by tile. Rows without keys (by the run, or by `live`) don't widen the hull."""

        def spread(node: Node) -> NDArray[np.int64]:
            return np.broadcast_to(self.pick(self.by_row(node), group), (self.call.sizes["i"],))[rows]

        lo, hi = spread(run.outer.lo), spread(run.outer.hi)
        dead = lo >= hi
        if live is not None:
            dead = dead | (spread(live.lo) >= spread(live.hi))
        far = np.iinfo(np.int64).max
        outer_lo = np.where(dead, far, lo).min(axis=1)
        outer_hi = np.where(dead, 0, hi).max(axis=1)
        if run.inner is None:
            return Hull(outer_lo.tolist(), outer_hi.tolist(), None, None)
        inner_lo, inner_hi = spread(run.inner.lo).max(axis=1), spread(run.inner.hi).min(axis=1)
        return Hull(outer_lo.tolist(), outer_hi.tolist(), inner_lo.tolist(), inner_hi.tolist())


def shares(kinds: NDArray[np.int64]) -> list[tuple[slice, slice]]:
    """(key heads, query heads of each) as slices, with all of one slice of one kind."""
    held: dict[tuple[int, int, int, int], list[int]] = {}
    for key_head, row in enumerate(kinds):
        for kind in np.unique(row).tolist():
            for start, stop, step in progressions(np.flatnonzero(row == kind).tolist()):
                held.setdefault((kind, start, stop, step), []).append(key_head)
    return [
        (slice(*heads), slice(*members))
        for (_, *members), key_heads in held.items()
        for heads in progressions(key_heads)
    ]


def progressions(ascending: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Ints as few (start, stop, step)."""
    start = 0
    while start < len(ascending):
        step = ascending[start + 1] - ascending[start] if start + 1 < len(ascending) else 1
        stop = start + 1
        while stop < len(ascending) and ascending[stop] - ascending[stop - 1] == step:
            stop += 1
        yield ascending[start], ascending[stop - 1] + 1, step
        start = stop


def singles(heads: slice) -> Iterator[slice]:
    """One slice a head."""
    return (slice(head, head + 1) for head in range(heads.start, heads.stop, heads.step))


def row_values(key_set: KeySet) -> list[Node]:
    """The nodes that decide which keys a row visits."""
    nodes = [bound for run in key_set.runs for bound in (run.outer.lo, run.outer.hi)]
    nodes += [bound for run in key_set.runs if run.inner for bound in (run.inner.lo, run.inner.hi)]
    walk = key_set.walk
    if isinstance(walk, Stepped):
        nodes.append(walk.phase)
    elif isinstance(walk, Grid):
        nodes += [walk.low.lo, walk.low.hi, *(phase for phase in (walk.high_phase, walk.low_phase) if phase)]
    elif isinstance(walk, Listed | Diagonals):
        nodes.append(walk.offset)
    return nodes


def matrix(tiles: Sequence[Progression | Positions]) -> Positions:
    """Row numbers by tile; a short tile repeats its last row."""
    if all(isinstance(one, Progression) for one in tiles):
        starts, steps, counts = np.array([(one.start, one.step, one.count) for one in tiles], dtype=np.int64).T  # type: ignore[union-attr]
        return starts[:, None] + steps[:, None] * np.minimum(np.arange(counts.max()), counts[:, None] - 1)  # type: ignore[no-any-return]
    found = [numbers(one) for one in tiles]
    longest = max(len(one) for one in found)
    return np.stack([np.pad(one, (0, longest - len(one)), mode="edge") for one in found])

"""Tiles of the same shape, worked on in one step: what turns many small products into one batched product."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from attnc.runtime.cpu.pieces import Spans, Tile
from attnc.runtime.cpu.rows import Positions, Progression


@dataclass(frozen=True)
class Shifted:
    """A progression a tile: tile n has start + n * shift, .. by `step`. Read as a view, nothing is copied."""

    start: int
    shift: int
    step: int
    tiles: int
    count: int

    def numbers(self) -> Tensor:
        """(tiles, count)"""
        tile = self.start + self.shift * torch.arange(self.tiles)
        return tile[:, None] + self.step * torch.arange(self.count)

    def of(self, tensor: Tensor) -> Tensor:
        """(.., L, X) -> (.., tiles, count, X), in place."""
        *outer, along, last = tensor.stride()
        size = (*tensor.shape[:-2], self.tiles, self.count, tensor.shape[-1])
        stride = (*outer, self.shift * along, self.step * along, last)
        return tensor.as_strided(size, stride, tensor.storage_offset() + self.start * along)

    def write(self, tensor: Tensor, values: Tensor) -> None:
        """Sets the places of (.., L, X) to (.., tiles, count, X); no place is there twice."""
        self.of(tensor).copy_(values)

    def add(self, tensor: Tensor, values: Tensor) -> None:
        """Adds (.., tiles, count, X) to the places of (.., L, X), tile after tile where they overlap."""
        if self.tiles == 1 or self.shift >= self.step * self.count:
            self.of(tensor).add_(values)
            return
        for tile in range(self.tiles):
            start = self.start + self.shift * tile
            stop = start + self.step * (self.count - 1) + 1
            tensor[..., start : stop : self.step, :].add_(values[..., tile, :, :])


@dataclass(frozen=True)
class Gathered:
    """Positions (tiles, count), or (tiles, rows, count) where every row has its own; -1 for none."""

    index: Tensor

    @property
    def count(self) -> int:
        return self.index.shape[-1]

    def numbers(self) -> Tensor:
        return self.index

    def of(self, tensor: Tensor) -> Tensor:
        """(.., L, X) -> (.., *index.shape, X), a copy."""
        flat = tensor.index_select(-2, self.index.clamp(min=0).view(-1))
        return flat.view(*tensor.shape[:-2], *self.index.shape, tensor.shape[-1])

    def write(self, tensor: Tensor, values: Tensor) -> None:
        """Sets the places of (.., L, X) to (.., *index.shape, X); no place is there twice."""
        tensor[..., self.index, :] = values.to(tensor.dtype)

    def add(self, tensor: Tensor, values: Tensor) -> None:
        """Adds (.., *index.shape, X) to the places of (.., L, X), tile after tile.

        A tile holds no key twice; where every row has its own, no two rows hold the same one in one column.
        """
        if self.index.dim() == 2:
            for tile, index in enumerate(self.index):
                tensor[..., index, :] += values[..., tile, :, :]
            return
        for tile, rows in enumerate(self.index):
            for column, index in enumerate(rows.unbind(1)):
                there = (index >= 0).nonzero().squeeze(1)
                tensor[..., index[there], :] += values[..., tile, there, column, :]


Places = Shifted | Gathered


@dataclass(frozen=True)
class Step:
    """One piece of every tile of a batch."""

    key_set: int
    keys: Places
    masked: Spans
    per_row: bool

    def positions(self) -> Tensor:
        """Positions of the keys, broadcast against (x, tiles, g, rows, keys); -1 for none."""
        numbers = self.keys.numbers()
        return numbers[None, :, None] if self.per_row else numbers[None, :, None, None]


@dataclass(frozen=True)
class Batch:
    rows: Places
    tiles: int
    steps: tuple[Step, ...]

    @property
    def widest(self) -> int:
        """Columns of the widest step."""
        return max((step.keys.count for step in self.steps), default=1)


def batches(tiles: Iterable[Tile], elements: int) -> Iterator[Batch]:
    """Neighbouring tiles of the same shape together; rows * keys of the widest step stay below `elements`."""
    pending: list[Tile] = []
    form: object = None
    shifts: tuple[int, ...] | None = None
    for tile in tiles:
        found = shape(tile)
        moved = distances(pending[-1], tile) if pending and found == form else None
        if moved is None or len(pending) >= room(tile, elements) or (shifts is not None and moved != shifts):
            if pending:
                yield join(pending)
            pending, form, shifts = [tile], found, None
        else:
            pending.append(tile)
            shifts = moved
    if pending:
        yield join(pending)


_remembered: OrderedDict[tuple[object, ...], tuple[object, list[Batch]]] = OrderedDict()
REMEMBERED = 32


def remembered(owner: object, key: tuple[object, ...], make: Callable[[], Iterable[Batch]]) -> list[Batch]:
    """What `make` gave last time for this owner and key. Only views are kept: lists of positions would take memory."""
    full = (id(owner), *key)
    if full in _remembered:
        _remembered.move_to_end(full)
        return _remembered[full][1]
    made = list(make())
    if all(isinstance(places, Shifted) for one in made for places in (one.rows, *(step.keys for step in one.steps))):
        _remembered[full] = (owner, made)  # the owner is held, so that its id stays its own
        if len(_remembered) > REMEMBERED:
            _remembered.popitem(last=False)
    return made


def room(tile: Tile, elements: int) -> int:
    """How many tiles of this shape fit one batch."""
    widest = max((piece.count for piece in tile.pieces), default=1)
    return max(1, elements // max(count(tile.rows) * widest, 1))


def count(places: Progression | Positions) -> int:
    """Rows, or keys, of one tile."""
    return places.count if isinstance(places, Progression) else int(places.shape[-1])


def shape(tile: Tile) -> object:
    """What tiles of a batch have in common."""
    pieces = tuple((piece.key_set, form(piece.keys), piece.masked, piece.per_row) for piece in tile.pieces)
    return form(tile.rows), pieces


def form(places: Progression | Positions) -> tuple[int, ...]:
    """Step and count of a progression; the shape of an array."""
    return (places.step, places.count) if isinstance(places, Progression) else (0, *places.shape)


def distances(before: Tile, after: Tile) -> tuple[int, ...] | None:
    """How far rows and keys move from one tile to the next; None where they move backwards."""
    pairs = [(before.rows, after.rows), *((x.keys, y.keys) for x, y in zip(before.pieces, after.pieces, strict=True))]
    moved = tuple(y.start - x.start for x, y in pairs if isinstance(x, Progression) and isinstance(y, Progression))
    return None if any(shift < 0 for shift in moved) else moved


def join(tiles: Sequence[Tile]) -> Batch:
    """A batch of tiles that `distances` lets follow one another."""
    steps = tuple(
        Step(piece.key_set, stack([tile.pieces[n].keys for tile in tiles]), piece.masked, piece.per_row)
        for n, piece in enumerate(tiles[0].pieces)
    )
    return Batch(stack([tile.rows for tile in tiles]), len(tiles), steps)


def stack(places: Sequence[Progression | Positions]) -> Places:
    """The places of every tile of a batch."""
    first = places[0]
    if not isinstance(first, Progression):
        return Gathered(torch.from_numpy(np.stack([np.asarray(one) for one in places])))
    second = places[1] if len(places) > 1 else first
    assert isinstance(second, Progression)
    return Shifted(first.start, second.start - first.start, first.step, len(places), first.count)

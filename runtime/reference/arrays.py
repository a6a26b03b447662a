"""Named arrays: what the float64 reference computes with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attnc.dsl.types import BUILT_IN_INDICES


def layout(names: Iterable[str]) -> tuple[str, ...]:
    """Index names without repeats, in layout order: b h i j t, then declared axes by name."""
    distinct = set(names)
    built_in = tuple(name for name in BUILT_IN_INDICES if name in distinct)
    return built_in + tuple(sorted(distinct.difference(BUILT_IN_INDICES)))


@dataclass(frozen=True, eq=False)
class Array:
    """A tensor whose leading dimensions are `indices` (in layout order), the others the vector axes in order.

    Indices broadcast by name. Vector axes are positional, since a name may occur twice (`outer(k, k)`).
    A selection is a bool array whose one vector axis is the axis chosen from.
    """

    data: Tensor
    indices: tuple[str, ...] = ()
    axes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        assert self.data.dim() == len(self.indices) + len(self.axes), (self.data.shape, self.indices, self.axes)

    def over(self, order: tuple[str, ...], rank: int | None = None) -> Tensor:
        """The tensor with a dimension (of size 1 where absent) for every index of `order`, in that order.

        With `rank`, an array without vector axes gets that many trailing dimensions of size 1.
        """
        names = [*self.indices, *range(len(self.axes))]
        here = [name for name in order if name in self.indices]
        tensor = self.data.permute([names.index(name) for name in [*here, *range(len(self.axes))]])
        for at, name in enumerate(order):
            if name not in self.indices:
                tensor = tensor.unsqueeze(at)
        for _ in range((rank or 0) - len(self.axes)):
            tensor = tensor.unsqueeze(-1)
        return tensor

    def select(self, index: str, position: int) -> Array:
        """The array at one position of an index, which goes; itself where it doesn't vary over the index."""
        if index not in self.indices:
            return self
        at = self.indices.index(index)
        return Array(self.data.select(at, position), self.indices[:at] + self.indices[at + 1 :], self.axes)

    def expand(self, index: str, size: int) -> Array:
        """The array varying over an index of this size."""
        if index in self.indices:
            return self
        order = layout((*self.indices, index))
        tensor = self.over(order)
        shape = list(tensor.shape)
        shape[order.index(index)] = size
        return Array(tensor.expand(shape), order, self.axes)


def arranged(data: Tensor, order: tuple[str, ...], axes: tuple[str, ...]) -> Array:
    """The array of a tensor whose leading dimensions are the indices `order`, in any order."""
    indices = layout(order)
    places = [order.index(name) for name in indices] + list(range(len(order), data.dim()))
    return Array(data.permute(places), indices, axes)


def aligned(*arrays: Array) -> tuple[tuple[str, ...], tuple[str, ...], list[Tensor]]:
    """(indices, axes, tensors): the union of the indices, the common vector axes, and broadcastable tensors."""
    order = layout(name for array in arrays for name in array.indices)
    axes = max((array.axes for array in arrays), key=len)
    return order, axes, [array.over(order, len(axes)) for array in arrays]


def common_shape(*shapes: Sequence[int]) -> tuple[int, ...]:
    """The shape that these broadcast to."""
    return tuple(int(size) for size in torch.broadcast_shapes(*shapes))

"""Positions put in an order of their own before attention runs: by group, or only those that take part.

A group is an int of every position; one below 0 takes no part. Positions of one group become neighbours and ascend
inside it, so that "same group" is an interval of slots, and so is an interval of positions inside a group. The order
differs by batch row and head. Everything here is linear in the sequence but for a sort.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

NOWHERE = 2**31 - 1  # the position in a slot that is empty: past every other
NOBODY = 2**63 - 1  # the group of such a slot


@dataclass(frozen=True)
class Arrangement:
    """An order of the positions 0 .. L of one sequence, for every batch row and head (1 long where they share it).

    `places` (b, h, S): the position in each slot, -1 in the empty slots at the end, of lists shorter than the
    longest. `slots` (b, h, L): the slot of each position, -1 for none. `group` (b, h, S): ascending, NOBODY where
    empty. All int64; S is at least 1 where L is.
    """

    places: Tensor
    slots: Tensor
    group: Tensor

    @property
    def positions(self) -> Tensor:
        """`places` with NOWHERE in the empty slots: ascending inside a group."""
        return self.places.masked_fill(self.places < 0, NOWHERE)

    @property
    def share(self) -> float:
        """Share of the positions that take part."""
        return float((self.slots >= 0).double().mean()) if self.slots.numel() else 0.0


@torch.no_grad()
def arrange(group: Tensor) -> Arrangement:
    """Sort positions by group (b, h, L), int64 or bool (one group: where true); ties by position.

    As many slots as the longest list has, which is read back from the device.
    """
    if group.dtype == torch.bool:
        group = group.to(torch.int64) - 1
    length = group.shape[-1]
    ordered, order = torch.where(group < 0, NOBODY, group).sort(dim=-1, stable=True)
    count = (group >= 0).sum(-1, keepdim=True)
    capacity = min(max(int(count.max()), 1), length) if group.numel() else length
    ordered, order = ordered[..., :capacity].contiguous(), order[..., :capacity]
    slot = torch.arange(capacity, device=group.device)
    filled = slot < count
    slots = torch.full(group.shape, -1, dtype=torch.int64, device=group.device)
    slots.scatter_(-1, order, torch.where(filled, slot, -1))
    return Arrangement(order.masked_fill(~filled, -1), slots, ordered)


@torch.no_grad()
def interval(
    rows: Tensor, keys: Arrangement, low: Tensor | int | None = None, high: Tensor | int | None = None
) -> tuple[Tensor, Tensor]:
    """The slots [first, last) of the keys of each row's group (b, h, N) that lie at low <= position < high.

    `low` and `high` broadcast against rows; None is unbounded. int64; first == last where a row sees no key.
    """
    length = keys.slots.shape[-1]
    shape = torch.broadcast_shapes(rows.shape[:-1], keys.group.shape[:-1])
    group = keys.group.expand(*shape, -1).contiguous()
    wanted = rows.expand(*shape, rows.shape[-1]).contiguous()
    first, last = torch.searchsorted(group, wanted), torch.searchsorted(group, wanted, right=True)
    if not group.shape[-1] or (low is None and high is None):
        return first, last
    # Groups numbered 0, 1, .. in their order, so that group and position make one int that ascends.
    number = torch.zeros_like(group)
    number[..., 1:] = (group[..., 1:] != group[..., :-1]).cumsum(-1)
    code = number * (length + 1) + keys.places.clamp(min=0).expand(*shape, -1)
    code = code.masked_fill(keys.places < 0, NOBODY)
    own = number.gather(-1, first.clamp(max=group.shape[-1] - 1)) * (length + 1)

    def ranked(bound: Tensor | int) -> Tensor:
        held = torch.as_tensor(bound, device=group.device).clamp(0, length).expand(wanted.shape)
        return torch.searchsorted(code, (own + held).contiguous())

    begin = first if low is None else torch.maximum(first, ranked(low))
    end = last if high is None else torch.minimum(last, ranked(high))
    begin = torch.where(first < last, begin, first)
    return begin, torch.where(first < last, torch.maximum(begin, end), first)


def read(tensor: Tensor, places: Tensor, fill: float = 0) -> Tensor:
    """The rows (b, h, S, ..) of a tensor (b, h, L, ..) at `places` (b, h, S); `fill` where a place is below 0.

    Batch rows and heads that are 1 long on one side are shared.
    """
    batch, heads = (max(x, y) if x and y else 0 for x, y in zip(tensor.shape[:2], places.shape[:2], strict=True))
    tail = tensor.shape[3:]
    if tensor.shape[2] == 0:
        return tensor.new_full((batch, heads, places.shape[2], *tail), fill)
    spread = (*places.shape, *(1,) * len(tail))
    index = places.clamp(min=0).view(spread).expand(batch, heads, -1, *tail)
    found = tensor.expand(batch, heads, *tensor.shape[2:]).gather(2, index)
    return torch.where(places.view(spread) >= 0, found, torch.full((), fill, dtype=found.dtype, device=found.device))


def totals(gradient: Tensor, shape: torch.Size) -> Tensor:
    """A gradient summed over the batch rows and heads that the tensor of this shape shares."""
    shared = [at for at in (0, 1) if shape[at] == 1 and gradient.shape[at] != 1]
    return gradient.sum(shared, keepdim=True) if shared else gradient


class Reading(torch.autograd.Function):
    """`read` where the places are distinct: its gradient is a read too, at the inverse places. No sum, no atomics."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, places: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.shape = tensor.shape
        return read(tensor, places)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return totals(read(gradient, inverse), ctx.shape), None, None


def gathered(tensor: Tensor, order: Arrangement) -> Tensor:
    """(b, h, L, ..) in the order of the slots, (b, h, S, ..); 0 in empty ones. Differentiable."""
    made: Tensor = Reading.apply(tensor, order.places, order.slots)
    return made


def scattered(tensor: Tensor, order: Arrangement) -> Tensor:
    """(b, h, S, ..) back at the positions, (b, h, L, ..); 0 where a position has no slot. Differentiable."""
    made: Tensor = Reading.apply(tensor, order.slots, order.places)
    return made

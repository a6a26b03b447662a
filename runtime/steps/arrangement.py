"""Positions put in an order of their own before attention runs: by group, or only those that take part.

A group is an int of every position; a bool says which take part. Positions of one group become neighbours and ascend
inside it, so that "same group" is an interval of slots, and so is an interval of positions inside a group. The order
differs by batch row and head. Everything here is linear in the sequence but for a sort.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
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

    def returned(self, gradient: Tensor) -> Tensor:
        """The gradient (b, h, S, ..) of an array in this order, over positions; 0 where one has no slot."""
        return read(gradient, self.slots)


@dataclass(frozen=True)
class Placement:
    """Where the rows of every batch row and head lie (1 long where they share it): each of 0 .. L once.

    `places` (b, h, L), int32: those that take part first, by group and then by position; `count` (b, h) of them.
    """

    places: Tensor
    count: Tensor

    @property
    def filled(self) -> Tensor:
        """Which slots hold a row that takes part: (b, h, L)."""
        return torch.arange(self.places.shape[-1], device=self.places.device) < self.count.unsqueeze(-1)

    @property
    def positions(self) -> Tensor:
        """`places` with NOWHERE in the slots of those that take no part."""
        return self.places.masked_fill(~self.filled, NOWHERE)

    @cached_property
    def slots(self) -> Tensor:
        """The slot of each position: (b, h, L)."""
        places = self.places.to(torch.int64)
        slot = torch.arange(self.places.shape[-1], device=self.places.device)
        return torch.empty_like(places).scatter_(-1, places, slot.expand(places.shape))

    def returned(self, gradient: Tensor) -> Tensor:
        """The gradient (b, h, L, ..) of an array in this order, over positions.

        What is not finite where a row takes no part comes from a value that nobody asked for.
        """
        filled = self.filled.view(*self.places.shape, *(1,) * (gradient.dim() - 3))
        filled = same_heads(filled, gradient)[0]
        return read(torch.where(filled | gradient.isfinite(), gradient, 0), self.slots, None)


@torch.no_grad()
def placed(group: Tensor | None, live: Tensor | None) -> Placement:
    """The positions where `live` holds (b, h, L), then the others; sorted by group (b, h, L), int64, ties by position.

    None: all of them, in one group.
    """
    if group is None:
        assert live is not None
        if live.is_cuda:
            from attnc.runtime.cuda.launch_ordering import place_live  # late: it brings triton

            return Placement(*place_live(live))
        before = live.cumsum(-1)
        position = torch.arange(live.shape[-1], device=live.device)
        count = before[..., -1:] if live.shape[-1] else before.new_zeros(*live.shape[:-1], 1)
        slot = torch.where(live, before - 1, count + position - before)
        places = torch.empty_like(slot).scatter_(-1, slot, position.expand(live.shape))
        return Placement(places.to(torch.int32), count.squeeze(-1).to(torch.int32))
    live = torch.ones_like(group, dtype=torch.bool) if live is None else live
    group, live = torch.broadcast_tensors(*same_heads(group, live))
    places = torch.where(live, group, NOBODY).sort(dim=-1, stable=True).indices
    return Placement(places.to(torch.int32), live.sum(-1, dtype=torch.int32))


@torch.no_grad()
def arrange(group: Tensor | None, live: Tensor | None, most: int | None = None) -> Arrangement:
    """The same order of positions, without those that take no part.

    `most`: how many a line has at most; so many slots there are, on a CPU no more than the longest line has.
    """
    found = placed(group, live)
    length = found.places.shape[-1]
    capacity = min(length, max(length if most is None else most, 1))
    if live is not None and found.count.numel() and found.count.device.type == "cpu":  # nobody waits for a device
        capacity = min(capacity, max(int(found.count.max()), 1))
    filled, places = found.filled[..., :capacity], found.places[..., :capacity]
    slots = found.slots.masked_fill(found.slots >= found.count.unsqueeze(-1), -1)
    places = places.to(torch.int64)
    own = torch.zeros_like(places) if group is None else same_heads(group, places)[0].expand(found.places.shape)
    own = own if group is None else own.gather(-1, places)
    return Arrangement(places.masked_fill(~filled, -1), slots, own.masked_fill(~filled, NOBODY))


def share(order: Arrangement | Placement) -> float:
    """Share of the positions that take part."""
    if not order.slots.numel():
        return 0.0
    taken = order.filled if isinstance(order, Placement) else order.slots >= 0
    return float(taken.double().sum() / order.slots.numel())


@torch.no_grad()
def interval(
    rows: Tensor, keys: Arrangement, low: Tensor | int | None = None, high: Tensor | int | None = None
) -> tuple[Tensor, Tensor]:
    """The slots [first, last) of the keys of each row's group (b, h, N) that lie at low <= position < high.

    `low` and `high` broadcast against rows; None is unbounded. int64; first == last where a row sees no key.
    """
    length = keys.slots.shape[-1]
    rows, group, places = same_heads(rows, keys.group, keys.places)
    bounds = [None if end is None else torch.as_tensor(end, device=rows.device) for end in (low, high)]
    shape = torch.broadcast_shapes(
        rows.shape[:2], group.shape[:2], *(end.shape[:2] for end in bounds if end is not None and end.dim() == 3)
    )
    group = group.expand(*shape, -1).contiguous()
    wanted = rows.expand(*shape, rows.shape[-1]).contiguous()
    first, last = torch.searchsorted(group, wanted), torch.searchsorted(group, wanted, right=True)
    if not group.shape[-1] or (low is None and high is None):
        return first, last
    # Groups numbered 0, 1, .. in their order, so that group and position make one int that ascends.
    number = torch.zeros_like(group)
    number[..., 1:] = (group[..., 1:] != group[..., :-1]).cumsum(-1)
    code = number * (length + 1) + places.clamp(min=0)
    code = code.masked_fill(places < 0, NOBODY)
    own = number.gather(-1, first.clamp(max=group.shape[-1] - 1)) * (length + 1)

    def ranked(bound: Tensor) -> Tensor:
        return torch.searchsorted(code, (own + bound.clamp(0, length).expand(wanted.shape)).contiguous())

    begin = first if bounds[0] is None else torch.maximum(first, ranked(bounds[0]))
    end = last if bounds[1] is None else torch.minimum(last, ranked(bounds[1]))
    begin = torch.where(first < last, begin, first)
    return begin, torch.where(first < last, torch.maximum(begin, end), first)


def same_heads(*tensors: Tensor) -> list[Tensor]:
    """Tensors (b, h, ..), those of key heads repeated where another has every query head; 1 is left as it is."""
    most = max(tensor.shape[1] for tensor in tensors)
    return [
        tensor if tensor.shape[1] in (1, most) else tensor.repeat_interleave(most // tensor.shape[1], 1)
        for tensor in tensors
    ]


def read(tensor: Tensor, places: Tensor, fill: float | None = 0) -> Tensor:
    """The rows (b, h, S, ..) of a tensor (b, h, L, ..) at `places` (b, h, S); `fill` where a place is below 0.

    None: no place is. A tensor or places of one batch row or head, or of key heads, serve all of the other's.
    """
    (places,) = same_heads(places, tensor)[:1]
    batch, heads = (max(x, y) if x and y else 0 for x, y in zip(tensor.shape[:2], places.shape[:2], strict=True))
    slots, tail = places.shape[2], tensor.shape[3:]
    if tensor.shape[2] == 0 or batch * heads == 0:
        return tensor.new_full((batch, heads, slots, *tail), fill or 0)
    # As rows of one list: whole rows are copied, and key heads are read by each of their query heads.
    lane = torch.arange(tensor.shape[0], device=tensor.device).view(-1, 1) * tensor.shape[1]
    lane = lane + torch.arange(heads, device=tensor.device) // (heads // tensor.shape[1])
    line = lane.unsqueeze(-1) * tensor.shape[2] + (places if fill is None else places.clamp(min=0))
    line = line.expand(batch, heads, slots)
    found = tensor.reshape(-1, *tail).index_select(0, line.flatten()).view(batch, heads, slots, *tail)
    if fill is None:
        return found
    empty = (places < 0).view(*places.shape, *(1,) * len(tail))
    return found.masked_fill_(empty, fill)


def totals(gradient: Tensor, shape: torch.Size) -> Tensor:
    """A gradient summed over the batch rows and heads that the tensor of this shape shares."""
    if shape[1] != gradient.shape[1] and shape[1]:
        gradient = gradient.unflatten(1, (shape[1], -1)).sum(2)
    return gradient.sum(0, keepdim=True) if shape[0] == 1 != gradient.shape[0] else gradient


class Reading(torch.autograd.Function):
    """`read` where the places are distinct: its gradient is a read too, at the slots. No sum, no atomics."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, order: Arrangement | Placement) -> Tensor:
        ctx.order = order
        ctx.shape = tensor.shape
        return read(tensor, order.places)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return totals(ctx.order.returned(gradient), ctx.shape), None


def gathered(tensor: Tensor, order: Arrangement | Placement) -> Tensor:
    """(b, h, L, ..) in the order of the slots, (b, h, S, ..); 0 in empty ones. Differentiable."""
    made: Tensor = Reading.apply(tensor, order)  # type: ignore[no-untyped-call]
    return made


def at_places(tensor: Tensor, places: Tensor) -> Tensor:
    """The rows (b, h, L, ..) of a tensor in the order of `places` (b, h, L), which lists each of them once."""
    return read(tensor, places, None)

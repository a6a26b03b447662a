"""Work lists of the listed kernels, made on the device without a look at the numbers in them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sorted:
    """Lists turned around, int32.

    Entries order[starts[n] : starts[n + 1]], as places of their lane and ascending, name block n % blocks in lane
    n // blocks; after the last group come those that name nothing. lines: the same as list lines.
    """

    order: Tensor
    lines: Tensor
    starts: Tensor


def sorted_entries(members: Tensor, blocks: int) -> Sorted:
    """From `members` (lanes, lines, entries), -1 for nothing. Stable, so that equal lists give equal bits."""
    lanes, lines, entries = members.shape
    groups = lanes * blocks
    lane = torch.arange(0, groups, blocks, dtype=torch.int32, device=members.device)
    named = torch.where(members < 0, groups, members + lane.view(-1, 1, 1)).flatten()
    narrow = torch.int16 if groups < torch.iinfo(torch.int16).max else torch.int32  # half the passes of the sort
    ordered, order = named.to(narrow).sort(stable=True)
    bounds = torch.arange(groups + 1, dtype=narrow, device=members.device)
    starts = torch.searchsorted(ordered, bounds, out_int32=True)
    order = order.to(torch.int32) % max(lines * entries, 1)
    return Sorted(order, order // max(entries, 1), starts)


@dataclass(frozen=True)
class Pieces:
    """Groups cut into pieces, one a program, int32.

    group; first: where in the group the piece begins; begin: the group's first entry; named: its length.
    `number` (groups): pieces of each group.
    """

    group: Tensor
    first: Tensor
    begin: Tensor
    named: Tensor
    number: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """By the names that kernels have for them."""
        names = ("group", "first", "begin", "named")
        return {f"piece_{name}": getattr(self, name) for name in names}


def cut(starts: Tensor, rows: int, piece: int, programs: int, *, least: int) -> Pieces:
    """Groups of entries, of `rows` rows each, in pieces of `piece` rows at most, `least` of them where one is empty.

    How many pieces there are is known on the device only; `programs` bounds it. Those past the end begin after the
    end of the last group.
    """
    lengths = starts.diff() * rows
    number = ((lengths + (piece - 1)) // piece).clamp(min=least)
    ends = number.cumsum(0, dtype=torch.int32)
    program = torch.arange(programs, dtype=torch.int32, device=lengths.device)
    group = torch.searchsorted(ends, program, right=True, out_int32=True).clamp(max=len(lengths) - 1)
    first = (program - (ends - number)[group]) * piece
    return Pieces(group, first, starts[group], lengths[group], number)

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
    ordered, order = named.sort(stable=True)
    bounds = torch.arange(groups + 1, dtype=ordered.dtype, device=members.device)
    starts = torch.searchsorted(ordered, bounds, out_int32=True)
    order = order.to(torch.int32) % max(lines * entries, 1)
    return Sorted(order, order // max(entries, 1), starts)


@dataclass(frozen=True)
class Pieces:
    """Groups cut into pieces, one a program, int32: the group, and the place in it where the piece begins.

    `number` (groups): pieces of each group.
    """

    group: Tensor
    first: Tensor
    number: Tensor


def cut(lengths: Tensor, piece: int, programs: int, *, least: int) -> Pieces:
    """Groups of `lengths` in pieces of `piece` at most, `least` of them where a group is empty.

    How many pieces there are is known on the device only; `programs` bounds it. Those past the end begin after the
    end of the last group.
    """
    number = ((lengths + (piece - 1)) // piece).clamp(min=least)
    ends = number.cumsum(0, dtype=torch.int32)
    program = torch.arange(programs, dtype=torch.int32, device=lengths.device)
    group = torch.searchsorted(ends, program, right=True, out_int32=True).clamp(max=len(lengths) - 1)
    first = (program - (ends - number)[group]) * piece
    return Pieces(group, first, number)

"""Tiles of listed pairs on a CPU: rows with the keys that a selection lists for them.

Two ways to gather the same pairs. Where rows stay, a tile is the rows that share a line of the selection, of all heads
of a key head that share it, with every key of the line: one softmax. Where keys stay, a tile is a block of keys with
the rows whose lines name it, found by sorting the entries (stable, so that the order never changes): each pair of
a row and an entry has a slot of its own, and a row's slots are joined by log-sum-exp.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from attnc.compiler.plan import Plan, Selected
from attnc.compiler.schedule import rows_stay
from attnc.runtime.call import Call
from attnc.runtime.derived import scalar

ELEMENTS = 2**20  # numbers in the largest array of one step


@dataclass(frozen=True)
class Lines:
    """A selection in one call.

    A lane is a batch row and key head. members (lanes, lines, entries): one such array where the `shared` query heads
    of a key head share their lines, else one for each of them (`shared` is 1).
    """

    members: tuple[Tensor, ...]
    shared: int
    width: int
    block: int  # rows of a line
    skipped: int  # rows before row 0 in the first line
    rows_stay: bool

    def chunks(self, width: int, numbers: int) -> Iterator[tuple[int, int, int]]:
        """(set of heads, first line, last line): rows whose parts, of `width` numbers, are `numbers` together at most.

        Where rows stay there are no parts, and one chunk is all rows.
        """
        lanes, count, entries = self.members[0].shape
        row = lanes * self.shared * self.block * entries * max(width, 1)
        step = max(count, 1) if self.rows_stay else max(1, numbers // max(row, 1))
        for member in range(len(self.members)):
            for first in range(0, count, step):
                yield member, first, min(first + step, count)


def lines_of(plan: Plan, call: Call, selected: Selected) -> Lines:
    """The lines of a call."""
    members = call.inputs[selected.members]
    batch, heads, key_heads = call.sizes["b"], call.sizes["h"], call.k.shape[1]
    group = heads // max(key_heads, 1)
    width = 1 if selected.width is None else int(scalar(plan, call, selected.width))
    block = 1 if selected.row_block is None else int(scalar(plan, call, selected.row_block))
    members = members.expand(batch, *members.shape[1:])
    if group == 1 or members.shape[1] != heads:
        held, shared = (members.expand(-1, key_heads, -1, -1).flatten(0, 1),), group
    else:
        split = members.unflatten(1, (key_heads, group))
        held, shared = tuple(split[:, :, member].flatten(0, 1) for member in range(group)), 1
    return Lines(held, shared, width, block, call.offset % block, rows_stay(shared * block, width))


def turned(members: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
    """Lists (lanes, lines, entries) turned around: which entries name each of `blocks` blocks.

    (order, starts), int64: entries order[starts[n] : starts[n + 1]], as places in `members` and ascending, name block
    n % blocks in lane n // blocks. After the last group come the entries that name nothing.
    """
    groups = members.shape[0] * blocks
    lane = torch.arange(members.shape[0], device=members.device).view(-1, 1, 1)
    place = (lane * blocks + members).masked_fill(members < 0, groups).flatten()
    ordered, order = place.sort(stable=True)
    return order, torch.searchsorted(ordered, torch.arange(groups + 1, device=members.device))


@dataclass(frozen=True)
class Tile:
    """Some tiles of one shape (t tiles of r rows and c keys).

    lane (t): batch row * Hk + key head. head (t, r): query head. row (t, r): place among the N rows. key (t, c). Rows
    and keys that are not there have `row_ok`, `key_ok` false and place 0. slot (t, r): which of the row's parts this
    is; None: the tile has all of the row's listed keys.
    """

    lane: Tensor
    head: Tensor
    row: Tensor
    key: Tensor
    row_ok: Tensor
    key_ok: Tensor
    slot: Tensor | None


class Tiler:
    """The tiles of one selection."""

    def __init__(self, call: Call, lines: Lines, widest: int) -> None:
        self.call = call
        self.lines = lines
        self.widest = widest  # of q, k and v
        self.rows = call.sizes["i"]
        self.keys = call.sizes["j"]
        self.group = call.sizes["h"] // max(call.k.shape[1], 1)

    def rows_stay(self, member: int, first: int, last: int) -> Iterator[Tile]:
        """Tiles of lines first .. last of one set of heads."""
        members = self.lines.members[member]
        lanes, _, entries = members.shape
        width, shared, block = self.lines.width, self.lines.shared, self.lines.block
        size = max(entries * width * self.widest, shared * block * max(entries * width, self.widest))
        step = max(1, ELEMENTS // max(size, 1))
        total = lanes * (last - first)
        within = torch.arange(width)
        for start in range(0, total, step):
            number = torch.arange(start, min(start + step, total))
            lane, line = number // max(last - first, 1), first + number % max(last - first, 1)
            entry = members[lane, line].long()
            key = (entry.unsqueeze(-1) * width + within).flatten(1)
            there = (entry >= 0).repeat_interleave(width, 1)
            yield self.tile(lane, line.unsqueeze(-1), torch.ones_like(line).bool().unsqueeze(-1), key, there, member)

    def keys_stay(self, member: int, first: int, last: int) -> Iterator[Tile]:
        """Tiles of the blocks of keys that lines first .. last of one set of heads name."""
        members = self.lines.members[member][:, first:last]
        _, count, entries = members.shape
        width, shared, block = self.lines.width, self.lines.shared, self.lines.block
        blocks = -(-self.keys // width)
        order, starts = turned(members, blocks)
        totals = starts.diff()
        groups = totals.argsort(descending=True, stable=True)
        groups = groups[: int((totals > 0).sum())]
        lengths = totals[groups].tolist()
        at = 0
        while at < len(lengths):
            most = lengths[at]
            size = max(shared * block * most * max(width, self.widest), width * self.widest)
            some = groups[at : at + max(1, ELEMENTS // size)]
            at += len(some)
            offset = torch.arange(most)
            there = offset < totals[some].unsqueeze(-1)
            entry = order[(starts[some].unsqueeze(-1) + offset).clamp(max=len(order) - 1)]
            line = first + entry // entries % count
            key = (some % blocks).unsqueeze(-1) * width + torch.arange(width)
            yield self.tile(some // blocks, line, there, key, torch.ones_like(key).bool(), member, entry % entries)

    def tile(
        self,
        lane: Tensor,
        line: Tensor,
        there: Tensor,
        key: Tensor,
        key_there: Tensor,
        member: int,
        entry: Tensor | None = None,
    ) -> Tile:
        """Rows of lines (t, n), for every head that shares them: (t, shared * n * block)."""
        shared, block = self.lines.shared, self.lines.block
        row = (line.unsqueeze(-1) * block + torch.arange(block) - self.lines.skipped).flatten(1)
        ok = there.repeat_interleave(block, 1) & (row >= 0) & (row < self.rows)
        key_ok = key_there & (key < self.keys)
        head = (lane % max(self.call.k.shape[1], 1)) * self.group + member
        heads = (head.view(-1, 1, 1) + torch.arange(shared).view(1, -1, 1)).expand(-1, -1, row.shape[1]).flatten(1)
        slot = None if entry is None else entry.repeat_interleave(block, 1).repeat(1, shared)
        row, ok = row.masked_fill(~ok, 0).repeat(1, shared), ok.repeat(1, shared)
        return Tile(lane, heads, row, key.masked_fill(~key_ok, 0), ok, key_ok, slot)

"""Listed branches on a CPU: gathered rows against gathered keys, in batches of equal tiles.

Rows are worked on in chunks; where keys stay, a chunk holds one result a row and entry of its line until they are
joined. Sums are float32 (float64 for float64). Every element of a result or gradient is summed in one order: the places
that a batch adds to differ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from attnc.compiler.differentiate import Leaf
from attnc.compiler.ir import Node
from attnc.compiler.plan import Branch, Plan
from attnc.runtime.backward import BranchGradients, score_gradient, table_shape
from attnc.runtime.call import Call
from attnc.runtime.cpu.listed_tiles import ELEMENTS, Tile, Tiler, lines_of
from attnc.runtime.evaluate import Environment

CHUNK = 8 * ELEMENTS  # numbers of the parts that a chunk of rows holds


class ListedRun:
    """One listed branch of one call."""

    def __init__(self, plan: Plan, branch: Branch, call: Call) -> None:
        assert branch.selected is not None
        assert call.v is not None
        self.plan, self.branch, self.call = plan, branch, call
        self.dtype = call.compute_dtype
        self.lines = lines_of(plan, call, branch.selected)
        self.batch, self.heads, self.rows = (call.sizes[index] for index in ("b", "h", "i"))
        self.key_heads, self.keys = call.k.shape[1:3]
        self.q = call.q.reshape(-1, call.q.shape[-1])
        self.k = call.k.reshape(-1, call.k.shape[-1])
        self.v = call.v.reshape(-1, call.v.shape[-1])
        self.tiler = Tiler(call, self.lines, max(call.q.shape[-1], call.v.shape[-1]))

    def run(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """out (B, H, N, E) of `dtype` and lse (B, H, N)."""
        out = torch.zeros(self.batch * self.heads * self.rows, self.v.shape[-1], dtype=dtype)
        lse = torch.full((len(out),), -math.inf, dtype=self.dtype)
        for member, first, last in self.chunks(self.v.shape[-1]):
            if self.lines.rows_stay:
                for tile in self.tiler.rows_stay(member, first, last):
                    place, (part, statistic) = self.places(tile), self.attend(tile)
                    self.put(out, place, tile, part.to(dtype))
                    self.put(lse, place, tile, statistic)
            else:
                self.join(member, first, last, out, lse)
        shape = (self.batch, self.heads, self.rows)
        return out.view(*shape, -1), lse.view(shape)

    def chunks(self, width: int) -> Iterator[tuple[int, int, int]]:
        """Lines to work on together; none where there is no pair."""
        if self.lines.members[0].numel() and self.keys and self.rows:
            yield from self.lines.chunks(width, CHUNK)

    def counts(self, *, masks: bool) -> Iterator[tuple[int, int]]:
        """(visited, live) pairs of every batch of tiles; live ones only with `masks`."""
        for member, first, last in self.chunks(self.v.shape[-1]):
            tiles = self.tiler.rows_stay if self.lines.rows_stay else self.tiler.keys_stay
            for tile in tiles(member, first, last):
                live = 0
                if masks:
                    q, k, _ = self.gathered(tile)
                    live = int((self.scores(tile, q, k)[0] > -math.inf).sum())
                yield tile.row.numel() * tile.key.shape[1], live

    def join(self, member: int, first: int, last: int, out: Tensor, lse: Tensor) -> None:
        """The parts of a chunk's rows, one an entry, joined by log-sum-exp."""
        parts = Parts(self, first, last)
        sums = parts.empty(self.v.shape[-1])
        statistics = parts.empty().fill_(-math.inf)
        for tile in self.tiler.keys_stay(member, first, last):
            part, statistic = self.attend(tile)
            parts.put(sums, tile, part)
            parts.put(statistics, tile, statistic)
        total = statistics.logsumexp(-1)
        weights = torch.exp(statistics - total.masked_fill(total == -math.inf, 0).unsqueeze(-1))
        # A part that no tile wrote has weight 0 and anything in it.
        joined = torch.einsum("...s,...se->...e", weights, sums)
        parts.store(member, out, joined)
        parts.store(member, lse, total)

    # One batch of tiles

    def places(self, tile: Tile) -> Tensor:
        """Rows of (B * H * N): (t, r)"""
        return (tile.lane // self.key_heads * self.heads).unsqueeze(-1) * self.rows + tile.head * self.rows + tile.row

    def key_places(self, tile: Tile) -> Tensor:
        """Keys of (B * Hk * M): (t, c)"""
        return tile.lane.unsqueeze(-1) * self.keys + tile.key

    @staticmethod
    def put(target: Tensor, place: Tensor, tile: Tile, value: Tensor) -> None:
        """Writes the rows that are there."""
        scatter(target, place, tile.row_ok, value)

    def environment(self, tile: Tile, dots: Tensor, real: torch.dtype) -> Environment:
        """All positions of the tiles' pairs (t, r, c)."""
        positions = {
            "b": (tile.lane // self.key_heads).view(-1, 1, 1),
            "h": tile.head.unsqueeze(-1),
            "i": tile.row.unsqueeze(-1) + self.call.offset,
            "j": tile.key.unsqueeze(1),
        }
        return Environment(self.plan, self.call, positions, real, dot=dots)

    def scores(self, tile: Tile, q: Tensor, k: Tensor) -> tuple[Tensor, Environment]:
        """Scores of the pairs (t, r, c), -inf where they are dead."""
        dots = torch.bmm(q, k.transpose(1, 2))
        at = self.environment(tile, dots, self.dtype)
        live = self.environment(tile, dots, torch.float64).value(self.branch.condition)
        live = live & tile.row_ok.unsqueeze(-1) & tile.key_ok.unsqueeze(1)
        return at.value(self.branch.score).expand(dots.shape).masked_fill(~live, -math.inf), at

    def gathered(self, tile: Tile) -> tuple[Tensor, Tensor, Tensor]:
        """Rows of q and keys of k and v."""
        key = self.key_places(tile)
        q = gather(self.q, self.places(tile), self.dtype)
        return q, gather(self.k, key, self.dtype), gather(self.v, key, self.dtype)

    def attend(self, tile: Tile) -> tuple[Tensor, Tensor]:
        """(out (t, r, E), lse (t, r)) of the tiles' keys alone."""
        q, k, v = self.gathered(tile)
        scores, _ = self.scores(tile, q, k)
        peak = scores.amax(-1, keepdim=True).clamp(min=torch.finfo(self.dtype).min)
        weights = (scores - peak).exp_()
        total = weights.sum(-1, keepdim=True)
        lse = (total.log() + peak).squeeze(-1)
        return torch.bmm(weights, v) / total.clamp(min=torch.finfo(self.dtype).tiny), lse


def gather(source: Tensor, place: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of a matrix (.., X), by places (t, r): (t, r, X)"""
    return source.index_select(0, place.flatten()).view(*place.shape, source.shape[-1]).to(dtype)


def scatter(target: Tensor, place: Tensor, there: Tensor, value: Tensor) -> None:
    """Writes (t, r, ..) to places (t, r) of `target`, where they are; no two are the same."""
    if bool(there.all()):
        target.index_copy_(0, place.flatten(), value.flatten(0, 1))
    else:
        target[place[there]] = value[there]


class Parts:
    """A place for each row of a chunk and entry of its line: (lanes, heads, lines, rows of a line, entries, ..)."""

    def __init__(self, run: ListedRun, first: int, last: int) -> None:
        self.run = run
        self.first, self.last = first, last
        lanes, _, entries = run.lines.members[0].shape
        self.shape = (lanes, run.lines.shared, last - first, run.lines.block, entries)

    def empty(self, *width: int) -> Tensor:
        return torch.zeros(*self.shape, *width, dtype=self.run.dtype)

    def put(self, target: Tensor, tile: Tile, value: Tensor) -> None:
        """Writes the parts of a tile: no two tiles have one in common."""
        _, shared, count, block, entries = self.shape
        assert tile.slot is not None
        at = tile.row + self.run.lines.skipped - self.first * block
        lane = (tile.lane * shared).unsqueeze(-1) + tile.head % self.run.tiler.group % shared
        place = (lane * count * block + at) * entries + tile.slot
        scatter(target.view(-1, *target.shape[5:]), place, tile.row_ok, value)

    def rows(self) -> slice:
        """The rows of the chunk that there are, among all places of its lines."""
        block, skipped = self.shape[3], self.run.lines.skipped
        before = max(skipped - self.first * block, 0)
        after = min(self.last * block, self.run.rows + skipped) - self.first * block
        return slice(before, after)

    def store(self, member: int, target: Tensor, value: Tensor) -> None:
        """Writes joined rows (lanes, shared, lines, rows of a line, ..) to (B * H * N, ..)."""
        run, (lanes, shared, count, block, _) = self.run, self.shape
        rows = self.rows()
        start = self.first * block - run.lines.skipped + rows.start
        held = value.reshape(lanes, shared, count * block, *value.shape[4:])[:, :, rows]
        whole = target.view(lanes, run.tiler.group, run.rows, *target.shape[1:])
        whole[:, member : member + shared, start : start + held.shape[2]] = held.to(target.dtype)


class ListedBackward(ListedRun):
    """The gradients of one listed branch; lse and delta are those of the whole softmax."""

    def __init__(self, plan: Plan, branch: Branch, call: Call, grad_out: Tensor, lse: Tensor, delta: Tensor) -> None:
        super().__init__(plan, branch, call)
        self.gradient = score_gradient(branch.score)
        self.cotangent = grad_out.reshape(-1, grad_out.shape[-1])
        self.lse, self.delta = lse.reshape(-1), delta.reshape(-1)
        self.dq, self.dk, self.dv = (torch.zeros(one.shape, dtype=self.dtype) for one in (self.q, self.k, self.v))
        self.leaves = [self.zero(leaf) for leaf in self.gradient.leaves]

    def zero(self, leaf: Leaf) -> Tensor:
        """The sums of a leaf, with its places in one axis. A cell of a table takes many pairs: float64."""
        if leaf.side == "pair":
            return torch.zeros(math.prod(table_shape(leaf, self.call)), dtype=torch.float64)
        return torch.zeros(self.batch * self.heads * (self.rows if leaf.side == "row" else self.keys), dtype=self.dtype)

    def gradients(self) -> BranchGradients:
        """Where rows stay, each half visits the pairs its own way; else one visit serves both."""
        if self.lines.rows_stay:
            for member, first, last in self.chunks(self.q.shape[-1]):
                for tile in self.tiler.rows_stay(member, first, last):
                    self.turn(tile, rows=self.whole_rows, keys=False)
                for tile in self.tiler.keys_stay(member, first, last):
                    self.turn(tile, rows=None, keys=True)
        else:
            for member, first, last in self.chunks(self.q.shape[-1]):
                self.join_gradients(member, first, last)
        shape = (self.batch, self.heads)
        leaves = tuple(
            total.view(table_shape(leaf, self.call)) if leaf.side == "pair" else total.view(*shape, -1)
            for leaf, total in zip(self.gradient.leaves, self.leaves, strict=True)
        )
        call = self.call
        assert call.v is not None
        return BranchGradients(
            self.dq.view(call.q.shape), self.dk.view(call.k.shape), self.dv.view(call.v.shape), leaves
        )

    def whole_rows(self, tile: Tile, gradient: Tensor, sums: dict[int, Tensor]) -> None:
        """A tile that has all keys of its rows."""
        place = self.places(tile)
        self.put(self.dq, place, tile, gradient)
        for number, total in sums.items():
            self.put(self.leaves[number], place, tile, total)

    def join_gradients(self, member: int, first: int, last: int) -> None:
        """Parts of the gradients of a chunk's rows, summed in the order of a row's entries."""
        parts = Parts(self, first, last)
        held = parts.empty(self.q.shape[-1])
        by_row = {n: parts.empty() for n, leaf in enumerate(self.gradient.leaves) if leaf.side == "row"}

        def rows(tile: Tile, gradient: Tensor, sums: dict[int, Tensor]) -> None:
            parts.put(held, tile, gradient)
            for number, total in sums.items():
                parts.put(by_row[number], tile, total)

        for tile in self.tiler.keys_stay(member, first, last):
            self.turn(tile, rows=rows, keys=True)
        parts.store(member, self.dq, held.sum(4))
        for number, total in by_row.items():
            parts.store(member, self.leaves[number], total.sum(4))

    def turn(self, tile: Tile, rows: Callable[[Tile, Tensor, dict[int, Tensor]], None] | None, keys: bool) -> None:
        """One batch of tiles: what it gives to the rows, to the keys, or to both."""
        q, k, v = self.gathered(tile)
        place = self.places(tile)
        cotangent = gather(self.cotangent, place, self.dtype)
        scores, at = self.scores(tile, q, k)
        weights = torch.exp(scores - self.lse[place].unsqueeze(-1))
        change = weights * (torch.bmm(cotangent, v.transpose(1, 2)) - self.delta[place].unsqueeze(-1))
        sums: dict[int, Tensor] = {}
        for number, leaf in enumerate(self.gradient.leaves):
            amount = self.times(change, leaf.adjoint, at)
            if leaf.side == "row":
                sums[number] = amount.sum(-1)
            elif leaf.side == "key" and keys:
                self.add_keys_of_heads(self.leaves[number], tile, amount)
            elif leaf.side == "pair" and keys:
                self.add_cells(self.leaves[number], leaf, tile, amount, at)
        by_dot = self.times(change, self.gradient.dot, at)
        if rows is not None:
            rows(tile, torch.bmm(by_dot, k), sums)
        if keys:
            self.add_keys(self.dv, tile, torch.bmm(weights.transpose(1, 2), cotangent))
            self.add_keys(self.dk, tile, torch.bmm(by_dot.transpose(1, 2), q))

    @staticmethod
    def times(change: Tensor, derivative: Node | None, at: Environment) -> Tensor:
        """The cotangent of the score times a derivative of it; 0 on a dead pair, where that may not be finite."""
        if derivative is None:
            return torch.zeros_like(change)
        return torch.where(change == 0, 0, change * at.value(derivative))

    def add_keys(self, target: Tensor, tile: Tile, amount: Tensor) -> None:
        """Adds (t, c, X) to the keys of each tile, which no other tile of the batch has."""
        place = self.key_places(tile)
        scatter(target, place, tile.key_ok, gather(target, place, self.dtype) + amount)

    def add_keys_of_heads(self, target: Tensor, tile: Tile, amount: Tensor) -> None:
        """Adds pairs (t, r, c) to (B * H * M), rows of one head together."""
        shared = self.lines.shared
        by_head = amount.unflatten(1, (shared, -1)).sum(2)
        head = tile.head.unflatten(1, (shared, -1))[..., 0]
        base = (tile.lane // self.key_heads * self.heads).unsqueeze(-1) + head
        place = base.unsqueeze(-1) * self.keys + tile.key.unsqueeze(1)
        there = tile.key_ok.unsqueeze(1).expand(place.shape)
        target[place[there]] = target[place[there]] + by_head[there]

    def add_cells(self, target: Tensor, leaf: Leaf, tile: Tile, amount: Tensor, at: Environment) -> None:
        """Adds pairs to the cells of the table that they read, one after the other."""
        table, index = leaf.value.args
        length = table_shape(leaf, self.call)[-1]
        cell = at.value(index).expand(amount.shape)
        inside = (cell >= 0) & (cell < length)
        place = (tile.lane // self.key_heads * self.heads).view(-1, 1, 1) + tile.head.unsqueeze(-1)
        for name, position, size in (("i", tile.row.unsqueeze(-1), self.rows), ("j", tile.key.unsqueeze(1), self.keys)):
            if table.depends_on(name):
                place = place * size + position
        place = (place * length + cell.clamp(0, length - 1)).expand(amount.shape)
        target.scatter_add_(0, place.flatten(), torch.where(inside, amount, 0).flatten().double())

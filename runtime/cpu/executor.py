"""The CPU back end: executes a plan's tiles with torch, visiting live pieces of keys only.

Per batch of row tiles an online softmax runs over the pieces of keys: products of tiles, exponents to base 2 (the
factor goes into q), sums in float32 (float64 for float64). Memory is that of one step; nothing is N x M.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from attnc.compiler.plan import Branch, Plan
from attnc.runtime.branches import join
from attnc.runtime.call import Call
from attnc.runtime.cpu.batches import Batch, Places, Shifted, Step, batches, remembered
from attnc.runtime.cpu.dense import dense_output
from attnc.runtime.cpu.distances import Line, by_distance
from attnc.runtime.cpu.listed_executor import ListedRun
from attnc.runtime.cpu.masks import Masks
from attnc.runtime.cpu.scores import read_score
from attnc.runtime.cpu.tiles import Group, Tiling
from attnc.runtime.cuda.work import closed_form
from attnc.runtime.evaluate import Environment
from attnc.runtime.steps.placing import RowPlaces

ELEMENTS = 2**20  # scores in one step: they stay in the cache
SMALLEST = 64  # rows of a tile
LOG2E = math.log2(math.e)


def execute(plan: Plan, call: Call, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """The result (B, H, N, E), of `dtype` or that of q, and lse (B, H, N), natural, -inf where there is no key.

    Sinks are part of lse. float32, or float64 where q is.
    """
    dtype = dtype or call.q.dtype
    rows = RowPlaces.of(plan, call)
    with torch.no_grad():
        if rows is not None:
            out, lse = branches_output(plan, replace(call, q=rows.ordered(call.q)), dtype)
            return rows.back(out), rows.back(lse)
        return branches_output(plan, call, dtype)


def branches_output(plan: Plan, call: Call, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The joined branches, for rows in the order of the plan."""
    own = dtype if len(plan.branches) == 1 else call.compute_dtype  # branches are rounded once, after they are joined
    return join([branch_output(plan, branch, call, own) for branch in plan.branches], dtype)


def branch_output(plan: Plan, branch: Branch, call: Call, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """out (B, H, N, E) of `dtype` and lse (B, H, N) of one branch."""
    if branch.selected is not None:
        return ListedRun(plan, branch, call).run(dtype)
    dense = dense_output(plan, branch, call)
    if dense is not None:
        return dense[0].to(dtype), dense[1]
    return BranchRun(plan, branch, call).run(dtype)


@dataclass
class Lanes:
    """Heads worked on together: (batch row, key head) pairs as one axis x, with the query heads of each.

    q (x, g, N, D), k (x, M, D), v (x, M, E), out (x, g, N, E), lse (x, g, N); b (x, 1, 1, 1, 1), h (x, 1, g, 1, 1).
    """

    q: Tensor
    k: Tensor
    v: Tensor | None
    out: Tensor | None
    lse: Tensor | None
    b: Tensor
    h: Tensor

    def part(self, start: int, stop: int) -> Lanes:
        def cut(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[start:stop]

        q, k, b, h = (tensor[start:stop] for tensor in (self.q, self.k, self.b, self.h))
        return Lanes(q, k, cut(self.v), cut(self.out), cut(self.lse), b, h)

    def __len__(self) -> int:
        return self.q.shape[0]


@dataclass
class Work:
    """One batch of tiles for some lanes. Positions have axes (x, tile, g, row, key)."""

    plan: Plan
    call: Call
    lanes: Lanes
    batch: Batch
    dead: dict[tuple[int, int], Tensor]  # masks by (step, first column), shared between lanes
    one_batch: bool  # whether these lanes, and those that share masks with them, are of one batch row

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(x, tiles, g, rows)"""
        return len(self.lanes), self.batch.tiles, self.lanes.q.shape[1], self.batch.rows.count

    @cached_property
    def rows(self) -> Tensor:
        """Global positions of the rows (1, tiles, 1, rows, 1)."""
        return self.batch.rows.numbers()[None, :, None, :, None] + self.call.offset

    def environment(
        self, keys: Tensor, real: torch.dtype, dot: Tensor | None = None, rows: Tensor | None = None
    ) -> Environment:
        """All positions, with keys that broadcast against (x, tiles, g, rows, keys)."""
        positions = {"b": self.lanes.b, "h": self.lanes.h, "i": self.rows if rows is None else rows, "j": keys}
        return Environment(self.plan, self.call, positions, real, dot=dot)


class BranchRun:
    """One branch of one call."""

    def __init__(self, plan: Plan, branch: Branch, call: Call) -> None:
        self.plan = plan
        self.branch = branch
        self.call = call
        self.dtype = call.compute_dtype
        self.lowest = torch.finfo(self.dtype).min / 2
        self.smallest = math.log2(torch.finfo(self.dtype).tiny)
        rows = max(call.sizes["i"], 1) * (call.sizes["h"] // max(call.k.shape[1], 1))
        self.tiling = Tiling(plan, branch.domain, call, columns=min(max(1024, ELEMENTS // rows), 2**15))
        self.masks = Masks(branch.domain)
        self.factor: Tensor | float | None = None  # of the score, into q
        self.score = read_score(branch.score, folded=not self.masks.dotted)
        terms = [node for node, _ in self.score.terms]
        self.lines = {node: Line(plan, call, node, self.dtype) for node in terms if by_distance(node)}

    def run(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """out (B, H, N, E) of `dtype` and lse (B, H, N)."""
        call = self.call
        assert call.v is not None
        batch, heads, rows = (call.sizes[index] for index in ("b", "h", "i"))
        split = (batch, call.k.shape[1], self.tiling.shared, rows)
        out = torch.zeros(*split, call.sizes["e"], dtype=dtype)
        lse = torch.full(split, -math.inf, dtype=self.dtype)
        if rows:
            for group in self.tiling.groups():
                own = out[group.batch, group.key_heads, group.members]
                statistic = lse[group.batch, group.key_heads, group.members]
                lanes = self.lanes(group, own.flatten(0, 1), statistic.flatten(0, 1))
                for work in self.works(group, lanes):
                    self.attend(work)
        return out.flatten(1, 2), lse.view(batch, heads, rows)

    def lanes(self, group: Group, out: Tensor | None = None, lse: Tensor | None = None) -> Lanes:
        call = self.call
        q = call.q.unflatten(1, (call.k.shape[1], -1))[group.batch, group.key_heads, group.members].flatten(0, 1)
        k = call.k[group.batch, group.key_heads].flatten(0, 1)
        v = None if call.v is None else call.v[group.batch, group.key_heads].flatten(0, 1)
        head = torch.arange(call.sizes["h"]).view(-1, self.tiling.shared)[group.key_heads, group.members]
        b = torch.arange(call.sizes["b"])[group.batch].repeat_interleave(len(head)).view(-1, 1, 1, 1, 1)
        h = head.repeat(len(b) // len(head), 1)[:, None, :, None, None]
        return Lanes(q, k, v, out, lse, b, h)

    def works(self, group: Group, lanes: Lanes) -> Iterator[Work]:
        """Batches of tiles, each for as many lanes as fit one step.

        With few lanes, several tiles of one lane at a time: the product of a view with two batch axes would be copied.
        """
        shared = lanes.q.shape[1]
        few = len(lanes) * SMALLEST < self.call.sizes["i"]
        one_batch = group.batch.start is not None or self.call.sizes["b"] == 1
        for batch in self.batches(group, ELEMENTS // shared if few else 0):
            cost = batch.tiles * batch.rows.count * shared * batch.widest
            step = max(1, ELEMENTS // cost) if batch.tiles == 1 else 1
            dead: dict[tuple[int, int], Tensor] = {}
            for start in range(0, len(lanes), step):
                yield Work(self.plan, self.call, lanes.part(start, start + step), batch, dead, one_batch)

    def batches(self, group: Group, elements: int) -> Sequence[Batch]:
        """The batches of a group, remembered where sizes and parameters alone decide them."""
        if not closed_form(self.branch):
            return list(batches(self.tiling.tiles(group), elements))
        sizes = tuple(sorted(self.call.sizes.items()))
        key = (*sizes, self.tiling.shared, self.tiling.columns, elements, *sorted(self.call.parameters.items()))
        return remembered(self.branch, key, lambda: batches(self.tiling.tiles(group), elements))

    # One batch

    def attend(self, work: Work) -> None:
        """The online softmax over a batch's steps. Scores are to base 2, with q's rows of all heads as one axis."""
        lanes, (x, tiles, shared, rows) = work.lanes, work.shape
        assert lanes.v is not None
        flat = (x * tiles, shared * rows)
        q = self.queries(work)
        peak = total = result = None
        for number, step in enumerate(work.batch.steps):
            scores = self.scores(work, number, step, q)
            highest = scores.amax(-1, keepdim=True).clamp_(min=self.lowest)
            if peak is None or total is None or result is None:
                peak = highest
                weights = self.weights(scores, peak)
                total = weights.sum(-1, keepdim=True)
                result = self.values(work, step, weights, lanes.v)
                continue
            highest = torch.maximum(peak, highest)
            kept = torch.exp2(peak - highest)
            weights = self.weights(scores, highest)
            peak = highest
            total = total.mul_(kept).add_(weights.sum(-1, keepdim=True))
            result = result.mul_(kept).add_(self.values(work, step, weights, lanes.v))
        if peak is None or total is None or result is None:
            if self.branch.sink is None:
                return  # no keys: out is 0 and lse -inf already
            peak, total = (torch.full((*flat, 1), fill, dtype=self.dtype) for fill in (self.lowest, 0.0))
            result = torch.zeros(*flat, lanes.v.shape[-1], dtype=self.dtype)
        self.finish(work, peak, total, result)

    def weights(self, scores: Tensor, peak: Tensor) -> Tensor:
        """2 ** (scores - peak), in place. Subnormals, which a bias can make many, are slow to multiply: 0 instead."""
        scores.sub_(peak)
        if not self.score.plain:
            torch.threshold_(scores, self.smallest, -math.inf)
        return scores.exp2_()

    def queries(self, work: Work) -> Tensor:
        """(x * tiles, g * rows, D), times the factor of the score."""
        x, tiles, shared, rows = work.shape
        if self.factor is None or not self.score.constant:
            self.factor = self.score.factor(work.environment(work.rows, self.dtype))
        q = work.batch.rows.of(work.lanes.q).transpose(1, 2)  # (x, tiles, g, rows, D)
        return (q.to(self.dtype) * self.factor).reshape(x * tiles, shared * rows, -1)

    def scores(self, work: Work, number: int, step: Step, q: Tensor) -> Tensor:
        """(x * tiles, g * rows, keys), -inf on dead pairs."""
        x, tiles, shared, rows = work.shape
        dots = self.dots(work, step, q, work.lanes.k)
        pairs = self.score.finish(work, step, dots, self.lines)
        self.mask(work, number, step, pairs, dots)
        return pairs.reshape(x * tiles, shared * rows, -1)

    def mask(self, work: Work, number: int, step: Step, pairs: Tensor, dots: Tensor) -> None:
        """Sets the scores of dead pairs to -inf, in place."""
        for start, stop in step.masked:
            dead = self.masks.dead(work, number, step, (start, stop), dots[..., start:stop])
            pairs[..., start:stop].masked_fill_(dead, -math.inf)

    def dots(self, work: Work, step: Step, q: Tensor, k: Tensor) -> Tensor:
        """Products of rows q (x * tiles, g * rows, D) with a step's keys of k (x, M, D): (x, tiles, g, rows, keys)."""
        x, tiles, shared, rows = work.shape
        k = step.keys.of(k).to(self.dtype)
        if step.per_row:  # k (x, tiles, rows, n, D)
            return (q.view(x, tiles, shared, rows, -1).transpose(2, 3) @ k.transpose(-1, -2)).transpose(2, 3)
        return torch.bmm(q, k.reshape(x * tiles, -1, k.shape[-1]).transpose(1, 2)).view(x, tiles, shared, rows, -1)

    def count(self, work: Work, *, masks: bool) -> tuple[int, int]:
        """(visited, live) pairs of a batch; without `masks`, columns that are not full count as dead."""
        x, tiles, shared, rows = work.shape
        lines = x * tiles * shared * rows
        visited = live = 0
        for number, step in enumerate(work.batch.steps):
            visited += lines * step.keys.count
            live += lines * (step.keys.count - sum(stop - start for start, stop in step.masked))
            if not (masks and step.masked):
                continue
            dots = self.dots(work, step, self.queries(work), work.lanes.k) if self.masks.dotted else None
            for start, stop in step.masked:
                some = None if dots is None else dots[..., start:stop]
                dead = self.masks.dead(work, number, step, (start, stop), some)
                alive = dead.numel() - int(dead.sum())
                live += alive * lines * (stop - start) // dead.numel()
        return visited, live

    def values(self, work: Work, step: Step, weights: Tensor, v: Tensor) -> Tensor:
        """Weighted sums over a step's keys of v (x, M, E): (x * tiles, g * rows, E)."""
        x, tiles, shared, rows = work.shape
        v = step.keys.of(v).to(self.dtype)
        if not step.per_row:
            return torch.bmm(weights, v.reshape(x * tiles, -1, v.shape[-1]))
        by_row = weights.view(x, tiles, shared, rows, -1).transpose(2, 3)
        return (by_row @ v).transpose(2, 3).reshape(x * tiles, shared * rows, -1)

    def finish(self, work: Work, peak: Tensor, total: Tensor, result: Tensor) -> None:
        """Divide by the denominator (with the sink in it) and store."""
        x, tiles, shared, rows = work.shape
        lanes, places = work.lanes, work.batch.rows
        assert lanes.out is not None
        assert lanes.lse is not None
        if self.branch.sink is not None:
            sink = work.environment(work.rows, self.dtype).value(self.branch.sink) * LOG2E
            sink = sink.expand(x, tiles, shared, rows, 1).reshape(x * tiles, shared * rows, 1)
            highest = torch.maximum(peak, sink)
            kept = torch.exp2(peak - highest)
            total = total * kept + torch.exp2(sink - highest)
            result, peak = result.mul_(kept), highest
        # A row with a key has a total of at least 1: its largest weight. Without: 0, so lse is -inf and out 0.
        view = (x, tiles, shared, rows, -1)
        statistic = (total.log2() + peak).mul_(1 / LOG2E)
        self.store(places, lanes.lse.unsqueeze(-1), statistic.view(view).transpose(1, 2))
        whole = total.clamp_(min=1.0).view(view).transpose(1, 2)
        result = result.view(view).transpose(1, 2)
        if isinstance(places, Shifted) and lanes.out.dtype == self.dtype:
            torch.div(result, whole, out=places.of(lanes.out))
        else:
            self.store(places, lanes.out, result / whole)

    @staticmethod
    def store(places: Places, target: Tensor, value: Tensor) -> None:
        """Write (x, g, tiles, rows, X) to (x, g, N, X)."""
        if isinstance(places, Shifted):
            places.of(target).copy_(value)
        else:
            target[:, :, places.numbers()] = value.to(target.dtype)


def visited_pairs(plan: Plan, call: Call) -> int:
    """Pairs (b, h, i, j) that the tiles visit, over all branches."""
    return sum(visited for visited, _ in _counts(plan, call, masks=False))


def live_pairs(plan: Plan, call: Call) -> int:
    """Pairs (b, h, i, j) that are live, over all branches: full columns counted, masks evaluated on the others."""
    return sum(live for _, live in _counts(plan, call, masks=True))


def _counts(plan: Plan, call: Call, *, masks: bool) -> Iterator[tuple[int, int]]:
    """(visited, live) of every batch."""
    with torch.no_grad():
        for branch in plan.branches:
            if branch.selected is not None:
                yield from ListedRun(plan, branch, call).counts(masks=masks)
                continue
            run = BranchRun(plan, branch, call)
            for group in run.tiling.groups() if call.sizes["i"] else ():
                lanes = run.lanes(group)
                for work in run.works(group, lanes):
                    yield run.count(work, masks=masks)

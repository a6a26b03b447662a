"""The gradients of a branch on a CPU: the forward's tiles once more, live pieces of keys only.

Every tile makes its weights again from lse; dq stays with the tile, dk and dv are added to the slices of keys it
visits, tile after tile, so that the order of sums never changes. Memory is that of one step beside the gradients.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attnc.compiler.ir import walk
from attnc.compiler.plan import Branch, Plan
from attnc.runtime.backward import BranchGradients, score_gradient
from attnc.runtime.call import Call
from attnc.runtime.cpu.batches import Step
from attnc.runtime.cpu.executor import LOG2E, BranchRun, Lanes, Work
from attnc.runtime.cpu.leaf_sums import Derivative, LeafSum
from attnc.runtime.cpu.listed_executor import ListedBackward
from attnc.runtime.cpu.scores import read_score
from attnc.runtime.cpu.tiles import Group
from attnc.runtime.evaluate import Environment
from attnc.runtime.steps.placing import RowPlaces


def branch_backward(
    plan: Plan, number: int, call: Call, grad_out: Tensor, lse: Tensor, delta: Tensor
) -> BranchGradients:
    """The gradients of one branch; see `backward.Engine`. All of them in the dtype of sums."""
    rows = RowPlaces.of(plan, call)
    with torch.no_grad():
        branch = plan.branches[number]
        if rows is not None:
            grad_out, lse, delta = (rows.ordered(one) for one in (grad_out, lse, delta))
            call = replace(call, q=rows.ordered(call.q))
        run = BackwardRun if branch.selected is None else ListedBackward
        made = run(plan, branch, call, grad_out, lse, delta).gradients()
        return made if rows is None else replace(made, q=rows.back(made.q))


@dataclass
class BackwardLanes(Lanes):
    """Lanes with what goes backward: `out` and `lse` hold the cotangent and the statistic of the rows.

    delta (x, g, N); the gradients dq (x, g, N, D), dk (x, M, D), dv (x, M, E), and one of each leaf.
    """

    delta: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor
    leaves: tuple[LeafSum, ...]

    def part(self, start: int, stop: int) -> BackwardLanes:
        held = super().part(start, stop)
        delta, dq, dk, dv = (tensor[start:stop] for tensor in (self.delta, self.dq, self.dk, self.dv))
        leaves = tuple(leaf.part(start, stop) for leaf in self.leaves)
        return BackwardLanes(held.q, held.k, held.v, held.out, held.lse, held.b, held.h, delta, dq, dk, dv, leaves)


class BackwardRun(BranchRun):
    """The backward of one branch of one call."""

    def __init__(self, plan: Plan, branch: Branch, call: Call, grad_out: Tensor, lse: Tensor, delta: Tensor) -> None:
        super().__init__(plan, branch, call)
        found = score_gradient(branch.score)
        self.by_dot = None if found.dot is None else Derivative(plan, call, found.dot)
        self.leaves = tuple(LeafSum.zero(plan, call, leaf) for leaf in found.leaves)
        dotted = self.masks.dotted or any(one.op == "dot" for leaf in found.leaves for one in walk(leaf.adjoint))
        self.score = read_score(branch.score, folded=not dotted)
        if self.score.formula is not None:
            self.lines = {}
        split = (call.sizes["b"], call.k.shape[1], self.tiling.shared)
        self.grad_out, self.lse, self.delta = (one.unflatten(1, split[1:]) for one in (grad_out, lse, delta))
        assert call.v is not None
        self.dq = torch.zeros(*split, *call.q.shape[2:], dtype=self.dtype)
        self.dk = torch.zeros(call.k.shape, dtype=self.dtype)
        self.dv = torch.zeros(call.v.shape, dtype=self.dtype)

    def gradients(self) -> BranchGradients:
        """Visits every tile. dk and dv hold the sums over the query heads of a key head."""
        for group in self.tiling.groups() if self.call.sizes["i"] else ():
            lanes = self.backward_lanes(group)
            for work in self.works(group, lanes):
                self.turn(work)
        if self.folded:
            self.dk /= LOG2E  # q was multiplied with it
        leaves = tuple(leaf.result(self.plan, self.call) for leaf in self.leaves)
        return BranchGradients(self.dq.flatten(1, 2), self.dk, self.dv, leaves)

    @property
    def folded(self) -> bool:
        """Whether the rows of q carry the factor of the score."""
        return self.score.formula is None

    def backward_lanes(self, group: Group) -> BackwardLanes:
        place = (group.batch, group.key_heads, group.members)

        def of(tensor: Tensor) -> Tensor:
            return tensor[place].flatten(0, 1)

        held = self.lanes(group, of(self.grad_out), of(self.lse))
        dk, dv = (one[group.batch, group.key_heads].flatten(0, 1) for one in (self.dk, self.dv))
        return BackwardLanes(
            held.q,
            held.k,
            held.v,
            held.out,
            held.lse,
            held.b,
            held.h,
            of(self.delta),
            of(self.dq),
            dk,
            dv,
            tuple(leaf.lanes(*place) for leaf in self.leaves),
        )

    # One batch

    def turn(self, work: Work) -> None:
        """The gradients of a batch of tiles. Rows of all heads are one axis, as in the forward."""
        lanes, (x, tiles, shared, rows) = work.lanes, work.shape
        assert isinstance(lanes, BackwardLanes)
        assert lanes.lse is not None
        assert lanes.v is not None
        if not work.batch.steps:
            return
        q = self.queries(work)
        cotangent = self.of_rows(work, lanes.out)
        statistic, delta = (self.of_rows(work, one.unsqueeze(-1)) for one in (lanes.lse, lanes.delta))
        statistic = statistic * LOG2E
        gradient = torch.zeros(x * tiles, shared * rows, q.shape[-1], dtype=self.dtype)
        for number, step in enumerate(work.batch.steps):
            weights, at = self.weights_of(work, number, step, q, statistic)
            self.add_keys(work, step, lanes.dv, weights, cotangent)
            values = self.dots(work, step, cotangent, lanes.v).reshape(weights.shape)
            change = values.sub_(delta).mul_(weights)  # the cotangent of the score
            pairs = change.view(x, tiles, shared, rows, -1)
            for leaf in lanes.leaves:
                leaf.add(work, step, pairs, at)
            if self.by_dot is None:
                continue  # the score does not depend on q @ k
            if not self.folded:
                change = self.by_dot.times(pairs, work, step, at).reshape(change.shape)
            self.add_keys(work, step, lanes.dk, change, q)
            gradient += self.values(work, step, change, lanes.k)
        gradient = gradient.view(x, tiles, shared, rows, -1)
        if self.folded:
            assert self.factor is not None
            gradient = gradient * (self.factor / LOG2E)
        work.batch.rows.write(lanes.dq, gradient.transpose(1, 2))

    def of_rows(self, work: Work, tensor: Tensor | None) -> Tensor:
        """The rows of a batch from (x, g, N, X): (x * tiles, g * rows, X)."""
        x, tiles, shared, rows = work.shape
        assert tensor is not None
        found = work.batch.rows.of(tensor).to(self.dtype).transpose(1, 2)
        return found.reshape(x * tiles, shared * rows, -1)

    def weights_of(
        self, work: Work, number: int, step: Step, q: Tensor, statistic: Tensor
    ) -> tuple[Tensor, Environment]:
        """exp(score - lse), (x * tiles, g * rows, keys), and where derivatives are evaluated."""
        dots = self.dots(work, step, q, work.lanes.k)
        held = None if self.folded else dots
        at = work.environment(step.positions().clamp(min=0), self.dtype, held)
        if self.score.formula is None:
            pairs = self.score.finish(work, step, dots, self.lines)
        else:
            pairs = at.value(self.score.formula).expand(dots.shape) * LOG2E
        self.mask(work, number, step, pairs, dots)
        return self.weights(pairs.reshape(*q.shape[:2], -1), statistic), at

    def add_keys(self, work: Work, step: Step, target: Tensor, weights: Tensor, rows: Tensor) -> None:
        """Adds weights^T @ rows to a step's keys of target (x, M, X). weights (.., keys) and rows (.., X) by row."""
        x, tiles, shared, count = work.shape
        if not step.per_row:
            made = torch.bmm(weights.transpose(1, 2), rows)
            step.keys.add(target, made.view(x, tiles, -1, rows.shape[-1]))
            return
        by_row, own = (one.view(x, tiles, shared, count, -1) for one in (weights, rows))
        step.keys.add(target, by_row.permute(0, 1, 3, 4, 2) @ own.transpose(2, 3))

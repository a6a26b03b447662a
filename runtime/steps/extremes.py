"""An `Extreme` step at run time: the largest score of each row, over the keys that its condition's bounds leave.

Rows go by in chunks; a chunk's scores are formed for the keys between its first and its last bound, so a window costs
its width. Backward forms them again: the gradient goes to the largest, in equal parts where several are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from attnc.compiler.composition import Extreme
from attnc.runtime.backward import Engine, recording
from attnc.runtime.call import Call
from attnc.runtime.compute.arrays import Frame
from attnc.runtime.evaluate import Environment
from attnc.runtime.steps.attending import ATTEND, call_of, operands
from attnc.runtime.steps.through_views import Operands, through_views

ROWS = 64


class Extremes:
    """The kind of step: see `steps.Kind`."""

    def again(self, step: Extreme) -> bool:
        return False

    def names(self, step: Extreme) -> list[str]:
        return [step.name]

    def reads(self, step: Extreme) -> list[str]:
        query, key, _, *leaves = ATTEND.reads(step.attend)
        return [query, key, *leaves]

    def shapes(self, step: Extreme, frame: Frame) -> list[tuple[list[int], torch.dtype]]:
        return [([frame.sizes["b"], frame.sizes["h"], frame.length(step.attend.rows)], frame.real)]

    def forward(self, step: Extreme, frame: Frame, engine: Engine) -> list[Tensor]:
        return [extremes(step, call_of(step.attend, frame, operands(step.attend, frame)))]

    def backward(
        self,
        step: Extreme,
        frame: Frame,
        engine: Engine,
        outputs: Sequence[Tensor],
        cotangents: Sequence[Tensor | None],
        wanted: Sequence[str],
    ) -> Mapping[str, Tensor]:
        (grad,) = cotangents
        if grad is None or not wanted or not outputs[0].numel():
            return {}
        inside = [entry.name for entry in step.attend.plan.inputs if entry.name in wanted]

        def seen(frame: Frame) -> Operands:
            viewed = operands(step.attend, frame)
            return [viewed["q"], viewed["k"], *(frame.tensors[name] for name in inside)]

        def backward(_: Operands) -> Sequence[Tensor | None]:
            made = gradients(step, call_of(step.attend, frame, operands(step.attend, frame)), grad, inside)
            return [made[name] for name in ("q", "k", *inside)]

        return through_views(frame, wanted, seen, backward)


def extremes(step: Extreme, call: Call) -> Tensor:
    """The largest score of every row (b, h, rows), in the type of sums."""
    parts = [
        largest(step, call, call.q[:, :, rows], call.k[:, :, keys], rows, keys) for rows, keys in chunks(step, call)
    ]
    return torch.cat(parts, 2) if parts else call.q.new_zeros(call.q.shape[:3], dtype=call.compute_dtype)


def gradients(step: Extreme, call: Call, grad: Tensor, inside: Sequence[str]) -> dict[str, Tensor]:
    """Gradients of the call's q and k, a chunk's rows and keys at a time, and of inputs that the score reads."""
    totals = {"q": torch.zeros_like(call.q), "k": torch.zeros_like(call.k)}
    totals |= {name: torch.zeros_like(call.inputs[name]) for name in inside}
    for rows, keys in chunks(step, call):
        q, k = (one.detach().requires_grad_() for one in (call.q[:, :, rows], call.k[:, :, keys]))
        inputs = {name: call.inputs[name].detach().requires_grad_() for name in inside}
        with recording():
            held = replace(call, inputs={**call.inputs, **inputs})
            found = largest(step, held, q, k, rows, keys)
        if not found.requires_grad:
            continue
        made = torch.autograd.grad(
            found, [q, k, *inputs.values()], grad[:, :, rows], allow_unused=True, materialize_grads=True
        )
        places = [totals["q"][:, :, rows], totals["k"][:, :, keys], *(totals[name] for name in inside)]
        for place, one in zip(places, made, strict=True):
            place += one
    return totals


def chunks(step: Extreme, call: Call) -> Iterator[tuple[slice, slice]]:
    """Rows, and the keys from the first to the last that one of them may see."""
    count, keys = call.sizes["i"], call.sizes["j"]
    runs = [run for key_set in step.attend.plan.branches[0].domain.key_sets for run in key_set.runs]
    position = call.positions("b", "h", "i")
    for start in range(0, count, ROWS):
        rows = slice(start, min(start + ROWS, count))
        at = Environment(step.attend.plan, call, {**position, "i": position["i"][..., rows]}, call.compute_dtype)
        bounds = [[at.value(side) for side in (run.outer.lo, run.outer.hi)] for run in runs]
        low = min((int(lo.min()) for lo, _ in bounds), default=0)
        high = max((int(hi.max()) for _, hi in bounds), default=0)
        low = min(max(low, 0), keys)
        yield rows, slice(low, min(max(high, low), keys))


def largest(step: Extreme, call: Call, q: Tensor, k: Tensor, rows: slice, keys: slice) -> Tensor:
    """The largest score (b, h, rows) of some rows q over some keys k; 0 where none is live. Differentiable."""
    branch, real = step.attend.plan.branches[0], call.compute_dtype
    positions = call.positions("b", "h", "i", "j")
    positions["i"], positions["j"] = positions["i"][:, :, rows], positions["j"][..., keys]
    key = k.to(real).repeat_interleave(q.shape[1] // k.shape[1], 1)
    at = Environment(step.attend.plan, call, positions, real, dot=q.to(real) @ key.mT)
    shape = (call.sizes["b"], call.sizes["h"], rows.stop - rows.start, keys.stop - keys.start)
    score, live = at.value(branch.score).expand(shape), at.value(branch.condition).expand(shape)
    if not shape[-1]:
        return score.sum(-1)
    limit = -math.inf if step.largest else math.inf
    score = score.masked_fill(~live, limit)
    found = score.amax(-1) if step.largest else score.amin(-1)
    return found.masked_fill(~live.any(-1), 0)


EXTREME = Extremes()

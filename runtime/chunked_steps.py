"""The steps `Carry` and `Recur` of a composition on the chunked kernels: arrays by name in, arrays by name out."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from attnc.compiler.composition import Carry, Extent, Recur
from attnc.compiler.emit.chunked import chunked_text, variant_of
from attnc.runtime.call import Call
from attnc.runtime.launch_chunked_carry import Carried, Reach, carry_backward, carry_forward
from attnc.runtime.launch_chunked_recur import Recurred, Recurrence, recur_backward, recur_forward
from attnc.runtime.scalars import of_node

NOTHING = -1.0e4  # a log decay after which nothing is left

Arrays = Mapping[str, Tensor]


def reach_of(extent: Extent, call: Call) -> Reach:
    """An extent with the numbers of a call."""
    amount = 0 if extent.amount is None else of_node(extent.amount, call.parameters, call.sizes)
    if amount is None:
        raise ValueError(f"the amount of a {extent.kind} is not known before the kernels run")
    return Reach(extent.kind, int(amount), call.offset)


def carry_step(step: Carry, call: Call, arrays: Arrays, keep: bool = False) -> Carried:
    """The sum of a step; `keep`: with what its backward would make again."""
    return carry_forward(
        arrays[step.query],
        arrays[step.key],
        arrays[step.value],
        decay_of(step, call, arrays),
        reach=reach_of(step.extent, call),
        total=step.total is not None,
        keep=keep,
    )


def carry_step_backward(
    step: Carry, call: Call, arrays: Arrays, cotangents: Mapping[str, Tensor | None], kept: Arrays | None = None
) -> dict[str, Tensor]:
    """Gradients by the names of the arrays, from those of `step.name` and `step.total` (None: zero)."""
    query, value = arrays[step.query], arrays[step.value]
    decay = decay_of(step, call, arrays)
    cotangent = cotangents.get(step.name)
    total = cotangents.get(step.total) if step.total is not None else None
    given = [query, arrays[step.key], value, *([decay] if decay is not None else [])]
    rows = (*(max(one.shape[axis] for one in given) for axis in (0, 1)), query.shape[2])
    if cotangent is None:
        cotangent = query.new_zeros((*rows, value.shape[3]))
    if step.total is not None and total is None:
        total = query.new_zeros(rows, dtype=torch.float32)
    found = carry_backward(
        query,
        arrays[step.key],
        value,
        decay,
        cotangent,
        reach=reach_of(step.extent, call),
        total_cotangent=total,
        kept=kept,
    )
    parts = [(step.query, found.query), (step.key, found.key), (step.value, found.value)]
    if step.decay is not None and found.decay is not None:
        parts.append((step.decay, found.decay.sum_to_size(arrays[step.decay].shape)))
    return summed(parts)


def decay_of(step: Carry, call: Call, arrays: Arrays) -> Tensor | None:
    """The step's log decay; where keys must agree with the query, everything decays at the first that differs."""
    decay = None if step.decay is None else arrays[step.decay].float()
    if step.extent.same is None:
        return decay
    if step.extent.kind == "all":
        raise ValueError("a sum over all keys that agree with the query has no kernel")
    same = arrays[step.extent.same]
    changes = torch.zeros(same.shape, dtype=torch.float32, device=same.device)
    changes[:, 1:] = torch.where(same[:, 1:] != same[:, :-1], NOTHING, 0.0)
    changes = changes[:, None]
    if decay is None:
        return changes
    return decay + (changes[..., None] if decay.dim() == 4 else changes)


def recurrence_of(step: Recur, call: Call, arrays: Arrays) -> Recurrence:
    """The operands of a step. No array `step.left` stands for the negated keys, the delta rule."""
    return Recurrence(
        arrays[step.query],
        arrays[step.key],
        arrays[step.value],
        arrays[step.right],
        arrays.get(step.left),
        None if step.decay is None else arrays[step.decay].float(),
        call.offset,
    )


def recur_step(step: Recur, call: Call, arrays: Arrays, keep: bool = False) -> Recurred:
    """The reads of a step."""
    return recur_forward(recurrence_of(step, call, arrays), keep=keep)


def recur_step_backward(
    step: Recur, call: Call, arrays: Arrays, cotangent: Tensor, kept: Arrays | None = None
) -> dict[str, Tensor]:
    """Gradients by the names of the arrays."""
    found = recur_backward(recurrence_of(step, call, arrays), cotangent, kept=kept)
    parts = [(step.query, found.query), (step.key, found.key), (step.value, found.value), (step.right, found.right)]
    if found.left is not None:
        parts.append((step.left, found.left))
    if step.decay is not None and found.decay is not None:
        parts.append((step.decay, found.decay))
    return summed(parts)


def summed(parts: list[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """One gradient an array: an array may stand in several places."""
    found: dict[str, Tensor] = {}
    for name, gradient in parts:
        found[name] = found[name] + gradient if name in found else gradient
    return found


def step_text(step: Carry | Recur, channel: bool = False, grouped: bool = False, delta: bool = False) -> str:
    """The generated module of a step, for people; the arguments as `variant_of`."""
    return chunked_text(variant_of(step, channel, grouped, delta))

"""States that rows read behind their keys, at one token that the device counts: see `decoding.decoded_states`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from attnc.compiler.composition import Carry
from attnc.dsl.diagnostics import InternalError
from attnc.runtime.compute.arrays import Frame
from attnc.runtime.decoding.decoded_states import States
from attnc.runtime.decoding.kv_cache import Held
from attnc.runtime.steps.carrying import CARRY, decay_of, with_ones
from attnc.runtime.steps.composition import with_arrays
from attnc.runtime.steps.handed import by_head

Operands = tuple[Tensor, Tensor, Tensor, Tensor | None]


def behind(step: Carry, frame: Frame, held: Held, now: Tensor, amount: int) -> Operands:
    """query, key, value and decay of a state that is `amount` tokens old: the query has the decay since."""
    names = [name for name in (step.key, step.value, step.decay) if name in held.kept.arrays]
    shifted = with_arrays(frame, {str(name): read(str(name), held, now - amount, 1) for name in names})
    query, key, value, decay = CARRY.operands(step, shifted)
    if query is None or key is None or value is None:
        raise InternalError("an operand of a sum is missing")
    if step.decay is None:
        return query, key, value, decay
    since = decay_of(frame, step.decay)
    if step.decay in held.kept.arrays:
        whole = with_arrays(frame, {step.decay: read(step.decay, held, now - amount + 1, amount)})
        since = decay_of(whole, step.decay)
    assert since is not None
    elapsed = since.double().sum(2) if since.shape[2] == amount else since.double().select(2, 0) * amount
    factor = elapsed.exp().to(query.dtype if query.is_floating_point() else frame.real)
    factor = factor.unsqueeze(2) if factor.dim() == 3 else factor.unsqueeze(-1).unsqueeze(-1)
    return query * (factor if factor.shape[1] == 1 else by_head(factor, query.shape[1])), key, value, decay


def read(name: str, held: Held, first: Tensor, count: int) -> Tensor:
    """A kept array at `count` positions from first (b,) on, 0 before all positions; in its layout."""
    position = first.unsqueeze(-1) + torch.arange(count, device=first.device)
    rows = held.gather(name, held.slots.place(position.clamp(min=0)))
    there = (position >= 0).view(*position.shape, *(1,) * (rows.dim() - 2))
    return held.array(name, rows.masked_fill(~there, 0))


def by_periods(step: Carry, frame: Frame, states: States, now: Tensor, period: int) -> Mapping[str, Tensor]:
    """A row reads the state of the periods before its own; its key enters the open one, which is whole at its end."""
    query, key, value, _ = with_ones(step, CARRY.operands(step, frame))
    if query is None or key is None or value is None:
        raise InternalError("an operand of a sum is missing")
    last, whole = states.last[step.name], states.whole[step.name]
    query, key, value = (by_head(one.to(frame.real), last.shape[1]) for one in (query, key, value))
    out = query @ whole
    last += key.mT @ value
    ended = ((now + 1) % period == 0).view(-1, 1, 1, 1)
    whole.copy_(torch.where(ended, last, whole))
    if step.total:
        return {step.name: out[..., :-1], step.total: out[..., -1]}
    return {step.name: out}

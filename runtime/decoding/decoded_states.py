"""States of `Carry` and `Recur` steps between calls: they go on from the last token."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from attnc.compiler.composition import Carry, Recur
from attnc.dsl.diagnostics import InternalError
from attnc.runtime.backward import Engine
from attnc.runtime.compute.arrays import Frame
from attnc.runtime.cpu import carried, recurrent
from attnc.runtime.cpu.carried import carry
from attnc.runtime.cpu.reaches import Reach
from attnc.runtime.cpu.recurrent import recur
from attnc.runtime.cuda.chunked_steps import carries, carry_sums, recur_reads, recurs
from attnc.runtime.decoding.decoded_attention import Reader, with_arrays
from attnc.runtime.steps.carrying import CARRY, decay_of, narrow, reach_of, with_ones
from attnc.runtime.steps.handed import by_head, state_heads
from attnc.runtime.steps.recurring import RECUR


@dataclass
class States:
    """The states (b, h, f, e), in the type of sums, by the name of their step; of whole periods beside the open one."""

    last: dict[str, Tensor] = field(default_factory=dict)
    whole: dict[str, Tensor] = field(default_factory=dict)
    on_kernels: bool = False  # whether prompts run on generated kernels
    stay: bool = False  # whether they stay where they are: graphs know their places

    def keep(self, name: str, state: Tensor) -> None:
        """The state of a step behind the last token."""
        if self.stay and name in self.last:
            self.last[name].copy_(state)
        else:
            self.last[name] = state

    @property
    def nbytes(self) -> int:
        return sum(self.sizes().values())

    def sizes(self) -> dict[str, int]:
        """Bytes by step."""
        return {name: one.nbytes * (2 if name in self.whole else 1) for name, one in self.last.items()}

    def advance(self, step: Carry | Recur, frame: Frame, reader: Reader, engine: Engine) -> list[Tensor]:
        """What a step leaves at the new tokens (frame: of them alone)."""
        self.on_kernels = engine.chunked
        if isinstance(step, Recur):
            return [self.recur(step, frame)]
        reach = reach_of(step, frame)
        if reach.kind == "period":
            out = self.by_periods(step, frame, reader.stretch.start, reach.amount)
        else:
            out = self.behind(step, frame, reader, reach.amount) if reach.amount else self.carry(step, frame)
        return [out[..., :-1].contiguous(), out[..., -1].contiguous()] if step.total else [out]

    def carry(self, step: Carry, frame: Frame, elapsed: Tensor | None = None) -> Tensor:
        """The sums. `elapsed` (b, h, n or 1, f or 1): the log decay between the state that a row reads and the row."""
        query, *others = CARRY.operands(step, frame)
        assert query is not None
        if elapsed is not None:
            factor = elapsed.exp().to(frame.real)
            query = query * (factor if factor.shape[1] == 1 else by_head(factor, query.shape[1]))
        state = self.last.get(step.name)
        operands = [query, *others]
        if self.on_kernels and frame.sizes["i"] > 1 and carries(operands, Reach()):
            heads, shared, total = query.shape[1], state_heads(operands), step.total is not None
            first = None if state is None else state[:, :: heads // shared]
            *made, last = carry_sums(operands, Reach(), total, narrow(frame, step.query), state=first, final=True)
            self.keep(step.name, by_head(last, heads))
            return torch.cat([made[0], made[1].unsqueeze(-1)], -1) if total else made[0]
        query, key, value, decay = with_ones(step, operands)
        assert query is not None
        assert key is not None
        assert value is not None
        if frame.sizes["i"] == 1 and state is not None:
            one = [by_heads(x, state, 2) for x in (query, key, value)]
            out, state = carried.advance(
                one[0], one[1], one[2], None if decay is None else by_heads(decay, state, 2), state
            )
            self.keep(step.name, state)
            return out.unsqueeze(2)
        out, state = carry(query, key, value, decay, Reach(), state)
        self.keep(step.name, state)
        return out

    def behind(self, step: Carry, frame: Frame, reader: Reader, amount: int) -> Tensor:
        """Rows read the state of some positions before, with the decay since."""
        names = [name for name in (step.key, step.value, step.decay) if name is not None and name in reader.new]
        shifted = with_arrays(frame, {name: read(name, frame, reader, amount, 0) for name in names})
        if step.decay is None:
            return self.carry(step, shifted)
        since = frame  # a decay that is the same at every token
        if step.decay in reader.new:
            since = with_arrays(frame, {step.decay: read(step.decay, frame, reader, amount, amount)})
        decay = decay_of(since, step.decay)
        assert decay is not None
        if step.decay in reader.new:
            sums = decay.double().cumsum(2)
            elapsed = sums[:, :, amount:] - sums[:, :, :-amount]
        else:
            elapsed = decay.double() * amount
        return self.carry(step, shifted, elapsed if elapsed.dim() == 4 else elapsed.unsqueeze(-1))

    def by_periods(self, step: Carry, frame: Frame, start: int, period: int) -> Tensor:
        """Rows read the state of the periods before their own; keys enter an open one, which is whole at its end."""
        query, key, value, _ = with_ones(step, CARRY.operands(step, frame))
        assert query is not None
        assert key is not None
        assert value is not None
        heads, count = query.shape[1], query.shape[2]
        query, key, value = (by_head(x.to(frame.real), heads) for x in (query, key, value))
        if step.name not in self.last:
            shape = (query.shape[0], heads, key.shape[-1], value.shape[-1])
            self.last[step.name] = query.new_zeros(shape)
            self.whole[step.name] = query.new_zeros(shape)
        outs, at = [], 0
        while at < count:
            stop = min(count, at + period - (start + at) % period)
            outs.append(query[:, :, at:stop] @ self.whole[step.name])
            self.last[step.name] = self.last[step.name] + key[:, :, at:stop].mT @ value[:, :, at:stop]
            if (start + stop) % period == 0:
                self.whole[step.name] = self.last[step.name].clone()
            at = stop
        return torch.cat(outs, 2)

    def recur(self, step: Recur, frame: Frame) -> Tensor:
        operands = RECUR.operands(step, frame)
        state = self.last.get(step.name)
        if frame.sizes["i"] == 1 and state is not None:
            query, key, value, decay, left, right = (None if x is None else by_heads(x, state, 2) for x in operands)
            if query is None or key is None or value is None or left is None or right is None:
                raise InternalError("an operand of a recurrence is missing")
            out, state = recurrent.advance(query, key, value, decay, left, right, state)
            self.keep(step.name, state)
            return out.unsqueeze(2)
        if self.on_kernels and recurs(operands, 0):
            delta, narrows = step.left == step.key, narrow(frame, step.query)
            out, state = recur_reads(operands, 0, delta, narrows, state=state, final=True)
        else:
            out, state = recur(*operands, offset=0, state=state)  # type: ignore[arg-type]
        self.keep(step.name, state)
        return out


def by_heads(x: Tensor, state: Tensor, along: int) -> Tensor:
    """The only token of an array, for every row and head of a state."""
    x = by_head(x.select(along, 0), state.shape[1])
    return x.expand(state.shape[0], *x.shape[1:])


def read(name: str, frame: Frame, reader: Reader, amount: int, more: int) -> Tensor:
    """A kept array at the positions `amount` before the rows, and at `more` behind them; 0 before all positions."""
    held = reader.held["j"]
    start, count = reader.span(held)
    position = torch.arange(start - amount, start + count - amount + more, device=frame.device)
    new = reader.new[name]
    if start and (held.slots.everything or count == 1):  # the new ones are there already
        rows = held.gather(name, held.slots.place(position.clamp(min=0)).unsqueeze(0))
    else:
        old = position[position < start] if start else position[: min(amount, len(position))]
        before = new.new_zeros(new.shape[0], len(old), *new.shape[2:])
        if start:
            before = held.gather(name, held.slots.place(old.clamp(min=0)).unsqueeze(0))
        rows = torch.cat([before, new[:, : len(position) - len(old)]], 1)
    there = (position >= 0).view(1, -1, *(1,) * (rows.dim() - 2))
    return held.array(name, torch.where(there, rows, torch.zeros((), dtype=rows.dtype, device=rows.device)))

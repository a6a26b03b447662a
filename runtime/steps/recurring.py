"""`Recur` steps at run time: arrays of the call as operands of recurrent sums."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from attnc.compiler.composition import Recur
from attnc.runtime.backward import Engine
from attnc.runtime.compute.arrays import Frame
from attnc.runtime.cpu.recurrent import recur, recur_backward
from attnc.runtime.cuda.chunked_steps import kept_by_recurrence, kept_count, recur_gradients, recur_reads, recurs
from attnc.runtime.steps.carrying import (
    add_first_row,
    add_first_row_gradients,
    decay_of,
    filled,
    is_early,
    keeping,
    narrow,
    on_kernels,
    placed,
    result_type,
    sides,
    whole,
)
from attnc.runtime.steps.handed import at_keys, from_keys, initial_state, left_shapes, left_states
from attnc.runtime.steps.through_views import Operands, through_views


class Recurring:
    """The kind of step: see `steps.Kind`."""

    def names(self, step: Recur) -> list[str]:
        return [step.name, *(step.handing.left if step.handing else ())]

    def reads(self, step: Recur) -> list[str]:
        optional = (step.decay, step.handing and step.handing.before)
        return [step.query, step.key, step.value, step.left, step.right, *(name for name in optional if name)]

    def shapes(self, step: Recur, frame: Frame) -> list[tuple[list[int], torch.dtype]]:
        rows = [frame.sizes["b"], frame.sizes["h"], frame.sizes["i"]]
        left = left_shapes(step, frame, self.operands(step, frame)) if step.handing else []
        return [([*rows, frame.tensors[step.value].shape[-1]], result_type(step, frame)), *left]

    def forward(self, step: Recur, frame: Frame, engine: Engine) -> list[Tensor]:
        *operands, state = self.with_state(step, frame)
        offset, kept, hands = frame.offset - is_early(step), result_type(step, frame), step.handing is not None
        if engine.chunked and on_kernels(step.name, frame, recurs(operands, offset)):
            delta, narrows = step.left == step.key, narrow(frame, step.query)
            held = keeping(step, frame)
            made = recur_reads(operands, offset, delta, narrows, kept, state=state, final=hands, kept=held)
            out, last = made if hands else (made[0], None)
        else:
            query, *others = operands
            assert query is not None
            rows, start = at_keys(query, offset) if is_early(step) else (query, offset)
            out, last = recur(rows, *others, offset=start, state=state)  # type: ignore[arg-type]
            out = (from_keys(out, offset) if is_early(step) else out).to(kept)
        add_first_row(step, out, operands[0], state, offset)
        return [out, *left_states(step, frame, last)]

    def backward(
        self,
        step: Recur,
        frame: Frame,
        engine: Engine,
        outputs: Sequence[Tensor],
        cotangents: Sequence[Tensor | None],
        wanted: Sequence[str],
    ) -> Mapping[str, Tensor]:
        (grad,) = filled(outputs[:1], cotangents[:1])
        offset, early = frame.offset - is_early(step), is_early(step)
        of_last = cotangents[1] if step.handing else None

        def backward(operands: Operands) -> Sequence[Tensor | None]:
            *tokens, state = operands
            if engine.chunked and on_kernels(step.name, frame, recurs(tokens, offset)):
                delta, narrows = step.left == step.key, narrow(frame, step.query)
                held = (frame.kept or {}).get(step.name, ())
                made = recur_gradients(tokens, offset, delta, narrows, grad, state=state, of_last=of_last, kept=held)
            else:
                query, *others = tokens
                assert query is not None
                rows, start = at_keys(query, offset) if early else (query, offset)
                given = at_keys(grad, offset)[0] if early else grad
                found = recur_backward(rows, *others, given, offset=start, state=state, grad_state=of_last)  # type: ignore[arg-type,misc]
                made = [from_keys(found[0], offset) if early else found[0], *found[1:]]
                made[-1] = None if state is None else made[-1]
            add_first_row_gradients(step, made, grad, tokens[0], state, offset)
            return made

        return through_views(frame, wanted, lambda frame: self.with_state(step, frame), backward)

    def operands(self, step: Recur, frame: Frame) -> Operands:
        """query, key, value, decay, left and right."""
        query, key, value = sides(frame, step.query, step.key, step.value)
        left, right = (
            whole(placed(frame, name, "j", vector=True), frame.sizes["j"]) for name in (step.left, step.right)
        )
        return [query, key, value, decay_of(frame, step.decay), left, right]

    def kept(self, step: Recur, frame: Frame) -> list[tuple[list[int], torch.dtype]]:
        """Shape and type of what the kernels keep."""
        operands, offset = self.operands(step, frame), frame.offset - is_early(step)
        if not recurs(operands, offset):
            return []
        return kept_by_recurrence(operands, offset, step.left == step.key, narrow(frame, step.query))

    def kept_count(self, step: Recur, frame: Frame) -> int:
        """How many those are."""
        operands = self.operands(step, frame)
        return kept_count(step, operands) if recurs(operands, frame.offset - is_early(step)) else 0

    def with_state(self, step: Recur, frame: Frame) -> Operands:
        """The operands and the first state."""
        found = self.operands(step, frame)
        return [*found, initial_state(step, frame, found)]


RECUR = Recurring()

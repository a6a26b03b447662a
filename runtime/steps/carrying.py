"""`Carry` steps at run time: arrays of the call as operands of carried sums; and what `Recur` steps share with them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from attnc.compiler.composition import Carry, Recur
from attnc.compiler.schedule_chunked import NEAR
from attnc.dsl.diagnostics import InternalError
from attnc.runtime.backward import Engine
from attnc.runtime.compute.arrays import Frame
from attnc.runtime.cpu.carried import carry, carry_backward
from attnc.runtime.cpu.reaches import Reach
from attnc.runtime.cuda.chunked_operands import of_first_members
from attnc.runtime.cuda.chunked_steps import carries, carry_gradients, carry_sums, kept_by_sum, kept_count
from attnc.runtime.scalars import of_node
from attnc.runtime.steps.handed import (
    at_keys,
    by_group,
    by_head,
    first_row,
    first_row_gradients,
    from_keys,
    initial_state,
    left_shapes,
    left_states,
    state_heads,
)
from attnc.runtime.steps.near import coefficients, near_gradients, near_sums
from attnc.runtime.steps.through_views import Operands, through_views

EXPANDED = 8  # times the width of q: more features than that are products of its elements


class Carrying:
    """The kind of step: see `steps.Kind`."""

    def names(self, step: Carry) -> list[str]:
        return [step.name, *([step.total] if step.total else []), *(step.handing.left if step.handing else ())]

    def reads(self, step: Carry) -> list[str]:
        optional = (step.decay, step.handing and step.handing.before)
        near = () if step.near is None else (step.near.query, step.near.key)
        return [step.query, step.key, step.value, *(name for name in optional if name), *near]

    def shapes(self, step: Carry, frame: Frame) -> list[tuple[list[int], torch.dtype]]:
        rows = [frame.sizes["b"], frame.sizes["h"], frame.sizes["i"]]
        out = ([*rows, frame.tensors[step.value].shape[-1]], result_type(step, frame))
        left = left_shapes(step, frame, self.operands(step, frame)) if step.handing else []
        return [out, *([(rows, frame.real)] if step.total else []), *left]

    def forward(self, step: Carry, frame: Frame, engine: Engine) -> list[Tensor]:
        reach, (*operands, state), near = self.reach(step, frame), self.with_state(step, frame), self.near(step, frame)
        total, kept = step.total is not None, result_type(step, frame)
        if engine.chunked and on_kernels(step.name, frame, carries(operands, reach)):
            hands, narrows = step.handing is not None, narrow(frame, step.query)
            held = keeping(step, frame, reach.kind != "period")
            dtype = frame.real if near else kept
            made = carry_sums(operands, reach, total, narrows, dtype, state=state, final=hands, kept=held)
            last = made.pop() if hands else None
        else:
            out, last = self.by_torch(step, operands, reach, state)
            made = [out[..., :-1].contiguous(), out[..., -1].contiguous()] if total else [out]
        if step.near is not None:
            value = with_ones(step, operands)[2]
            assert value is not None
            found = near_sums(near[0], near[1], value.to(frame.real), coefficients(step.near, frame), reach.offset)
            made[0] += found[..., : made[0].shape[-1]]
            if total:
                made[1] += found[..., -1]
        add_first_row(step, made[0], operands[0], state, reach.offset)
        return [made[0] if total else made[0].to(kept), *made[1:], *left_states(step, frame, last, reach.same)]

    def reach(self, step: Carry, frame: Frame) -> Reach:
        """What the state gives: the blocks before the row's own, where near pairs are weighed by themselves."""
        reach = reach_of(step, frame)
        return reach if step.near is None else replace(reach, kind="period", amount=NEAR)

    def near(self, step: Carry, frame: Frame) -> list[Tensor]:
        """The query and key of near pairs, in the type of the sums."""
        if step.near is None:
            return []
        query, key, _ = sides(frame, step.near.query, step.near.key, step.value)
        return [query.to(frame.real), key.to(frame.real)]

    @staticmethod
    def by_torch(step: Carry, operands: Operands, reach: Reach, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """The sums, with those of the weights as last column where they are asked for, and the last state."""
        query, key, value, decay = with_ones(step, operands)
        assert query is not None
        assert key is not None
        assert value is not None
        shared, heads, offset = state_heads(operands), query.shape[1], reach.offset
        state = None if state is None else by_head(state, heads)
        if is_early(step):
            query, start = at_keys(query, offset)
            out, last = carry(query, key, value, decay, replace(reach, offset=start), state)
            out = from_keys(out, offset)
        else:
            out, last = carry(query, key, value, decay, reach, state)
        return out, last[:, :: heads // shared]

    def backward(
        self,
        step: Carry,
        frame: Frame,
        engine: Engine,
        outputs: Sequence[Tensor],
        cotangents: Sequence[Tensor | None],
        wanted: Sequence[str],
    ) -> Mapping[str, Tensor]:
        reach, count = self.reach(step, frame), 1 + (step.total is not None)
        given = filled(outputs[:count], cotangents[:count])
        of_last = cotangents[count] if step.handing else None

        def viewed(frame: Frame) -> Operands:
            return [*self.with_state(step, frame), *self.near(step, frame)]

        def backward(operands: Operands) -> Sequence[Tensor | None]:
            sides, state, near = operands[:4], operands[4], operands[5:]
            if engine.chunked and on_kernels(step.name, frame, carries(sides, reach)):
                narrows = narrow(frame, step.query)
                held = (frame.kept or {}).get(step.name, ())
                made = carry_gradients(sides, reach, given, narrows, state=state, of_last=of_last, kept=held)
            else:
                made = self.back_by_torch(step, sides, reach, given, state, of_last)
            add_first_row_gradients(step, made, given[0], sides[0], state, reach.offset)
            return made if step.near is None else self.back_near(step, frame, made, sides, near, given)

        return through_views(frame, wanted, viewed, backward)

    @staticmethod
    def back_near(
        step: Carry,
        frame: Frame,
        made: list[Tensor | None],
        operands: Operands,
        near: Operands,
        given: Sequence[Tensor],
    ) -> list[Tensor | None]:
        """The gradients with those of near pairs: added to the value's; of their query and key behind the others."""
        assert step.near is not None
        tensors = [one for one in (*near, with_ones(step, operands)[2]) if one is not None]
        grad = torch.cat([given[0], given[1].unsqueeze(-1)], -1) if step.total else given[0]
        powers = coefficients(step.near, frame)
        query, key, value = near_gradients(tensors, powers, frame.offset, grad.to(frame.real))
        assert made[2] is not None
        made[2] = made[2] + value[..., : made[2].shape[-1]]
        return [*made, query, key]

    @staticmethod
    def back_by_torch(
        step: Carry,
        operands: Operands,
        reach: Reach,
        given: Sequence[Tensor],
        state: Tensor | None,
        of_last: Tensor | None,
    ) -> list[Tensor | None]:
        """Gradients of the operands and of the first state."""
        query, key, value, decay = with_ones(step, operands)
        assert query is not None
        assert key is not None
        assert value is not None
        grad = torch.cat([given[0], given[1].unsqueeze(-1)], -1) if step.total else given[0]
        heads, offset, early = query.shape[1], reach.offset, is_early(step)
        if early:
            grad, _ = at_keys(grad, offset)
            query, start = at_keys(query, offset)
            reach = replace(reach, offset=start)
        first = None if state is None else by_head(state, heads)
        of_last = None if of_last is None else of_first_members(of_last, heads)
        made = list(carry_backward(query, key, value, decay, grad, reach, first, of_last))
        made[0] = from_keys(made[0], offset) if early and made[0] is not None else made[0]
        made[2] = made[2][..., :-1] if step.total and made[2] is not None else made[2]
        made[4] = None if state is None or made[4] is None else by_group(made[4], state.shape[1])
        return made

    def operands(self, step: Carry, frame: Frame) -> Operands:
        """query, key, value and decay."""
        return [*sides(frame, step.query, step.key, step.value), decay_of(frame, step.decay)]

    def kept(self, step: Carry, frame: Frame) -> list[tuple[list[int], torch.dtype]]:
        """Shape and type of what the kernels keep. Periods may be short, so of them nothing."""
        reach, operands = self.reach(step, frame), self.operands(step, frame)
        if reach.kind == "period" or not carries(operands, reach):
            return []
        return kept_by_sum(operands, reach, step.total is not None, narrow(frame, step.query))

    def kept_count(self, step: Carry, frame: Frame) -> int:
        """How many those are."""
        reach, operands = self.reach(step, frame), self.operands(step, frame)
        return 0 if reach.kind == "period" or not carries(operands, reach) else kept_count(step, operands, reach)

    def with_state(self, step: Carry, frame: Frame) -> Operands:
        """The operands and the first state."""
        found = self.operands(step, frame)
        return [*found, initial_state(step, frame, found, reach_of(step, frame).same)]


def keeping(step: Carry | Recur, frame: Frame, keeps: bool = True) -> list[Tensor] | None:
    """Where what a step keeps for its gradient goes; None where it keeps nothing."""
    return frame.kept.setdefault(step.name, []) if frame.kept is not None and keeps else None


def is_early(step: Carry | Recur) -> bool:
    """Whether rows read the state before the update of their own position."""
    return step.handing is not None and step.handing.early


def add_first_row(step: Carry | Recur, out: Tensor, query: Tensor | None, state: Tensor | None, offset: int) -> None:
    """What a row before the first key reads of the state that is handed over."""
    if is_early(step) and offset < 0 and state is not None and query is not None:
        out[:, :, :1] += first_row(query, state)


def add_first_row_gradients(
    step: Carry | Recur,
    made: list[Tensor | None],
    cotangent: Tensor,
    query: Tensor | None,
    state: Tensor | None,
    offset: int,
) -> None:
    """Its gradients, to those of query and state."""
    if is_early(step) and offset < 0 and state is not None and query is not None:
        of_query, of_state = first_row_gradients(cotangent, query, state)
        assert made[0] is not None
        assert made[-1] is not None
        made[0][:, :, :1] += of_query
        made[-1] = made[-1] + of_state


def result_type(step: Carry | Recur, frame: Frame) -> torch.dtype:
    """The element type of the reads: that of q, where all of their readers round them to it."""
    return frame.tensors["q"].dtype if step.name in frame.rounded else frame.real


def with_ones(step: Carry, operands: Operands) -> Operands:
    """The operands with a column of ones behind the values where the total is asked for."""
    query, key, value, decay = operands
    if step.total and value is not None:
        value = torch.cat([value, torch.ones_like(value[..., :1])], -1)
    return [query, key, value, decay]


class NoKernelWarning(UserWarning):
    """A step runs by torch operators on a GPU, since no kernel takes a call of these lengths or widths."""


_warned: set[str] = set()


def on_kernels(name: str, frame: Frame, fits: bool) -> bool:
    """Whether a step runs on the chunked kernels; on a GPU a warning, once a step and process, says where not."""
    if not fits and frame.device.type == "cuda" and name not in _warned:
        _warned.add(name)
        message = f"{name} runs by torch operators: no kernel carries a state of these widths over this extent"
        warnings.warn(message, NoKernelWarning, stacklevel=2)
    return fits


def narrow(frame: Frame, query: str) -> bool:
    """Whether products are of bfloat16, as those of softmax are: where the text's query is.

    Not where the features are all products of elements (powers of a score): thousands of terms that cancel to a
    square near 0, by which a row may be divided, keep nothing of their 8 bits.
    """
    return narrow_features(frame, frame.tensors[query].shape[-1])


def narrow_features(frame: Frame, count: int) -> bool:
    """`narrow`, of that many features."""
    return frame.tensors["q"].dtype == torch.bfloat16 and count <= EXPANDED * frame.sizes["d"]


def filled(outputs: Sequence[Tensor], cotangents: Sequence[Tensor | None]) -> list[Tensor]:
    """Cotangents with zeros for absent ones."""
    return [
        torch.zeros_like(output) if cotangent is None else cotangent
        for output, cotangent in zip(outputs, cotangents, strict=True)
    ]


def reach_of(step: Carry, frame: Frame) -> Reach:
    """The extent of a step in this call."""
    extent, amount = step.extent, 0
    if extent.amount is not None:
        value = of_node(extent.amount, frame.parameters, frame.sizes)
        if not isinstance(value, int):
            raise InternalError("the amount of an extent is no int of parameters and sizes")
        amount = value
    same = None if extent.same is None else placed(frame, extent.same, "t", vector=False)[:, 0]
    if same is not None:
        same = same.expand(frame.sizes["b"], frame.sizes["t"])
    return Reach(extent.kind, amount, frame.offset - is_early(step), same)


def sides(frame: Frame, query: str, key: str, value: str) -> tuple[Tensor, Tensor, Tensor]:
    """query (B, H, N, f) in full, key and value (b, h, M, ..) for all M."""
    batch, heads, rows = (frame.sizes[name] for name in "bhi")
    found = placed(frame, query, "i", vector=True)
    if found.shape[1] not in (1, heads):
        found = found.repeat_interleave(heads // found.shape[1], 1)
    found = found.expand(batch, heads, rows, -1)
    others = [whole(placed(frame, name, "j", vector=True), frame.sizes["j"]) for name in (key, value)]
    return found, others[0], others[1]


def whole(tensor: Tensor, length: int) -> Tensor:
    """(b, h, 1 or length, ..) for all positions."""
    return tensor if tensor.shape[2] == length else tensor.expand(-1, -1, length, -1)


def decay_of(frame: Frame, name: str | None) -> Tensor | None:
    """Log decays (b, h, t) or (b, h, t, f); b, h and t may be 1 long."""
    if name is None:
        return None
    layout = [axis for axis in frame.layouts[name] if axis not in ("b", "h", "t", "1")]
    found = placed(frame, name, "t", vector=bool(layout))
    if not frame.tracing and found.shape[2] == 1 and found.device.type == "cpu" and bool(found.isnan().any()):
        raise ValueError("the base of a power of the distance is negative: its logarithm is no decay")
    return found


def placed(frame: Frame, name: str, along: str, *, vector: bool) -> Tensor:
    """An array as (b, h, along), and its vector axis; an index that it does not vary over is 1 long."""
    tensor, layout = frame.tensors[name], list(frame.layouts[name])
    if vector:
        last = next(at for at in reversed(range(len(layout))) if layout[at] not in ("b", "h", along))
        tensor = tensor.movedim(last, -1)
        layout.pop(last)
    places = [layout.index(axis) if axis in layout else None for axis in ("b", "h", along)]
    rest = [at for at in range(len(layout)) if at not in places]  # declared to be 1 long
    kept = [place for place in places if place is not None]
    tail = [len(layout)] if vector else []
    tensor = tensor.permute([*rest, *kept, *tail])
    tensor = tensor.reshape(tensor.shape[len(rest) :]) if rest else tensor
    for at, place in enumerate(places):
        if place is None:
            tensor = tensor.unsqueeze(at)
    return tensor


CARRY = Carrying()

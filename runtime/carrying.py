"""`Carry` and `Recur` steps at run time: arrays of the call as operands of carried and recurrent sums."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from attnc.compiler.composition import Carry, Recur
from attnc.dsl.diagnostics import InternalError
from attnc.runtime.arrays import Frame
from attnc.runtime.backward import Engine
from attnc.runtime.carried import carry, carry_backward
from attnc.runtime.chunked_steps import carries, carry_gradients, carry_sums, recur_gradients, recur_reads, recurs
from attnc.runtime.reaches import Reach
from attnc.runtime.recurrent import recur, recur_backward
from attnc.runtime.scalars import of_node
from attnc.runtime.through_views import Operands, through_views

EXPANDED = 8  # times the width of q: more features than that are products of its elements


class Carrying:
    """The kind of step: see `steps.Kind`."""

    def again(self, step: Carry) -> bool:
        return False

    def names(self, step: Carry) -> list[str]:
        return [step.name, *([step.total] if step.total else [])]

    def reads(self, step: Carry) -> list[str]:
        return [step.query, step.key, step.value, *([step.decay] if step.decay else [])]

    def shapes(self, step: Carry, frame: Frame) -> list[tuple[list[int], torch.dtype]]:
        rows = [frame.sizes["b"], frame.sizes["h"], frame.sizes["i"]]
        out = ([*rows, frame.tensors[step.value].shape[-1]], result_type(step, frame))
        return [out, (rows, frame.real)] if step.total else [out]

    def forward(self, step: Carry, frame: Frame, engine: Engine) -> list[Tensor]:
        reach, operands = reach_of(step, frame), self.operands(step, frame)
        if engine.chunked and on_kernels(step.name, frame, carries(operands, reach)):
            kept = result_type(step, frame)
            return carry_sums(operands, reach, step.total is not None, narrow(frame, step.query), kept)
        query, key, value, decay = with_ones(step, operands)
        assert query is not None
        assert key is not None
        assert value is not None
        out, _ = carry(query, key, value, decay, reach)
        out = out.to(result_type(step, frame)) if step.total is None else out
        return [out[..., :-1].contiguous(), out[..., -1].contiguous()] if step.total else [out]

    def backward(
        self,
        step: Carry,
        frame: Frame,
        engine: Engine,
        outputs: Sequence[Tensor],
        cotangents: Sequence[Tensor | None],
        wanted: Sequence[str],
    ) -> Mapping[str, Tensor]:
        reach, given = reach_of(step, frame), filled(outputs, cotangents)

        def backward(operands: Operands) -> Sequence[Tensor | None]:
            if engine.chunked and on_kernels(step.name, frame, carries(operands, reach)):
                return carry_gradients(operands, reach, given, narrow(frame, step.query))
            query, key, value, decay = with_ones(step, operands)
            assert query is not None
            assert key is not None
            assert value is not None
            grad = torch.cat([given[0], given[1].unsqueeze(-1)], -1) if step.total else given[0]
            made = carry_backward(query, key, value, decay, grad, reach)
            return made[0], made[1], made[2][..., :-1] if step.total else made[2], made[3]

        return through_views(frame, wanted, lambda frame: self.operands(step, frame), backward)

    def operands(self, step: Carry, frame: Frame) -> Operands:
        """query, key, value and decay."""
        return [*sides(frame, step.query, step.key, step.value), decay_of(frame, step.decay)]


class Recurring:
    """The kind of step: see `steps.Kind`."""

    def again(self, step: Recur) -> bool:
        return False

    def names(self, step: Recur) -> list[str]:
        return [step.name]

    def reads(self, step: Recur) -> list[str]:
        names = [step.query, step.key, step.value, step.left, step.right]
        return [*names, *([step.decay] if step.decay else [])]

    def shapes(self, step: Recur, frame: Frame) -> list[tuple[list[int], torch.dtype]]:
        rows = [frame.sizes["b"], frame.sizes["h"], frame.sizes["i"]]
        return [([*rows, frame.tensors[step.value].shape[-1]], result_type(step, frame))]

    def forward(self, step: Recur, frame: Frame, engine: Engine) -> list[Tensor]:
        operands = self.operands(step, frame)
        if engine.chunked and on_kernels(step.name, frame, recurs(operands, frame.offset)):
            kept = result_type(step, frame)
            return [recur_reads(operands, frame.offset, step.left == step.key, narrow(frame, step.query), kept)]
        out, _ = recur(*operands, offset=frame.offset)  # type: ignore[arg-type]
        return [out.to(result_type(step, frame))]

    def backward(
        self,
        step: Recur,
        frame: Frame,
        engine: Engine,
        outputs: Sequence[Tensor],
        cotangents: Sequence[Tensor | None],
        wanted: Sequence[str],
    ) -> Mapping[str, Tensor]:
        (grad,) = filled(outputs, cotangents)

        def backward(operands: Operands) -> Sequence[Tensor | None]:
            if engine.chunked and on_kernels(step.name, frame, recurs(operands, frame.offset)):
                return recur_gradients(operands, frame.offset, step.left == step.key, narrow(frame, step.query), grad)
            query, key, value, decay, left, right = operands
            assert query is not None
            assert key is not None
            assert value is not None
            assert left is not None
            assert right is not None
            return recur_backward(query, key, value, decay, left, right, grad, offset=frame.offset)[:6]

        return through_views(frame, wanted, lambda frame: self.operands(step, frame), backward)

    def operands(self, step: Recur, frame: Frame) -> Operands:
        """query, key, value, decay, left and right."""
        query, key, value = sides(frame, step.query, step.key, step.value)
        left, right = (
            whole(placed(frame, name, "j", vector=True), frame.sizes["j"]) for name in (step.left, step.right)
        )
        return [query, key, value, decay_of(frame, step.decay), left, right]


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
    return Reach(extent.kind, amount, frame.offset, same)


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
    if found.shape[2] == 1 and found.device.type == "cpu" and bool(found.isnan().any()):
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


CARRY, RECUR = Carrying(), Recurring()

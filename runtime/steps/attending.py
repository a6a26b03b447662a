"""An `Attend` step at run time: arrays as q, k and v of its plan, forward and backward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from attnc.compiler.composition import Attend
from attnc.dsl.types import Base
from attnc.runtime.backward import Engine, Gradients, differentiable, recording
from attnc.runtime.call import Call, with_derived
from attnc.runtime.compute.arrays import Frame


class Attending:
    """The kind of step: see `steps.Kind`."""

    def names(self, step: Attend) -> list[str]:
        return [step.name, step.lse]

    def reads(self, step: Attend) -> list[str]:
        smooth = differentiable(step.plan)
        leaves = [entry.name for entry in step.plan.inputs if entry.base is Base.REAL and entry.name in smooth]
        return [step.query, step.key, step.value, *leaves]

    def shapes(self, step: Attend, frame: Frame) -> list[tuple[list[int], torch.dtype]]:
        value = frame.tensors[step.value]
        rows = [frame.sizes["b"], frame.sizes["h"], frame.length(step.rows)]
        return [([*rows, value.shape[-1]], result_type(step, frame)), (rows, frame.real)]

    def forward(self, step: Attend, frame: Frame, engine: Engine) -> list[Tensor]:
        call = call_of(step, frame, operands(step, frame, mixed=mixed_operands(step, engine)))
        return list(engine.execute(step.plan, call, result_type(step, frame)))

    def backward(
        self,
        step: Attend,
        frame: Frame,
        engine: Engine,
        outputs: Sequence[Tensor],
        cotangents: Sequence[Tensor | None],
        wanted: Sequence[str],
    ) -> Mapping[str, Tensor]:
        """The plan's gradients, carried through the views that made arrays its q, k and v."""
        out, lse = outputs
        grad_out, grad_lse = cotangents
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        named = dict.fromkeys((step.query, step.key, step.value))
        leaves = {name: frame.tensors[name].detach().requires_grad_(name in wanted) for name in named}
        with recording():
            viewed = operands(
                step, replace(frame, tensors={**frame.tensors, **leaves}), mixed=mixed_operands(step, engine)
            )
        call = call_of(step, frame, {name: tensor.detach() for name, tensor in viewed.items()})
        inside = [entry.name for entry in step.plan.inputs if entry.name in wanted]
        asked = [name for name in "qkv" if viewed[name].requires_grad]
        made = Gradients(step.plan, call, engine, [*asked, *inside]).of(out, lse, grad_out, grad_lse)
        found: dict[str, Tensor] = {}
        if asked:
            targets = [name for name in named if name in wanted]
            parts = torch.autograd.grad(
                [viewed[name] for name in asked],
                [leaves[name] for name in targets],
                [made[name] for name in asked],
                allow_unused=True,
                materialize_grads=True,
            )
            found = dict(zip(targets, parts, strict=True))
        for name in inside:
            found[name] = found[name] + made[name] if name in found else made[name]
        return found


def mixed_operands(step: Attend, engine: Engine) -> bool:
    """Whether query, key and value may differ in type: generated kernels load each as it is."""
    return step.plan.exact and engine.chunked


def operands(step: Attend, frame: Frame, *, mixed: bool = False) -> dict[str, Tensor]:
    """q (B, H, N, D), k (B, Hk, M, D), v (B, Hk, M, E) of the plan, in the element type of the call's q; `mixed`: each
    in its own.

    On a CPU, arrays that torch made stay in the type of sums; on CUDA too where a side is segments: what is made of
    their few weights (an inverse, in Nystroem's attention) makes much of a rounding.
    """
    batch, heads = frame.sizes["b"], frame.sizes["h"]
    q = four(frame, step.query, step.rows)
    k, v = (four(frame, name, step.keys) for name in (step.key, step.value))
    shared = max(k.shape[1], v.shape[1])
    q = spread(q, heads)
    k, v = spread(k, shared), spread(v, shared)
    rounds = rounded_operands(step, frame.device)
    element = frame.tensors["q"].dtype if rounds else max_dtype(q, k, v)
    return {
        name: (x if mixed else x.to(element)).expand(batch, *x.shape[1:]) for name, x in (("q", q), ("k", k), ("v", v))
    }


def result_type(step: Attend, frame: Frame) -> torch.dtype:
    """The element type of the output: that of q, where all of its readers round it."""
    return frame.tensors["q"].dtype if step.name in frame.rounded else frame.real


def rounded_operands(step: Attend, device: torch.device) -> bool:
    """Whether query, key and value of a step are rounded to the element type of the call's q: see `operands`."""
    return device.type == "cuda" and not step.plan.exact


def max_dtype(*tensors: Tensor) -> torch.dtype:
    """The widest element type."""
    first, *others = (tensor.dtype for tensor in tensors)
    for other in others:
        first = torch.promote_types(first, other)
    return first


def four(frame: Frame, name: str, along: str) -> Tensor:
    """An array as (b, h, along, width)."""
    tensor, layout = frame.tensors[name], list(frame.layouts[name])
    order = [layout.index(axis) if axis in layout else None for axis in ("b", "h", along)]
    if order[1] is None and len(layout) > 1 and layout[1] == "1":
        order[1] = 1
    (width,) = (at for at in range(len(layout)) if at not in order)
    for at in range(3):
        if order[at] is None:
            tensor = tensor.unsqueeze(-1)
            order[at] = tensor.dim() - 1
    tensor = tensor.permute([*(place for place in order if place is not None), width])
    length = frame.length(along)
    return tensor if tensor.shape[2] == length else tensor.expand(-1, -1, length, -1)


def spread(tensor: Tensor, heads: int) -> Tensor:
    """(B, H, .., ..) with that many heads."""
    if tensor.shape[1] == heads:
        return tensor
    if tensor.shape[1] == 1:
        return tensor.expand(-1, heads, -1, -1)
    return tensor.repeat_interleave(heads // tensor.shape[1], 1)


def call_of(step: Attend, frame: Frame, given: Mapping[str, Tensor]) -> Call:
    """The plan's call: its own lengths, and the pattern's under `outer_` names."""
    q, k, v = (given[name] for name in "qkv")
    own = [name for name in (*frame.sizes, *frame.axes) if name not in ("b", "h")]
    sizes = {f"outer_{name}": frame.length(name) for name in own}
    sizes |= {name: length for name, length in frame.sizes.items() if name not in "ijtde"}
    offset = frame.offset if step.rows == "i" else 0
    sizes |= {"b": q.shape[0], "h": q.shape[1], "i": q.shape[2], "d": q.shape[3], "offset": offset}
    sizes |= {"j": k.shape[2], "e": v.shape[3], "t": frame.sizes["t"]}
    inputs = {entry.name: frame.tensors[entry.name] for entry in step.plan.inputs}
    return with_derived(step.plan, Call(q, k, v, dict(frame.parameters), inputs, sizes, offset=offset))


ATTEND = Attending()

"""Runs a composition: every step in order, forward; and its gradients, by autograd over the steps.

Forward, what each step leaves is an array by name. Backward, values over one sequence are computed again under
autograd, and a step that attends or carries a state gives back what the forward saved, with a backward of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

import attnc.runtime.array_features
import attnc.runtime.array_reductions
import attnc.runtime.array_selections
import attnc.runtime.array_structure  # noqa: F401  # each registers its rules
from attnc.compiler.composition import (
    Attend,
    Carry,
    Choose,
    Composition,
    Compute,
    Extreme,
    Recur,
    Regroup,
    Sequential,
    Step,
)
from attnc.compiler.ir import Node
from attnc.compiler.plan import Plan
from attnc.dsl.types import Base
from attnc.runtime.arrays import Arrays, Frame
from attnc.runtime.attending import ATTEND, call_of, operands
from attnc.runtime.backward import Engine, recording
from attnc.runtime.call import Call
from attnc.runtime.carrying import CARRY, RECUR
from attnc.runtime.choose import CHOOSE, ragged
from attnc.runtime.computing import computed, rounded_arrays
from attnc.runtime.extremes import EXTREME
from attnc.runtime.regrouping import REGROUP, Slots, inside, move_all, slots_of
from attnc.runtime.sequential import RUN


class Kind(Protocol):
    """What the runtime knows of one kind of step."""

    def names(self, step: Any) -> list[str]:
        """The arrays that it leaves, in order."""

    def reads(self, step: Any) -> list[str]:
        """The arrays that gradients may flow to, in order."""

    def shapes(self, step: Any, frame: Frame) -> list[tuple[list[int], torch.dtype]]:
        """Shape and type of what it leaves."""

    def forward(self, step: Any, frame: Frame, engine: Engine) -> list[Tensor]:
        """What it leaves."""

    def backward(
        self,
        step: Any,
        frame: Frame,
        engine: Engine,
        outputs: Sequence[Tensor],
        cotangents: Sequence[Tensor | None],
        wanted: Sequence[str],
    ) -> Mapping[str, Tensor]:
        """Gradients of the wanted arrays, in their shapes; an absent one is zero."""


KINDS: dict[type[Step], Kind] = {
    Attend: ATTEND,
    Carry: CARRY,
    Choose: CHOOSE,
    Extreme: EXTREME,
    Recur: RECUR,
    Regroup: REGROUP,
    Sequential: RUN,
}


def made_again(step: Step) -> bool:
    """Whether the backward makes again what a step leaves, which is then not saved."""
    return isinstance(step, Choose) and ragged(step)


def frame_of(
    composition: Composition,
    tensors: Mapping[str, Tensor | None],
    parameters: Mapping[str, int | float | bool],
    sizes: Mapping[str, int],
) -> Frame:
    """The frame of a call. `tensors`: q, k, v (or None) and every declared input; sizes as `operator.sizes_of`."""
    q, k = tensors["q"], tensors["k"]
    assert q is not None
    assert k is not None
    return Frame(
        tensors={name: tensor for name, tensor in tensors.items() if tensor is not None},
        layouts={name: entry.axes for name, entry in composition.arrays.items()},
        parameters=parameters,
        sizes={**sizes, "key_heads": k.shape[1]},
        offset=sizes["offset"],
        axes={axis.name: axis for axis in composition.axes},
        real=torch.float64 if q.dtype == torch.float64 else torch.float32,
        device=q.device,
        rounded=rounded_arrays(composition, q),
    )


def with_arrays(frame: Frame, made: Mapping[str, Tensor]) -> Frame:
    """The frame with what a step left."""
    return replace(frame, tensors={**frame.tensors, **made})


@dataclass(frozen=True)
class Result:
    """The result in the layout of the pattern, and what every heavy step left, in order."""

    out: Tensor
    saved: list[Tensor]


def run(composition: Composition, frame: Frame, engine: Engine | None) -> Result:
    """All steps, forward, without gradients. Without an engine (in tracing): shapes only."""
    saved: list[Tensor] = []
    out: Tensor | None = None
    frame = replace(frame, tracing=engine is None)
    for step in composition.steps:
        if isinstance(step, Compute):
            out = computed(step, frame)
            frame = with_arrays(frame, {step.name: out})
            continue
        kind = KINDS[type(step)]
        if engine is None:
            left = [torch.empty(shape, dtype=dtype, device=frame.device) for shape, dtype in kind.shapes(step, frame)]
        else:
            left = kind.forward(step, frame, engine)
        saved += [] if made_again(step) else left
        out = left[0]
        frame = with_arrays(frame, dict(zip(kind.names(step), left, strict=True)))
    assert out is not None
    return Result(arranged(composition, frame, out), saved)


def stepped(composition: Composition, frame: Frame, engine: Engine) -> Iterator[tuple[Step, Frame]]:
    """Every step that is more than torch on whole arrays, with the arrays that it finds; the steps run along."""
    for step in composition.steps:
        if isinstance(step, Compute):
            frame = with_arrays(frame, {step.name: computed(step, frame)})
            continue
        yield step, frame
        kind = KINDS[type(step)]
        frame = with_arrays(frame, dict(zip(kind.names(step), kind.forward(step, frame, engine), strict=True)))


def attended_steps(composition: Composition, frame: Frame, engine: Engine) -> Iterator[tuple[Plan, Call]]:
    """The plan of every step that streams keys, with its call."""
    for step, found in stepped(composition, frame, engine):
        if isinstance(step, Attend):
            yield step.plan, call_of(step, found, operands(step, found))
        if isinstance(step, Regroup):
            slots = slots_of(step, found)
            inner = inside(step, found, slots, move_all(step, found, slots))
            yield step.attend.plan, call_of(step.attend, inner, operands(step.attend, inner))


def regrouped_orders(composition: Composition, frame: Frame, engine: Engine) -> Iterator[tuple[Regroup, Slots]]:
    """Every step in an order of its own with the orders of this call."""
    for step, found in stepped(composition, frame, engine):
        if isinstance(step, Regroup):
            yield step, slots_of(step, found)


def arranged(composition: Composition, frame: Frame, out: Tensor) -> Tensor:
    """The last step's array in the pattern's layout, in full size."""
    last = composition.steps[-1]
    if isinstance(last, Compute):
        made = [*last.node.type.ordered_indices(), *last.node.type.axes]
    else:
        made = list(composition.arrays[last.name].axes)
    wanted = list(composition.output_axes)
    for name in wanted:
        if name not in made:
            made.insert(0, name)
            out = out.unsqueeze(0)
    out = out.permute([made.index(name) for name in wanted])
    at = Arrays(frame)
    for place, name in enumerate(wanted):
        if name in composition_indices(composition):
            out = at.full(out, place, name)
    return out


def composition_indices(composition: Composition) -> set[str]:
    """Names that count positions, heads or members."""
    return {*"bhijt", *(axis.name for axis in composition.axes)}


class Replayed(torch.autograd.Function):
    """A step whose outputs are known: backward, its own gradients."""

    @staticmethod
    def forward(ctx: Any, backward: Callable[..., Any], outputs: Sequence[Tensor], *reads: Tensor) -> Any:
        ctx.step = backward
        ctx.set_materialize_grads(False)
        return tuple(output.detach() for output in outputs)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        return None, None, *ctx.step(cotangents, ctx.needs_input_grad[2:])


def gradients(
    composition: Composition,
    frame: Frame,
    engine: Engine,
    saved: Sequence[Tensor],
    cotangents: tuple[Tensor, Tensor | None],
    wanted: Sequence[str],
) -> dict[str, Tensor]:
    """Gradients of q, k, v and inputs by name, in their shapes and types, zero where nothing flows.

    `cotangents`: of the result, and of the log-sum-exp of a result that is one softmax.
    """
    leaves = {name: frame.tensors[name].detach().requires_grad_() for name in wanted}
    grad_out, grad_lse = cotangents
    with recording():
        out, last = _replay(composition, with_arrays(frame, leaves), engine, list(saved))
        if not out.requires_grad:
            return {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
        results, given = [out], [grad_out.to(out.dtype)]
        if grad_lse is not None:
            results, given = [*results, last], [*given, grad_lse.to(last.dtype)]
        made = torch.autograd.grad(results, list(leaves.values()), given, allow_unused=True, materialize_grads=True)
    return {name: gradient.contiguous() for name, gradient in zip(leaves, made, strict=True)}


def _replay(composition: Composition, frame: Frame, engine: Engine, saved: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The result, and the last that the last heavy step left, under autograd; those give back what they left."""
    out: Tensor | None = None
    last: Tensor | None = None
    for step in composition.steps:
        if isinstance(step, Compute):
            out = computed(step, frame)
            frame = with_arrays(frame, {step.name: out})
            continue
        kind = KINDS[type(step)]
        names = kind.names(step)
        if made_again(step):
            frame = with_arrays(frame, dict(zip(names, kind.forward(step, frame, engine), strict=True)))
            continue
        outputs, saved = saved[: len(names)], saved[len(names) :]
        read = list(dict.fromkeys(name for name in kind.reads(step) if frame.tensors[name].is_floating_point()))
        call = _Call(kind, step, frame, engine, outputs, read)
        left: tuple[Tensor, ...] = Replayed.apply(  # type: ignore[no-untyped-call]
            call, outputs, *(frame.tensors[name] for name in read)
        )
        out, last = left[0], left[-1]
        frame = with_arrays(frame, dict(zip(names, left, strict=True)))
    assert out is not None
    return arranged(composition, frame, out), out if last is None else last


@dataclass(frozen=True)
class _Call:
    """The backward of one step of one call."""

    kind: Kind
    step: Step
    frame: Frame
    engine: Engine
    outputs: Sequence[Tensor]
    read: Sequence[str]

    def __call__(self, cotangents: Sequence[Tensor | None], needed: Sequence[bool]) -> list[Tensor | None]:
        wanted = [name for name, need in zip(self.read, needed, strict=True) if need]
        plain = with_arrays(self.frame, {name: self.frame.tensors[name].detach() for name in self.read})
        with torch.no_grad():
            made = self.kind.backward(self.step, plain, self.engine, self.outputs, cotangents, wanted)
        return [made.get(name) if need else None for name, need in zip(self.read, needed, strict=True)]


def differentiable(composition: Composition) -> set[str]:
    """Names of q, k, v and the inputs that the result follows smoothly."""
    followed = {composition.steps[-1].name}
    for step in reversed(composition.steps):
        if isinstance(step, Compute):
            followed |= smooth_inputs(step.node) if step.name in followed else set()
        elif followed & set(KINDS[type(step)].names(step)):
            followed |= set(KINDS[type(step)].reads(step))
    return followed & {"q", "k", "v", *(entry.name for entry in composition.inputs)}


def smooth_inputs(root: Node) -> set[str]:
    """The real arrays that a value follows smoothly; those that only steer a condition or an int are not among them."""
    found: set[str] = set()
    seen: set[Node] = set()
    stack = [root]
    while stack:
        node = stack.pop()
        if node in seen or node.type.base is not Base.REAL or node.type.selects is not None or node.op == "detach":
            continue
        seen.add(node)
        if node.op == "input":
            found.add(str(node.attribute))
        stack += node.args
    return found

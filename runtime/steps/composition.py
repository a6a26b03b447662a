"""Runs a composition: every step in order; what each leaves is an array by name. `steps.gradients` has the way back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

import attnc.runtime.compute.array_features
import attnc.runtime.compute.array_reads
import attnc.runtime.compute.array_reductions
import attnc.runtime.compute.array_selections
import attnc.runtime.compute.array_structure  # noqa: F401  # each registers its rules
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
from attnc.compiler.plan import Plan
from attnc.runtime.backward import Engine
from attnc.runtime.call import Call
from attnc.runtime.clock import at_step
from attnc.runtime.compute.arrays import Arrays, Frame, Span
from attnc.runtime.compute.computing import rounded_arrays
from attnc.runtime.compute.row_steps import compute
from attnc.runtime.steps.attending import ATTEND, call_of, operands
from attnc.runtime.steps.carrying import CARRY
from attnc.runtime.steps.choose import CHOOSE, ragged
from attnc.runtime.steps.extremes import EXTREME
from attnc.runtime.steps.heads import narrowed, span_of
from attnc.runtime.steps.recurring import RECUR
from attnc.runtime.steps.regrouping import REGROUP, Slots, inside, move_all, slots_of
from attnc.runtime.steps.results import Result, summary
from attnc.runtime.steps.sequential import RUN


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
    return not summary(step) if isinstance(step, Compute) else isinstance(step, Choose) and ragged(step)


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


def with_arrays(frame: Frame, made: Mapping[str, Tensor], span: Span | None = None) -> Frame:
    """The frame with what a step left, perhaps of some heads alone."""
    spans = frame.spans if span is None else {**frame.spans, **dict.fromkeys(made, span)}
    return replace(frame, tensors={**frame.tensors, **made}, spans=spans)


def with_result(composition: Composition, kept: Sequence[Tensor], out: Tensor) -> list[Tensor]:
    """What steps left, from `Result.kept` and the result."""
    saved = list(kept)
    place = places_of(composition).get(composition.steps[-1].name)
    if place is not None and saved[place].dim() == 1:
        saved[place] = out
    return saved


def run(composition: Composition, frame: Frame, engine: Engine | None, keep: bool = False) -> Result:
    """All steps, forward, without gradients. Without an engine (in tracing): shapes only.

    `keep`: states of chunks, and what was solved in them, are saved for the gradients, behind what the steps left;
    without an engine, where kernels would run.
    """
    saved: list[Tensor] = []
    out: Tensor | None = None
    kept: dict[str, list[Tensor]] = {}
    frame = replace(frame, tracing=engine is None, kept=kept if keep else None)
    for step in composition.steps:
        at_step(step.name)
        if isinstance(step, Compute):
            out = compute(composition, step, frame, engine)
            if step is not composition.steps[-1] and not made_again(step):
                out = out.contiguous()
                saved.append(out)
            frame = with_arrays(frame, {step.name: out})
            continue
        kind, span = KINDS[type(step)], span_of(step, frame)
        given = narrowed(step, frame, span)
        if engine is None:
            left = [torch.empty(shape, dtype=dtype, device=frame.device) for shape, dtype in kind.shapes(step, given)]
        else:
            left = kind.forward(step, given, engine)
        saved += [] if made_again(step) else left
        out = left[0]
        frame = with_arrays(frame, dict(zip(kind.names(step), left, strict=True)), span)
    assert out is not None
    if engine is None and keep:
        shapes = [one for step in composition.steps for one in kept_shapes(step, frame)]
        kept = {"": [torch.empty(shape, dtype=dtype, device=frame.device) for shape, dtype in shapes]}
    last, made = composition.steps[-1], arranged(composition, frame, out)
    stands = not isinstance(last, Compute) and composition.arrays[last.name].axes == composition.output_axes
    stands = stands and made.shape == out.shape and made.dtype == frame.tensors["q"].dtype
    saved += [one for held in kept.values() for one in held]
    return Result(made, saved, places_of(composition).get(last.name) if stands else None)


def kept_shapes(step: Step, frame: Frame) -> list[tuple[list[int], torch.dtype]]:
    """Shape and type of what the kernels of a step keep for its gradients."""
    frame = narrowed(step, frame, span_of(step, frame))
    if isinstance(step, Carry):
        return CARRY.kept(step, frame)
    return RECUR.kept(step, frame) if isinstance(step, Recur) else []


def each(composition: Composition, frame: Frame, engine: Engine) -> Iterator[tuple[Step, Frame, Tensor]]:
    """Every step after it ran: with the arrays that it found, and the first that it left."""
    for step in composition.steps:
        found = frame
        if isinstance(step, Compute):
            names, left, span = [step.name], [compute(composition, step, frame, engine)], None
        else:
            kind, span = KINDS[type(step)], span_of(step, frame)
            found = narrowed(step, frame, span)
            names, left = kind.names(step), kind.forward(step, found, engine)
        frame = with_arrays(frame, dict(zip(names, left, strict=True)), span)
        yield step, found, left[0]


def attended_steps(composition: Composition, frame: Frame, engine: Engine) -> Iterator[tuple[Plan, Call]]:
    """The plan of every step that streams keys, with its call."""
    for step, found, _ in each(composition, frame, engine):
        if isinstance(step, Attend | Regroup):
            yield attended(step, found)


def attended(step: Attend | Regroup, frame: Frame) -> tuple[Plan, Call]:
    """The plan of a step that streams keys, with its call."""
    if isinstance(step, Attend):
        return step.plan, call_of(step, frame, operands(step, frame))
    slots = slots_of(step, frame)
    inner = inside(step, frame, slots, move_all(step, frame, slots))
    return step.attend.plan, call_of(step.attend, inner, operands(step.attend, inner))


def regrouped_orders(composition: Composition, frame: Frame, engine: Engine) -> Iterator[tuple[Regroup, Slots]]:
    """Every step in an order of its own with the orders of this call."""
    for step, found, _ in each(composition, frame, engine):
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


def places_of(composition: Composition) -> dict[str, int]:
    """Where what steps leave lies in `Result.saved`: arrays of heavy ones, and short products over the tokens."""
    steps = composition.steps[: -1 if isinstance(composition.steps[-1], Compute) else None]
    left = (step for step in steps if not made_again(step))
    names = ([step.name] if isinstance(step, Compute) else KINDS[type(step)].names(step) for step in left)
    return {name: at for at, name in enumerate(name for own in names for name in own)}

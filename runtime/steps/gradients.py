"""The gradients of a composition, step by step in reverse.

Values over one sequence are made again (`runtime.compute.row_steps`); a step that attends or carries a state gives
back what the forward saved, and has a backward of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from attnc.compiler.composition import Carry, Composition, Compute, Recur, Step
from attnc.runtime.backward import Engine, recording
from attnc.runtime.clock import at_step
from attnc.runtime.compute.arrays import Frame
from attnc.runtime.compute.row_steps import Replay, compute, smooth_inputs
from attnc.runtime.steps.carrying import CARRY
from attnc.runtime.steps.composition import KINDS, arranged, made_again, with_arrays
from attnc.runtime.steps.heads import in_all_heads, narrowed, span_of
from attnc.runtime.steps.recurring import RECUR


def gradients(
    composition: Composition,
    frame: Frame,
    engine: Engine,
    saved: Sequence[Tensor],
    cotangents: tuple[Tensor, Tensor | None, Sequence[Tensor | None]],
    wanted: Sequence[str],
) -> dict[str, Tensor]:
    """Gradients of q, k, v and inputs by name, in their shapes and types, zero where nothing flows.

    `cotangents`: of the result, of the log-sum-exp of a result that is one softmax, and of what is handed over.
    """
    plain = with_arrays(frame, {name: frame.tensors[name].detach() for name in wanted})
    back = Backward(composition, plain, engine, set(wanted))
    rest = list(saved)
    back.again(rest)
    back.share(rest)
    back.start(*cotangents[:2])
    for handed, cotangent in zip(composition.handed, cotangents[2], strict=True):
        if cotangent is not None:
            back.add(handed.after, cotangent)
    found = back.run()
    given = cotangents[0].untyped_storage().data_ptr()
    made = {}
    for name in wanted:
        leaf, gradient = frame.tensors[name], found.get(name)
        gradient = torch.zeros_like(leaf) if gradient is None else gradient.to(leaf.dtype).contiguous()
        made[name] = gradient.clone() if gradient.untyped_storage().data_ptr() == given else gradient
    return made


class Backward:
    """The steps of one call in reverse. `active`: the arrays that gradients flow through; `found`: cotangents so far.

    Types of cotangents are free, as autograd's are not: a kernel's result goes to the next kernel as it is.
    """

    def __init__(self, composition: Composition, frame: Frame, engine: Engine, active: set[str]) -> None:
        self.composition = composition
        self.frame = frame
        self.engine = engine
        self.active = active
        self.found: dict[str, Tensor] = {}
        self.pending: list[Callable[[], None]] = []  # what each step does backward, in the order of the steps
        self.late: list[Callable[[], None]] = []  # the same, of what follows inputs alone: it adds to what is there
        self.carried: set[str] = set()  # arrays that follow what heavy steps left
        self.last: str | None = None  # the last array that a heavy step left

    def again(self, saved: list[Tensor]) -> None:
        """All steps forward: heavy ones give back what they left."""
        self.frame = replace(self.frame, kept={})
        for step in self.composition.steps:
            self.made = self.compute(step, saved) if isinstance(step, Compute) else self.heavy(step, saved)
            names = [step.name] if isinstance(step, Compute) else KINDS[type(step)].names(step)
            span = span_of(step, self.frame)
            self.frame = with_arrays(self.frame, dict(zip(names, self.made, strict=True)), span)

    def share(self, kept: list[Tensor]) -> None:
        """What forward kept, to the steps that did; nothing if it was not asked to."""
        assert self.frame.kept is not None
        for step in self.composition.steps if kept else ():
            if not isinstance(step, Carry | Recur):
                continue
            frame = narrowed(step, self.frame, span_of(step, self.frame))
            count = (CARRY if isinstance(step, Carry) else RECUR).kept_count(step, frame)  # type: ignore[arg-type]
            self.frame.kept[step.name], kept = kept[:count], kept[count:]

    def compute(self, step: Compute, saved: list[Tensor]) -> list[Tensor]:
        """A value over one sequence."""
        last = step is self.composition.steps[-1]
        kept = None if last or made_again(step) else saved.pop(0)
        wanted = [name for name in smooth_inputs(step.node) if name in self.active]
        if not wanted:
            return [compute(self.composition, step, self.frame, self.engine) if kept is None else kept]
        replay = Replay(self.composition, step, self.frame, self.engine, wanted, kept)
        made = replay.run(needed=not last)
        self.active.add(step.name)
        late = not self.carried.intersection(wanted)
        if not late:
            self.carried.add(step.name)

        def back() -> None:
            at_step(step.name)
            cotangent = self.found.pop(step.name, None)
            if cotangent is not None:
                replay.back(cotangent, self.found, self.add)

        (self.late if late else self.pending).append(back)
        return [made]

    def heavy(self, step: Step, saved: list[Tensor]) -> list[Tensor]:
        """A step with a backward of its own."""
        kind = KINDS[type(step)]
        names = kind.names(step)
        if made_again(step):
            return kind.forward(step, self.frame, self.engine)
        outputs, saved[:] = saved[: len(names)], saved[len(names) :]
        self.last = names[-1]
        whole, span = self.frame, span_of(step, self.frame)
        frame = narrowed(step, whole, span)
        read = dict.fromkeys(name for name in kind.reads(step) if frame.tensors[name].is_floating_point())
        wanted = [name for name in read if name in self.active]
        if not wanted:
            return outputs
        smooth = [name for name, one in zip(names, outputs, strict=True) if one.is_floating_point()]
        self.active.update(smooth)
        self.carried.update(smooth)

        def back() -> None:
            at_step(step.name)
            cotangents = [self.found.pop(name, None) for name in names]
            if any(one is not None for one in cotangents):
                made = kind.backward(step, frame, self.engine, outputs, cotangents, wanted)
                for name, gradient in in_all_heads(step, whole, span, made).items():
                    self.add(name, gradient)

        self.pending.append(back)
        return outputs

    def add(self, name: str, gradient: Tensor) -> None:
        """One more part of a cotangent."""
        held = self.found.get(name)
        self.found[name] = gradient if held is None else held + gradient

    def start(self, grad_out: Tensor, grad_lse: Tensor | None) -> None:
        """The cotangents of the result, in the layout of the step that left it, and of its log-sum-exp."""
        name, out = last_name(self.composition), self.made[0]
        if name in self.active:
            with recording():
                stand = out.new_zeros(()).expand(out.shape).requires_grad_()
                viewed = arranged(self.composition, self.frame, stand)
            (given,) = torch.autograd.grad(viewed, stand, grad_out.to(viewed.dtype))
            self.add(name, given)
        if grad_lse is not None and self.last is not None and self.last in self.active:
            self.add(self.last, grad_lse.to(self.frame.tensors[self.last].dtype))

    def run(self) -> dict[str, Tensor]:
        """The gradients of what has no step."""
        with recording(), torch.no_grad():  # steps record what they differentiate by autograd
            for steps in (self.pending, self.late):
                while steps:
                    steps.pop()()
        return self.found


def last_name(composition: Composition) -> str:
    """The array that is the result."""
    last = composition.steps[-1]
    return last.name if isinstance(last, Compute) else KINDS[type(last)].names(last)[0]


def differentiable(composition: Composition) -> set[str]:
    """Names of q, k, v and the inputs that the result follows smoothly."""
    followed = {composition.steps[-1].name, *(one.after for one in composition.handed)}
    for step in reversed(composition.steps):
        if isinstance(step, Compute):
            followed |= smooth_inputs(step.node) if step.name in followed else set()
        elif followed & set(KINDS[type(step)].names(step)):
            followed |= set(KINDS[type(step)].reads(step))
    return followed & {"q", "k", "v", *(entry.name for entry in composition.inputs)}

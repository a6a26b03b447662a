"""A `Sequential` step at run time: a scan of no known form, one position after the other. Correct, and slow.

Forward, the step nodes are evaluated at each position with torch. Backward, stretches of positions run once more under
autograd, from the last to the first: memory is linear, with one state a stretch.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from math import prod

import torch
from torch import Tensor

from attnc.compiler.composition import Sequential
from attnc.compiler.ir import Node, walk
from attnc.compiler.scans import scan_names
from attnc.dsl.types import Base
from attnc.runtime.backward import Engine
from attnc.runtime.compute.arrays import Arrays, Frame
from attnc.runtime.cpu.stretches import Arrays as Slices
from attnc.runtime.cpu.stretches import Recurrence
from attnc.runtime.steps.through_views import Operands, through_views

STRETCH = 64


class SequentialWarning(UserWarning):
    """A scan has no parallel form: every position waits for the one before."""


class Running:
    """The kind of step: see `steps.Kind`."""

    def __init__(self) -> None:
        self.warned: set[tuple[str, str]] = set()

    def again(self, step: Sequential) -> bool:
        return False

    def names(self, step: Sequential) -> list[str]:
        return [step.name]

    def reads(self, step: Sequential) -> list[str]:
        return [name for name, node in inputs_of(step.node).items() if node.type.base is Base.REAL]

    def shapes(self, step: Sequential, frame: Frame) -> list[tuple[list[int], torch.dtype]]:
        return [([frame.length(name) for name in (*"bht", *step.node.type.axes)], frame.real)]

    def forward(self, step: Sequential, frame: Frame, engine: Engine) -> list[Tensor]:
        self.warn(step)
        scan = Steps(step.node, frame)
        out, _ = scan.recurrence.forward(scan.slices(frame), scan.first())
        return [scan.empty() if out is None else out]

    def backward(
        self,
        step: Sequential,
        frame: Frame,
        engine: Engine,
        outputs: Sequence[Tensor],
        cotangents: Sequence[Tensor | None],
        wanted: Sequence[str],
    ) -> Mapping[str, Tensor]:
        (grad,) = cotangents
        if grad is None or not wanted or not outputs[0].numel():
            return {}
        scan = Steps(step.node, frame)

        def backward(operands: Operands) -> Sequence[Tensor | None]:
            first = scan.first()
            return scan.recurrence.backward(operands, first, grad, torch.zeros_like(first))[0]

        return through_views(frame, wanted, scan.slices, backward)

    def warn(self, step: Sequential) -> None:
        """Once a scan and process."""
        key = step.name, step.reason
        if key not in self.warned:
            self.warned.add(key)
            message = f"a scan runs one position after the other, which is slow: {step.reason}"
            warnings.warn(message, SequentialWarning, stacklevel=2)


def inputs_of(scan: Node) -> dict[str, Node]:
    """The arrays that a scan reads."""
    return {str(node.attribute): node for node in walk(scan) if node.op == "input"}


class Steps:
    """The steps of one scan in one call. All states travel as one tensor, end to end."""

    def __init__(self, scan: Node, frame: Frame) -> None:
        self.scan = scan
        self.frame = frame
        self.assigned = scan_names(scan)[1]
        self.inputs = inputs_of(scan)
        leaves = {str(node.attribute[0]): node for node in walk(scan) if node.op == "state"}  # type: ignore[index]
        self.shapes = {
            name: [frame.length(axis) for axis in ("b", "h", *node.type.axes)] for name, node in sorted(leaves.items())
        }
        self.recurrence = Recurrence(self.run, self.run, frame.sizes["t"], STRETCH)

    def first(self) -> Tensor:
        count = sum(prod(shape) for shape in self.shapes.values())
        return torch.zeros(count, dtype=self.frame.real, device=self.frame.device)

    def empty(self) -> Tensor:
        shape = [self.frame.length(name) for name in (*"bht", *self.scan.type.axes)]
        return torch.zeros(shape, dtype=self.frame.real, device=self.frame.device)

    def slices(self, frame: Frame) -> list[Tensor | None]:
        """The arrays as (b, h, t, axes..); an index that one does not vary over is 1 long."""
        found: list[Tensor | None] = []
        for node in self.inputs.values():
            tensor = Arrays(frame).value(node)
            own = node.type.ordered_indices()
            for at, name in enumerate("bht"):
                if name not in own:
                    tensor = tensor.unsqueeze(at)
            found.append(tensor)
        return found

    def run(self, slices: Slices, state: Tensor) -> tuple[Tensor | None, Tensor]:
        """One stretch."""
        lengths = [one.shape[2] for one in slices if one is not None]
        length = max(lengths, default=0)
        states = dict(self.unpacked(state))
        results = []
        for t in range(length):
            at = self.at(slices, t)
            at.names = {str((name, 0)): value for name, value in states.items()}
            counts = dict.fromkeys(states, 0)
            for name, node in zip(self.assigned, self.scan.args, strict=False):
                counts[name] += 1
                states[name] = self.without_position(at.value(node), node).expand(self.shapes[name])
                at.names[str((name, counts[name]))] = states[name]
            result = self.without_position(at.value(self.scan.args[-1]), self.scan.args[-1])
            batch, heads = self.frame.sizes["b"], self.frame.sizes["h"]
            results.append(result.expand(batch, heads, *result.shape[2:]))
        after = torch.cat([states[name].reshape(-1) for name in self.shapes])
        return torch.stack(results, 2), after

    def unpacked(self, state: Tensor) -> list[tuple[str, Tensor]]:
        sizes = [prod(shape) for shape in self.shapes.values()]
        parts = state.split(sizes)
        return [(name, part.view(shape)) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)]

    def at(self, slices: Slices, t: int) -> Arrays:
        """Values at one position: the arrays are known to have one."""
        found = Arrays(self.frame)
        for node, one in zip(self.inputs.values(), slices, strict=True):
            assert one is not None
            there = one if one.shape[2] == 1 else one.narrow(2, t, 1)
            for place, name in reversed(list(enumerate("bht"))):
                if name not in node.type.indices:
                    there = there.squeeze(place)
            found.known[node] = there
        return found

    @staticmethod
    def without_position(tensor: Tensor, node: Node) -> Tensor:
        """(b, h, axes..) of a value in its node's layout; b and h may be 1 long."""
        own = node.type.ordered_indices()
        if "t" in own:
            tensor = tensor.select(own.index("t"), 0)
        for at, name in enumerate("bh"):
            if name not in own:
                tensor = tensor.unsqueeze(at)
        return tensor


RUN = Running()

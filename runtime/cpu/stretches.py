"""A recurrence over stretches of positions: forward, and backward that keeps only the states between stretches.

Backward runs the states forward once more, then takes the stretches from the last to the first, each under autograd by
itself. Memory: inputs, gradients, one state a stretch, and the intermediates of one stretch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# A step takes the arrays of one stretch and the state before it; gives the stretch's output and the state after it.
Arrays = Sequence[Tensor | None]
Step = Callable[[Arrays, Tensor], tuple[Tensor | None, Tensor]]
POSITIONS = 2  # the dimension of an array that positions run along; 1 long: the same at all of them
ELEMENTS = 2**22  # of the intermediates of one stretch


@dataclass(frozen=True)
class Recurrence:
    """`step` gives outputs; `advance` gives only the state, and ignores arrays that only outputs need (None then)."""

    step: Step
    advance: Step
    length: int
    stretch: int  # positions a stretch

    def bounds(self) -> list[tuple[int, int]]:
        return [(at, min(at + self.stretch, self.length)) for at in range(0, self.length, self.stretch)]

    def forward(self, arrays: Arrays, state: Tensor) -> tuple[Tensor | None, Tensor]:
        """The outputs of all positions (None where a step gives none), and the last state."""
        outputs = []
        for start, stop in self.bounds():
            output, state = self.step(part(arrays, start, stop), state)
            outputs.append(output)
        made = [output for output in outputs if output is not None]
        return (torch.cat(made, POSITIONS) if made else None), state

    def backward(
        self, arrays: Arrays, state: Tensor, grad_output: Tensor | None, grad_state: Tensor
    ) -> tuple[list[Tensor | None], Tensor]:
        """Gradients of the arrays (None of ints and of None) and of the first state."""
        bounds, states = self.bounds(), [state]
        for start, stop in bounds[:-1]:
            states.append(self.advance(part(arrays, start, stop), states[-1])[1])
        states = states[: len(bounds)]
        gradients = [torch.zeros_like(one) if one is not None and one.is_floating_point() else None for one in arrays]
        for (start, stop), before in zip(reversed(bounds), reversed(states), strict=True):
            given = None if grad_output is None else grad_output.narrow(POSITIONS, start, stop - start)
            found, grad_state = self.differentiate(part(arrays, start, stop), before, given, grad_state)
            for total, one in zip(part(gradients, start, stop), found, strict=True):
                if total is not None and one is not None:
                    total += one
        return gradients, grad_state

    def differentiate(
        self, arrays: Arrays, state: Tensor, grad_output: Tensor | None, grad_state: Tensor
    ) -> tuple[list[Tensor | None], Tensor]:
        """The gradients of one stretch."""
        with torch.enable_grad():
            leaves = [
                one.detach().requires_grad_(one.is_floating_point()) if one is not None else None for one in arrays
            ]
            before = state.detach().requires_grad_()
            output, after = self.step(leaves, before)
            wanted = [one for one in (*leaves, before) if one is not None and one.requires_grad]
            results, cotangents = [after], [grad_state]
            if output is not None and grad_output is not None:
                results, cotangents = [*results, output], [*cotangents, grad_output.to(output.dtype)]
            found = iter(torch.autograd.grad(results, wanted, cotangents, materialize_grads=True, allow_unused=True))
        gradients = [next(found) if one is not None and one.requires_grad else None for one in leaves]
        return gradients, next(found)


def part(arrays: Arrays, start: int, stop: int) -> list[Tensor | None]:
    """Arrays at some positions; those that are the same everywhere as they are."""
    return [
        one if one is None or one.shape[POSITIONS] == 1 else one.narrow(POSITIONS, start, stop - start)
        for one in arrays
    ]

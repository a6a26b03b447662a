"""Turns as a CUDA graph: the host copies one token's tensors and starts the graph, whatever the pattern computes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Run = Callable[[Mapping[str, Tensor]], Tensor]
WARM = 2  # turns that run by themselves before: they compile kernels and take memory


@dataclass
class Replay:
    """A captured turn. `given`: where it reads the tensors that each call gives anew; `fixed`: those that it reads in
    place, by name with their addresses."""

    graph: torch.cuda.CUDAGraph
    given: dict[str, Tensor]
    fixed: Mapping[str, tuple[int, tuple[int, ...]]]
    out: Tensor

    @staticmethod
    def of(
        run: Callable[[Mapping[str, Tensor]], Tensor], tensors: Mapping[str, Tensor], fresh: Sequence[str]
    ) -> Replay:
        """Captures `run` of tensors; those named in `fresh` are other ones at each call.

        Raises RuntimeError where something in it cannot be captured.
        """
        given = {name: torch.empty_like(tensors[name]).copy_(tensors[name]) for name in fresh}
        fixed = {name: place(one) for name, one in tensors.items() if name not in given}
        graph = torch.cuda.CUDAGraph()
        torch.cuda.current_stream().synchronize()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            out = run({**tensors, **given})
        return Replay(graph, given, fixed, out)

    def fits(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether what is read in place is where it was."""
        return all(place(tensors[name]) == where for name, where in self.fixed.items())

    def run(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The result of one token, the caller's own."""
        torch._foreach_copy_(list(self.given.values()), [tensors[name] for name in self.given])
        self.graph.replay()
        return self.out.clone()


def place(tensor: Tensor) -> tuple[int, tuple[int, ...]]:
    """Where a tensor lies, and how."""
    return tensor.data_ptr(), tensor.stride()

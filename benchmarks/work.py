"""A row of a suite: one pattern at one size, and the tensors that all contenders share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import attnc
from attnc.runtime.pattern import CompiledPattern
from attnc.runtime.tools.comparison import defaults
from attnc.runtime.tools.inputs import Shape, made_inputs
from attnc.runtime.tools.settings import settings

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
SEED = 1
COUNTED = 2**23  # pairs looked at together when live pairs are counted

Mask = Callable[[Any, Any, Any, Any], Any]
"""(b, h, i, j) -> bool: what FlexAttention calls a mask_mod."""
Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Size:
    """Sizes of the tensors, and values of the pattern's parameters."""

    shape: Shape
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Aim:
    """How many times faster than `peer` the pattern should be."""

    peer: str
    times: float


def no_inputs(size: Size, generator: torch.Generator) -> Inputs:
    return {}


@dataclass(frozen=True)
class Work:
    """One row. `pattern` names a file of examples/.

    `mask` writes the same condition by hand, for FlexAttention and to count live pairs (None: the pattern is not a
    softmax over a fixed set of pairs); `pairs` is that count for a batch row and head in closed form, where counting
    would take long. `inputs` draws what the pattern declares, on the CPU; None: as `attnc check` does, within `ranges`
    and with the lengths `axes` of what nothing else fixes. `operations` counts floating-point operations where there
    are no pairs to count. `small` is compared with the float64 reference before `timed` is timed. `spare`: bytes that a
    call may allocate beyond its output and the rows' statistics, where that is part of the claim.
    """

    name: str
    pattern: str
    timed: Size
    small: Size
    mask: Callable[[Problem], Mask] | None
    peers: tuple[str, ...]
    inputs: Callable[[Size, torch.Generator], Inputs] | None = no_inputs
    pairs: Callable[[Size], int] | None = None
    aim: Aim | None = None
    spare: int | None = None
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    axes: Mapping[str, int] = field(default_factory=dict)
    operations: Callable[[Size], int] | None = None
    path: Path | None = None  # of the file, where it is none of examples/

    def quick(self) -> Work:
        """The row at its small size, to see that everything works."""
        return replace(self, name=f"{self.name}, small", timed=self.small, pairs=None, aim=None)

    def at(self, length: int) -> Work:
        """The row with another number of tokens."""
        shape = replace(self.timed.shape, queries=length, keys=length)
        return replace(self, name=f"{self.name}, N {length}", timed=replace(self.timed, shape=shape), aim=None)


def drawn(pattern: str, timed: Size, small: Size, peers: tuple[str, ...] = (), **more: Any) -> Work:
    """A row of a pattern that is no fixed set of pairs, inputs drawn as `attnc check` does. `more`: other fields."""
    return Work(more.pop("name", pattern), pattern, timed, small, None, peers, None, **more)


class Problem:
    """The tensors of a row, drawn from one seed. q, k (B, H, N, D) and v (B, H, M, E) of `dtype`, contiguous."""

    def __init__(self, work: Work, size: Size, device: str, dtype: torch.dtype) -> None:
        self.work, self.size, self.device, self.dtype = work, size, device, dtype
        shape = size.shape
        if work.inputs is None:
            parameters = defaults(self.pattern) | dict(size.parameters)
            checked = settings(self.pattern.pattern, "check", self.pattern.known)
            ranges = {**(checked[0].ranges if checked else {}), **work.ranges}
            made = made_inputs(
                self.pattern.pattern,
                shape,
                parameters,
                dtype=dtype,
                device=device,
                seed=SEED,
                ranges=ranges,
                axes=work.axes,
            )
            self.q, self.k, self.v, self.inputs = made.q, made.k, made.v, made.inputs
            return
        generator = torch.Generator(device).manual_seed(SEED)

        def normal(*lengths: int) -> Tensor:
            return torch.randn(lengths, device=device, dtype=dtype, generator=generator)

        self.q = normal(shape.batch, shape.heads, shape.queries, shape.width)
        self.k = normal(shape.batch, shape.key_heads, shape.keys, shape.width)
        self.v = normal(shape.batch, shape.key_heads, shape.keys, shape.value_width)
        drawn = work.inputs(size, torch.Generator().manual_seed(SEED))
        self.inputs = {name: value.to(device) for name, value in drawn.items()}

    @property
    def settings(self) -> dict[str, Any]:
        """Keywords of the call."""
        return {**self.size.parameters, **self.inputs}

    @cached_property
    def pattern(self) -> CompiledPattern:
        """The compiled pattern, loaded anew (not yet lowered)."""
        path = self.work.path or EXAMPLES / f"{self.work.pattern}.attn"
        return attnc.load(path).patterns[self.work.pattern]

    @cached_property
    def mask(self) -> Mask | None:
        return self.work.mask and self.work.mask(self)

    def live_pairs(self) -> int | None:
        """Query-key pairs with a weight, over all batch rows and heads; None where there is no mask to count by."""
        shape = self.size.shape
        if self.mask is None:
            return None
        if self.work.pairs is not None:
            return self.work.pairs(self.size) * shape.batch * shape.heads
        mask, keys = self.mask, torch.arange(shape.keys, device=self.device)
        step = max(1, COUNTED // shape.keys)
        total = 0
        for batch in range(shape.batch):  # no row's mask differs by head
            for start in range(0, shape.queries, step):
                rows = torch.arange(start, min(start + step, shape.queries), device=self.device)[:, None]
                total += int(torch.broadcast_to(mask(batch, 0, rows, keys), (len(rows), len(keys))).sum())
        return total * shape.heads

"""Tensors made up for `attnc check`, `attnc run` and the tests, from a seed and with the shapes of a declaration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attnc.dsl.terms import Input, Pattern
from attnc.dsl.types import Base
from attnc.runtime.binding import fixed_sizes, flat
from attnc.runtime.refusal import extra_inputs, layouts
from attnc.runtime.tools.settings import SIZES

FREE_AXIS = 6  # length of an axis that nothing fixes, such as the listed columns of a head
TOKENS = ("i", "j", "t")


@dataclass(frozen=True)
class Shape:
    """Sizes of q (batch, heads, queries, width), k (.., key_heads, keys, width) and v (.., value_width)."""

    batch: int
    heads: int
    key_heads: int
    queries: int
    keys: int
    width: int
    value_width: int

    @classmethod
    def square(cls, batch: int, heads: int, length: int, width: int) -> Shape:
        return cls(batch, heads, heads, length, length, width, width)

    def updated(self, sizes: Mapping[str, int]) -> Shape:
        """With sizes by the names B H Hk N M D E. M follows N, Hk follows H and E follows D unless they are given."""
        fields = dict(
            zip(SIZES, ("batch", "heads", "key_heads", "queries", "keys", "width", "value_width"), strict=True)
        )
        followed = dict(sizes)
        for follower, leader in (("M", "N"), ("Hk", "H"), ("E", "D")):
            if leader in sizes and follower not in sizes:
                followed[follower] = sizes[leader]
        return replace(self, **{fields[name]: size for name, size in followed.items()})

    def __str__(self) -> str:
        heads = f"{self.heads}" if self.heads == self.key_heads else f"{self.heads}/{self.key_heads}"
        tokens = f"{self.queries}" if self.queries == self.keys else f"{self.queries}/{self.keys}"
        width = f"{self.width}" if self.width == self.value_width else f"{self.width}/{self.value_width}"
        return f"B{self.batch} H{heads} N{tokens} D{width}"


@dataclass(frozen=True)
class Made:
    """The tensors of one call."""

    q: Tensor
    k: Tensor
    v: Tensor
    inputs: dict[str, Tensor]


def made_inputs(
    pattern: Pattern,
    shape: Shape,
    parameters: Mapping[str, Any],
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    seed: int = 0,
    ranges: Mapping[str, tuple[float, float]] | None = None,
    axes: Mapping[str, int] | None = None,
) -> Made:
    """Draws a call. q, k, v and real inputs over tokens: standard normal; other rules are at `_integers`, `_reals`.

    `ranges` overrides how an input is drawn: uniform between two bounds (ints: both included). `axes`: lengths of axes
    that neither `shape` nor the pattern fixes.
    """
    generator = torch.Generator().manual_seed(seed)
    sizes = {"b": shape.batch, "h": shape.heads, "i": shape.queries, "j": shape.keys, "t": shape.keys}
    sizes |= {"d": shape.width, "e": shape.value_width}
    sizes |= fixed_sizes(pattern, flat(parameters), sizes)
    for name, length in (axes or {}).items():
        sizes.setdefault(name, length)

    def normal(*lengths: int) -> Tensor:
        return torch.randn(lengths, generator=generator).to(device, dtype)

    q = normal(shape.batch, shape.heads, shape.queries, shape.width)
    latent = layouts(pattern)["k"]
    sizes.setdefault(latent[3], shape.width)
    k = normal(shape.batch, 1 if latent[1] == "1" else shape.key_heads, shape.keys, sizes[latent[3]])
    v = normal(shape.batch, shape.key_heads, shape.keys, shape.value_width)
    inputs: dict[str, Tensor] = {}
    for declared in extra_inputs(pattern):
        lengths = [int(axis) if axis.isdigit() else sizes.setdefault(axis, FREE_AXIS) for axis in declared.axes]
        bounds = (ranges or {}).get(declared.name)
        if declared.base is Base.REAL:
            inputs[declared.name] = _reals(declared, lengths, bounds, generator).to(device, dtype)
        elif declared.base is Base.INT:
            inputs[declared.name] = _integers(declared, lengths, shape.keys, bounds, generator).to(device)
        else:
            inputs[declared.name] = (torch.rand(lengths, generator=generator) < 0.5).to(device)
    return Made(q, k, v, inputs)


def _reals(
    declared: Input, lengths: list[int], bounds: tuple[float, float] | None, generator: torch.Generator
) -> Tensor:
    """One number a head (a slope, a decay, a gate): uniform in 0.05 .. 1, else standard normal."""
    if bounds is None and declared.axes == ("h",):
        bounds = (0.05, 1.0)
    if bounds is not None:
        low, high = bounds
        return low + (high - low) * torch.rand(lengths, generator=generator)
    return torch.randn(lengths, generator=generator)


def _integers(
    declared: Input, lengths: list[int], keys: int, bounds: tuple[float, float] | None, generator: torch.Generator
) -> Tensor:
    """Over tokens: ascending ids, about four of them (packed documents). A list of a head or of all: positions,
    some of them -1, which pads. One a batch (a prefix): a position. One a head (a kind of head): 0 and 1 by turns."""
    if bounds is not None:
        return torch.randint(int(bounds[0]), int(bounds[1]) + 1, lengths, generator=generator)
    token = next((at for at, axis in enumerate(declared.axes) if axis in TOKENS), None)
    if token is not None:
        starts = torch.rand(lengths, generator=generator) < 3 / max(lengths[token], 4)
        return starts.long().cumsum(token)
    if declared.axes == ("h",):
        return torch.arange(lengths[0]) % 2
    if set(declared.axes) <= {"b", "h"}:
        return torch.randint(0, keys + 1, lengths, generator=generator)
    return torch.randint(-1, keys, lengths, generator=generator)

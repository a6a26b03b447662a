"""Feature maps over whole arrays with torch: vectors end to end, Kronecker products, symmetric powers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import combinations_with_replacement
from math import factorial, prod, sqrt

import torch
from torch import Tensor

from attnc.compiler.ir import Node
from attnc.runtime.compute.arrays import RULES, Arrays


def _features(at: Arrays, node: Node) -> Tensor:
    """Vectors, and scalars as vectors of one element, end to end."""
    indices = node.type.ordered_indices()
    parts = at.same_heads(indices, [at.over(arg, indices, 1) for arg in node.args])
    shape = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
    return torch.cat([part.to(at.frame.real).expand(*shape, part.shape[-1]) for part in parts], -1)


def _kronecker(at: Arrays, node: Node) -> Tensor:
    """All products of elements of two vectors, the first's outermost."""
    x, y = at.aligned(node.args)
    return (x.unsqueeze(-1) * y.unsqueeze(-2)).flatten(-2)


def _symmetric(at: Arrays, node: Node) -> Tensor:
    assert isinstance(node.attribute, int)
    x = at.value(node.args[0]).to(at.frame.real)
    key = x.shape[-1], node.attribute
    if key not in at.tables:
        at.tables[key] = monomial_tables(*key, x)
    return symmetric(x, at.tables[key])


def symmetric(x: Tensor, tables: Sequence[Tensor]) -> Tensor:
    """(.., d) -> (.., C(d + degree - 1, degree)): <symmetric(x), symmetric(y)> = <x, y> ** degree.

    The monomials of x, each once, times the square root of how many orders it has (arXiv 2507.04239): `tables`.
    """
    weights, first, *others = tables
    found = x[..., first] * weights
    for place in others:
        found = found * x[..., place]
    return found


def monomial_tables(width: int, degree: int, like: Tensor) -> list[Tensor]:
    """The weight of every monomial, and its factors, factor by factor; on the device of a tensor, in its type."""
    places, weights = monomials(width, degree)
    made = [torch.tensor(weights, dtype=like.dtype, device=like.device)]
    return made + [torch.tensor(place, device=like.device) for place in places]


@lru_cache(maxsize=32)
def monomials(width: int, degree: int) -> tuple[list[list[int]], list[float]]:
    """The factors of every monomial, factor by factor, and the square root of how many orders each has."""
    found = list(combinations_with_replacement(range(width), degree))
    weights = [sqrt(factorial(degree) // prod(factorial(one.count(at)) for at in set(one))) for one in found]
    return [list(place) for place in zip(*found, strict=True)], weights


RULES |= {"features": _features, "kronecker": _kronecker, "symmetric": _symmetric}

"""Pairs of a block of positions, weighed by powers of their score (`composition.Near`): torch, linear in the keys."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from attnc.compiler.composition import Near
from attnc.compiler.schedule_chunked import NEAR
from attnc.runtime.backward import recording
from attnc.runtime.compute.arrays import Frame
from attnc.runtime.scalars import of_node
from attnc.runtime.steps.handed import by_head


def coefficients(near: Near, frame: Frame) -> list[float]:
    """The numbers of a call, from the 0th power on."""
    return [float(of_node(one, frame.parameters, frame.sizes) or 0.0) for one in near.coefficients]


def near_sums(query: Tensor, key: Tensor, value: Tensor, powers: Sequence[float], offset: int) -> Tensor:
    """(b, h, i, e): sums over the keys up to the row, of the row's own block of NEAR positions.

    query (b, h, i, d), row 0 at position `offset`; key (b, hk, j, d), value (b, hk, j, e), hk a divisor of h; all in
    the type of the sums.
    """
    rows, first = query.shape[2], offset // NEAR * NEAR
    queries = blocks(pad(query, (0, 0, offset - first, 0)))
    keys, values = (
        blocks(by_head(pad(one, (0, 0, 0, max(offset + rows - one.shape[2], 0)))[:, :, first:], query.shape[1]))
        for one in (key, value)
    )
    scores = queries @ keys.mT
    weights = polynomial(scores, powers).tril()
    out: Tensor = (weights @ values).flatten(2, 3)
    return out[:, :, offset - first : offset - first + rows]


def blocks(array: Tensor) -> Tensor:
    """(b, h, n, width) as (b, h, block, position, width), with 0 behind the last position."""
    cut: Tensor = pad(array, (0, 0, 0, -array.shape[2] % NEAR)).unflatten(2, (-1, NEAR))
    return cut


def polynomial(x: Tensor, powers: Sequence[float]) -> Tensor:
    """By Horner's rule."""
    found = torch.full_like(x, powers[-1])
    for one in reversed(powers[:-1]):
        found = found * x + one if one else found * x
    return found


def near_gradients(
    given: Sequence[Tensor], powers: Sequence[float], offset: int, cotangent: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, which are `given`, in their types; `cotangent`: of the sums."""
    with recording():
        leaves = [one.detach().to(cotangent.dtype).requires_grad_() for one in given]
        out = near_sums(leaves[0], leaves[1], leaves[2], powers, offset)
        query, key, value = torch.autograd.grad(out, leaves, cotangent)
    return query, key, value

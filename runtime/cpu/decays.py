"""Chunks of positions and their decays: sums of log decays, and scores that they weigh.

Every exponent is a sum of log decays over a span of positions, never the difference of two large exponentials: with
log decays that are at most 0 nothing overflows. Spans are differences of prefix sums in float64, so that a token which
forgets everything (log decay -50) does not cost the digits of those around it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

FORGOTTEN = -1e5  # exp of it is 0 in every type; a log decay of -infinity would give NaN in a difference
SUB = 16  # rows and keys of a sub-chunk, for decays by channel
MILD = 60.0  # exp of it and of minus it, and products of sums of them, are far from overflow and underflow in float32


def chunked(array: Tensor, batch: int, heads: int, chunk: int, *, length: int, value: float = 0.0) -> Tensor:
    """(b, h, t, ..) -> (batch * heads, chunks, chunk, ..), filled up with `value` behind the last position.

    Axes b and t may be 1 long (the same for all); h may be a divisor of `heads`.
    """
    if array.shape[1] != heads:
        array = array.repeat_interleave(heads // array.shape[1], 1)
    tail = array.shape[3:]
    array = array.expand(batch, heads, length, *tail)
    missing = -length % chunk
    if missing:
        array = pad(array, (*(0, 0) * len(tail), 0, missing), value=value)
    return array.reshape(batch * heads, -1, chunk, *tail)


def sums(decay: Tensor) -> Tensor:
    """Inclusive prefix sums (.., c) or (.., c, f) of log decays along the chunk, which is dimension 2; float64."""
    return decay.double().clamp(min=FORGOTTEN).cumsum(2)


def spans(rows: Tensor, keys: Tensor, live: Tensor) -> Tensor:
    """rows_i - keys_j where `live`, else -infinity: (.., r), (.., c) -> (.., r, c)."""
    difference = rows.unsqueeze(-1) - keys.unsqueeze(-2)
    return difference.masked_fill(~live, -torch.inf)


def scores(query: Tensor, key: Tensor, rows: Tensor | None, keys: Tensor | None, live: Tensor) -> Tensor:
    """sum over f of query_if key_jf exp(rows_if - keys_jf) where `live`, else 0.

    query, key (z, n, c, f); `rows`, `keys` prefix sums (z, n, c), (z, n, c, f) or None; `live` (.., c, c), lower
    triangular: `rows` at a live pair is at most `keys`. -> (z, n, c, c)
    """
    if rows is None or keys is None:
        return (query @ key.mT).masked_fill(~live, 0)
    if rows.dim() == 3:
        return (query @ key.mT) * spans(rows, keys, live).to(query.dtype).exp()
    return channel_scores(query, key, rows, keys, live)


def channel_scores(query: Tensor, key: Tensor, rows: Tensor, keys: Tensor, live: Tensor) -> Tensor:
    """`scores` with a decay for each channel.

    Rows of a sub-chunk reach keys before it by way of the sub-chunk's start: both factors are at most 1. So do they
    reach keys of the sub-chunk itself where it decays little; where it decays much, every pair has its own exponent.
    """
    size = query.shape[2]
    bands = []
    for start in range(0, size, SUB):
        stop = min(start + SUB, size)
        own, sums_of_rows = query[:, :, start:stop], rows[:, :, start:stop]
        middle = keys[:, :, start - 1 : start] if start else torch.zeros_like(keys[:, :, :1])
        mild = bool((middle - keys[:, :, stop - 1 : stop] <= MILD).all())
        reached = stop if mild else start
        left = own * (sums_of_rows - middle).to(query.dtype).exp()
        right = key[:, :, :reached] * (middle - keys[:, :, :reached]).to(query.dtype).exp()
        band = [(left @ right.mT).masked_fill(~live[..., start:stop, :reached], 0)]
        if not mild:
            near = slice(start, stop)
            difference = sums_of_rows.unsqueeze(3) - keys[:, :, near].unsqueeze(2)
            dead = ~live[..., near, near].unsqueeze(-1)
            factors = difference.masked_fill(dead, -torch.inf).to(query.dtype).exp()
            band.append((own.unsqueeze(3) * factors * key[:, :, near].unsqueeze(2)).sum(-1))
        band.append(query.new_zeros(*query.shape[:2], stop - start, size - stop))
        bands.append(torch.cat(band, -1))
    return torch.cat(bands, 2)


def decayed(array: Tensor, rows: Tensor | None) -> Tensor:
    """(z, n, c, f) times the decay from the chunk's start to each position."""
    if rows is None:
        return array
    factor = rows.to(array.dtype).exp()
    return array * (factor if rows.dim() == 4 else factor.unsqueeze(-1))


def to_end(array: Tensor, rows: Tensor | None) -> Tensor:
    """(z, n, c, f) times the decay from each position to the chunk's end."""
    if rows is None:
        return array
    factor = (rows[:, :, -1:] - rows).to(array.dtype).exp()
    return array * (factor if rows.dim() == 4 else factor.unsqueeze(-1))


def kept(rows: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """What a chunk keeps of the state before it, (z, n, f or 1, 1)."""
    if rows is None:
        return None
    factor = rows[:, :, -1].to(dtype).exp()
    return factor.unsqueeze(-1) if rows.dim() == 4 else factor[..., None, None]

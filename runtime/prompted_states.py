"""States of a prompt on generated kernels: reads by the chunked ones, the state that is left by products."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attnc.dsl.diagnostics import InternalError
from attnc.runtime.chunked_steps import carry_sums, recur_reads
from attnc.runtime.reaches import Reach, Shapes

PIECE = 1024  # tokens whose operands are in float32 at a time


def carry_prompt(
    operands: Sequence[Tensor | None], total: bool, narrow: bool, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The sums (b, h, n, e) and the state (b, h, f, e) behind the last token, in float32.

    `operands`: query (b, h, n, f), key (b, h, n, f), value (b, h, n, e) and log decays, see `carried.carry`; with
    `total` a last column sums what values of 1 would. `state`: what earlier tokens left.
    """
    query, key, value, decay = operands
    if query is None or key is None or value is None:
        raise InternalError("an operand of a sum is missing")
    parts = carry_sums(operands, Reach(), total, narrow, torch.float32)
    out = torch.cat([parts[0], parts[1].unsqueeze(-1)], -1) if total else parts[0]
    shapes = Shapes.of(query, key, value, decay)
    first = None if state is None else state.float()
    now = out.new_zeros(shapes.batch, shapes.heads, shapes.features, out.shape[-1]) if first is None else first
    before = None  # the log decay since the call began
    for start in range(0, shapes.rows, PIECE):
        stop = min(start + PIECE, shapes.rows)
        read, written, values = (spread(one[:, :, start:stop].float(), shapes) for one in (query, key, value))
        values = torch.nn.functional.pad(values, (0, 1), value=1.0) if total else values
        steps = None if decay is None else log_decays(decay, start, stop)
        sums = None if steps is None else steps.cumsum(2)
        if steps is not None and sums is not None:
            written = written * spread(to_end(steps).exp().float(), shapes)
            now = now * spread(sums[:, :, -1].exp().float(), shapes).unsqueeze(-1)
        if first is not None:
            if sums is not None:
                before = sums if before is None else before + sums
                read = read * spread(before.exp().float(), shapes)
                before = before[:, :, -1:]
            out[:, :, start:stop] += read @ first
        now = now + written.mT @ values
    return out, now


def recur_prompt(operands: Sequence[Tensor | None], delta: bool, narrow: bool) -> tuple[Tensor, Tensor]:
    """The reads (b, h, n, e) of a recurrence that begins, and the state behind its last token, in float32.

    `operands`: query, key, value, decay, left and right, see `recurrent.recur`; `delta`: left is key. What a token
    reads before its change is what its `right` reads after the token before, by the same kernels; then the state is
    a sum.
    """
    query, key, value, decay, left, right = operands
    if query is None or key is None or value is None or left is None or right is None:
        raise InternalError("an operand of a recurrence is missing")
    out = recur_reads(operands, 0, delta, narrow, torch.float32)
    batch, heads, rows, width = out.shape
    shapes = Shapes(batch, heads, rows, key.shape[2], key.shape[3], width, out.dtype)
    later = torch.nn.functional.pad(right[:, :, 1:], (0, 0, 0, 1))
    later = spread(later, shapes).expand(shapes.batch, shapes.heads, -1, -1)
    found = recur_reads([later, *operands[1:]], 0, delta, narrow, torch.float32)
    reads = torch.nn.functional.pad(found[:, :, :-1], (0, 0, 1, 0))
    now = out.new_zeros(shapes.batch, shapes.heads, shapes.features, shapes.width)
    for start in range(0, shapes.rows, PIECE):
        stop = min(start + PIECE, shapes.rows)
        changed, written, values = (spread(one[:, :, start:stop].float(), shapes) for one in (left, key, value))
        if decay is not None:
            steps = log_decays(decay, start, stop)
            factor = spread(to_end(steps).exp().float(), shapes)
            changed, written = changed * factor, written * factor
            now = now * spread(steps.sum(2).exp().float(), shapes).unsqueeze(-1)
        now = now + changed.mT @ reads[:, :, start:stop] + written.mT @ values
    return out, now


def log_decays(decay: Tensor, start: int, stop: int) -> Tensor:
    """Those of some tokens, float64 (b, h, n, f or 1)."""
    piece = decay[:, :, start:stop] if decay.shape[2] != 1 else decay.expand(-1, -1, stop - start, *decay.shape[3:])
    return piece.double() if piece.dim() == 4 else piece.double().unsqueeze(-1)


def to_end(steps: Tensor) -> Tensor:
    """The log decay behind each token: a sum, not a difference of sums, which may both be infinite."""
    return torch.nn.functional.pad(steps[:, :, 1:].flip(2).cumsum(2).flip(2), (0, 0, 0, 1))


def spread(tensor: Tensor, shapes: Shapes) -> Tensor:
    """(b, h, ..) for every head of a state."""
    return (
        tensor if tensor.shape[1] in (1, shapes.heads) else tensor.repeat_interleave(shapes.heads // tensor.shape[1], 1)
    )

"""`Carry` and `Recur` steps on the chunked kernels: operands of a call to what the kernels take, and back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attnc.compiler.schedule_chunked import WIDEST_SOLVED
from attnc.runtime.launch_chunked_carry import carry_backward, carry_forward
from attnc.runtime.launch_chunked_recur import Recurrence, recur_backward, recur_forward
from attnc.runtime.reaches import Reach

Operands = Sequence[Tensor | None]


def carries(operands: Operands, reach: Reach) -> bool:
    """Whether the kernels do a carried sum: in float32 or less, and not over all keys with a decay or of one run."""
    query, key, _, decay = operands
    assert query is not None
    assert key is not None
    rows = max(key.shape[2], query.shape[2] + reach.offset)
    fits = decay is None or decay.shape[2] >= rows or decay.shape[2] == 1
    return (
        query.dtype != torch.float64
        and fits
        and not (reach.kind == "all" and (decay is not None or reach.same is not None))
    )


def carry_sums(operands: Operands, reach: Reach, total: bool, narrow: bool) -> list[Tensor]:
    """[out, and where asked for, total], in float32. `narrow`: products of bfloat16."""
    query, key, value, decay = narrowed(operands, narrow)
    made = carry_forward(query, key, value, decay, reach=reach, total=total, dtype=torch.float32)
    return [made.out, *([made.total] if made.total is not None else [])]


def carry_gradients(
    operands: Operands, reach: Reach, cotangents: Sequence[Tensor], narrow: bool
) -> Sequence[Tensor | None]:
    """Gradients of query, key, value and decay."""
    query, key, value, decay = narrowed(operands, narrow)
    total = cotangents[1] if len(cotangents) > 1 else None
    found = carry_backward(query, key, value, decay, cotangents[0], reach=reach, total_cotangent=total)
    return [found.query, found.key, found.value, found.decay]


def recurs(operands: Operands, offset: int) -> bool:
    """Whether the kernels do a recurrence: in float32 or less, of a state that fits, with a token for every row."""
    query, key, _, decay = operands[:4]
    assert query is not None
    assert key is not None
    fits = offset + query.shape[2] <= key.shape[2] and key.shape[3] <= WIDEST_SOLVED
    return query.dtype != torch.float64 and fits and (decay is None or decay.shape[2] in (1, key.shape[2]))


def recurrence(operands: Operands, offset: int, delta: bool, narrow: bool) -> Recurrence:
    """The operands query, key, value, decay, left, right of the kernels. `delta`: left is the key."""
    query, key, value, decay, left, right = narrowed([*operands[:3], operands[3], *operands[4:]], narrow)
    return Recurrence(query, key, value, right, None if delta else left, decay, offset)


def recur_reads(operands: Operands, offset: int, delta: bool, narrow: bool) -> Tensor:
    """The reads, in float32."""
    return recur_forward(recurrence(operands, offset, delta, narrow), dtype=torch.float32).out


def recur_gradients(
    operands: Operands, offset: int, delta: bool, narrow: bool, cotangent: Tensor
) -> Sequence[Tensor | None]:
    """Gradients of query, key, value, decay, left (None for a delta rule: in that of the key) and right."""
    found = recur_backward(recurrence(operands, offset, delta, narrow), cotangent)
    return [found.query, found.key, found.value, found.decay, found.left, found.right]


def narrowed(operands: Operands, narrow: bool) -> list[Tensor]:
    """Operands as the kernels take them: all but the decay, which is the fourth, in bfloat16 where `narrow`."""
    dtype = torch.bfloat16 if narrow else None
    found = [
        one if one is None or (dtype is None and at != 3) else one.to(torch.float32 if at == 3 else dtype)
        for at, one in enumerate(operands)
    ]
    return found  # type: ignore[return-value]

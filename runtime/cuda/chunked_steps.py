"""`Carry` and `Recur` steps on the chunked kernels: operands of a call to what the kernels take, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attnc.compiler.composition import Carry, Composition, Recur
from attnc.compiler.emit.chunked import chunked_text, kept_names, plain_variant
from attnc.compiler.emit.chunked_kernel import Variant
from attnc.compiler.schedule_chunked import WIDEST_SOLVED
from attnc.runtime.cpu.reaches import Reach
from attnc.runtime.cuda.launch_chunked_carry import carry_backward, carry_forward
from attnc.runtime.cuda.launch_chunked_carry import prepare as prepare_sum
from attnc.runtime.cuda.launch_chunked_recur import Recurrence, recur_backward, recur_forward
from attnc.runtime.cuda.launch_chunked_recur import prepare as prepare_recurrence

DECAY = 3  # its place among the operands
SHORTEST_PERIOD = 16  # shorter ones would keep more states than a torch run takes

Operands = Sequence[Tensor | None]


def carries(operands: Operands, reach: Reach) -> bool:
    """Whether the kernels do a carried sum.

    They take no float64, no decay over all keys, no decay that lacks positions, and keep a state for every period.
    """
    query, key, _, decay = operands
    assert query is not None
    assert key is not None
    rows = max(key.shape[2], query.shape[2] + reach.offset)
    if decay is not None and decay.shape[2] != 1 and decay.shape[2] < rows:
        return False
    if reach.same is not None and reach.same.shape[1] < rows:
        return False
    if reach.kind == "all" and (decay is not None or reach.same is not None):
        return False
    return query.dtype != torch.float64 and not (reach.kind == "period" and reach.amount < SHORTEST_PERIOD)


def carry_sums(
    operands: Operands,
    reach: Reach,
    total: bool,
    narrow: bool,
    dtype: torch.dtype = torch.float32,
    *,
    state: Tensor | None = None,
    final: bool = False,
    kept: list[Tensor] | None = None,
) -> list[Tensor]:
    """[out in `dtype`, and where asked for, total and the last state in float32]. `narrow`: products of bfloat16.

    `state`: the one before the first key (see `carry_forward`). `kept` takes what backward needs again.
    """
    query, key, value, decay = narrowed(operands, narrow)
    made = carry_forward(
        query,
        key,
        value,
        decay,
        reach=reach,
        total=total,
        initial=state,
        final=final,
        keep=kept is not None,
        dtype=dtype,
    )
    if kept is not None:
        kept += made.kept.values()
    return [one for one in (made.out, made.total, made.final) if one is not None]


def carry_gradients(
    operands: Operands,
    reach: Reach,
    cotangents: Sequence[Tensor],
    narrow: bool,
    *,
    state: Tensor | None = None,
    of_last: Tensor | None = None,
    kept: Sequence[Tensor] = (),
) -> list[Tensor | None]:
    """Gradients of query, key, value, decay and the first state. `of_last`: the last state's cotangent."""
    query, key, value, decay = narrowed(operands, narrow)
    total = cotangents[1] if len(cotangents) > 1 else None
    found = carry_backward(
        query,
        key,
        value,
        decay,
        cotangents[0],
        reach=reach,
        total_cotangent=total,
        initial=state,
        final_cotangent=of_last,
        kept=kept,
    )
    return [found.query, found.key, found.value, found.decay, found.initial]


def recurs(operands: Operands, offset: int) -> bool:
    """Whether the kernels do a recurrence: in float32 or less, of a state that fits, with a token for every row."""
    query, key, _, decay = operands[:4]
    assert query is not None
    assert key is not None
    fits = offset + query.shape[2] <= key.shape[2] and key.shape[3] <= WIDEST_SOLVED
    return query.dtype != torch.float64 and fits and (decay is None or decay.shape[2] in (1, key.shape[2]))


def recurrence(operands: Operands, offset: int, delta: bool, narrow: bool) -> Recurrence:
    """The operands query, key, value, decay, left, right of the kernels. `delta`: left is the key."""
    query, key, value, decay, left, right = narrowed(operands, narrow)
    return Recurrence(query, key, value, right, None if delta else left, decay, offset)


def recur_reads(
    operands: Operands,
    offset: int,
    delta: bool,
    narrow: bool,
    dtype: torch.dtype = torch.float32,
    *,
    state: Tensor | None = None,
    final: bool = False,
    kept: list[Tensor] | None = None,
) -> list[Tensor]:
    """[the reads, in `dtype`, and where asked for, the last state in float32]. `state`: before the first token."""
    given = recurrence(operands, offset, delta, narrow)
    made = recur_forward(given, initial=state, final=final, keep=kept is not None, dtype=dtype)
    if kept is not None:
        kept += made.kept.values()
    return [one for one in (made.out, made.final) if one is not None]


def recur_gradients(
    operands: Operands,
    offset: int,
    delta: bool,
    narrow: bool,
    cotangent: Tensor,
    *,
    state: Tensor | None = None,
    of_last: Tensor | None = None,
    kept: Sequence[Tensor] = (),
) -> list[Tensor | None]:
    """Gradients of query, key, value, decay, left (None for a delta rule: in that of the key), right, first state."""
    given = recurrence(operands, offset, delta, narrow)
    found = recur_backward(given, cotangent, initial=state, final_cotangent=of_last, kept=kept)
    return [found.query, found.key, found.value, found.decay, found.left, found.right, found.initial]


def kept_count(step: Carry | Recur, operands: Operands, reach: Reach | None = None) -> int:
    """How many tensors the kernels of a step keep for its gradients."""
    decay = operands[DECAY]
    packed = reach is not None and reach.same is not None
    kind = "channel" if decay is not None and decay.dim() == 4 else "none" if decay is None and not packed else "scalar"
    if isinstance(step, Recur):
        return len(kept_names(Variant(kind, rule="delta" if step.left == step.key else "dplr")))
    assert reach is not None
    return len(kept_names(Variant(kind, reach.kind, step.total is not None)))


def kept_by_sum(operands: Operands, reach: Reach, total: bool, narrow: bool) -> list[tuple[list[int], torch.dtype]]:
    """Shape and type of what the kernels of a sum keep for its gradients."""
    query, key, value, decay = narrowed(operands, narrow)
    return prepare_sum(query, key, value, decay, reach, total)[0].kept_shapes()


def kept_by_recurrence(
    operands: Operands, offset: int, delta: bool, narrow: bool
) -> list[tuple[list[int], torch.dtype]]:
    """The same of a recurrence."""
    return prepare_recurrence(recurrence(operands, offset, delta, narrow)).kept_shapes()


def narrowed(operands: Operands, narrow: bool) -> Sequence[Any]:
    """Operands as the kernels take them: all but the decay, which is the fourth, in bfloat16 where `narrow`."""
    if not narrow:
        return operands
    return [one if one is None or at == DECAY else one.to(torch.bfloat16) for at, one in enumerate(operands)]


def chunked_texts(composition: Composition) -> dict[str, str]:
    """Generated modules by the step's name, for people: as for calls in which every query head has its own keys."""
    texts = {}
    for step in composition.steps:
        if isinstance(step, Carry | Recur):
            texts[step.name] = chunked_text(plain_variant(step, composition.arrays), composition.source.text)
    return texts

"""Carried sums on the chunked skeleton: `Carry` of compiler/composition.py, forward and backward, on tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from attnc.compiler.emit.chunked import kept_names
from attnc.compiler.emit.chunked_kernel import Variant
from attnc.runtime.cpu.reaches import Reach
from attnc.runtime.cuda.chunked_operands import (
    batch_of,
    decay_gradient,
    element_type,
    gathered,
    of_first_members,
    spread,
    whole_decay,
)
from attnc.runtime.cuda.kernel_call import processors
from attnc.runtime.cuda.launch_chunked import ChunkedCall, Sizes, tile_length


@dataclass(frozen=True)
class Carried:
    """out (B, H, N, E) in the operands' type, total (B, H, N) and final (B, heads of the states, F, E) in float32.

    With a total, final has one more column: the sum of the (decayed) keys.
    `kept`: what spares `carry_backward` a part of its work, for 2 F E / 64 elements a position and head.
    """

    out: Tensor
    total: Tensor | None = None
    final: Tensor | None = None
    kept: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class CarryGradients:
    """Gradients in the shapes and types of the operands."""

    query: Tensor
    key: Tensor
    value: Tensor
    decay: Tensor | None
    initial: Tensor | None = None


def carry_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor | None = None,
    *,
    reach: Reach | None = None,
    total: bool = False,
    initial: Tensor | None = None,
    final: bool = False,
    keep: bool = False,
    dtype: torch.dtype | None = None,
) -> Carried:
    """out_i = sum over the keys j that i sees of w_ij v_j, w_ij = sum_f Q_if K_jf exp(sum of g_u for j < u <= i).

    query (B, H, N, F), key (B, Hk, M, F), value (B, Hk, M, E), float32, bfloat16 or float16, of any strides; decay g
    None, (B, H or Hk, T) or (B, H or Hk, T, F), T >= the positions, or 1 for all. A batch or head of 1 serves all. The
    offset of `reach` may be negative: rows before any key see nothing. `initial`: a state as `final` is one, before the
    first key. Its heads are those of the key and value, or all where the decay has more. `dtype`: of out, else the
    operands'.

    Raises ValueError for operands that do not fit, and for a decay over all keys; else as `element_type`.
    """
    reach = reach or Reach()
    call, scaled = prepare(query, key, value, decay, reach, total)
    del scaled
    refuse_states(reach, initial is not None or final)
    sizes = call.sizes
    first, chunks = sizes.query_chunks()
    out = call.for_rows("out", (sizes.e,), dtype)
    sums = call.for_rows("total", (), torch.float32) if total else None
    if out.numel() and sizes.keys and sizes.f:
        run_forward(call, initial, final)
        e_blocks = call.blocks("outputs")[1]
        aliases = {"states": "end", "norms": "end_norm"} if reach.kind == "all" else {}
        grid = (e_blocks, chunks * sizes.tiles, sizes.batch * sizes.heads)
        call.run("outputs", grid, aliases, FIRST=first * sizes.tiles)
    elif not out.numel() or not sizes.f:
        out.zero_()
    return Carried(out.to(dtype or call.given), sums, call.end() if final else None, call.kept() if keep else {})


def carry_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor | None,
    cotangent: Tensor,
    *,
    reach: Reach | None = None,
    total_cotangent: Tensor | None = None,
    initial: Tensor | None = None,
    final_cotangent: Tensor | None = None,
    kept: Sequence[Tensor] = (),
) -> CarryGradients:
    """Gradients of `carry_forward` from those of out, total (B, H, N) and final (where they were asked for).

    `kept`: the values of `kept` of a forward with the same operands; without them, its states are made again.
    """
    reach = reach or Reach()
    call, scaled = prepare(query, key, value, decay, reach, total_cotangent is not None)
    refuse_states(reach, initial is not None or final_cotangent is not None)
    sizes, tensors = call.sizes, call.tensors
    operands = dict(tensors)
    tensors["cotangent"] = cotangent.to(call.dtype)
    if total_cotangent is not None:
        tensors["total_cotangent"] = total_cotangent
    d_query = call.for_rows("d_query", (sizes.f,))
    d_key = call.buffer("d_key", *operands["key"].shape)
    d_value = call.buffer("d_value", *operands["value"].shape)
    if not (d_query.numel() and d_key.numel() and d_value.numel()):
        nothing = [None if one is None else torch.zeros_like(one) for one in (decay, initial)]
        return CarryGradients(torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value), *nothing)
    if kept:
        tensors.update(zip(kept_names(call.variant), kept, strict=True))
    else:
        run_forward(call, initial, final=False)
    everything = reach.kind == "all"
    start = None if final_cotangent is None else of_first_members(final_cotangent, sizes.heads)
    call.sum_states(reverse=True, store=not everything, initial=start, end=everything or initial is not None)
    aliases = {}
    if everything:
        aliases = {"states": "end", "norms": "end_norm", "d_states": "d_end", "d_norms": "d_end_norm"}
    programs = sizes.chunks * sizes.tiles, sizes.batch * sizes.key_heads
    call.run("value_gradients", (call.blocks("value_gradients")[1], *programs), aliases)
    f_blocks = call.blocks("feature_gradients")[0]
    if call.variant.decay != "none":
        lead = (sizes.batch, sizes.heads, sizes.positions)
        shape = (*lead, sizes.f) if call.variant.decay == "channel" else (f_blocks, *lead)
        call.buffer("d_decay", *shape, dtype=torch.float32)
    call.run("feature_gradients", (f_blocks, *programs), aliases)
    d_decay = None
    if decay is not None:
        d_decay = decay_steps(call, reach)
    if scaled is not None:
        d_query, change = scaled.back(d_query)
        if d_decay is not None:
            change[:, :, : d_decay.shape[2]] += d_decay
            d_decay = change
    return CarryGradients(
        gathered(d_query, query),
        gathered(d_key, key),
        gathered(d_value, value),
        None if decay is None or d_decay is None else decay_gradient(d_decay, decay, d_decay.shape[2]),
        None if initial is None else gathered(call.end("d_"), initial),
    )


def prepare(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor | None, reach: Reach, total: bool
) -> tuple[ChunkedCall, LagScale | None]:
    """The call of a sum."""
    dtype = element_type(query, key, value)
    if query.shape[3] != key.shape[3] or key.shape[2] != value.shape[2]:
        raise ValueError(f"operands do not fit: {[tuple(one.shape) for one in (query, key, value)]}")
    given = [query, key, value, *([decay] if decay is not None else [])]
    batch = batch_of(*given, *([] if reach.same is None else [reach.same]))
    key_heads = max(key.shape[1], value.shape[1])
    heads = max(one.shape[1] for one in given)
    lag = reach.amount if reach.kind == "lag" else 0
    shift = 0 if reach.kind == "all" else reach.offset - lag
    if decay is not None or reach.same is not None:
        decay = whole_decay(decay, reach.same, batch, max(key.shape[2], query.shape[2] + reach.offset))
    kind = "none" if decay is None else "channel" if decay.dim() == 4 else "scalar"
    if kind != "none" and reach.kind == "all":
        raise ValueError("a decay has no meaning where every query sees every key")
    if reach.kind == "period" and reach.amount < 1:
        raise ValueError(f"a period is at least 1, not {reach.amount}")
    variant = Variant(kind, reach.kind, total, heads != key_heads)
    tile = tile_length(variant, dtype)
    length = reach.amount if reach.kind == "period" else tile
    sizes = Sizes(
        batch,
        heads,
        key_heads,
        1 if decay is None else decay.shape[1],
        query.shape[2],
        key.shape[2],
        shift,
        key.shape[3],
        value.shape[3],
        length,
        tile,
        processors(query),
    )
    query = spread(query, batch, heads)
    tensors = {"key": spread(key, batch, key_heads).to(dtype), "value": spread(value, batch, key_heads).to(dtype)}
    scaled = None
    if decay is not None:
        tensors["decay"] = decay
        if lag:
            scaled = LagScale(query, decay, reach.offset, lag)
            query = scaled.scaled
    tensors["query"] = query.to(dtype)
    return ChunkedCall(variant, sizes, tensors), scaled


def refuse_states(reach: Reach, given: bool) -> None:
    """Raises ValueError for a state from outside that the reach gives no meaning."""
    if given and (reach.kind == "all" or (reach.kind == "lag" and reach.amount)):
        raise ValueError("a state from outside, or left outside, goes with reach of periods, or `lag` of no amount")


def run_forward(call: ChunkedCall, initial: Tensor | None, final: bool) -> None:
    """What forward and backward both need: prefix sums, weights, states."""
    call.prefix_sums()
    call.scores()
    everything = call.variant.extent == "all"
    call.sum_states(reverse=False, store=not everything, initial=initial, end=everything or final)


def decay_steps(call: ChunkedCall, reach: Reach) -> Tensor:
    """The gradient of the decay at every position, over all heads, in float32."""
    found = call.tensors["d_decay"]
    if call.variant.decay == "scalar":
        found = found.sum(0)
    if reach.kind == "period":  # a chunk is longer than a tile: its kernels leave the terms of the sum
        found = found.double().flip(2).cumsum(2).flip(2).float()
    return found


class LagScale:
    """Queries that lag behind: what decays between the last key that a query sees and the query, as a factor of it."""

    def __init__(self, query: Tensor, decay: Tensor, offset: int, lag: int) -> None:
        rows = torch.arange(query.shape[2], device=query.device) + offset
        ahead = torch.nn.functional.pad(decay.double().cumsum(2), (0, 0, 1, 0) if decay.dim() == 4 else (1, 0))
        self.last, self.first = rows + 1, (rows - lag + 1).clamp(min=0)
        steps = ahead[:, :, self.last] - ahead[:, :, self.first]
        self.length = decay.shape[2]
        self.factors = spread(steps.exp().float(), query.shape[0], query.shape[1])
        if decay.dim() == 3:
            self.factors = self.factors[..., None]
        self.channel = decay.dim() == 4
        self.query = query
        self.scaled = query * self.factors

    def back(self, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """(gradient of the query, what the decay's gradient gains (B, H, T[, F]))."""
        d_query = gradient * self.factors
        change = (d_query * self.query).double()
        if not self.channel:
            change = change.sum(-1)
        marks = change.new_zeros(*change.shape[:2], self.length + 1, *change.shape[3:])
        marks.index_add_(2, self.first, change)
        marks.index_add_(2, self.last, -change)
        return d_query, marks.cumsum(2)[:, :, :-1].float()

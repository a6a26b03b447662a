"""Recurrences of rank one on the chunked skeleton: `Recur` of compiler/composition.py, forward and backward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from attnc.compiler.emit.chunked import kept_names
from attnc.compiler.emit.chunked_kernel import Variant
from attnc.compiler.schedule_chunked import WIDEST_SOLVED
from attnc.runtime.cuda.chunked_operands import batch_of, decay_gradient, element_type, gathered, spread, whole_decay
from attnc.runtime.cuda.kernel_call import processors
from attnc.runtime.cuda.launch_chunked import ChunkedCall, Sizes, tile_length


@dataclass(frozen=True)
class Recurrence:
    """The operands of S_t = diag(exp g_t) S_{t-1} + x_t (y_t^T S_{t-1}) + k_t v_t^T, out_t = q_t^T S_t.

    query (B, H, N, F) is row 0 at position `offset` (-1: each row reads the state before its own position);
    key k, left x, right y (B, H, T, F), value v (B, H, T, E), decay g None, (B, H, T) or (B, H, T, F). `left` None
    stands for the keys, as in the delta rule (y = -beta k), which costs about half. A batch or head of 1, or heads that
    divide, are shared.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    right: Tensor
    left: Tensor | None = None
    decay: Tensor | None = None
    offset: int = 0


@dataclass(frozen=True)
class RecurrenceGradients:
    """In the shapes and types of the operands; that of `key` holds what reaches it as `left` where that is None."""

    query: Tensor
    key: Tensor
    value: Tensor
    right: Tensor
    left: Tensor | None
    decay: Tensor | None
    initial: Tensor | None = None


@dataclass(frozen=True)
class Recurred:
    """out (B, H, N, E) in the operands' type, final (B, H, F, E) in float32; `kept` as in `Carried`."""

    out: Tensor
    final: Tensor | None = None
    kept: Mapping[str, Tensor] = field(default_factory=dict)


def recur_forward(
    given: Recurrence,
    *,
    initial: Tensor | None = None,
    final: bool = False,
    keep: bool = False,
    dtype: torch.dtype | None = None,
) -> Recurred:
    """The rows' reads and, where `final`, the state at the end.

    Float32, bfloat16 or float16 of any strides; `initial` (B, H, F, E) is the state before position 0,
    which rows before position 0 do not see. Raises
    ValueError for operands that do not fit, or more than 128 features; else as `element_type`.
    """
    call = prepare(given)
    sizes = call.sizes
    first, chunks = sizes.query_chunks()
    out = call.for_rows("out", (sizes.e,), dtype)
    if not (out.numel() and sizes.keys and sizes.f):
        out.zero_()
        return Recurred(out.to(dtype or call.given), initial)
    solve_states(call, initial, final)
    grid = (call.blocks("outputs")[1], chunks, sizes.batch * sizes.heads)
    call.run("outputs", grid, FIRST=first)
    return Recurred(out.to(dtype or call.given), call.tensors["end"] if final else None, call.kept() if keep else {})


def recur_backward(
    given: Recurrence,
    cotangent: Tensor,
    *,
    initial: Tensor | None = None,
    final_cotangent: Tensor | None = None,
    kept: Sequence[Tensor] = (),
) -> RecurrenceGradients:
    """Gradients of `recur_forward` from those of out and, where it was asked for, of the final state.

    `kept`: the values of `kept` of a forward with the same operands; without them, its states are made again.
    """
    call = prepare(given)
    sizes, tensors = call.sizes, call.tensors
    lead, grid = (sizes.batch, sizes.heads), (1, sizes.chunks, sizes.batch * sizes.heads)
    tensors["cotangent"] = cotangent.to(call.dtype)
    names = ["query", "key", "right", *(["left"] if given.left is not None else [])]
    length = {name: sizes.rows if name == "query" else sizes.keys for name in names}
    if not (sizes.keys and sizes.rows and sizes.f and sizes.e and sizes.batch * sizes.heads):
        operands = (given.query, given.key, given.value, given.right, given.left, given.decay, initial)
        return RecurrenceGradients(*(None if one is None else torch.zeros_like(one) for one in operands))  # type: ignore[arg-type]
    if kept:
        tensors.update(zip(kept_names(call.variant), kept, strict=True))
    else:
        solve_states(call, initial, final=False)
    found = {name: call.buffer(f"d_{name}", *lead, length[name], sizes.f, zero=sizes.shift < 0) for name in names}
    call.buffer("d_base", *lead, sizes.positions, sizes.e)
    call.buffer("d_reads", *lead, sizes.positions, sizes.f)
    aliases = {name: f"d_{name}" for name in ("base", "reads", "states", "end", "initial")} | {"rows": "d_solved"}
    call.run("solve_reverse", grid, aliases)
    d_value = call.buffer("d_solved", *lead, sizes.positions, sizes.e)
    start = final_cotangent.float().contiguous() if final_cotangent is not None else None
    pass_states(call, reverse=True, initial=start, end=initial is not None, aliases=aliases)
    if given.left is not None:
        d_value = call.buffer("d_value", *lead, sizes.keys, sizes.e)
        call.run("value_gradients", (call.blocks("value_gradients")[1], *grid[1:]))
    f_blocks = call.blocks("feature_gradients")[0]
    if given.decay is not None:
        shape = (*lead, sizes.positions)
        call.buffer(
            "d_decay", *((*shape, sizes.f) if given.decay.dim() == 4 else (f_blocks, *shape)), dtype=torch.float32
        )
    call.run("feature_gradients", (f_blocks, *grid[1:]))
    d_decay = None
    if given.decay is not None:
        steps = tensors["d_decay"] if given.decay.dim() == 4 else tensors["d_decay"].sum(0)
        d_decay = decay_gradient(steps, given.decay, sizes.positions)
    return RecurrenceGradients(
        gathered(found["query"], given.query),
        gathered(found["key"], given.key),
        gathered(d_value[:, :, : sizes.keys], given.value),
        gathered(found["right"], given.right),
        gathered(found["left"], given.left) if given.left is not None else None,
        d_decay,
        None if initial is None else gathered(tensors["d_end"], initial),
    )


def prepare(given: Recurrence) -> ChunkedCall:
    """The call of a recurrence: all operands have as many heads."""
    operands = {"query": given.query, "key": given.key, "value": given.value, "right": given.right}
    if given.left is not None:
        operands["left"] = given.left
    dtype = element_type(*operands.values())
    every = [*operands.values(), *([given.decay] if given.decay is not None else [])]
    batch, heads = batch_of(*every), max(one.shape[1] for one in every)
    length = given.key.shape[2]
    fit = all(one.shape[2] == length for name, one in operands.items() if name != "query")
    fit = fit and all(one.shape[3] == given.key.shape[3] for name, one in operands.items() if name != "value")
    if not fit or given.offset + given.query.shape[2] > length:
        raise ValueError(f"operands do not fit: {[(name, tuple(one.shape)) for name, one in operands.items()]}")
    if given.key.shape[3] > WIDEST_SOLVED:
        raise ValueError(f"a recurrence has at most {WIDEST_SOLVED} features, not {given.key.shape[3]}")
    decay = given.decay
    kind = "none" if decay is None else "channel" if decay.dim() == 4 else "scalar"
    variant = Variant(kind, rule="delta" if given.left is None else "dplr")
    tile = tile_length(variant, dtype)
    widths = given.key.shape[3], given.value.shape[3]
    most = processors(given.query)
    sizes = Sizes(batch, heads, heads, heads, given.query.shape[2], length, given.offset, *widths, tile, tile, most)
    tensors = {name: spread(one, batch, heads).to(dtype) for name, one in operands.items()}
    if decay is not None:
        decay = whole_decay(decay, None, batch, length)
        assert decay is not None
        tensors["decay"] = decay
        sizes = replace(sizes, decay_heads=decay.shape[1])
    return ChunkedCall(variant, sizes, tensors)


def solve_states(call: ChunkedCall, initial: Tensor | None, final: bool) -> None:
    """What forward and backward both need: prefix sums, weights, the solved systems, the states."""
    sizes = call.sizes
    lead = (sizes.batch, sizes.heads)
    call.prefix_sums()
    call.scores()
    call.buffer("inverse", *lead, sizes.chunks, sizes.tile, sizes.tile)
    call.buffer("base", *lead, sizes.positions, sizes.e)
    call.buffer("reads", *lead, sizes.positions, sizes.f)
    call.run("solve", (1, sizes.chunks, sizes.batch * sizes.heads))
    call.buffer("solved", *lead, sizes.positions, sizes.e)
    start = initial.float().contiguous() if initial is not None else None
    pass_states(call, reverse=False, initial=start, end=final, aliases={"rows": "solved"})


def pass_states(call: ChunkedCall, reverse: bool, initial: Tensor | None, end: bool, aliases: dict[str, str]) -> None:
    """States in order, each from the one before."""
    sizes, name, mark = call.sizes, "states_reverse" if reverse else "states", "d_" if reverse else ""
    call.state_buffers(mark, sizes.heads, store=True, end=end, count=1)
    if initial is not None:
        call.tensors[f"{mark}initial"] = initial
    flags = {"STORE": True, "INITIAL": initial is not None, "JOIN": False, "PARTS": False, "END": end}
    call.run(name, (call.blocks(name)[1], sizes.batch * sizes.heads, 1), aliases, **flags)

"""Hybrids written by hand: FlexAttention and SDPA for softmax, fla for states, torch.compile for the glue between them.

What somebody without a compiler for mixtures would write. Masks that no tensor decides are built beforehand; those of a
selection are part of the call. fla keeps tokens before heads: its tensors are laid out beforehand, too.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import rms_norm

from benchmarks.libraries import library, tokens_first
from benchmarks.ready import Ready, UnavailableError, first_line
from benchmarks.timing import seconds_of
from benchmarks.work import Mask, Problem

F = TypeVar("F", bound=Callable[..., object])
TILE = 128  # rows and keys of FlexAttention's tiles


class Tools(Protocol):
    """What the hybrids are put together from. q, k, v (B, H, N, D) as everywhere here."""

    def glue(self, function: F) -> F:
        """A compiled function of tensors."""

    def masked(self, mask: Mask, problem: Problem) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """Softmax attention under a mask of (i, j) alone."""

    def chosen(self, mask: Mask, touched: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Softmax attention under a mask that tensors of this call decide. `touched`: which tiles of TILE rows and keys
        have a pair (B, H, rows / TILE, keys / TILE)."""

    def selected(self, q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, width: int) -> Tensor:
        """Causal softmax attention to listed blocks of keys: int64 (B, T, Hk, S), -1 for none; tensors (B, T, H, D)."""

    def linear(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal linear attention of features, divided by its weights' sum; tensors (B, T, H, D)."""

    def gated(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float) -> Tensor:
        """Causal linear attention with a log decay g (B, T, H); tensors (B, T, H, D)."""


class Libraries:
    """The libraries themselves, on a GPU."""

    def __init__(self) -> None:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        torch._dynamo.reset()  # each row is a first use
        self.flex = torch.compile(flex_attention, dynamic=False)
        self.blocks = torch.compile(create_block_mask, dynamic=False)

    def glue(self, function: F) -> F:
        compiled: F = torch.compile(function, dynamic=False)  # type: ignore[assignment]
        return compiled

    def masked(self, mask: Mask, problem: Problem) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        rows, keys = problem.q.shape[2], problem.k.shape[2]
        grouped = problem.q.shape[1] != problem.k.shape[1]
        made = self.blocks(mask, None, None, rows, keys, device=problem.device)
        return partial(self.flex, block_mask=made, enable_gqa=grouped)

    def chosen(self, mask: Mask, touched: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        from torch.nn.attention.flex_attention import BlockMask

        counts = touched.sum(-1, dtype=torch.int32)
        tiles = touched.int().argsort(stable=True, dim=-1, descending=True).int()
        lengths = (q.shape[2], k.shape[2])
        made = BlockMask.from_kv_blocks(counts, tiles, BLOCK_SIZE=TILE, mask_mod=mask, seq_lengths=lengths)
        result: Tensor = self.flex(q, k, v, block_mask=made, enable_gqa=q.shape[1] != k.shape[1])
        return result

    def selected(self, q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, width: int) -> Tensor:
        run = library("fla.ops.nsa.parallel").ParallelNSAFunction  # without the pools that parallel_nsa makes
        out: Tensor = run.apply(q, k, v, blocks, blocks.shape[-1], width, q.shape[-1] ** -0.5, None)
        return out

    def linear(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        run = library("fla.ops.linear_attn").chunk_linear_attn
        out: Tensor = run(q, k, v, scale=1.0, normalize=True)[0]
        return out

    def gated(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float) -> Tensor:
        """Where fla refuses the gradient of one gate a head (Hopper, Triton before 3.7.1), a gate a feature."""
        if q.requires_grad and torch.cuda.get_device_capability() == (9, 0) and triton_version() < (3, 7, 1):
            each = g.unsqueeze(-1).expand(*g.shape, q.shape[-1]).contiguous()
            wide: Tensor = library("fla.ops.gla").chunk_gla(q, k, v, each, scale=scale)[0]
            return wide
        out: Tensor = library("fla.ops.simple_gla").chunk_simple_gla(q, k, v, g=g, scale=scale)[0]
        return out


def triton_version() -> tuple[int, ...]:
    """Triton's version in numbers."""
    return tuple(int(part) for part in library("triton").__version__.split(".")[:3])


def windowed(window: int) -> Mask:
    """The last `window` keys."""
    return lambda b, h, i, j: (i - j < window) & (j <= i)


def hymba(problem: Problem, tools: Tools) -> Callable[[], Tensor]:
    """A window and a decaying state, each normed, their mean."""
    q, k, v = problem.q, problem.k, problem.v
    near = tools.masked(windowed(problem.size.parameters["window"]), problem)
    first = [tokens_first(one) for one in (q, k, v, problem.inputs["g"])]

    def mean(near: Tensor, state: Tensor) -> Tensor:
        width = near.shape[-1:]
        state = state.transpose(1, 2)
        return (rms_norm(near.float(), width, eps=1e-6) + rms_norm(state.float(), width, eps=1e-6)).to(near.dtype) / 2

    glue = tools.glue(mean)
    return lambda: glue(near(q, k, v), tools.gated(first[0], first[1], first[2], first[3], q.shape[-1] ** -0.5))


def half_and_half(problem: Problem, tools: Tools) -> Callable[[], Tensor]:
    """Half of the heads linear beyond a window; the others mix it with the window. A query t reads the linear sum
    `window` tokens before, so its features are moved there."""
    q, k, v, mix = problem.q, problem.k, problem.v, problem.inputs["mix"]
    half, window, length = q.shape[1] // 2, int(problem.size.parameters["window"]), q.shape[2]
    near = tools.masked(windowed(window), problem)
    first = [tokens_first(one) for one in (q, k, v)]

    def features(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        phi_q = q[:, window:].float().softmax(-1).to(q.dtype)
        return phi_q, k[:, : length - window].float().softmax(-1).to(k.dtype)

    def mixed(near: Tensor, far: Tensor, mix: Tensor) -> Tensor:
        far = torch.nn.functional.pad(far.transpose(1, 2), (0, 0, window, 0))
        share = mix[half:, None, None]
        return torch.cat([far[:, :half], (share * near + (1 - share) * far[:, half:]).to(far.dtype)], 1)

    phi, glue = tools.glue(features), tools.glue(mixed)

    def call() -> Tensor:
        phi_q, phi_k = phi(first[0], first[1])
        far = tools.linear(phi_q, phi_k, first[2][:, : length - window])
        return glue(near(q[:, half:], k[:, half:], v[:, half:]), far, mix)

    return call


def window_plus_blocks(problem: Problem, tools: Tools) -> Callable[[], Tensor]:
    """A window, and past blocks by their mean keys: a mask of this call's choices."""
    window, block, top = (int(problem.size.parameters[name]) for name in ("window", "block", "top"))

    def near(row: Tensor, number: Tensor) -> Tensor:
        return (number * block <= row) & (number * block + block > row - window + 1)

    def close(i: Any, j: Any) -> Any:
        return i - j < window

    return among_blocks(problem, tools, block, top, near, close)


def moba(problem: Problem, tools: Tools) -> Callable[[], Tensor]:
    """The own block, and past blocks by their mean keys: a mask of this call's choices."""
    block, top = (int(problem.size.parameters[name]) for name in ("block", "top"))

    def near(row: Tensor, number: Tensor) -> Tensor:
        return number == row // block

    def close(i: Any, j: Any) -> Any:
        return i // block == j // block

    return among_blocks(problem, tools, block, top - 1, near, close)


def among_blocks(
    problem: Problem,
    tools: Tools,
    block: int,
    top: int,
    near: Callable[[Tensor, Tensor], Tensor],
    close: Callable[[Any, Any], Any],
) -> Callable[[], Tensor]:
    """Causal attention to keys that are close, or in one of the `top` past blocks whose mean key fits best.

    `near`: which blocks have a close key, by rows and numbers of blocks.
    """
    q, k, v = problem.q, problem.k, problem.v

    def choices(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        heads, rows, keys = q.shape[1], q.shape[2], k.shape[2]
        blocks = -(-keys // block)
        padded = torch.nn.functional.pad(k.float(), (0, 0, 0, blocks * block - keys))
        number = torch.arange(blocks, device=k.device)
        sizes = (keys - number * block).clamp(max=block)
        means = padded.unflatten(2, (blocks, block)).sum(3) / sizes[:, None]
        score = q.float() @ means.repeat_interleave(heads // k.shape[1], 1).mT
        row = torch.arange(rows, device=q.device)[:, None]
        score = score.masked_fill(number * block + sizes > row, float("-inf"))
        best, at = score.topk(min(top, blocks), -1)
        picked = torch.zeros_like(score, dtype=torch.bool).scatter(-1, at, best > float("-inf"))
        return picked, tiles_of(picked | near(row, number), block, keys)

    choose = tools.glue(choices)

    def call() -> Tensor:
        with torch.no_grad():
            picked, touched = choose(q, k)

        def mask(b: Any, h: Any, i: Any, j: Any) -> Any:
            return (j <= i) & (close(i, j) | picked[b, h, i, j // block])

        return tools.chosen(mask, touched, q, k, v)

    return call


def tiles_of(picked: Tensor, block: int, keys: int) -> Tensor:
    """Which tiles of TILE rows and TILE keys have a picked block (B, H, rows / TILE, keys / TILE)."""
    padded = torch.nn.functional.pad(picked, (0, 0, 0, -picked.shape[2] % TILE))
    rows = padded.unflatten(2, (-1, TILE)).any(3)
    tiles = torch.arange(-(-keys // TILE), device=picked.device) * TILE
    first, last = tiles // block, (tiles + TILE - 1).clamp(max=keys - 1) // block
    before = torch.nn.functional.pad(rows.cumsum(-1), (1, 0))  # picked blocks before each
    touched: Tensor = before[..., last + 1] > before[..., first]
    return touched


def nsa(problem: Problem, tools: Tools) -> Callable[[], Tensor]:
    """Compressed, selected and near keys: pools and the choice by torch, selected blocks by fla, the window by Flex."""
    q, k, v, gate = problem.q, problem.k, problem.v, problem.inputs["gate"]
    named = ("size", "stride", "block", "top", "window")
    size, stride, block, top, window = (int({**NSA, **problem.size.parameters}[name]) for name in named)
    near = tools.masked(windowed(window), problem)
    rows, keys, scale = q.shape[2], k.shape[2], q.shape[-1] ** -0.5
    members, blocks = (keys - size) // stride + 1, -(-keys // block)
    device = q.device
    starts = torch.arange(members, device=device) * stride
    row, first = torch.arange(rows, device=device), torch.arange(blocks, device=device) * block
    within = (starts[:, None] < first + block) & (starts[:, None] + size > first)

    def compressed(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        pools = [one.float().unfold(2, size, stride).mean(-1).to(q.dtype) for one in (k, v)]
        grouped = q.unflatten(1, (k.shape[1], -1))
        score = (grouped @ pools[0].unsqueeze(2).mT).float() * scale
        score = score.masked_fill(starts + size > row[:, None] + 1, float("-inf"))
        weights = score.softmax(-1).nan_to_num(0.0)
        out = (weights.to(q.dtype) @ pools[1].unsqueeze(2)).flatten(1, 2)
        shares = (weights.detach().sum(2) @ within.float()).masked_fill(first > row[:, None], float("-inf"))
        number = torch.arange(blocks, device=device)
        recent = (number == 0) | (row[:, None] // block - number <= 1)
        shares = shares.masked_fill(recent & (first <= row[:, None]), float("inf"))
        best, at = shares.topk(min(top, blocks), -1)
        return out, at.masked_fill(best == float("-inf"), -1).transpose(1, 2).contiguous()

    def mixed(one: Tensor, two: Tensor, three: Tensor, gate: Tensor) -> Tensor:
        parts = zip((one, two.transpose(1, 2), three), gate.unsqueeze(-2).unbind(-1), strict=True)
        return sum((part * share for part, share in parts), start=torch.zeros_like(one)).to(one.dtype)

    compress, glue = tools.glue(compressed), tools.glue(mixed)
    first_q, first_k, first_v = (tokens_first(one) for one in (q, k, v))

    def call() -> Tensor:
        out, picked = compress(q, k, v)
        return glue(out, tools.selected(first_q, first_k, first_v, picked, block), near(q, k, v), gate)

    return call


NSA = {"size": 32, "stride": 16, "block": 64, "top": 16, "window": 512}
HYBRIDS: dict[str, Callable[[Problem, Tools], Callable[[], Tensor]]] = {
    "half_and_half": half_and_half,
    "hymba": hymba,
    "moba": moba,
    "nsa": nsa,
    "window_plus_blocks": window_plus_blocks,
}
CHOOSING = frozenset({"moba", "nsa", "window_plus_blocks"})  # rounded scores may choose other blocks


def by_hand(problem: Problem) -> Ready:
    """The row's hybrid, written by hand."""
    if problem.work.pattern not in HYBRIDS:
        raise UnavailableError("nobody wrote this one by hand")
    if not problem.q.is_cuda:
        raise UnavailableError("what is written by hand needs a CUDA device")
    call = HYBRIDS[problem.work.pattern](problem, Libraries())
    try:
        first = seconds_of(call, problem.device)
    except UnavailableError:
        raise
    except Exception as error:  # the libraries' own failures have no common type
        raise UnavailableError(f"it fails: {first_line(error)}") from error
    return Ready(call, first, exact=problem.work.pattern not in CHOOSING, note="glue by torch.compile")

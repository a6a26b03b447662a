"""Runs the kernels of `compiler.emit.ordering`: choices and weights of few members, and who takes part first."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from attnc.compiler.emit.ordering import ORDERING
from attnc.runtime.cache import cached_module
from attnc.runtime.cuda.kernel_call import device_of, padded, stride

FEW = 64  # members of a row that a program holds at once; choices compare each with all others
PAIRS = 2**14  # members that a program compares, times those that each is compared with
CHUNK = 1024  # positions of a program
CHUNKS = 1024  # counts that are read at a time
ROWS = 128  # that a program moves: as many as the longest tile of rows that stream by


@lru_cache(maxsize=1)
def _module() -> Any:
    return cached_module(ORDERING, lambda: ORDERING)


def few(scores: Tensor) -> bool:
    """Whether `choose_few` and `weigh_few` take these scores (.., S)."""
    return 0 < scores.shape[-1] <= FEW and scores.dim() <= 4 and scores.dtype == torch.float32 and scores.numel() > 0


@dataclass(frozen=True)
class FewRows:
    """Rows (.., S) as the kernels count them: of three dimensions, some of length 1."""

    shape: tuple[int, ...]

    def over(self, tensor: Tensor) -> Tensor:
        """A tensor that broadcasts against the rows, or against the rows without S, with all dimensions."""
        rank = 4 if tensor.dim() == len(self.shape) else 3
        shape = self.shape[: len(self.shape) + rank - 4]
        return tensor.expand(shape).expand(*(1,) * (rank - len(shape)), *shape)

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Rows, the lengths of the last two dimensions, members."""
        *lead, members = (1,) * (4 - len(self.shape)) + self.shape
        return lead[0] * lead[1] * lead[2], lead[1], lead[2], members

    def launch(self, kernel: Any, *values: Any, pairs: bool, **constants: Any) -> None:
        """`pairs`: whether members are compared with each other."""
        rows, _, _, members = self.sizes
        block = max(1 << (members - 1).bit_length(), 2)
        block_rows = max(PAIRS // (block**2 if pairs else 4 * block), 1)
        kernel[(-(-rows // block_rows),)](
            *values, *self.sizes, **constants, BLOCK_R=block_rows, BLOCK_S=block, num_warps=4
        )


def choose_few(scores: Tensor, count: Tensor, allowed: Tensor, forced: Tensor | None) -> Tensor:
    """`choices.mask_topk`: a bool (.., S) of scores (.., S), float32, for a count (..). See `few`."""
    rows = FewRows(tuple(scores.shape))
    given = [rows.over(one) for one in (scores, allowed, allowed if forced is None else forced, count)]
    chosen = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    strides = [step for one in given for step in one.stride()]
    with device_of(scores):
        rows.launch(_module().choose_few, *given, chosen, *strides, pairs=True, FORCED=forced is not None)
    return chosen


class FewWeights(torch.autograd.Function):
    """The softmax of scores (.., S) where a bool holds, 0 elsewhere, under autograd. See `few`."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, allowed: Tensor) -> Tensor:
        rows = FewRows(tuple(scores.shape))
        given = [rows.over(one) for one in (scores, allowed)]
        weights = torch.empty(scores.shape, dtype=torch.float32, device=scores.device)
        with device_of(scores):
            strides = [step for one in given for step in one.stride()]
            rows.launch(_module().weigh_few, *given, weights, *strides, pairs=False)
        ctx.save_for_backward(weights)
        return weights

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None]:
        (weights,) = ctx.saved_tensors
        rows, gradient = FewRows(tuple(weights.shape)), torch.empty_like(weights)
        given = rows.over(cotangent)
        with device_of(weights):
            rows.launch(_module().weigh_few_back, weights, given, gradient, *given.stride(), pairs=False)
        return gradient, None


def weigh_few(scores: Tensor, allowed: Tensor) -> Tensor:
    """`FewWeights` of these."""
    made: Tensor = FewWeights.apply(scores, allowed)  # type: ignore[no-untyped-call]
    return made


def place_live(live: Tensor) -> tuple[Tensor, Tensor]:
    """Of each line of a bool (b, h, L) its positions, those where it holds first: (b, h, L), and their number (b, h).

    int32. Both kinds ascend.
    """
    batch, heads, length = live.shape
    chunks = max(-(-length // CHUNK), 1)
    shapes = ((batch, heads, length), (batch, heads), (batch, heads, chunks))
    places, count, counts = (torch.empty(shape, dtype=torch.int32, device=live.device) for shape in shapes)
    if batch * heads == 0:
        return places, count
    sizes = (*live.stride(), heads, length, chunks)
    grid = (chunks, batch * heads)
    with device_of(live):
        _module().count_live[grid](live, counts, *sizes, BLOCK=CHUNK, num_warps=4)
        block = max(min(1 << (chunks - 1).bit_length(), CHUNKS), 2)
        _module().place_live[grid](live, counts, places, count, *sizes, BLOCK=CHUNK, BLOCK_C=block, num_warps=4)
    return places, count


def order_rows(
    places: Tensor, count: Tensor, q: Tensor, do: Tensor, lse: Tensor, delta: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q (b, h, L, D), do (b, h, L, E), lse and delta (b, h, L) in the order of places (b, h, L), for the first `count`
    (b, h) of a line and up to the next multiple of ROWS, where a row weighs nothing. What follows is not filled.
    """
    batch, heads, length, width = q.shape
    lse, delta = lse.contiguous(), delta.contiguous()
    made = [torch.empty(one.shape, dtype=one.dtype, device=one.device) for one in (q, do, lse, delta)]
    lines = [stride(one, slot) for one in (places, count) for slot in range(one.dim())]
    rows = [stride(one, slot) for one in (q, do) for slot in range(4)]
    sizes = (heads, length, width, do.shape[3])
    if q.numel():
        grid = (-(-length // ROWS), batch * heads)
        blocks = {"BLOCK": ROWS, "BLOCK_D": padded(width), "BLOCK_E": padded(do.shape[3])}
        with device_of(q):
            _module().order_rows[grid](
                places, count, q, do, lse, delta, *made, *lines, *rows, *sizes, **blocks, num_warps=8
            )
    return made[0], made[1], made[2], made[3]

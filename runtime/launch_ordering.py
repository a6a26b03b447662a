"""Runs the kernels of `compiler.emit.ordering`: choices among few members, and who takes part first."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from attnc.compiler.emit.ordering import ORDERING
from attnc.runtime.cache import cached_module
from attnc.runtime.kernel_call import device_of

FEW = 64  # members that are compared with each other; more are sorted
PAIRS = 2**14  # of members that a program compares
CHUNK = 1024  # positions of a program
CHUNKS = 1024  # counts that are read at a time


@lru_cache(maxsize=1)
def _module() -> Any:
    return cached_module(ORDERING, lambda: ORDERING)


def few(scores: Tensor) -> bool:
    """Whether `choose_few` takes these scores (.., S)."""
    return 0 < scores.shape[-1] <= FEW and scores.dim() <= 4 and scores.dtype == torch.float32 and scores.numel() > 0


def choose_few(scores: Tensor, count: Tensor, allowed: Tensor, forced: Tensor | None) -> Tensor:
    """`choices.mask_topk`: a bool (.., S) of scores (.., S), float32, for a count (..). See `few`."""
    shape, members = scores.shape, scores.shape[-1]
    leads = (1,) * (4 - len(shape)) + tuple(shape[:-1])
    given = [scores, allowed.expand(shape), (allowed if forced is None else forced).expand(shape)]
    given = [one.expand(*(1,) * (4 - len(shape)), *shape) for one in given]
    counts = count.expand(shape[:-1]).expand(leads)
    chosen = torch.empty(shape, dtype=torch.bool, device=scores.device)
    block = max(1 << (members - 1).bit_length(), 2)
    block_rows = max(PAIRS // block**2, 1)
    rows = leads[0] * leads[1] * leads[2]
    strides = [stride for one in given for stride in one.stride()]
    with device_of(scores):
        _module().choose_few[(-(-rows // block_rows),)](
            *given,
            counts,
            chosen,
            *strides,
            *counts.stride(),
            rows,
            *leads[1:],
            members,
            FORCED=forced is not None,
            BLOCK_R=block_rows,
            BLOCK_S=block,
            num_warps=4,
        )
    return chosen


def place_live(live: Tensor) -> tuple[Tensor, Tensor]:
    """Of each line of a bool (b, h, L) its positions, those where it holds first: (b, h, L), and their number (b, h).

    int32. Both kinds ascend.
    """
    batch, heads, length = live.shape
    chunks = max(-(-length // CHUNK), 1)
    made = {"dtype": torch.int32, "device": live.device}
    places, count = torch.empty(batch, heads, length, **made), torch.empty(batch, heads, **made)
    counts = torch.empty(batch, heads, chunks, **made)
    if batch * heads == 0:
        return places, count
    sizes = (*live.stride(), heads, length, chunks)
    grid = (chunks, batch * heads)
    with device_of(live):
        _module().count_live[grid](live, counts, *sizes, BLOCK=CHUNK, num_warps=4)
        block = min(1 << (chunks - 1).bit_length(), CHUNKS)
        _module().place_live[grid](
            live, counts, places, count, *sizes, BLOCK=CHUNK, BLOCK_C=max(block, 2), num_warps=4
        )
    return places, count

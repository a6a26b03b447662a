"""Who takes part: attnc, and what people would use instead.

Each entry of `CONTENDERS` makes a `Ready` from a problem, with all that can be made beforehand made, and raises
`UnavailableError` with the reason where it cannot take part.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.by_hand import by_hand
from benchmarks.libraries import fla, natten
from benchmarks.ready import Ready, UnavailableError, first_line
from benchmarks.timing import seconds_of
from benchmarks.work import Problem, no_inputs
from benchmarks.written import causal_cudnn, compiled, eager


def attnc(problem: Problem) -> Ready:
    """The pattern, by its public call."""

    def call() -> Tensor:
        return problem.pattern(problem.q, problem.k, problem.v, **problem.settings)

    return Ready(call, seconds_of(call, problem.device))


def dense(problem: Problem) -> Ready:
    """Causal attention by torch, on the kernel that it chooses: what a pattern has to beat to be worth it."""
    q, k, v = problem.q, problem.k, problem.v
    call = partial(scaled_dot_product_attention, q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    return Ready(call, seconds_of(call, problem.device), exact=problem.work.pattern == "causal")


def cudnn(problem: Problem) -> Ready:
    """Causal attention by cuDNN."""
    return sdpa(problem, "CUDNN_ATTENTION", "cuDNN")


def flash(problem: Problem) -> Ready:
    """Causal attention by torch's own FlashAttention."""
    return sdpa(problem, "FLASH_ATTENTION", "FlashAttention")


def sdpa(problem: Problem, kernel: str, name: str) -> Ready:
    """Causal attention by one of torch's kernels."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if not problem.q.is_cuda:
        raise UnavailableError(f"{name} needs a CUDA device")
    if problem.work.pattern != "causal":
        raise UnavailableError(f"{name}'s kernel is dense")
    q, k, v = problem.q, problem.k, problem.v

    def call() -> Tensor:
        with sdpa_kernel(getattr(SDPBackend, kernel)):
            return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])

    try:
        return Ready(call, seconds_of(call, problem.device))
    except RuntimeError as error:
        raise UnavailableError(f"{name} refuses: {first_line(error)}") from error


def flex(problem: Problem) -> Ready:
    """FlexAttention, compiled, its block mask built beforehand by a compiled create_block_mask."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if not problem.q.is_cuda:
        raise UnavailableError("FlexAttention is compared on a GPU")
    if problem.mask is None:
        raise UnavailableError("no mask of FlexAttention says the same")
    torch._dynamo.reset()  # each row is a first use; and no row reaches the limit of recompilations
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # else it would go on with dense eager attention
    q, k, v, mask = problem.q, problem.k, problem.v, problem.mask
    batch = None if problem.work.inputs is no_inputs else q.shape[0]
    build_eagerly = partial(create_block_mask, mask, batch, None, q.shape[2], k.shape[2], device=problem.device)
    build = partial(torch.compile(create_block_mask, dynamic=False), *build_eagerly.args, **build_eagerly.keywords)
    made: list[Any] = []
    note = "mask by compiled create_block_mask"
    try:
        building = seconds_of(lambda: made.append(build()), problem.device)
    except Exception as error:  # the compiler's own failures have no common type
        if q.shape[2] * k.shape[2] > 2**32:
            raise UnavailableError(f"create_block_mask does not compile: {first_line(error)}") from error
        note, build = f"mask by eager create_block_mask, compiled it fails: {first_line(error)}", build_eagerly
        building = seconds_of(lambda: made.append(build()), problem.device)
    block_mask = made.pop()
    compiled = torch.compile(flex_attention, dynamic=False)

    def call() -> Tensor:
        result: Tensor = compiled(q, k, v, block_mask=block_mask, enable_gqa=q.shape[1] != k.shape[1])
        return result

    try:
        first = seconds_of(call, problem.device)
    except Exception as error:
        raise UnavailableError(f"FlexAttention fails: {first_line(error)}") from error
    held = [part for part in block_mask.as_tuple() if isinstance(part, Tensor)]
    return Ready(call, building + first, True, build, sum(part.nbytes for part in held), note)


CONTENDERS: dict[str, Callable[[Problem], Ready]] = {
    "attnc": attnc,
    "eager": eager,
    "compiled": compiled,
    "causal_cudnn": causal_cudnn,
    "cudnn": cudnn,
    "flash": flash,
    "dense": dense,
    "flex": flex,
    "fla": fla,
    "natten": natten,
    "by_hand": by_hand,
}
LABELS = {
    "attnc": "attnc",
    "eager": "eager torch",
    "compiled": "torch.compile",
    "causal_cudnn": "causal cuDNN",
    "cudnn": "cuDNN",
    "flash": "flash SDPA",
    "dense": "dense SDPA",
    "flex": "FlexAttention",
    "fla": "fla",
    "natten": "NATTEN",
    "by_hand": "by hand",
}
GROUPS = {"sdpa": ("dense", "flash", "cudnn")}  # names for several of them

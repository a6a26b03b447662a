"""Whole calls on a CUDA device, forward and with gradients: `python -m benchmarks.calls [NAME ..]`, bfloat16.

Times hold everything between the call and its result: binding, choices, tables, kernels. Inputs are drawn as
`attnc check` does. The first calls of a kind compile and record what it does; those are not timed. Beside the patterns:
`dense N D`, causal attention by cuDNN (B1 H16); `fla N`, fla's parallel_nsa at the sizes of `nsa N` without its window,
which asks for flash-attn (its compressed blocks are the selected ones: `nsa same N` is that function, and a window);
`flex N`, FlexAttention given the blocks of `moba N`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from attnc.runtime.tools.inputs import Shape
from benchmarks.by_hand import Libraries, moba
from benchmarks.libraries import library
from benchmarks.work import Problem, Size, drawn

STATE = Shape.square(2, 16, 8192, 128)
LONG = Shape.square(1, 16, 65536, 128)
LOW = Shape.square(1, 16, 32768, 64)
WIDE = Shape.square(1, 16, 32768, 128)
SHORT = Shape.square(1, 16, 8192, 128)
LINES = Shape.square(1, 16, 16384, 64)
NSA = (8192, 32768, 65536)


def grouped(length: int) -> Shape:
    """Sizes of nsa."""
    return Shape(1, 64, 4, length, length, 128, 128)


Call = tuple[str, Shape, dict[str, Any], dict[str, int]]
# name: the pattern, sizes, parameters, lengths of axes that nothing fixes
CALLS: dict[str, Call] = {
    **{
        name: (name, STATE, {}, {})
        for name in ("linear", "retention", "simple_gla", "gla", "delta", "gated_delta", "kda")
    },
    **{f"{name} 64K": (name, LONG, {}, {}) for name in ("linear", "gla", "gated_delta")},
    "half_and_half": ("half_and_half", STATE, {"window": 512}, {}),
    "hymba": ("hymba", STATE, {"window": 1024}, {}),
    "window_plus_blocks": ("window_plus_blocks", SHORT, {"window": 512, "block": 64, "top": 8}, {}),
    **{f"nsa {n // 1024}K": ("nsa", grouped(n), {"window": 512}, {}) for n in NSA},
    **{f"nsa same {n // 1024}K": ("nsa", grouped(n), {"window": 512, "size": 64, "stride": 64}, {}) for n in NSA},
    "moba 32K": ("moba", WIDE, {"block": 512, "top": 3}, {}),
    "moba 128K": ("moba", Shape.square(1, 16, 131072, 128), {"block": 512, "top": 3}, {}),
    "moh 8K, 4 of 16": ("moh", SHORT, {"active": 4}, {}),
    "moh 32K, 4 of 16": ("moh", WIDE, {"active": 4}, {}),
    "full 8K": ("full", SHORT, {}, {}),
    "full 32K": ("full", WIDE, {}, {}),
    "linformer": ("linformer", LOW, {}, {"r": 256}),
    "nystrom": ("nystrom", LOW, {"landmarks": 64}, {}),
    "agent": ("agent", LOW, {}, {"m": 64}),
    "compressed": ("compressed", LOW, {}, {}),
    "latent": ("latent", LOW, {}, {"m": 256}),
    "mla": ("mla", SHORT, {}, {"c": 256, "x": 64}),
    "causal": ("causal", STATE, {}, {}),
    "documents": ("documents", STATE, {}, {}),
    "sliding_window": ("sliding_window", WIDE, {"window": 1024}, {}),
    "longformer": ("longformer", LINES, {}, {}),
    "bigbird": ("bigbird", LINES, {}, {}),
    "strided": ("strided", LOW, {"local": 128, "stride": 128}, {}),
}
PEERS = (
    "dense 8192 128",
    "dense 32768 64",
    "dense 32768 128",
    "dense 131072 128",
    "fla 8192",
    "fla 32768",
    "flex 32768",
)
BEFORE = 4  # calls before a kind is timed: compiled, recorded, repeated


def dense(length: int, width: int) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """Causal attention by cuDNN, and what its gradient is taken of."""
    q, k, v = (
        torch.randn(1, 16, length, width, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)
    )

    def call() -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return scaled_dot_product_attention(q, k, v, is_causal=True)

    return call, [q, k, v]


def fla(length: int) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """fla's native sparse attention, its choice and compressed branch included; tensors (B, T, H, D)."""
    run = library("fla.ops.nsa").parallel_nsa
    shapes = [(1, length, heads, 128) for heads in (64, 4, 4)] + [(1, length, 64)] * 2
    given = [torch.randn(shape, device="cuda").to(torch.bfloat16).requires_grad_() for shape in shapes]
    q, k, v, compressed, selected = given
    return lambda: run(q, k, v, compressed, selected, block_counts=16, block_size=64), given


def flex(length: int) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """FlexAttention with a mask of moba's choices, which are made by torch, compiled."""
    size = Size(Shape.square(1, 16, length, 128), {"block": 512, "top": 3})
    problem = Problem(drawn("moba", size, size, ()), size, "cuda", torch.bfloat16)
    given = [one.requires_grad_() for one in (problem.q, problem.k, problem.v)]
    return moba(problem, Libraries()), given


MADE: dict[str, Callable[..., tuple[Callable[[], Tensor], list[Tensor]]]] = {"dense": dense, "fla": fla, "flex": flex}


def pattern(call: Call) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """A pattern's call, and what its gradient is taken of."""
    name, shape, parameters, axes = call
    size = Size(shape, parameters)
    problem = Problem(drawn(name, size, size, (), axes=axes), size, "cuda", torch.bfloat16)
    settings = problem.settings
    given = [problem.q, problem.k, problem.v, *settings.values()]
    leaves = [one for one in given if isinstance(one, Tensor) and one.is_floating_point()]
    for leaf in leaves:
        leaf.requires_grad_()
    return lambda: problem.pattern(problem.q, problem.k, problem.v, **settings), leaves


def row(name: str) -> str:
    """Medians in milliseconds, the time that the host is busy with a forward, the most memory beyond the inputs."""
    from triton.testing import do_bench

    kind, *numbers = name.split()
    call, leaves = pattern(CALLS[name]) if name in CALLS else MADE[kind](*map(int, numbers))
    cotangent = torch.randn_like(call())

    def both() -> None:
        torch.autograd.grad(call(), leaves, cotangent, allow_unused=True)

    for _ in range(BEFORE):
        both()
    with torch.no_grad():
        for _ in range(BEFORE):
            call()
        forward = do_bench(call, warmup=8, rep=40, return_mode="median")
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(BEFORE):
            call()
        host = (time.perf_counter() - began) / BEFORE * 1e3
    gradients = do_bench(both, warmup=8, rep=50, return_mode="median")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    both()
    peak = (torch.cuda.max_memory_allocated() - held) / 2**20
    return f"| {name} | {forward:.3f} | {gradients:.3f} | {host:.2f} | {peak:.0f} |"


def main() -> None:
    """A table, line by line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join((*CALLS, *PEERS))}; default: all")
    names = parser.parse_args().names or [*CALLS, *PEERS]
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}\n")
    print("| call | forward ms | with backward ms | host ms a forward | peak MiB |\n|---|---|---|---|---|")
    for name in names:
        print(row(name), flush=True)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()

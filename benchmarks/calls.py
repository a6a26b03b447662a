"""Whole calls on a CUDA device, forward and with gradients: `python -m benchmarks.calls [NAME ..]`, bfloat16.

Times hold everything between the call and its result: binding, choices, tables, kernels. Inputs are drawn as
`attnc check` does. The first calls of a kind compile and record what it does; those are not timed. `dense N D` beside
the patterns is causal attention by cuDNN (B1 H16).
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

from attnc.runtime.inputs import Shape
from benchmarks.work import Problem, Size, drawn

STATE = Shape.square(2, 16, 8192, 128)
LONG = Shape.square(1, 16, 65536, 128)
LOW = Shape.square(1, 16, 32768, 64)
WIDE = Shape.square(1, 16, 32768, 128)
SHORT = Shape.square(1, 16, 8192, 128)
LINES = Shape.square(1, 16, 16384, 64)
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
    "nsa 8K": ("nsa", Shape(1, 64, 4, 8192, 8192, 128, 128), {"window": 512}, {}),
    "nsa 32K": ("nsa", Shape(1, 64, 4, 32768, 32768, 128, 128), {"window": 512}, {}),
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
DENSE = ("dense 8192 128", "dense 32768 64", "dense 32768 128", "dense 131072 128")
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

    given = name.split()
    call, leaves = dense(int(given[1]), int(given[2])) if given[0] == "dense" else pattern(CALLS[name])
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
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join((*CALLS, *DENSE))}; default: all")
    names = parser.parse_args().names or [*CALLS, *DENSE]
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}\n")
    print("| call | forward ms | with backward ms | host ms a forward | peak MiB |\n|---|---|---|---|---|")
    for name in names:
        print(row(name), flush=True)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()

"""Shapes of the chunked kernels: positions of a chunk, blocks of features and values, and segments of the sequence."""

from __future__ import annotations

from dataclasses import dataclass

from attnc.compiler.emit.chunked_kernel import Variant

SHORTEST_SEGMENT = 8  # chunks; under that the second pass costs more than it spreads
WIDEST_SOLVED = 256  # features of a state that a recurrence keeps whole in one program


@dataclass(frozen=True)
class ChunkShape:
    """Features and values of a block, warps and pipeline stages of a program."""

    block_f: int
    block_e: int
    warps: int
    stages: int


def chunk_length(variant: Variant, itemsize: int) -> int:
    """Positions of a tile; forward and backward agree, so that backward can use what forward kept."""
    return 32 if variant.rule != "sum" and itemsize > 2 else 64


def chunked_shape(kernel: str, variant: Variant, f: int, e: int, itemsize: int) -> ChunkShape:
    """The shape of a kernel for `f` features and `e` values, each padded to a power of two.

    Measured on an H100, see benchmarks/results/chunked-h100.md.
    """
    if itemsize > 2:
        return single_shape(kernel, variant, f, e)
    if kernel in ("states", "states_reverse"):
        if variant.rule != "sum":
            return ChunkShape(f, min(e, 16 if f > 128 else 32), 4, 3)
        return ChunkShape(min(f, 64), min(e, 64), 4, 2)
    if kernel in ("outputs", "value_gradients"):
        return ChunkShape(min(f, 128), min(e, 64), 4, 2)
    if kernel == "feature_gradients":
        return ChunkShape(min(f, 64), min(e, 64), 8 if variant.decay == "channel" else 4, 2)
    if kernel.startswith("solve"):
        return ChunkShape(min(f, 128), min(e, 128), 4, 1)
    return ChunkShape(min(f, 64), min(e, 64), 4, 1)


def single_shape(kernel: str, variant: Variant, f: int, e: int) -> ChunkShape:
    """Shapes for elements of four bytes, whose products take three passes."""
    if kernel in ("states", "states_reverse"):
        if variant.rule != "sum":
            return ChunkShape(f, 16, 4, 1)
        return ChunkShape(min(f, 64), min(e, 32), 4, 1)
    return ChunkShape(min(f, 32), min(e, 64 if kernel in ("outputs", "value_gradients") else 32), 4, 1)


def segments(programs: int, chunks: int, processors: int, shortest: int = SHORTEST_SEGMENT) -> int:
    """Into how many segments the chunks of a sequence are cut, so that every processor has work."""
    return max(1, min(-(-4 * processors // max(programs, 1)) if programs < 2 * processors else 1, chunks // shortest))

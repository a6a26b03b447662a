"""Shapes of the chunked kernels: positions of a chunk, blocks of features and values, and segments of the sequence."""

from __future__ import annotations

from dataclasses import dataclass

from attnc.compiler.emit.chunked_kernel import Variant

SHORTEST_SEGMENT = 8  # chunks; under that the second pass costs more than it spreads
NEAR = 64  # positions of a block whose pairs are weighed by a score, where features would cancel
WIDEST_SOLVED = 128  # features of a state that a recurrence keeps whole in one program


@dataclass(frozen=True)
class ChunkShape:
    """Features and values of a block, warps and pipeline stages of a program."""

    block_f: int
    block_e: int
    warps: int
    stages: int


def chunk_length(variant: Variant, single: bool) -> int:
    """Positions of a tile, for `single` precision or for bfloat16.

    Forward and backward agree, so that backward can use what forward kept.
    """
    return 32 if variant.rule != "sum" and single else 64


def chunked_shape(kernel: str, variant: Variant, f: int, e: int, single: bool, few: bool = False) -> ChunkShape:
    """The shape of a kernel for `f` features and `e` values, each padded to a power of two.

    `few`: so few heads that the states of a recurrence, a program for some values each, leave processors idle.

    Measured on an H100, see benchmarks/results/chunked-h100.md. In bfloat16 no block is narrower than 64, apart from
    the values of a recurrence's states: Triton 3.6 compiled narrower ones to wrong results there.
    """
    if single:
        return single_shape(kernel, variant, f, e)
    f, e, decays = max(f, 64), max(e, 64), variant.decay == "scalar"
    if kernel in ("states", "states_reverse"):
        if variant.rule != "sum":
            return ChunkShape(f, 16 if few else 32, 4, 2 if decays and kernel == "states_reverse" else 3)
        if decays and kernel == "states_reverse":  # a wider block decays the rows fewer times
            return ChunkShape(64, min(e, 128), 4, 3)
        return ChunkShape(64, 64, 4, 4)
    if kernel == "outputs" and decays:
        return ChunkShape(64, 64, 4, 3)
    if kernel in ("outputs", "value_gradients"):
        return ChunkShape(min(f, 128), 64, 4, 2)
    if kernel == "feature_gradients":
        if variant.decay == "channel":
            return ChunkShape(64, 64, 8, 2)
        if variant.rule != "sum" and decays:
            return ChunkShape(min(f, 128), 64, 8, 2)
        return ChunkShape(64, 64, 4, 3 if decays else 2)
    if kernel.startswith("solve"):
        return ChunkShape(min(f, 128), min(e, 128), 4, 1)
    return ChunkShape(64, 64, 4, 1)


def single_shape(kernel: str, variant: Variant, f: int, e: int) -> ChunkShape:
    """Shapes for elements of four bytes, whose products take three passes."""
    if kernel in ("states", "states_reverse"):
        if variant.rule != "sum":
            return ChunkShape(f, 16, 4, 1)
        return ChunkShape(min(f, 64), min(e, 32), 4, 1)
    return ChunkShape(min(f, 32), min(e, 64 if kernel in ("outputs", "value_gradients") else 32), 4, 1)


def idle(heads: int, e: int, processors: int) -> bool:
    """Whether the states of a recurrence of so many heads (of all batch rows) take half of the processors at most."""
    return 2 * heads * max(1, e // 32) <= processors


def segments(programs: int, chunks: int, processors: int, shortest: int = SHORTEST_SEGMENT) -> int:
    """Into how many segments the chunks of a sequence are cut.

    Segments read the sequence twice, so they pay only where a pass in order leaves half of the processors idle.
    """
    if 2 * programs > processors:
        return 1
    return max(1, min(-(-2 * processors // max(programs, 1)), chunks // shortest))

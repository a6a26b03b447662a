"""Fixed patterns, forward. The first rows and the aims are those that the project set itself."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from attnc.runtime.tools.inputs import Shape
from benchmarks.work import Aim, Inputs, Mask, Problem, Size, Work

MEGABYTE = 10**6
BLOCK = 64  # BigBird's default


def causal_mask(problem: Problem) -> Mask:
    return lambda b, h, i, j: j <= i


def window_mask(problem: Problem) -> Mask:
    window = problem.size.parameters["window"]
    return lambda b, h, i, j: (j <= i) & (i - j < window)


def dilated_mask(problem: Problem) -> Mask:
    dilation = problem.size.parameters["dilation"]
    reach = problem.size.parameters["window"] * dilation
    return lambda b, h, i, j: (j <= i) & (i - j < reach) & ((i - j) % dilation == 0)


def longformer_mask(problem: Problem) -> Mask:
    radius, count = problem.size.parameters["radius"], problem.size.parameters["globals"]
    return lambda b, h, i, j: ((i - j <= radius) & (j - i <= radius)) | (i < count) | (j < count)


def strided_mask(problem: Problem) -> Mask:
    local, stride = problem.size.parameters["local"], problem.size.parameters["stride"]
    return lambda b, h, i, j: (j <= i) & ((i - j < local) | (j % stride == stride - 1))


def streaming_mask(problem: Problem) -> Mask:
    sinks, window = problem.size.parameters["sinks"], problem.size.parameters["window"]
    return lambda b, h, i, j: (j <= i) & ((j < sinks) | (i - j < window))


def documents_mask(problem: Problem) -> Mask:
    doc = problem.inputs["doc"]
    return lambda b, h, i, j: (j <= i) & (doc[b, i] == doc[b, j])


def prefix_mask(problem: Problem) -> Mask:
    prefix = problem.inputs["prefix"]
    return lambda b, h, i, j: (j <= i) | (j < prefix[b])


def neighborhood_mask(problem: Problem) -> Mask:
    """An undilated `kernel` x `kernel` window that shifts inward at the edges."""
    height, width, kernel = (problem.size.parameters[name] for name in ("height", "width", "kernel"))

    def first(x: Any, length: int) -> Any:
        return (x - kernel // 2).clamp(0, length - kernel)

    def mask(b: Any, h: Any, i: Any, j: Any) -> Any:
        row, column = j // width - first(i // width, height), j % width - first(i % width, width)
        return (row >= 0) & (row < kernel) & (column >= 0) & (column < kernel)

    return mask


def bigbird_mask(problem: Problem) -> Mask:
    """The random blocks are those that the pattern draws (its reference is compared at the small size)."""
    blocks = -(-problem.size.shape.keys // BLOCK)
    chosen = torch.zeros(blocks, blocks + 1, dtype=torch.bool)
    prepared = problem.pattern.prepared(problem.q, problem.k, problem.v, problem.settings)
    call = prepared.call(prepared.program.plan)
    (drawn,) = (table.cpu().long() for name, table in call.derived.items() if name.endswith(".list"))
    chosen.scatter_(1, torch.where(drawn < 0, blocks, drawn), True)  # -1 pads: a column that is cut off
    table = chosen[:, :blocks].to(problem.device).contiguous()
    last = blocks - 1

    def mask(b: Any, h: Any, i: Any, j: Any) -> Any:
        row, column = i // BLOCK, j // BLOCK
        edge = (row == 0) | (row == last) | (column == 0) | (column == last)
        return edge | ((row - column <= 1) & (column - row <= 1)) | table[row, column]

    return mask


def documents(size: Size, generator: torch.Generator) -> Inputs:
    """Lengths drawn log-uniformly between a 256th and a quarter of the sequence (128 and 8192 of 32768)."""
    shape = size.shape
    least, most = max(1, shape.keys // 256), shape.keys // 4

    def row() -> Tensor:
        share = torch.rand(shape.keys, generator=generator)
        lengths = (least * torch.exp(share * math.log(most / least))).long()
        return torch.repeat_interleave(torch.arange(shape.keys), lengths)[: shape.keys]

    return {"doc": torch.stack([row() for _ in range(shape.batch)])}


def prefixes(size: Size, generator: torch.Generator) -> Inputs:
    """Between an eighth and half of the sequence."""
    keys = size.shape.keys
    return {"prefix": torch.randint(keys // 8, keys // 2 + 1, (size.shape.batch,), generator=generator)}


def causal_pairs(size: Size) -> int:
    return size.shape.keys * (size.shape.keys + 1) // 2


def window_pairs(size: Size) -> int:
    window: int = min(size.parameters["window"], size.shape.keys)
    return size.shape.keys * window - window * (window - 1) // 2


def long(width: int = 128) -> Shape:
    return Shape.square(1, 16, 32768, width)


def small(length: int = 777, width: int = 128) -> Shape:
    return Shape.square(2, 4, length, width)


EXACT = ("cudnn", "dense", "flex")  # for causal attention, all compute the same
OTHERS = ("dense", "flex")


def gpu_works() -> list[Work]:
    """Rows for one GPU, bfloat16."""
    return [*plain_works(), *mixed_works()]


def plain_works() -> list[Work]:
    """Causal and windows, dense and dilated."""
    wide = Size(Shape.square(2, 16, 8192, 128))
    narrow = Size(Shape.square(2, 16, 8192, 64))
    window = Size(long(), {"window": 1024})
    dilated = {"window": 256, "dilation": 8}
    return [
        Work(
            "causal D128", "causal", wide, Size(small()), causal_mask, EXACT, pairs=causal_pairs, aim=Aim("flex", 1.2)
        ),
        Work(
            "causal D64",
            "causal",
            narrow,
            Size(small(width=64)),
            causal_mask,
            EXACT,
            pairs=causal_pairs,
            aim=Aim("flex", 1.2),
        ),
        Work(
            "window 1024",
            "sliding_window",
            window,
            Size(small(), {"window": 200}),
            window_mask,
            OTHERS,
            pairs=window_pairs,
            aim=Aim("flex", 1.2),
        ),
        Work(
            "dilated 256x8",
            "dilated_window",
            Size(long(), dilated),
            Size(small(), {"window": 30, "dilation": 8}),
            dilated_mask,
            OTHERS,
            aim=Aim("flex", 5.0),
        ),
    ]


def mixed_works() -> list[Work]:
    """Windows with more beside them, what tensors or a grid decide, and a million tokens."""
    grid = {"height": 128, "width": 256, "kernel": 7}
    return [
        Work(
            "longformer 256/64",
            "longformer",
            Size(long(), {"radius": 256, "globals": 64}),
            Size(small(), {"radius": 50, "globals": 20}),
            longformer_mask,
            OTHERS,
            aim=Aim("flex", 2.0),
        ),
        Work(
            "strided 128/128",
            "strided",
            Size(long(), {"local": 128, "stride": 128}),
            Size(small(), {"local": 32, "stride": 32}),
            strided_mask,
            OTHERS,
            aim=Aim("flex", 20.0),
        ),
        Work("bigbird 64", "bigbird", Size(long()), Size(small(1000)), bigbird_mask, OTHERS),
        Work("documents", "documents", Size(long()), Size(small()), documents_mask, OTHERS, documents),
        Work("prefix", "prefix_lm", Size(Shape.square(2, 16, 8192, 128)), Size(small()), prefix_mask, OTHERS, prefixes),
        Work(
            "neighborhood 7x7",
            "neighborhood",
            Size(long(), grid),
            Size(small(30 * 33), {"height": 30, "width": 33, "kernel": 7}),
            neighborhood_mask,
            OTHERS,
        ),
        Work(
            "streaming 4/1024",
            "streaming",
            Size(long(), {"sinks": 4, "window": 1024}),
            Size(small(), {"sinks": 4, "window": 100}),
            streaming_mask,
            OTHERS,
        ),
        Work(
            "window 512, 2^20 tokens",
            "sliding_window",
            Size(Shape.square(1, 1, 2**20, 64), {"window": 512}),
            Size(small(width=64), {"window": 200}),
            window_mask,
            OTHERS,
            pairs=window_pairs,
            spare=MEGABYTE,
        ),
    ]


def cpu_works() -> list[Work]:
    """Rows for a CPU, float32, beside dense causal attention."""
    tiny = Shape.square(1, 2, 300, 64)
    shape = Shape.square(1, 4, 16384, 64)
    return [
        Work(
            "window 512",
            "sliding_window",
            Size(shape, {"window": 512}),
            Size(tiny, {"window": 50}),
            window_mask,
            ("dense",),
            pairs=window_pairs,
            aim=Aim("dense", 10.0),
        ),
        Work(
            "causal",
            "causal",
            Size(Shape.square(1, 4, 4096, 64)),
            Size(tiny),
            causal_mask,
            ("dense",),
            pairs=causal_pairs,
        ),
        Work(
            "dilated 256x8",
            "dilated_window",
            Size(shape, {"window": 256, "dilation": 8}),
            Size(tiny, {"window": 9, "dilation": 8}),
            dilated_mask,
            ("dense",),
        ),
    ]


def works(device: str) -> list[Work]:
    """The rows for a kind of device."""
    return gpu_works() if device.startswith("cuda") else cpu_works()

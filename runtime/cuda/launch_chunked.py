"""Runs the generated kernels of the chunked skeleton (on a CPU under TRITON_INTERPRET=1)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from attnc.compiler.emit.chunked import chunked_kernels, chunked_text, kept_names
from attnc.compiler.emit.chunked_kernel import ChunkedKernel, Variant, scaled_name
from attnc.compiler.emit.chunked_pairs import scores_name, stored_scores
from attnc.compiler.schedule_chunked import ChunkShape, chunk_length, chunked_shape, idle, segments
from attnc.runtime.cache import cached_module
from attnc.runtime.cuda.kernel_call import device_of, interpreting, padded

INTERPRETED_CHUNK = 16  # small, so that small tests have several chunks
INTERPRETED_BLOCK = 16  # the smallest


@cache
def modules_of(variant: Variant) -> tuple[ModuleType, dict[str, ChunkedKernel]]:
    """The loaded module of a variant, and its kernels by name."""
    text = chunked_text(variant)
    return cached_module(text, lambda: text), {one.name: one for one in chunked_kernels(variant)}


@dataclass(frozen=True)
class Sizes:
    """Sizes that all kernels of a call share, by the names of their arguments."""

    batch: int
    heads: int
    key_heads: int
    decay_heads: int
    rows: int
    keys: int
    shift: int
    f: int
    e: int
    length: int  # positions of a chunk
    tile: int  # positions of a tile
    processors: int

    @cached_property
    def positions(self) -> int:
        return max(self.keys, self.rows + self.shift)

    @cached_property
    def chunks(self) -> int:
        return -(-self.positions // self.length)

    @property
    def tiles(self) -> int:
        return -(-self.length // self.tile)

    @property
    def state_heads(self) -> int:
        """Heads whose states differ."""
        return self.heads if self.decay_heads > self.key_heads else self.key_heads

    @cached_property
    def few(self) -> bool:
        return idle(self.batch * self.heads, padded(self.e), self.processors)

    def query_chunks(self) -> tuple[int, int]:
        """The chunks that hold a query: the first, and how many."""
        first = max(self.shift, 0) // self.length
        last = -(-(self.shift + self.rows) // self.length)
        return first, max(last - first, 0)


class ChunkedCall:
    """The kernels of one call: its tensors and buffers by name.

    Float16 is computed as float32, whose range its sums need.
    """

    def __init__(self, variant: Variant, sizes: Sizes, tensors: dict[str, Tensor]) -> None:
        self.variant = variant
        self.sizes = sizes
        self.tensors = tensors
        self.given = tensors["query"].dtype
        self.dtype = torch.float32 if self.given == torch.float16 else self.given
        self.tensors |= {name: one.to(self.dtype) for name, one in tensors.items() if name != "decay"}
        self.device = tensors["query"].device
        self.known_strides: dict[str, tuple[int, ...]] = {}

    @property
    def module(self) -> ModuleType:
        return modules_of(self.variant)[0]

    @property
    def kernels(self) -> dict[str, ChunkedKernel]:
        return modules_of(self.variant)[1]

    @property
    def state_dtype(self) -> torch.dtype:
        """What states are kept in between kernels: what products round them to, with the range of float32."""
        return torch.bfloat16 if self.dtype == torch.bfloat16 else torch.float32

    def shape(self, kernel: str) -> ChunkShape:
        sizes = self.sizes
        return shape_of(kernel, self.variant, sizes.f, sizes.e, self.dtype == torch.float32, sizes.few)

    def blocks(self, kernel: str) -> tuple[int, int]:
        """Blocks of features, and of values."""
        shape = self.shape(kernel)
        return -(-self.sizes.f // shape.block_f), -(-self.sizes.e // shape.block_e)

    def buffer(self, name: str, *shape: int, dtype: torch.dtype | None = None, zero: bool = False) -> Tensor:
        """A buffer for what a kernel leaves."""
        make = torch.zeros if zero else torch.empty
        made: Tensor = make(shape, dtype=self.dtype if dtype is None else dtype, device=self.device)
        self.tensors[name] = made
        return made

    def for_rows(self, name: str, width: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        """A buffer (B, H, N, width) for what a kernel leaves at rows that have a position; 0 at those before any."""
        sizes = self.sizes
        made = self.buffer(name, sizes.batch, sizes.heads, sizes.rows, *width, dtype=dtype)
        before = sizes.rows if not sizes.keys else min(max(-sizes.shift, 0), sizes.rows)
        if before:
            made[:, :, :before].zero_()
        return made

    def run(self, name: str, grid: tuple[int, int, int], aliases: dict[str, str] | None = None, **given: Any) -> None:
        """Launch a kernel. `aliases`: other names of its buffers; `given`: constants, and sizes of this launch."""
        if 0 in grid:
            return
        kernel, shape = self.kernels[name], self.shape(name)
        values = launch_numbers(name, self.variant, self.sizes, self.given)
        if given:
            values = values | given
        names, tensors = aliases or {}, self.tensors
        unused = tensors["query"]  # for arguments that this launch's constants leave unread
        arguments: list[Any] = []
        for one in kernel.arguments:
            if one.role == "size":
                arguments.append(values[one.attribute])
            elif one.role == "tensor":
                arguments.append(tensors.get(names.get(one.attribute, one.attribute), unused))
            else:
                arguments.append(self.strides(names.get(one.attribute, one.attribute))[one.slot])
        constants = {constant: values[constant] for constant in kernel.constants}
        with device_of(unused):
            getattr(self.module, name)[grid](*arguments, **constants, num_warps=shape.warps, num_stages=shape.stages)

    def strides(self, name: str) -> tuple[int, ...]:
        """A tensor's strides; 0 along axes of length 1."""
        found = self.known_strides.get(name)
        if found is None:
            tensor = self.tensors[name]
            found = tuple(0 if n == 1 else step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
            self.known_strides[name] = found
        return found

    def kept(self) -> dict[str, Tensor]:
        """What forward made and backward needs again, by name, in the order of `kept_names`."""
        return {name: self.tensors[name] for name in kept_names(self.variant)}

    def kept_shapes(self) -> list[tuple[list[int], torch.dtype]]:
        """Shape and type of each of them, of a sum without periods or a recurrence; for tracing."""
        sizes = self.sizes
        lead, summed = [sizes.batch, sizes.heads], self.variant.rule == "sum"
        states = [sizes.batch, sizes.state_heads if summed else sizes.heads]
        states += [] if self.variant.extent == "all" else [sizes.chunks]
        features = [sizes.f] if self.variant.decay == "channel" else []
        square = [*lead, sizes.chunks, sizes.tile, sizes.tile]
        single, kept = torch.float32, self.state_dtype
        shapes = {
            "sums": ([sizes.batch, sizes.decay_heads, sizes.positions, *features], single),
            "states": ([*states, sizes.f, sizes.e], kept),
            "norms": ([*states, sizes.f], single),
            "end": ([*states, sizes.f, sizes.e], single),
            "end_norm": ([*states, sizes.f], single),
            "inverse": (square, self.dtype),
            "solved": ([*lead, sizes.positions, sizes.e], self.dtype),
        }
        rows = ([*lead, sizes.positions, sizes.f], self.dtype)  # reads, and rows scaled by their decay
        scores = {name: (square, single if strict else self.dtype) for name, strict in score_buffers(self.variant)}
        return [(shapes | scores).get(name, rows) for name in kept_names(self.variant)]

    # What several kinds of calls do

    def prefix_sums(self) -> None:
        """Prefix sums of the decay in every chunk."""
        if self.variant.decay == "none":
            return
        sizes = self.sizes
        width = (sizes.f,) if self.variant.decay == "channel" else ()
        self.buffer("sums", sizes.batch, sizes.decay_heads, sizes.positions, *width, dtype=torch.float32)
        blocks = self.blocks("prefix_sums")[0] if width else 1
        self.run("prefix_sums", (blocks, sizes.chunks, sizes.batch * sizes.decay_heads))

    def scores(self) -> None:
        """Weights of pairs and decayed rows, where kernels of their own leave them."""
        sizes, variant = self.sizes, self.variant
        if variant.scaled:
            rows = [(read.x, False) for read in variant.reads] + [(write.x, True) for write in variant.writes]
            for name, to_end in rows:
                self.buffer(scaled_name(name, to_end), sizes.batch, sizes.heads, sizes.positions, sizes.f)
        for name, strict in score_buffers(variant):
            shape = (sizes.batch, sizes.heads, sizes.chunks, sizes.tile, sizes.tile)
            self.buffer(name, *shape, dtype=torch.float32 if strict else None)
            self.run(name, (1, sizes.chunks, sizes.batch * sizes.heads))

    def sum_states(self, reverse: bool, store: bool, initial: Tensor | None = None, end: bool = False) -> None:
        """States of a sum, or their gradients: buffers `states`, `norms`, `end`, `end_norm` (d_ before, in reverse).

        `initial` (B, heads, F, E, or E + 1 with a total): what they begin with.
        """
        sizes, name = self.sizes, "states_reverse" if reverse else "states"
        heads = sizes.heads if reverse else sizes.state_heads
        f_blocks, e_blocks = self.blocks(name)
        programs = f_blocks * e_blocks * sizes.batch * heads
        shortest = {"shortest": 2} if interpreting() else {}
        count = segments(programs, sizes.chunks, sizes.processors, **shortest)
        span = -(-sizes.chunks // count)
        count = -(-sizes.chunks // span)
        mark = "d_" if reverse else ""
        named = ("states", "norms", "end", "end_norm", "initial", "initial_norm")
        aliases = {one: f"{mark}{one}" for one in named}
        self.state_buffers(mark, heads, store, end, count)
        if initial is not None:
            self.begin(mark, initial)
        grid = (f_blocks * e_blocks, sizes.batch * heads)
        flags = {"STORE": False, "INITIAL": False, "JOIN": False, "PARTS": False, "END": False, "SPAN": span}
        if count > 1:
            self.run(name, (*grid, count), aliases, **(flags | {"PARTS": True}))
        flags |= {"INITIAL": initial is not None, "JOIN": count > 1, "END": end, "STORE": store}
        if store or count == 1:
            self.run(name, (*grid, count), aliases, **flags)
        else:
            self.run(name, (*grid, 1), aliases, **flags, FIRST=count)

    def begin(self, mark: str, initial: Tensor) -> None:
        """What states begin with, as the kernels take it."""
        if self.variant.total:
            self.tensors[f"{mark}initial_norm"] = initial[..., -1].float().contiguous()
            initial = initial[..., :-1]
        self.tensors[f"{mark}initial"] = initial.float().contiguous()

    def end(self, mark: str = "") -> Tensor:
        """The state at the end of a pass; with a total, the sum of the keys is its last column."""
        state = self.tensors[f"{mark}end"]
        return torch.cat([state, self.tensors[f"{mark}end_norm"][..., None]], -1) if self.variant.total else state

    def state_buffers(self, mark: str, heads: int, store: bool, end: bool, count: int) -> None:
        """Buffers of a pass over the states."""
        sizes, total = self.sizes, self.variant.total
        lead = (sizes.batch, heads)
        if store:
            self.buffer(f"{mark}states", *lead, sizes.chunks, sizes.f, sizes.e, dtype=self.state_dtype)
            if total:
                self.buffer(f"{mark}norms", *lead, sizes.chunks, sizes.f, dtype=torch.float32)
        if end:
            self.buffer(f"{mark}end", *lead, sizes.f, sizes.e, dtype=torch.float32)
            if total:
                self.buffer(f"{mark}end_norm", *lead, sizes.f, dtype=torch.float32)
        if count > 1:
            self.buffer("parts", count, *lead, sizes.f, sizes.e, dtype=torch.float32)
            self.buffer("part_fades", count, *lead, sizes.f, dtype=torch.float32)
            if total:
                self.buffer("part_norms", count, *lead, sizes.f, dtype=torch.float32)


def score_buffers(variant: Variant) -> list[tuple[str, bool]]:
    """The weights of pairs that kernels of their own leave, and whether they are strict: the system's, in float32."""
    return [(scores_name(read, write), read.strict) for read, write in stored_scores(variant)]


@lru_cache(maxsize=1024)
def shape_of(kernel: str, variant: Variant, f: int, e: int, single: bool, few: bool) -> ChunkShape:
    """The shape of a kernel in a call."""
    if interpreting():
        whole = variant.rule != "sum" and kernel.startswith("states")
        halves = [max(padded(width) // 2, INTERPRETED_BLOCK) for width in (f, e)]  # two blocks are as good as many
        return ChunkShape(padded(f) if whole else halves[0], halves[1], 1, 1)
    return chunked_shape(kernel, variant, padded(f), padded(e), single, few)


@lru_cache(maxsize=1024)
def launch_numbers(kernel: str, variant: Variant, sizes: Sizes, given: torch.dtype) -> dict[str, Any]:
    """Sizes and constants of a launch, without those of its own. `given`: the element type that the caller has."""
    half = given == torch.bfloat16
    shape = shape_of(kernel, variant, sizes.f, sizes.e, not half, sizes.few)
    f_blocks, e_blocks = -(-sizes.f // shape.block_f), -(-sizes.e // shape.block_e)
    single = "tf32" if half else "tf32x3"
    return {
        "H": sizes.heads,
        "HK": sizes.key_heads,
        "HG": sizes.decay_heads,
        "HS": sizes.state_heads,
        "N": sizes.rows,
        "M": sizes.keys,
        "T": sizes.positions,
        "SHIFT": sizes.shift,
        "F": sizes.f,
        "E": sizes.e,
        "CHUNKS": sizes.chunks,
        "LENGTH": sizes.length,
        "TILES": sizes.tiles,
        "SPAN": sizes.chunks,
        "FIRST": 0,
        "BLOCK_C": sizes.tile,
        "BLOCK_F": shape.block_f,
        "BLOCK_E": shape.block_e,
        "F_BLOCKS": f_blocks,
        "E_BLOCKS": e_blocks,
        "EVEN_F": f_blocks * shape.block_f == sizes.f,
        "EVEN_E": e_blocks * shape.block_e == sizes.e,
        "PRECISION": "ieee" if half else single,
        "STATE_PRECISION": "ieee" if half else single,
        "INVERSE_PRECISION": single,
        "LEVELS": sizes.tile.bit_length() - 1,
        "LIMIT": 56.0,  # a step more is at most 48 (PrefixSums): factors under 2^104
    }


def tile_length(variant: Variant, dtype: torch.dtype) -> int:
    """Positions of a tile in a call."""
    return INTERPRETED_CHUNK if interpreting() else chunk_length(variant, dtype != torch.bfloat16)

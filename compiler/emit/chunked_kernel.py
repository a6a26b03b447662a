"""What the kernels of the chunked skeleton share: signature, heads, positions of a chunk, loads, decays.

Keys lie at positions t = 0 .. M - 1, query `row` at t = row + SHIFT; a query reads what keys up to its position left.
Positions are cut into chunks of LENGTH. A tile is BLOCK_C positions of one chunk; only where a chunk is longer than a
tile (`Variant.tiled`) does a chunk have several. `sums` holds inclusive prefix sums of the log decay from the start of
a chunk, in base 2; every exponent below is a difference of two of them, later minus earlier.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from attnc.compiler.emit.arguments import Argument
from attnc.compiler.emit.writer import Writer

# Query heads, heads of keys, of the decay and of the states; queries, keys, positions; place of the first query;
# features, values; chunks, their length, tiles in one; chunks a segment; the first tile and segment of a launch.
SIZES = ("H", "HK", "HG", "HS", "N", "M", "T", "SHIFT", "F", "E", "CHUNKS", "LENGTH", "TILES", "SPAN", "FIRST")
SPECIALISED = ("F", "E")  # strides of the kernels' own buffers: what divides them decides how wide loads are
CONSTANTS = (
    *("BLOCK_C", "BLOCK_F", "BLOCK_E", "F_BLOCKS", "E_BLOCKS"),
    *("EVEN_F", "EVEN_E", "PRECISION", "STATE_PRECISION"),
)


@dataclass(frozen=True)
class Variant:
    """What decides the text of the kernels of a step.

    decay: `none`, `scalar` (b, h, t) or `channel` (b, h, t; f). extent: `lag`, `period` or `all`, as `Extent.kind`.
    total: the sum of the weights too. grouped: query heads share key heads. rule: how a token changes the state:
    `sum` adds k v^T; `delta` adds k (v + y^T S)^T; `dplr` adds x (y^T S)^T + k v^T.
    """

    decay: str = "none"
    extent: str = "lag"
    total: bool = False
    grouped: bool = False
    rule: str = "sum"

    @property
    def tiled(self) -> bool:
        return self.extent == "period"

    @property
    def intra(self) -> bool:
        """Whether a query sees keys of its own chunk."""
        return self.extent == "lag"

    @property
    def scaled(self) -> bool:
        """Whether the kernels that weigh pairs also leave the rows scaled by their decay."""
        return self.decay == "channel" and self.intra

    @property
    def reads(self) -> tuple[Read, ...]:
        """What is read from the states."""
        return (QUERY,) if self.rule == "sum" else (QUERY, RIGHT)

    @property
    def writes(self) -> tuple[Write, ...]:
        """What is written to the states."""
        return {"sum": (KEY,), "delta": (SOLVED_KEY,), "dplr": (KEY, LEFT)}[self.rule]


@dataclass(frozen=True)
class Read:
    """A row `x` reads x^T S, with the gradient `cotangent`; `strict`: of the state before the row's own update."""

    x: str
    cotangent: str
    strict: bool
    gradient: str


@dataclass(frozen=True)
class Write:
    """A row adds x value^T to the state; `value` may be what the recurrence solves for."""

    x: str
    value: str
    gradient: str


QUERY = Read("query", "cotangent", False, "d_query")
RIGHT = Read("right", "d_solved", True, "d_right")
KEY = Write("key", "value", "d_key")
SOLVED_KEY = Write("key", "solved", "d_key")
LEFT = Write("left", "solved", "d_left")

# Tensors of any strides; all others are buffers in the order of their indices, without gaps.
LAYOUTS = {
    "query": "bhnf",
    "key": "bhtf",
    "value": "bhte",
    "decay": "bhtf",
    "left": "bhtf",
    "right": "bhtf",
    "cotangent": "bhne",
    "solved": "bhte",
    "d_solved": "bhte",
    "total_cotangent": "bhn",
}
QUERY_SIDE = ("query", "cotangent", "total_cotangent")


@dataclass(frozen=True)
class ChunkedKernel:
    """A kernel's text, its name, its arguments in order, and the constants that follow them."""

    name: str
    text: str
    arguments: tuple[Argument, ...]
    constants: tuple[str, ...]


class ChunkedWriter(Writer):
    """Writes one kernel. Subclasses say what it is given, and write its body."""

    tensors: tuple[str, ...] = ()
    buffers: tuple[str, ...] = ()
    constants: tuple[str, ...] = ()
    scaled_head: str | None = None  # where scaled rows lie by another head than `head`

    def __init__(self, variant: Variant, name: str) -> None:
        super().__init__()
        self.variant = variant
        self.name = name
        self.every_constant = (*CONSTANTS, *self.constants)
        self.body()
        words = set(re.findall(r"\w+", self.text()))
        given = chunked_arguments(self.tensors, self.buffers, variant)
        self.arguments = tuple(one for one in given if one.name in words)
        self.every_constant = tuple(one for one in self.every_constant if one in words)

    def kernel(self) -> ChunkedKernel:
        """Its text, with those arguments that the body reads: each costs time at every launch."""
        plain = [one.name for one in self.arguments if not one.specialised]
        names = [one.name for one in self.arguments]
        parameters = ", ".join([*names, *(f"{constant}: tl.constexpr" for constant in self.every_constant)])
        whole = Writer()
        whole.line(f"@triton.jit(do_not_specialize={plain!r})")
        with whole.block(f"def {self.name}({parameters}):"):
            for line in self.text().splitlines():
                whole.line(line)
        return ChunkedKernel(self.name, whole.text(), self.arguments, self.every_constant)

    def body(self) -> None:
        raise NotImplementedError

    def when(self, condition: bool, head: str) -> AbstractContextManager[None]:
        """A block where `condition` holds, else the lines as they are."""
        return self.block(head) if condition else nullcontext()

    # Heads and positions

    def heads(self, program: str, count: str) -> None:
        """`b`, `h` of a program over (b, h), and `head` = their number."""
        self.let("head", f"{program}.to(tl.int64)")
        self.let("b", f"head // {count}")
        self.let("h", f"head % {count}")

    def members(self) -> AbstractContextManager[None]:
        """The query heads of the key head `key_head` of this program, one after the other."""
        self.let("key_head", "tl.program_id(2).to(tl.int64)")
        self.let("b", "key_head // HK")
        return self.when(self.variant.grouped, "for member in range(0, H // HK):")

    def member(self) -> None:
        """`h` and `head` of a member."""
        self.let("h", "key_head % HK * (H // HK) + member" if self.variant.grouped else "key_head % HK")
        self.let("head", "b * H + h")
        self.decay_rows()

    def lanes(self) -> None:
        self.let("lane", "tl.arange(0, BLOCK_C)")

    def chunk_of_tile(self) -> None:
        """`chunk` and `tile` of a program over tiles."""
        self.lanes()
        self.let("tile", "tl.program_id(1) + FIRST")
        self.let("chunk", "tile // TILES" if self.variant.tiled else "tile")
        self.positions("tile % TILES")

    def positions(self, tile: str) -> None:
        """`t` and `row` of the lanes in tile number `tile` of `chunk`, and which of them exist."""
        if self.variant.tiled:
            self.let("local", f"({tile}) * BLOCK_C + lane")
            self.let("t", "chunk * LENGTH + local")
            self.let("t_ok", "(local < LENGTH) & (t < T)")
        else:
            self.let("t", "chunk * BLOCK_C + lane")
            self.let("t_ok", "t < T")
        self.let("row", "t - SHIFT")
        self.let("row_ok", "t_ok & (row >= 0) & (row < N)")
        self.let("key_ok", "t_ok & (t < M)")

    def last_position(self) -> None:
        """`last`: the last position of `chunk`."""
        self.let("last", "tl.minimum(chunk * LENGTH + LENGTH, T) - 1")

    # Loads

    def base(self, tensor: str, h: str = "h") -> None:
        """`{tensor}_at`: where a tensor's batch and head begin."""
        self.let(f"{tensor}_at", f"{tensor} + b * {tensor}_sb + ({h}) * {tensor}_sh")

    def rows_of(self, name: str, tensor: str) -> str:
        """`name`: the tile of a tensor at the positions of the lanes."""
        axis = LAYOUTS[tensor][3]
        place, ok = ("row", "row_ok") if tensor in QUERY_SIDE else ("t", "key_ok")
        slot = LAYOUTS[tensor][2]
        pointer = f"{tensor}_at + {place}.to(tl.int64)[:, None] * {tensor}_s{slot} + {axis}[None, :] * {tensor}_s{axis}"
        return self.let(name, f"_load_tile({pointer}, {ok}, {axis} < {axis.upper()}, True, not EVEN_{axis.upper()})")

    def decayed_rows(self, name: str, tensor: str, strict: bool, to_end: bool) -> None:
        """`name`: the tile of a tensor, decayed to the end of the chunk or else from its start; needs `prefix_last`."""
        if self.variant.scaled:
            head = "head" if self.scaled_head is None else self.scaled_head
            pointer = f"{scaled_name(tensor, to_end)} + ({head} * T + t)[:, None] * F + f[None, :]"
            self.let(name, f"_load_tile({pointer}, t_ok, f < F, True, not EVEN_F)")
            return
        self.rows_of(name, tensor)
        if self.variant.decay != "none":
            prefix = self.prefix(strict)
            factor = self.to_end() if to_end else self.from_start(prefix)
            self.let(name, f"({name} * {factor}).to({tensor}.dtype.element_ty)")

    def weights_of_rows(self, name: str, tensor: str) -> None:
        """A vector with one element a query, in float32."""
        pointer = f"{tensor}_at + row.to(tl.int64) * {tensor}_sn"
        self.let(name, f"tl.load({pointer}, mask=row_ok, other=0.0).to(tl.float32)")

    def state_of(self, name: str, buffer: str, head: str) -> None:
        """`name`: the block f x e of the state of `chunk` in a buffer (head, chunk, f, e)."""
        first = head if self.variant.extent == "all" else f"({head} * CHUNKS + chunk)"
        pointer = f"{buffer} + ({first} * F + f)[:, None] * E + e[None, :]"
        self.let(name, f"_load_tile({pointer}, f < F, e < E, not EVEN_F, not EVEN_E)")

    def norm_of(self, name: str, buffer: str, head: str) -> None:
        """`name`: the sum of the keys, f long, beside the state of `chunk`."""
        first = head if self.variant.extent == "all" else f"({head} * CHUNKS + chunk)"
        self.let(name, f"tl.load({buffer} + {first} * F + f, mask=f < F, other=0.0)")

    def store_tile(self, buffer: str, head: str, place: str, length: str, axis: str, value: str, ok: str) -> None:
        """Store a tile into a buffer (head, length, axis)."""
        width = axis.upper()
        pointer = f"{buffer} + ({head} * {length} + {place})[:, None] * {width} + {axis}[None, :]"
        mask = f"{ok}[:, None] & ({axis} < {width})[None, :]"
        self.line(f"tl.store({pointer}, {value}.to({buffer}.dtype.element_ty), mask={mask})")

    def blocks(self, axis: str) -> AbstractContextManager[None]:
        """A loop over the blocks of an axis: `axis` holds the indices of a block."""
        width = axis.upper()
        return self.block(f"for start_{axis} in range(0, {width}_BLOCKS * BLOCK_{width}, BLOCK_{width}):")

    def block_lanes(self, axis: str) -> None:
        self.let(axis, f"start_{axis} + tl.arange(0, BLOCK_{axis.upper()})")

    def block_of_program(self, axis: str, number: str) -> None:
        self.let(f"start_{axis}", f"{number} * BLOCK_{axis.upper()}")
        self.block_lanes(axis)

    # Decays

    def decay_rows(self) -> None:
        """`decay_at`: where the prefix sums of query head `h` begin."""
        if self.variant.decay != "none":
            self.let("decay_at", "(b * HG + h // (H // HG)) * T")

    def prefix(self, strict: bool = False) -> str:
        """`prefix` (or, for a strict read, `prefix_before`): prefix sums at the lanes."""
        name = "prefix_before" if strict else "prefix"
        place, ok = ("t - 1", "(t_ok & (lane > 0))") if strict else ("t", "t_ok")
        self.gather(name, place, ok)
        return name

    def gather(self, name: str, place: str, ok: str) -> None:
        """Prefix sums at positions; 0 where they are not there."""
        if self.variant.decay == "scalar":
            self.let(name, f"tl.load(sums + decay_at + {place}, mask={ok}, other=0.0)")
        else:
            pointer = f"sums + (decay_at + {place})[:, None] * F + f[None, :]"
            self.let(name, f"_load_tile({pointer}, {ok}, f < F, True, not EVEN_F)")

    def prefix_last(self) -> None:
        """`prefix_last`: the sums at the end of the chunk: a number, or a row."""
        if self.variant.decay == "scalar":
            self.let("prefix_last", "tl.load(sums + decay_at + last)")
        elif self.variant.decay == "channel":
            self.let("prefix_last", "tl.load(sums + (decay_at + last) * F + f, mask=f < F, other=0.0)")

    def to_end(self) -> str:
        """What decays from a lane to the end of the chunk, to multiply a tile over features."""
        return (
            "tl.exp2(prefix_last - prefix)[:, None]"
            if self.variant.decay == "scalar"
            else ("tl.exp2(prefix_last[None, :] - prefix)")
        )

    def from_start(self, prefix: str = "prefix") -> str:
        """What decays from the state before the chunk to a lane."""
        return f"tl.exp2({prefix})[:, None]" if self.variant.decay == "scalar" else f"tl.exp2({prefix})"

    def over_chunk(self, row: bool = False) -> str:
        """What decays over a chunk, to multiply a state (or, `row`, a vector over features)."""
        if self.variant.decay == "scalar" or row:
            return "tl.exp2(prefix_last)"
        return "tl.exp2(prefix_last)[:, None]"


def scaled_name(tensor: str, to_end: bool) -> str:
    """The buffer (head, t, f) of a tensor's rows, decayed to the end of their chunk or from its start."""
    return f"{tensor}_{'to_end' if to_end else 'from_start'}"


def dot(x: str, y: str, add: str = "", precision: str = "PRECISION") -> str:
    """A matrix product, added to `add`."""
    return f"tl.dot({x}, {y}{', ' + add if add else ''}, input_precision={precision})"


def chunked_arguments(tensors: Sequence[str], buffers: Sequence[str], variant: Variant) -> tuple[Argument, ...]:
    """Tensors and buffers, strides of the tensors, sizes."""
    found = [Argument(name, "tensor", name, specialised=True) for name in (*tensors, *buffers)]
    for tensor in tensors:
        axes = LAYOUTS[tensor] if tensor != "decay" or variant.decay == "channel" else LAYOUTS[tensor][:3]
        found += [
            Argument(f"{tensor}_s{axis}", "stride", tensor, slot, specialised=True) for slot, axis in enumerate(axes)
        ]
    return (*found, *(Argument(size, "size", size, specialised=size in SPECIALISED) for size in SIZES))

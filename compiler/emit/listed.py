"""Kernels of listed branches, forward: rows with the keys that a selection lists for them (see `plan.Selected`).

With PARTS a tile is rows whose lines name one block of keys, found in the turned lists (`order`: the entries of a lane,
sorted by block), and each row leaves its part of the softmax in the slot of its entry. Without, a tile is
rows of TOGETHER lines, of all heads that share them, and visits every block that one of the lines names: once, however
many name it (`named_by`: which do, by bits), so that lines with keys in common load them together.

A lane is a batch row and PER_LANE query heads of one key head, with LISTS lists of LINES lines each; SHARED heads read
one list (PER_LANE = LISTS * SHARED). `members` (lanes, LISTS * LINES, ENTRIES) and `counts` (lanes, LISTS * LINES) are
int32; of several lines together, those of `unite_lines`: (lanes, LISTS * groups of lines, TOGETHER * ENTRIES). An entry
of `order` is list line * ENTRIES + place in the line. A program has a piece of the rows that name one block:
`piece_group` (lane * BLOCKS + block), `piece_first` (where it begins among those rows), `piece_begin` (their first
entry in `order`) and `piece_named` (how many they are). Programs past the last piece leave at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from attnc.compiler.emit.arguments import Argument, Signature
from attnc.compiler.emit.bounds import Loop
from attnc.compiler.emit.certain import certain
from attnc.compiler.emit.expressions import Expressions, View
from attnc.compiler.emit.kernel import Kernel, StreamedKernel
from attnc.compiler.emit.streamed import StreamedForward
from attnc.compiler.plan import Branch, Domain, KeySet, Plan, Rows

NOTHING = Domain((), Rows())
PIECES = ("piece_group", "piece_first", "piece_begin", "piece_named")
LISTS = ("members", "counts", "named_by", "order", *PIECES)
SIZES = ("ENTRIES", "LINES", "FIRST_LINE", "BLOCKS", "SKIPPED", "LANE_HEADS", "PER_LANE")
CONSTANTS = ("PARTS", "WIDTH", "ROW_BLOCK", "SHARED", "LISTS", "NARROW", "SAME", "TOGETHER")


def bare(branch: Branch) -> Branch:
    """The branch with its condition among the nodes that a kernel evaluates."""
    key_set = KeySet(None, (), branch.condition)
    return replace(branch, domain=Domain((key_set,), Rows()))


class Gathered(StreamedKernel):
    """What these kernels share: lists as arguments, rows that are gathered."""

    tailed = False

    def prepare(self, buffers: Sequence[str], lists: Sequence[str] = LISTS, sizes: Sequence[str] = SIZES) -> None:
        """Adds the lists and their sizes to the arguments."""
        self.constants = (*self.constants, *CONSTANTS)
        made = [Argument(name, "tensor", name, specialised=True) for name in (*buffers, *lists)]
        self.arguments = (*made, *self.arguments, *(Argument(name, "size", name) for name in sizes))
        self.key_set = self.domain.key_sets[0]
        scalars = Expressions(self.writer, self.expressions.arrays, self.streamed)
        self.certain = certain(self.key_set.mask, scalars)

    def kernel(self) -> Kernel:
        return replace(super().kernel(), domain=NOTHING)

    def lane_heads(self) -> None:
        """Batch row, first query head and key head of `lane`."""
        writer = self.writer
        writer.let("b", "lane // LANE_HEADS")
        writer.let("first_head", "lane % LANE_HEADS * PER_LANE")
        writer.let("key_head", "first_head // GROUP")
        writer.let("b64", "b.to(tl.int64)")

    def load_piece(self) -> None:
        """`group`, `first`, `begin` and `named` of `piece`."""
        for name in PIECES:
            self.writer.let(name.removeprefix("piece_"), f"tl.load({name} + piece)")

    def rows_of(self, line: str, share: str, ok: str) -> None:
        """`h`, `head`, `row`, `row_ok`, `i`: vectors over gathered rows, of list lines and their shares of them."""
        writer = self.writer
        writer.let("member", f"{share} // ROW_BLOCK")
        writer.let("row", f"{line}")
        with writer.block("if LISTS > 1:"):
            writer.let("member", "member + row // LINES * SHARED")
            writer.let("row", "row % LINES")
        writer.let("row", f"(FIRST_LINE + row) * ROW_BLOCK + {share} % ROW_BLOCK - SKIPPED")
        writer.let("h", self.head_of_rows())
        writer.let("head", "b * H + h")
        writer.let("row_ok", ok)
        with writer.block("if ROW_BLOCK > 1:"):
            writer.let("row_ok", "row_ok & (row >= 0) & (row < N)")
        writer.let("i", "row + OFFSET")

    def head_of_rows(self) -> str:
        """A row that is not there may have a member that is not there."""
        return "tl.minimum(first_head + member, H - 1)"

    def tile_of_rows(self) -> None:
        """The tile's rows, and how many `turns` its keys take."""
        writer = self.writer
        writer.let("lane_m", "tl.arange(0, BLOCK_M)")
        with writer.block("if PARTS:"):
            writer.let("piece", "tl.program_id(0)")
            self.load_piece()
            with writer.block("if first >= named:"):
                writer.line("return")
            writer.let("lane", "group // BLOCKS")
            writer.let("place", "first + lane_m")
            writer.let("share", "place % (SHARED * ROW_BLOCK)")
            writer.let("place_ok", "place < named")
            writer.let("spot", "tl.load(order + begin + place // (SHARED * ROW_BLOCK), mask=place_ok, other=0)")
            writer.let("line", "spot // ENTRIES")
            writer.let("turns", "(WIDTH + BLOCK_N - 1) // BLOCK_N")
        with writer.block("else:"):
            writer.let("tiles", "(TOGETHER * SHARED * ROW_BLOCK + BLOCK_M - 1) // BLOCK_M")
            writer.let("group", "tl.program_id(0) // tiles")
            writer.let("groups", "(LINES + TOGETHER - 1) // TOGETHER")
            writer.let("lane", "group // (LISTS * groups)")
            writer.let("share", "tl.program_id(0) % tiles * BLOCK_M + lane_m")
            writer.let("along", "share // (SHARED * ROW_BLOCK)")
            writer.let("line", "group % groups * TOGETHER + along")
            writer.let("place_ok", "(along < TOGETHER) & (line < LINES)")
            writer.let("line", "group // groups % LISTS * LINES + line")
            writer.let("share", "share % (SHARED * ROW_BLOCK)")
            writer.let("reach", "tl.load(counts + group) * WIDTH")
            writer.let("turns", "(reach + BLOCK_N - 1) // BLOCK_N")
        self.lane_heads()
        self.rows_of("line", "share", "place_ok")
        writer.let("i_ok", "row_ok")
        self.rows_end()

    def keys_of_turn(self) -> None:
        """The n-th tile of the line's keys: `j`, `j_ok`; `start` where they are consecutive."""
        writer = self.writer
        with writer.block("if PARTS:"):
            writer.let("start", "group % BLOCKS * WIDTH + n * BLOCK_N")
            writer.let("j", "start + lanes_n")
            writer.let("j_ok", "j < M")
            with writer.block("if WIDTH % BLOCK_N != 0:"):
                writer.let("j_ok", "j_ok & (n * BLOCK_N + lanes_n < WIDTH)")
            self.keys_may_be_dead()
        with writer.block("elif WIDTH % BLOCK_N == 0:"):
            writer.let("entry", "group.to(tl.int64) * (TOGETHER * ENTRIES) + n // (WIDTH // BLOCK_N)")
            writer.let("start", "tl.load(members + entry) * WIDTH + n % (WIDTH // BLOCK_N) * BLOCK_N")
            with writer.block("if TOGETHER > 1:"):
                writer.let("row_named", "(tl.load(named_by + entry) >> along) & 1 == 1")
            writer.let("j", "start + lanes_n")
            writer.let("j_ok", "j < M")
            self.keys_may_be_dead()
        with writer.block("else:"):
            writer.let("place_n", "n * BLOCK_N + lanes_n")
            writer.let("entry", "group.to(tl.int64) * ENTRIES + place_n // WIDTH")
            writer.let("named_key", "tl.load(members + entry, mask=place_n < reach, other=-1)")
            writer.let("j", "named_key * WIDTH + place_n % WIDTH")
            writer.let("j_ok", "(named_key >= 0) & (j < M)")
            if self.certain is not None:
                writer.let("partial", "n >= 0")

    def keys_may_be_dead(self) -> None:
        """`partial`: whether a tile of consecutive keys may have a dead pair."""
        if self.certain is None:
            return
        writer = self.writer
        writer.let("j_low", "start")
        writer.let("j_high", "start + BLOCK_N - 1")
        writer.let("partial", "n >= 0")
        with writer.block("if WIDTH % BLOCK_N == 0:"):
            writer.let("partial", f"((j_high < M) & ({self.certain})) == 0")

    def rows_end(self) -> None:
        """`i_low` and `i_high`: the least and the largest position of the tile's rows."""
        if self.certain is not None:
            self.writer.let("i_low", "tl.min(tl.where(row_ok, i, FAR), 0)")
            self.writer.let("i_high", "tl.max(tl.where(row_ok, i, 0), 0)")

    def each(self) -> Loop:
        """What a step is told of its tile."""
        return Loop("0", "turns", lambda writer: None, partial=None if self.certain is None else "partial")

    def load_streamed(self, name: str, tensor: str, axis: str, loop: Loop) -> None:
        """A tile of keys: through its descriptor where keys are consecutive and there is one."""
        writer, guards = self.writer, f"{axis} < {axis.upper()}, True, not EVEN_{axis.upper()}"
        with writer.block("if VIEW and (PARTS or WIDTH % BLOCK_N == 0):"):
            view = f"{tensor}_view.load([b, key_head, start, 0]).reshape(BLOCK_N, BLOCK_{axis.upper()})"
            writer.let(name, view)
        with writer.block("else:"):
            rows = f"{tensor}_head + j.to(tl.int64)[:, None] * {tensor}_sn + {axis}[None, :] * {tensor}_s{axis}"
            writer.let(name, f"_load_tile({rows}, j_ok, {guards})")

    def masked(self, key_set: KeySet, loop: Loop, view: View, write: Callable[[str], None]) -> None:
        """Also without the rows whose line does not name the tile's block."""
        super().masked(key_set, loop, view, write)
        with self.writer.block("if TOGETHER > 1:"):
            write("row_named[:, None]")

    def stretch(self) -> None:
        """A step for every tile of keys."""
        with self.writer.block("for n in range(0, turns):"):
            self.keys_of_turn()
            self.step(self.key_set, self.each())

    def gathered(self, tensor: str, axis: str) -> str:
        """Pointers of gathered rows; how far they lie from the lane's first head may need 64 bits (not NARROW)."""
        writer = self.writer
        apart = f"_wide(row, NARROW) * {tensor}_sn + _wide(member, NARROW) * {tensor}_sh"
        if tensor == "do":
            with writer.block("if SAME:"):
                writer.let("do_apart", "q_apart")
            with writer.block("else:"):
                writer.let("do_apart", apart)
        else:
            writer.let(f"{tensor}_apart", apart)
        base = f"{tensor} + b64 * {tensor}_sb + first_head.to(tl.int64) * {tensor}_sh"
        return f"{base} + ({tensor}_apart[:, None] + {axis}[None, :] * {tensor}_s{axis})"

    def load_rows(self, name: str, tensor: str, axis: str) -> None:
        pointers = self.gathered(tensor, axis)
        self.writer.let(name, f"_load_tile({pointers}, row_ok, {axis} < {axis.upper()}, True, not EVEN_{axis.upper()})")

    def slots(self) -> None:
        """`part_row`: the slot of a row's entry, among (lanes, LISTS * LINES, ENTRIES, SHARED, ROW_BLOCK)."""
        writer = self.writer
        with writer.block("if PARTS:"):
            writer.let("slot", "lane.to(tl.int64) * (LISTS * LINES * ENTRIES) + spot")
            writer.let("part_row", "slot * (SHARED * ROW_BLOCK) + share")

    def store_rows(self, tensor: str, axis: str, value: str, part: str) -> None:
        """A vector a row, into its slot or its place."""
        writer = self.writer
        with writer.block("if PARTS:"):
            pointers = f"{part} + part_row[:, None] * BLOCK_{axis.upper()} + {axis}[None, :]"
            writer.line(f"tl.store({pointers}, {value}, mask=row_ok[:, None])")
        with writer.block("else:"):
            mask = f"row_ok[:, None] & ({axis} < {axis.upper()})[None, :]"
            cast = f"{value}.to({tensor}.dtype.element_ty)"
            pointers = self.gathered(tensor, axis)
            writer.line(f"tl.store({pointers}, {cast}, mask={mask})")

    def store_scalars(self, tensor: str, value: str, part: str) -> None:
        """A number a row, the same way."""
        with self.writer.block("if PARTS:"):
            self.writer.line(f"tl.store({part} + part_row, {value}, mask=row_ok)")
        with self.writer.block("else:"):
            self.writer.line(f"tl.store({tensor} + head.to(tl.int64) * N + row, {value}, mask=row_ok)")


class ListedForward(Gathered, StreamedForward):
    """Rows stay: outputs and log-sum-exps, whole or in parts."""

    signature = Signature(("q", "k", "v", "o"), ("lse", "part_out", "part_lse"), (), ("k", "v"))

    def __init__(self, plan: Plan, branch: Branch, name: str) -> None:
        branch = bare(branch)
        super().__init__(plan, branch, branch.domain, name)
        self.prepare(())
        self.expressions.head_rows = True

    def body(self) -> None:
        self.tile_of_rows()
        self.expressions.hoist([self.branch.score, self.key_set.mask])
        self.lanes()
        for tensor in ("k", "v"):
            self.base(tensor)
        self.load_rows("query", "q", "d")
        self.start()
        self.stretch()
        self.finish()

    def finish(self) -> None:
        writer = self.writer
        empty = 'float("-inf")'
        writer.let("seen", "total > 0.0")
        writer.let("whole", "tl.where(seen, total, 1.0)")
        writer.let("result", "acc / whole[:, None]")
        writer.let("statistic", f"tl.where(seen, (largest + tl.log2(whole)) / LOG2E, {empty})")
        self.slots()
        self.store_rows("o", "e", "result", "part_out")
        self.store_scalars("lse", "statistic", "part_lse")


def listed_forward(plan: Plan, branch: Branch, number: int) -> Kernel:
    """The forward kernel of a listed branch."""
    return ListedForward(plan, branch, f"forward_{number}").kernel()

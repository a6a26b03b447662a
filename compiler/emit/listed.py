"""Kernels of listed branches: rows with the keys that a selection lists for them (see `plan.Selected`).

Rows stay in two of them, forward and for the gradient of q. With PARTS a tile is rows whose lines name one block of
keys, found in the turned lists (`order`, `starts`: the entries of a lane, sorted by block), and each row leaves its
part of the softmax in the slot of its entry. Without, a tile is the rows of one line, of all heads that share it, and
visits every entry of the line. Keys stay in the third, for the gradients of k and v: a tile of one block streams the
rows whose lines name it. No sum has two owners, so there are no atomics.

A lane is a batch row and key head. `members` (lanes, LINES, ENTRIES), `counts` (lanes, LINES), `order` and `starts`
(lanes * BLOCKS + 2) are int buffers. An entry of `order` is line * ENTRIES + place in the line; a last group is empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from attnc.compiler.differentiate import differentiate
from attnc.compiler.emit.arguments import Argument, Signature
from attnc.compiler.emit.backward import BackwardKernel, BackwardKeys, BackwardRows
from attnc.compiler.emit.bounds import Loop
from attnc.compiler.emit.kernel import Kernel, StreamedKernel
from attnc.compiler.emit.streamed import StreamedForward
from attnc.compiler.plan import Branch, Domain, KeySet, Plan, Rows

NOTHING = Domain((), Rows())
LISTS = ("members", "counts", "order", "starts", "tile_group", "tile_first")
SIZES = ("ENTRIES", "LINES", "FIRST_LINE", "BLOCKS", "WIDTH", "ROW_BLOCK", "SKIPPED", "SHARED", "MEMBER", "KEY_HEADS")
TURN = Loop("0", "turns", lambda writer: None)


def bare(branch: Branch) -> Branch:
    """The branch with its condition among the nodes that a kernel evaluates."""
    key_set = KeySet(None, (), branch.condition)
    return replace(branch, domain=Domain((key_set,), Rows()))


class Gathered(StreamedKernel):
    """What these kernels share: lists as arguments, tiles through pointers."""

    def prepare(self, buffers: Sequence[str], *, head_rows: bool) -> None:
        """Adds the lists and their sizes to the arguments. `head_rows`: whether rows of a tile differ in their head."""
        self.constants = (*self.constants, "PARTS")
        plain = [one for one in self.arguments if one.role != "view"]
        lists = [Argument(name, "tensor", name, specialised=True) for name in (*buffers, *LISTS)]
        self.arguments = (*lists, *plain, *(Argument(name, "size", name) for name in SIZES))
        self.expressions.head_rows = head_rows
        self.key_set = self.domain.key_sets[0]

    def kernel(self) -> Kernel:
        return replace(super().kernel(), domain=NOTHING)

    def lane_of(self, lane: str) -> None:
        writer = self.writer
        writer.let("b", f"{lane} // KEY_HEADS")
        writer.let("key_head", f"{lane} % KEY_HEADS")
        writer.let("b64", "b.to(tl.int64)")

    def rows_of_tile(self) -> None:
        """`row`, `h`, `i` and what they belong to: vectors over the tile."""
        writer = self.writer
        writer.let("lane_m", "tl.arange(0, BLOCK_M)")
        with writer.block("if PARTS:"):
            writer.let("group", "tl.load(tile_group + tl.program_id(0))")
            writer.let("lane", "group // BLOCKS")
            writer.let("begin", "tl.load(starts + group)")
            writer.let("named", "(tl.load(starts + group + 1) - begin) * (SHARED * ROW_BLOCK)")
            writer.let("place", "tl.load(tile_first + tl.program_id(0)) + lane_m")
            writer.let("row_ok", "place < named")
            writer.let("spot", "tl.load(order + begin + place // (SHARED * ROW_BLOCK), mask=row_ok, other=0)")
            writer.let("line", "spot // ENTRIES")
            writer.let("share", "place % (SHARED * ROW_BLOCK)")
            writer.let("reach", "tl.where(named > 0, WIDTH, 0)")
        with writer.block("else:"):
            writer.let("tiles", "(SHARED * ROW_BLOCK + BLOCK_M - 1) // BLOCK_M")
            writer.let("group", "tl.program_id(0) // tiles")
            writer.let("lane", "group // LINES")
            writer.let("share", "tl.program_id(0) % tiles * BLOCK_M + lane_m")
            writer.let("row_ok", "share < SHARED * ROW_BLOCK")
            writer.let("line", "group % LINES + tl.zeros([BLOCK_M], tl.int32)")
            writer.let("spot", "line * ENTRIES")
            writer.let("reach", "tl.load(counts + group) * WIDTH")
        self.lane_of("lane")
        writer.let("h", "tl.minimum(key_head * GROUP + MEMBER + share // ROW_BLOCK, H - 1)")
        writer.let("row", "(FIRST_LINE + line) * ROW_BLOCK + share % ROW_BLOCK - SKIPPED")
        writer.let("row_ok", "row_ok & (row >= 0) & (row < N)")
        writer.let("head", "b * H + h")
        writer.let("i", "row + OFFSET")
        writer.let("i_ok", "row_ok")
        writer.let("turns", "(reach + BLOCK_N - 1) // BLOCK_N")

    def keys_of_turn(self) -> None:
        """The n-th tile of the line's keys: `j`, `j_ok`."""
        writer = self.writer
        writer.let("along", "n * BLOCK_N + lanes_n")
        with writer.block("if PARTS:"):
            writer.let("j", "group % BLOCKS * WIDTH + along")
            writer.let("j_ok", "(along < WIDTH) & (j < M)")
        with writer.block("else:"):
            writer.let("entry_n", "group.to(tl.int64) * ENTRIES + along // WIDTH")
            writer.let("member", "tl.load(members + entry_n, mask=along < reach, other=-1)")
            writer.let("j", "member * WIDTH + along % WIDTH")
            writer.let("j_ok", "(member >= 0) & (j < M)")

    def part_rows(self) -> None:
        """`part_row`: the slot of a row's entry, among (lanes, SHARED, LINES, ROW_BLOCK, ENTRIES)."""
        writer = self.writer
        writer.let("shared_line", "(lane.to(tl.int64) * SHARED + share // ROW_BLOCK) * LINES + line")
        writer.let("part_row", "(shared_line * ROW_BLOCK + share % ROW_BLOCK) * ENTRIES + spot % ENTRIES")

    def of_rows(self, tensor: str, axis: str) -> str:
        """Pointers of the tile's rows, whose heads differ."""
        return (
            f"{tensor} + b64 * {tensor}_sb + h.to(tl.int64)[:, None] * {tensor}_sh"
            f" + row.to(tl.int64)[:, None] * {tensor}_sn + {axis}[None, :] * {tensor}_s{axis}"
        )

    def load_rows(self, name: str, tensor: str, axis: str) -> None:
        pointers = self.of_rows(tensor, axis)
        self.writer.let(name, f"_load_tile({pointers}, row_ok, {axis} < {axis.upper()}, True, not EVEN_{axis.upper()})")

    def store_rows(self, tensor: str, axis: str, value: str, part: str) -> None:
        """A vector a row, into its slot or its place."""
        writer, limit = self.writer, f"({axis} < {axis.upper()})[None, :]"
        with writer.block("if PARTS:"):
            pointers = f"{part} + part_row[:, None] * {axis.upper()} + {axis}[None, :]"
            writer.line(f"tl.store({pointers}, {value}, mask=row_ok[:, None] & {limit})")
        with writer.block("else:"):
            pointers = self.of_rows(tensor, axis)
            writer.line(f"tl.store({pointers}, {value}.to({tensor}.dtype.element_ty), mask=row_ok[:, None] & {limit})")

    def store_scalars(self, tensor: str, value: str, part: str) -> None:
        """A number a row, the same way."""
        with self.writer.block("if PARTS:"):
            self.writer.line(f"tl.store({part} + part_row, {value}, mask=row_ok)")
        with self.writer.block("else:"):
            self.writer.line(f"tl.store({tensor} + head.to(tl.int64) * N + row, {value}, mask=row_ok)")


class ListedForward(Gathered, StreamedForward):
    """Rows stay: outputs and log-sum-exps, whole or in parts."""

    signature = Signature(("q", "k", "v", "o"), ("lse", "part_out", "part_lse"), (), ())

    def __init__(self, plan: Plan, branch: Branch, name: str) -> None:
        branch = bare(branch)
        super().__init__(plan, branch, branch.domain, name)
        self.prepare((), head_rows=True)

    def body(self) -> None:
        self.rows_of_tile()
        self.expressions.hoist([self.branch.score, self.key_set.mask])
        self.lanes()
        for tensor in ("k", "v"):
            self.base(tensor)
        self.load_rows("query", "q", "d")
        self.start()
        with self.writer.block("for n in range(0, turns):"):
            self.keys_of_turn()
            self.step(self.key_set, TURN)
        self.finish()

    def finish(self) -> None:
        writer = self.writer
        empty = 'float("-inf")'
        writer.let("seen", "total > 0.0")
        writer.let("whole", "tl.where(seen, total, 1.0)")
        writer.let("result", "acc / whole[:, None]")
        writer.let("statistic", f"tl.where(seen, (largest + tl.log2(whole)) / LOG2E, {empty})")
        self.part_rows()
        self.store_rows("o", "e", "result", "part_out")
        self.store_scalars("lse", "statistic", "part_lse")


class ListedBackwardRows(Gathered, BackwardRows):
    """Rows stay: the gradients of q, of leaves without j and of tables read at pairs."""

    row_tensors = ()
    streams = ("k", "v")
    parts = ()

    def __init__(self, plan: Plan, branch: Branch, name: str, leaves: tuple[int, ...]) -> None:
        branch = bare(branch)
        BackwardKernel.__init__(self, plan, branch, branch.domain, name, leaves)
        self.prepare(("part_dq", *(f"part_leaf_{number}" for number in self.numbers)), head_rows=True)

    def body(self) -> None:
        writer = self.writer
        self.rows_of_tile()
        self.hoist()
        self.lanes()
        for tensor in ("k", "v"):
            self.base(tensor)
        self.load_rows("query", "q", "d")
        self.load_rows("cotangent", "do", "e")
        self.load_statistics("row", "row_ok")
        writer.let("dq_rows", "tl.zeros([BLOCK_M, BLOCK_D], tl.float32)")
        for number, leaf in zip(self.numbers, self.leaves, strict=True):
            shape = f"[WIDTH_{number}]" if leaf.side == "pair" else "[BLOCK_M]"
            writer.let(f"sum_{number}", f"tl.zeros({shape}, tl.float32)")
        with writer.block("for n in range(0, turns):"):
            self.keys_of_turn()
            self.step(self.key_set, TURN)
        self.finish()

    def finish(self) -> None:
        writer = self.writer
        self.scaled("dq_rows")
        self.part_rows()
        self.store_rows("dq", "d", "dq_rows", "part_dq")
        for number, leaf in zip(self.numbers, self.leaves, strict=True):
            if leaf.side == "row":
                self.store_scalars(f"leaf_{number}", f"sum_{number}", f"part_leaf_{number}")
            else:  # a program has one head: see `runtime/launch_listed.py`
                writer.let("program", "tl.program_id(0).to(tl.int64)")
                width = f"WIDTH_{number}"
                writer.line(f"tl.store(leaf_{number} + program * {width} + tl.arange(0, {width}), sum_{number})")


class ListedBackwardKeys(Gathered, BackwardKeys):
    """Keys stay: the gradients of k, v and of leaves without i, one query head of the key head after the other."""

    row_tensors = ()
    streams = ("q", "do")
    parts = ()
    constants = ()

    def __init__(self, plan: Plan, branch: Branch, name: str, leaves: tuple[int, ...]) -> None:
        branch = bare(branch)
        BackwardKernel.__init__(self, plan, branch, branch.domain, name, leaves)
        self.prepare((), head_rows=False)

    def body(self) -> None:
        writer = self.writer
        writer.let("tiles", "(WIDTH + BLOCK_M - 1) // BLOCK_M")
        writer.let("group", "tl.program_id(0) // tiles")
        writer.let("lane", "group // BLOCKS")
        self.lane_of("lane")
        writer.let("along", "tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)")
        writer.let("j", "group % BLOCKS * WIDTH + along")
        writer.let("row_ok", "(along < WIDTH) & (j < M)")
        writer.let("j_ok", "row_ok")
        self.lanes()
        for tensor in ("k", "v", "dk", "dv"):
            self.base(tensor)
        self.load_keys("keys", "k", "d")
        self.load_keys("values", "v", "e")
        writer.let("dk_rows", "tl.zeros([BLOCK_M, BLOCK_D], tl.float32)")
        writer.let("dv_rows", "tl.zeros([BLOCK_M, BLOCK_E], tl.float32)")
        writer.let("list_of", "group")
        writer.let("listed", "KEY_HEADS * B * BLOCKS + 2")
        with writer.block("for member in range(0, GROUP):"):
            writer.comment("heads with lines of their own (SHARED is 1) have lists of their own")
            writer.let("which", "tl.where(SHARED == 1, member, 0)")
            writer.let("begin", "tl.load(starts + which * listed + group)")
            writer.let("named", "(tl.load(starts + which * listed + group + 1) - begin) * ROW_BLOCK")
            writer.let("turns", "(named + BLOCK_N - 1) // BLOCK_N")
            self.member()
        self.finish()

    def load_keys(self, name: str, tensor: str, axis: str) -> None:
        pointer = f"{tensor}_head + j.to(tl.int64)[:, None] * {tensor}_sn + {axis}[None, :] * {tensor}_s{axis}"
        self.writer.let(name, f"_load_tile({pointer}, row_ok, {axis} < {axis.upper()}, True, not EVEN_{axis.upper()})")

    def member(self) -> None:
        writer = self.writer
        writer.let("h", "key_head * GROUP + member")
        writer.let("head", "b * H + h")
        self.hoist()
        for tensor in self.streams:
            self.base(tensor)
        for number in self.numbers:
            writer.let(f"sum_{number}", "tl.zeros([BLOCK_M], tl.float32)")
        with writer.block("for n in range(0, turns):"):
            writer.let("place", "n * BLOCK_N + lanes_n")
            writer.let("spot", "tl.load(order + begin + place // ROW_BLOCK, mask=place < named, other=0)")
            writer.let("row", "spot // ENTRIES * ROW_BLOCK + place % ROW_BLOCK - SKIPPED")
            writer.let("i_ok", "(place < named) & (row >= 0) & (row < N)")
            writer.let("i", "row + OFFSET")
            self.step(self.key_set, TURN)
        for number in self.numbers:
            writer.let("leaf_rows", f"leaf_{number} + head.to(tl.int64) * M + j")
            writer.line(f"tl.store(leaf_rows, sum_{number}, mask=row_ok)")


def listed_forward(plan: Plan, branch: Branch, number: int) -> Kernel:
    """The forward kernel of a listed branch."""
    return ListedForward(plan, branch, f"forward_{number}").kernel()


def listed_backward(plan: Plan, branch: Branch, number: int) -> list[Kernel]:
    """The gradient kernels of a listed branch: rows, then keys."""
    leaves = differentiate(branch.score).leaves
    by_row = tuple(n for n, leaf in enumerate(leaves) if leaf.side != "key")
    by_key = tuple(n for n, leaf in enumerate(leaves) if leaf.side == "key")
    return [
        ListedBackwardRows(plan, branch, f"backward_rows_{number}", by_row).kernel(),
        ListedBackwardKeys(plan, branch, f"backward_keys_{number}", by_key).kernel(),
    ]

"""Kernels of listed branches, backward; see `listed.py` for the lists.

One keeps rows, the way that the forward kernel does. The other keeps a tile of one block of keys and streams the rows
whose lines name the block, gathered by the turned lists. Some blocks are named by far more rows than others, so the
rows of a block are cut into pieces of PIECE rows at most: a piece of its own block alone writes the result, others
leave their sums in slots, which `add_pieces` adds in their order. No sum has two owners, so there are no atomics.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from attnc.compiler.differentiate import differentiate
from attnc.compiler.emit.backward import BackwardKeys, BackwardRows
from attnc.compiler.emit.backward_kernel import BackwardKernel
from attnc.compiler.emit.bounds import Loop
from attnc.compiler.emit.expressions import View
from attnc.compiler.emit.kernel import Kernel
from attnc.compiler.emit.listed import PIECES, SIZES, Gathered, bare
from attnc.compiler.plan import Branch, KeySet, Plan

TURNED_LISTS = ("order", "order_line", *PIECES, "piece_slot")


class ListedBackwardRows(Gathered, BackwardRows):
    """Rows stay: the gradients of q, of leaves without j and of tables read at pairs."""

    row_tensors = ()
    streams = ("k", "v")
    parts = ()

    def __init__(self, plan: Plan, branch: Branch, name: str, leaves: tuple[int, ...]) -> None:
        branch = bare(branch)
        BackwardKernel.__init__(self, plan, branch, branch.domain, name, leaves)
        self.prepare(("part_dq", *(f"part_leaf_{number}" for number in self.numbers)))
        self.expressions.head_rows = True

    def body(self) -> None:
        writer = self.writer
        self.tile_of_rows()
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
        self.stretch()
        self.finish()

    def weights(self, key_set: KeySet, loop: Loop, view: View) -> None:
        """A row whose line does not name the block weighs nothing: by its statistic, where scores are finite."""
        writer = self.writer
        with writer.block("if TOGETHER > 1:"):
            named = "statistic" if self.factor is None else 'tl.where(row_named, statistic, float("inf"))'
            writer.let("named_statistic", named)
        with writer.block("else:"):
            writer.let("named_statistic", "statistic")
        super().weights(key_set, loop, view)

    def of_queries(self, name: str, view: View) -> str:
        return super().of_queries("named_statistic" if name == "statistic" else name, view)

    def masked(self, key_set: KeySet, loop: Loop, view: View, write: Callable[[str], None]) -> None:
        masked = super().masked if self.factor is None else partial(BackwardRows.masked, self)
        masked(key_set, loop, view, write)

    def finish(self) -> None:
        writer = self.writer
        self.scaled("dq_rows")
        self.slots()
        self.store_rows("dq", "d", "dq_rows", "part_dq")
        for number, leaf in zip(self.numbers, self.leaves, strict=True):
            if leaf.side == "row":
                self.store_scalars(f"leaf_{number}", f"sum_{number}", f"part_leaf_{number}")
            else:  # a program has one head: see `runtime/cuda/launch_listed_backward.py`
                writer.let("program", "tl.program_id(0).to(tl.int64)")
                width = f"WIDTH_{number}"
                writer.line(f"tl.store(leaf_{number} + program * {width} + tl.arange(0, {width}), sum_{number})")


class ListedBackwardKeys(Gathered, BackwardKeys):
    """Keys stay: the gradients of k, v and of leaves without i, summed over the heads of a lane.

    A lane of a kernel with such leaves has one head. Where a tile has all keys of its block and the score has no
    leaves, it may leave the parts of dq, too (FUSED), and no other kernel makes the weights again.
    """

    row_tensors = ()
    streams = ("q", "do")
    parts = ()
    statistics = ()
    constants = ("FUSED",)

    def __init__(self, plan: Plan, branch: Branch, name: str, leaves: tuple[int, ...]) -> None:
        branch = bare(branch)
        BackwardKernel.__init__(self, plan, branch, branch.domain, name, leaves)
        self.arguments = tuple(one for one in self.arguments if one.role != "view")
        buffers = ("part_dk", "part_dv", "part_dq", *(f"part_leaf_{number}" for number in self.numbers))
        self.prepare(buffers, TURNED_LISTS, (*SIZES, "PIECE"))
        self.expressions.head_rows = not leaves

    def body(self) -> None:
        writer = self.writer
        writer.let("tiles", "(WIDTH + BLOCK_M - 1) // BLOCK_M")
        writer.let("piece", "tl.program_id(0) // tiles")
        self.load_piece()
        with writer.block("if (first > 0) & (first >= named):"):
            writer.line("return")
        writer.let("lane", "group // BLOCKS")
        self.lane_heads()
        if self.numbers:
            writer.let("h", "first_head")
        writer.let("along", "tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)")
        writer.let("j", "group % BLOCKS * WIDTH + along")
        writer.let("key_ok", "(along < WIDTH) & (j < M)")
        writer.let("j_ok", "key_ok")
        self.lanes()
        for tensor in ("k", "v"):
            self.base(tensor)
        self.load_keys("keys", "k", "d")
        self.load_keys("values", "v", "e")
        writer.let("dk_rows", "tl.zeros([BLOCK_M, BLOCK_D], tl.float32)")
        writer.let("dv_rows", "tl.zeros([BLOCK_M, BLOCK_E], tl.float32)")
        for number in self.numbers:
            writer.let(f"sum_{number}", "tl.zeros([BLOCK_M], tl.float32)")
        self.hoist()
        writer.let("last", "tl.minimum(named, first + PIECE)")
        self.may_be_dead()
        self.next_lines("first + lanes_n")
        with writer.block("for n in range(0, (last - first + BLOCK_N - 1) // BLOCK_N):"):
            self.rows_of_turn()
            self.step(self.key_set, self.each())
            if not self.gradient.leaves:
                with writer.block("if FUSED:"):
                    self.parts_of_rows()
        self.finish()

    def next_lines(self, place: str) -> None:
        """`lines` of the rows at a place, a turn before they are wanted: copies of rows then wait for no other load."""
        self.writer.let("next_place", place)
        entry = "begin + next_place // (SHARED * ROW_BLOCK)"
        self.writer.let("lines", f"tl.load(order_line + {entry}, mask=next_place < last, other=0)")

    def parts_of_rows(self) -> None:
        """What the block gives to the gradients of the turn's rows, in the slots of their entries."""
        writer = self.writer
        writer.let("spot", "tl.load(order + begin + place // (SHARED * ROW_BLOCK), mask=place_ok, other=0)")
        writer.let("slot_row", "lane.to(tl.int64) * (LISTS * LINES * ENTRIES) + spot")
        writer.let("slot_row", "slot_row * (SHARED * ROW_BLOCK) + place % (SHARED * ROW_BLOCK)")
        writer.let("dq_rows", "tl.dot(tl.trans(ds.to(keys.dtype)), keys, input_precision=PRECISION)")
        self.scaled("dq_rows")
        writer.line("tl.store(part_dq + slot_row[:, None] * BLOCK_D + d[None, :], dq_rows, mask=row_ok[:, None])")

    def masked(self, key_set: KeySet, loop: Loop, view: View, write: Callable[[str], None]) -> None:
        BackwardKeys.masked(self, key_set, loop, view, write)  # all rows name the block

    def dead(self, live: str, key_set: KeySet) -> None:
        """Takes the other pairs out, and those of keys that are not there."""
        super().dead(f"key_ok[:, None] & {live}", key_set)

    def rows_of_turn(self) -> None:
        """The n-th rows of the piece."""
        writer = self.writer
        writer.let("place", "first + n * BLOCK_N + lanes_n")
        writer.let("place_ok", "place < last")
        writer.let("line", "lines")
        self.next_lines("place + BLOCK_N")
        self.rows_of("line", "(place % (SHARED * ROW_BLOCK))", "place_ok")
        writer.let("i_ok", "row_ok")

    def may_be_dead(self) -> None:
        """`partial`: whether the piece may have a dead pair. One list names rows in their order; others stay masked.

        Rows that are not there weigh nothing.
        """
        if self.certain is None:
            return
        writer = self.writer
        writer.let("partial", "last >= first")
        with writer.block("if LISTS == 1 and WIDTH % BLOCK_M == 0:"):
            writer.let("j_low", "group % BLOCKS * WIDTH + tl.program_id(0) % tiles * BLOCK_M")
            writer.let("j_high", "j_low + BLOCK_M - 1")
            for name, place, row in (("low", "first", "0"), ("high", "tl.maximum(last - 1, 0)", "ROW_BLOCK - 1")):
                entry = f"begin + {place} // (SHARED * ROW_BLOCK)"
                writer.let(f"{name}_line", f"tl.load(order_line + {entry}, mask=last > 0, other=0)")
                writer.let(f"i_{name}", f"(FIRST_LINE + {name}_line) * ROW_BLOCK + {row} - SKIPPED + OFFSET")
            writer.let("partial", f"((j_high < M) & ({self.certain})) == 0")

    def load_keys(self, name: str, tensor: str, axis: str) -> None:
        pointer = f"{tensor}_head + j.to(tl.int64)[:, None] * {tensor}_sn + {axis}[None, :] * {tensor}_s{axis}"
        self.writer.let(name, f"_load_tile({pointer}, key_ok, {axis} < {axis.upper()}, True, not EVEN_{axis.upper()})")

    def load_streamed(self, name: str, tensor: str, axis: str, loop: Loop) -> None:
        """A tile of gathered rows."""
        self.load_rows(name, tensor, axis)

    def head_of_rows(self) -> str:
        return "first_head" if self.numbers else "first_head + member"

    def load_query_statistics(self, loop: Loop, view: View) -> None:
        """Log-sum-exps (base 2) and deltas; a row that is not there weighs nothing."""
        writer = self.writer
        writer.let("lane_rows", "(b * H + first_head).to(tl.int64) * N")
        for name, other, unit in (("lse", 'float("inf")', " * LOG2E"), ("delta", "0.0", "")):
            loaded = f"tl.load({name} + lane_rows + (member * N + row), mask=i_ok, other={other}){view.i}{unit}"
            writer.let("statistic" if name == "lse" else "delta_rows", loaded)

    def finish(self) -> None:
        writer = self.writer
        self.scaled("dk_rows")
        writer.let("slot", "tl.load(piece_slot + piece)")
        with writer.block("if slot >= 0:"):
            writer.let("part_row", "slot.to(tl.int64) * WIDTH + along")
            for tensor, axis in (("dk", "d"), ("dv", "e")):
                pointers = f"part_{tensor} + part_row[:, None] * BLOCK_{axis.upper()} + {axis}[None, :]"
                writer.line(f"tl.store({pointers}, {tensor}_rows, mask=(along < WIDTH)[:, None])")
            for number in self.numbers:
                writer.line(f"tl.store(part_leaf_{number} + part_row, sum_{number}, mask=along < WIDTH)")
        with writer.block("else:"):
            for tensor, axis in (("dk", "d"), ("dv", "e")):
                base = f"{tensor} + b64 * {tensor}_sb + (lane % LANE_HEADS).to(tl.int64) * {tensor}_sh"
                rows = f"{base} + j.to(tl.int64)[:, None] * {tensor}_sn + {axis}[None, :] * {tensor}_s{axis}"
                mask = f"key_ok[:, None] & ({axis} < {axis.upper()})[None, :]"
                writer.line(f"tl.store({rows}, {tensor}_rows.to({tensor}.dtype.element_ty), mask={mask})")
            for number in self.numbers:
                rows = f"leaf_{number} + (b * H + first_head).to(tl.int64) * M + j"
                writer.line(f"tl.store({rows}, sum_{number}, mask=key_ok)")


def listed_backward(plan: Plan, branch: Branch, number: int) -> list[Kernel]:
    """The gradient kernels of a listed branch: rows, then keys."""
    leaves = differentiate(branch.score).leaves
    by_row = tuple(n for n, leaf in enumerate(leaves) if leaf.side != "key")
    by_key = tuple(n for n, leaf in enumerate(leaves) if leaf.side == "key")
    return [
        ListedBackwardRows(plan, branch, f"backward_rows_{number}", by_row).kernel(),
        ListedBackwardKeys(plan, branch, f"backward_keys_{number}", by_key).kernel(),
    ]

"""The streamed skeleton, backward: scores are computed again, nothing of size N x M is kept.

Two kernels a branch. One keeps queries and streams the keys they see: gradients of q and of what varies over the
rows. The other keeps keys and streams the queries that see them, over the transposed domain: gradients of k and v and
of what varies over the keys. Each output element is summed by one program in a fixed order, so no atomics are needed
and equal inputs give equal bits (Dao et al. 2022, arXiv 2205.14135, algorithm 4, for the recomputation).

The second product of a tile comes after the weights: both products' results at once would not fit in registers. Where
keys stay it may come before the weights' own product, which then runs while the scores' gradient is made (OVERLAP).

Where one tile holds all rows of the side that stays, a tile of the other side meets all that it sees in one turn, and
its gradients are whole then and there (FUSED): one kernel gives them all, and each operand is read once.

With P the weights and dO the cotangent: dV = P^T dO, g = P * (dO V^T - delta), delta_i = sum_e dO_ie O_ie - dlse_i,
d(leaf) = g * d(score)/d(leaf).
"""

from __future__ import annotations

from contextlib import nullcontext

from attnc.compiler.build import unlowered
from attnc.compiler.differentiate import Leaf, differentiate
from attnc.compiler.emit.backward_kernel import BackwardKernel
from attnc.compiler.emit.bounds import Loop
from attnc.compiler.emit.expressions import PAIRS, TILE, TURNED, View, array_name
from attnc.compiler.emit.kernel import Kernel
from attnc.compiler.emit.listed_ranges import table_line
from attnc.compiler.emit.rows import emit_rows
from attnc.compiler.emit.streamed import emit_heads
from attnc.compiler.plan import Branch, Diagonals, Domain, KeySet, Plan, Rows


class BackwardRows(BackwardKernel):
    """Queries stay: the gradients of q, of leaves without j, and of tables read at pairs."""

    tensors: tuple[str, ...] = ("q", "k", "v", "do", "dq")
    fused: tuple[str, ...] = ("dk", "dv")
    row_tensors: tuple[str, ...] = ("q", "do")
    streams: tuple[str, ...] = ("k", "v")
    parts: tuple[str, ...] = ("part_q",)

    def body(self) -> None:
        writer = self.writer
        emit_heads(writer)
        self.place_rows()
        self.hoist()
        self.lanes()
        for tensor in self.tensors:
            self.base(tensor)
        self.load_row_tile("query", "q", "d", self.row)
        self.load_row_tile("cotangent", "do", "e", self.row)
        self.load_statistics(self.row, "row_ok")
        self.start_sum("dq_rows", "d")
        for number, leaf in zip(self.numbers, self.leaves, strict=True):
            shape = f"[WIDTH_{number}]" if leaf.side == "pair" else "[BLOCK_M]"
            writer.let(f"sum_{number}", f"tl.zeros({shape}, tl.float32)")
        self.stream()
        self.finish()

    def step(self, key_set: KeySet, loop: Loop) -> None:
        """One tile of keys."""
        self.expressions.local = {}
        writer = self.writer
        pairs = isinstance(key_set.walk, Diagonals)
        view = PAIRS if pairs else TILE
        self.load_streamed("keys", "k", "d", loop)
        self.load_streamed("values", "v", "e", loop)
        if pairs:
            self.paired_scores()
        else:
            self.scores("query", "keys")
        self.weights(key_set, loop, view)
        if pairs:
            writer.let("dp", "tl.sum(cotangent.to(tl.float32) * values.to(tl.float32), 1)")
        else:
            writer.let("dp", self.product("cotangent", "tl.trans(values)"))
        self.score_gradient(view)
        if pairs:
            self.add_pairs("dq_rows", "keys")
        else:
            self.add_product("dq_rows", "keys")
        for number, leaf in zip(self.numbers, self.leaves, strict=True):
            self.sum_leaf(number, leaf, view, pairs)

    def other_side(self) -> None:
        self.store_tile("dv", "e", "j", "weights", "cotangent")
        self.store_tile("dk", "d", "j", "ds", "query")

    def sum_leaf(self, number: int, leaf: Leaf, view: View, pairs: bool) -> None:
        writer = self.writer
        writer.let("part_sum", self.carried(leaf.adjoint, view), leaf.value.span)
        if leaf.side == "row":
            writer.let(f"sum_{number}", f"sum_{number} + " + ("part_sum" if pairs else "tl.sum(part_sum, 1)"))
            return
        # A table read at pairs: the few entries that this tile reads, one after the other
        table, index = leaf.value.args
        length = f"{array_name(table)}_n{len(self.expressions.arrays[str(table.attribute)].axes) - 1}"
        place = self.expressions.text(index, view)
        writer.let("part_sum", f"tl.where(({place} >= 0) & ({place} < {length}), part_sum, 0.0)")
        place = f"tl.minimum(tl.maximum({place}, 0), {length} - 1)"
        axis = "" if pairs else f" + tl.zeros([BLOCK_M, {'1' if pairs else 'BLOCK_N'}], tl.int32)"
        writer.let("entry_of", f"({place}){axis}")
        low, high = ("tl.min(entry_of, 0)", "tl.max(entry_of, 0)")
        if not pairs:
            low, high = f"tl.min({low}, 0)", f"tl.max({high}, 0)"
        with writer.block(f"for entry in range({low}, {high} + 1):"):
            picked = "tl.where(entry_of == entry, part_sum, 0.0)"
            total = f"tl.sum({picked}, 0)" if pairs else f"tl.sum(tl.sum({picked}, 1), 0)"
            writer.let(f"sum_{number}", f"sum_{number} + tl.where(tl.arange(0, WIDTH_{number}) == entry, {total}, 0.0)")

    def finish(self) -> None:
        writer = self.writer
        self.scaled_sum("dq_rows", "d")
        with writer.block("if slot >= 0:"):
            self.store_part("part_q", "dq_rows", "d")
        with writer.block("else:"):
            for columns in self.columns("d"):
                with self.tail() if columns.suffix else nullcontext():
                    self.store_columns("dq", self.row, "row_ok", f"dq_rows{columns.suffix}", columns)
        for number, leaf in zip(self.numbers, self.leaves, strict=True):
            if leaf.side == "row":
                own = "head.to(tl.int64) * N + row" if self.placed else "query_rows"
                writer.line(f"tl.store(leaf_{number} + {own}, sum_{number}, mask=row_ok)")
            else:
                writer.let("program", "(tile.to(tl.int64) * tl.num_programs(1) + head)")
                width = f"WIDTH_{number}"
                writer.line(f"tl.store(leaf_{number} + program * {width} + tl.arange(0, {width}), sum_{number})")


class BackwardKeys(BackwardKernel):
    """Keys stay: the gradients of k, v and of leaves without i, summed over the query heads of a key head."""

    tensors: tuple[str, ...] = ("q", "k", "v", "do", "dk", "dv")
    fused: tuple[str, ...] = ("dq",)
    row_tensors: tuple[str, ...] = ("k", "v")
    streams: tuple[str, ...] = ("q", "do")
    parts: tuple[str, ...] = ("part_k", "part_v")
    statistics: tuple[str, ...] = ("lse", "delta")
    streamed = "i"
    constants: tuple[str, ...] = ("MEMBERS",)  # query heads of a key head

    def body(self) -> None:
        """All query heads of the key head, or, where each lists keys of its own, the one that MEMBER names."""
        writer = self.writer
        writer.let("KEY_HEADS", "H // GROUP")
        writer.let("b", "tl.program_id(1) // KEY_HEADS")
        writer.let("b64", "b.to(tl.int64)")
        writer.let("key_head", "tl.program_id(1) % KEY_HEADS")
        listed = self.domain.rows.listed
        if listed is not None:
            writer.let("h", "key_head * GROUP + MEMBER")
            line = table_line(self.expressions.arrays[listed.table])
            emit_rows(writer, self.domain.rows, self.row_steps(self.domain.rows), "j", line)
        else:
            emit_rows(writer, self.domain.rows, self.row_steps(self.domain.rows), "j")
        writer.let("j_ok", "row_ok")
        self.lanes()
        for tensor in ("k", "v", "dk", "dv"):
            self.base(tensor)
        self.load_row_tile("keys", "k", "d", "j")
        self.load_row_tile("values", "v", "e", "j")
        self.start_sum("dk_rows", "d")
        writer.let("dv_rows", "tl.zeros([BLOCK_M, BLOCK_E], tl.float32)")
        if listed is not None:
            writer.let("member", "MEMBER")
            self.member()
        else:
            with writer.block("for member in range(0, MEMBERS):"):
                self.member()
        self.finish()

    def member(self) -> None:
        """One query head of the key head."""
        writer = self.writer
        writer.let("h", "key_head * GROUP + member")
        writer.let("head", "b * H + h")
        self.hoist()
        for tensor in (*self.streams, *(self.fused if self.fuses else ())):
            self.base(tensor)
        for number in self.numbers:
            writer.let(f"sum_{number}", "tl.zeros([BLOCK_M], tl.float32)")
        self.stream()
        for number in self.numbers:
            writer.let("leaf_rows", f"leaf_{number} + head.to(tl.int64) * M + j")
            writer.line(f"tl.store(leaf_rows, tl.load(leaf_rows, mask=row_ok, other=0.0) + sum_{number}, mask=row_ok)")

    def of_queries(self, name: str, view: View) -> str:
        return name  # loaded as it is used

    def load_query_statistics(self, loop: Loop, view: View) -> None:
        """Log-sum-exps (base 2) and deltas of the tile's queries.

        Through descriptors their copies are under way with those of q and do, and they are read from shared memory
        where they are needed: held in registers over a turn they would push others out.
        """
        writer = self.writer
        if loop.view is None:
            self.load_statistics("i - OFFSET", "i_ok", view.i)
        else:
            with writer.block(f"if VIEW_S{loop.view}:"):
                for name, tensor, unit in (("statistic", "lse", " * LOG2E"), ("delta_rows", "delta", "")):
                    tile = f"{tensor}_view{loop.view}.load([b, h, {loop.place}]).reshape(1, BLOCK_N)"
                    writer.let(name, tile + unit)
            with writer.block("else:"):
                self.load_statistics("i - OFFSET", "i_ok", view.i)

    def step(self, key_set: KeySet, loop: Loop) -> None:
        """One tile of queries."""
        self.expressions.local = {}
        writer = self.writer
        pairs = isinstance(key_set.walk, Diagonals)
        view = PAIRS if pairs else TURNED
        self.load_streamed("query", "q", "d", loop)
        self.load_streamed("cotangent", "do", "e", loop)
        self.load_query_statistics(loop, view)
        if pairs:
            self.paired_scores()
        else:
            self.scores("keys", "query")
        self.weights(key_set, loop, view)
        if pairs:
            writer.let("dv_rows", "dv_rows + weights[:, None] * cotangent.to(tl.float32)")
            writer.let("dp", "tl.sum(cotangent.to(tl.float32) * values.to(tl.float32), 1)")
        else:
            self.products()
        self.score_gradient(view)
        if pairs:
            self.add_pairs("dk_rows", "query")
        else:
            self.add_product("dk_rows", "query")
        for number, leaf in zip(self.numbers, self.leaves, strict=True):
            part = self.carried(leaf.adjoint, view)
            writer.let(f"sum_{number}", f"sum_{number} + " + (part if pairs else f"tl.sum({part}, 1)"), leaf.value.span)

    def other_side(self) -> None:
        self.store_tile("dq", "d", "i - OFFSET", "ds", "keys")

    def products(self) -> None:
        """dv and `dp`, in one order or the other: what is issued last runs on while `ds` is made of dp."""
        writer = self.writer
        dv = self.product(self.rounded("weights", "cotangent"), "cotangent", "dv_rows")
        with writer.block("if not OVERLAP:"):
            writer.let("dv_rows", dv)
        writer.let("dp", self.product("values", "tl.trans(cotangent)"))
        with writer.block("if OVERLAP:"):
            writer.let("dv_rows", dv)

    def finish(self) -> None:
        """Store, or add to what other passes left."""
        writer = self.writer
        self.scaled_sum("dk_rows", "d")
        if not self.parts:
            self.store_sums()
            return
        with writer.block("if slot >= 0:"):
            self.store_part("part_k", "dk_rows", "d")
            self.store_part("part_v", "dv_rows", "e")
        with writer.block("else:"):
            self.store_sums()

    def store_sums(self) -> None:
        for tensor, axis in (("dk", "d"), ("dv", "e")):
            for columns in self.columns(axis):
                with self.tail() if columns.suffix else nullcontext():
                    self.store_columns(tensor, "j", "row_ok", f"{tensor}_rows{columns.suffix}", columns, adding=True)


def backward_kernels(plan: Plan, branch: Branch, number: int) -> list[Kernel]:
    """The kernels of one branch of a transposed plan: rows first, then a kernel for each pass over the keys."""
    if branch.selected is not None:
        from attnc.compiler.emit.listed_backward import listed_backward  # it extends these kernels

        return listed_backward(plan, branch, number)
    leaves = differentiate(branch.score).leaves
    for leaf in leaves:
        if leaf.side == "pair" and {"i", "j"} & leaf.value.args[0].type.indices:
            help = "the CPU back end has it; on CUDA a table that is read at pairs is one for all tokens"
            raise unlowered(leaf.value, "on CUDA, the gradient of a table that varies over tokens", help)
    by_row = tuple(n for n, leaf in enumerate(leaves) if leaf.side != "key")
    by_key = tuple(n for n, leaf in enumerate(leaves) if leaf.side == "key")
    fuses = not leaves and fusable(branch.domain)
    rows = BackwardRows(plan, branch, branch.domain, f"backward_rows_{number}", by_row, fuses=fuses).kernel()
    alone = not leaves and len(branch.transposed) == 1
    keys = [
        BackwardKeys(
            plan, branch, domain, f"backward_keys_{number}_{at}", by_key, fuses=alone and fusable(domain)
        ).kernel()
        for at, domain in enumerate(branch.transposed)
    ]
    return [rows, *keys]


def fusable(domain: Domain) -> bool:
    """Whether each tile that streams by is visited once by each tile of rows, and rows are in order."""
    return domain.rows == Rows() and len(domain.key_sets) == 1 and domain.key_sets[0].walk is None

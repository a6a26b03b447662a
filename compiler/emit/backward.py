"""The streamed skeleton, backward: scores are computed again, nothing of size N x M is kept.

Two kernels a branch. One keeps queries and streams the keys they see: gradients of q and of what varies over the
rows. The other keeps keys and streams the queries that see them, over the transposed domain: gradients of k and v and
of what varies over the keys. Each output element is summed by one program in a fixed order, so no atomics are needed
and equal inputs give equal bits (Dao et al. 2022, arXiv 2205.14135, algorithm 4, for the recomputation).

The second product of a tile comes after the weights: both products' results at once would not fit in registers. Where
keys stay it may come before the weights' own product, which then runs while the scores' gradient is made (OVERLAP).

With P the weights and dO the cotangent: dV = P^T dO, g = P * (dO V^T - delta), delta_i = sum_e dO_ie O_ie - dlse_i,
d(leaf) = g * d(score)/d(leaf).
"""

from __future__ import annotations

from attnc.compiler.build import unlowered
from attnc.compiler.differentiate import Leaf, ScoreGradient, differentiate
from attnc.compiler.emit.arguments import Signature
from attnc.compiler.emit.bounds import Loop
from attnc.compiler.emit.expressions import PAIRS, TILE, TURNED, View, array_name
from attnc.compiler.emit.kernel import Kernel, StreamedKernel
from attnc.compiler.emit.listed_ranges import table_line
from attnc.compiler.emit.rows import emit_rows
from attnc.compiler.emit.streamed import emit_heads
from attnc.compiler.ir import Graph, Node, walk
from attnc.compiler.plan import Branch, Diagonals, Domain, KeySet, Plan

# Ops that may not be finite where their operands are.
FRAGILE = frozenset({"exp", "log", "sqrt", "pow", "div"})


def fragile(adjoint: Node) -> bool:
    """Whether a derivative may not be finite on some pair. A divisor that is the same for all pairs is harmless."""
    return any(
        node.op in FRAGILE and (node.op != "div" or bool({"i", "j"} & node.args[1].type.indices))
        for node in walk(adjoint)
    )


class BackwardKernel(StreamedKernel):
    """What both kernels share: the weights again, and g."""

    view: View
    cotangent = "cotangent[:, None]"

    def __init__(self, plan: Plan, branch: Branch, domain: Domain, name: str, leaves: tuple[int, ...]) -> None:
        self.gradient: ScoreGradient = differentiate(branch.score)
        self.numbers = leaves
        self.leaves: list[Leaf] = [self.gradient.leaves[number] for number in leaves]
        adjoints = [leaf.adjoint for leaf in self.leaves]
        # A score without q @ k, or that rounds it, sends nothing back to q and k.
        self.adjoint = Graph().literal(0.0) if self.gradient.dot is None else self.gradient.dot
        extra = [*adjoints, self.adjoint, *(leaf.value for leaf in self.leaves)]
        scheduled = (*self.parts, "schedule") if self.parts else ()
        buffers = ("lse", "delta", *scheduled, *(f"leaf_{number}" for number in leaves))
        self.signature = Signature(self.tensors, buffers, self.row_tensors, self.streams, self.statistics)
        pairs = (n for n, leaf in zip(leaves, self.leaves, strict=True) if leaf.side == "pair")
        self.constants = (*self.constants, *(f"WIDTH_{number}" for number in pairs))
        super().__init__(plan, branch, domain, name, extra)

    tensors: tuple[str, ...]
    row_tensors: tuple[str, ...]
    streams: tuple[str, ...]
    parts: tuple[str, ...]  # buffers of sums over a part of what a row sees; none: rows are never split
    statistics: tuple[str, ...] = ()  # those that stream by

    def hoist(self) -> None:
        """What does not vary over the streamed side."""
        masks = [key_set.mask for key_set in self.domain.key_sets]
        adjoints = [leaf.adjoint for leaf in self.leaves]
        self.expressions.hoist([self.branch.score, *masks, *adjoints, self.adjoint])
        if self.factor is not None:
            self.writer.let("factor", f"({self.expressions.once(self.factor, PAIRS)}) * LOG2E", self.factor.span)

    def outside(self) -> bool:
        """Whether the derivative by q @ k is one number, applied once at the end."""
        return not self.adjoint.type.indices

    def weights(self, key_set: KeySet, loop: Loop, view: View) -> None:
        """`weights`: the softmax weights of this tile, from its scores `s` and the rows' log-sum-exps."""
        writer = self.writer
        self.expressions.share([self.branch.score, *(leaf.adjoint for leaf in self.leaves), self.adjoint], view)
        statistic = self.of_queries("statistic", view)
        if self.factor is not None:
            writer.let("weights", f"tl.exp2(s * factor - {statistic})")
        else:
            score = self.expressions.text(self.raw, view)
            writer.let("weights", f"tl.exp2(({score}) * LOG2E - {statistic})", self.raw.span)
        self.masked(key_set, loop, view, lambda live: self.dead(live, key_set))

    def dead(self, live: str, key_set: KeySet) -> None:
        """Takes the other pairs out."""
        self.writer.let("weights", f"tl.where({live}, weights, 0.0)", key_set.mask.span)

    def of_queries(self, name: str, view: View) -> str:
        """A statistic of the queries, made to broadcast."""
        return f"{name}{view.i}"

    def score_gradient(self, view: View) -> None:
        """`g`, and `ds`, the gradient of q @ k, from `weights` and `dp` = dO V^T."""
        self.writer.let("g", f"weights * (dp - {self.of_queries('delta_rows', view)})")
        if not self.outside():
            self.writer.let("ds", self.carried(self.adjoint, view), self.adjoint.span)
        else:
            self.writer.let("ds", "g")

    def carried(self, adjoint: Node, view: View) -> str:
        """g times a derivative; 0 on a pair without weight, where the derivative may not be finite."""
        product = f"g * ({self.expressions.text(adjoint, view)})"
        return f"tl.where(weights > 0.0, {product}, 0.0)" if fragile(adjoint) else product

    def scaled(self, name: str) -> None:
        if self.outside():
            self.writer.let(name, f"{name} * ({self.expressions.text(self.adjoint, PAIRS)})")

    def load_statistics(self, place: str, ok: str, broadcast: str = "") -> None:
        """Log-sum-exps (base 2) and deltas of queries; a row that is not there weighs nothing."""
        writer = self.writer
        writer.let("query_rows", f"head.to(tl.int64) * N + {place}")
        writer.let("statistic", f'tl.load(lse + query_rows, mask={ok}, other=float("inf")){broadcast} * LOG2E')
        writer.let("delta_rows", f"tl.load(delta + query_rows, mask={ok}, other=0.0){broadcast}")

    def store_part(self, buffer: str, name: str, axis: str) -> None:
        """Sums over a part of what the rows see: `add_parts` joins them."""
        writer = self.writer
        writer.let("part_row", "(slot.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * BLOCK_M + lane")
        writer.line(f"tl.store({buffer} + part_row[:, None] * BLOCK_{axis.upper()} + {axis}[None, :], {name})")


class BackwardRows(BackwardKernel):
    """Queries stay: the gradients of q, of leaves without j, and of tables read at pairs."""

    tensors: tuple[str, ...] = ("q", "k", "v", "do", "dq")
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
        writer.let("dq_rows", "tl.zeros([BLOCK_M, BLOCK_D], tl.float32)")
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
            writer.let("s", "tl.sum(query.to(tl.float32) * keys.to(tl.float32), 1)")
        else:
            writer.let("s", "tl.dot(query, tl.trans(keys), input_precision=PRECISION)")
        self.weights(key_set, loop, view)
        if pairs:
            writer.let("dp", "tl.sum(cotangent.to(tl.float32) * values.to(tl.float32), 1)")
        else:
            writer.let("dp", "tl.dot(cotangent, tl.trans(values), input_precision=PRECISION)")
        self.score_gradient(view)
        if pairs:
            writer.let("dq_rows", "dq_rows + ds[:, None] * keys.to(tl.float32)")
        else:
            writer.let("dq_rows", "tl.dot(ds.to(keys.dtype), keys, dq_rows, input_precision=PRECISION)")
        for number, leaf in zip(self.numbers, self.leaves, strict=True):
            self.sum_leaf(number, leaf, view, pairs)

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
        self.scaled("dq_rows")
        with writer.block("if slot >= 0:"):
            self.store_part("part_q", "dq_rows", "d")
        with writer.block("else:"):
            writer.let("out", f"dq_head + {self.row}.to(tl.int64)[:, None] * dq_sn + d[None, :] * dq_sd")
            writer.line("tl.store(out, dq_rows.to(dq.dtype.element_ty), mask=row_ok[:, None] & (d < D)[None, :])")
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
        writer.let("dk_rows", "tl.zeros([BLOCK_M, BLOCK_D], tl.float32)")
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
        for tensor in self.streams:
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
            writer.let("s", "tl.sum(query.to(tl.float32) * keys.to(tl.float32), 1)")
        else:
            writer.let("s", "tl.dot(keys, tl.trans(query), input_precision=PRECISION)")
        self.weights(key_set, loop, view)
        if pairs:
            writer.let("dv_rows", "dv_rows + weights[:, None] * cotangent.to(tl.float32)")
            writer.let("dp", "tl.sum(cotangent.to(tl.float32) * values.to(tl.float32), 1)")
        else:
            self.products()
        self.score_gradient(view)
        if pairs:
            writer.let("dk_rows", "dk_rows + ds[:, None] * query.to(tl.float32)")
        else:
            writer.let("dk_rows", "tl.dot(ds.to(query.dtype), query, dk_rows, input_precision=PRECISION)")
        for number, leaf in zip(self.numbers, self.leaves, strict=True):
            part = self.carried(leaf.adjoint, view)
            writer.let(f"sum_{number}", f"sum_{number} + " + (part if pairs else f"tl.sum({part}, 1)"), leaf.value.span)

    def products(self) -> None:
        """dv and `dp`, in one order or the other: what is issued last runs on while `ds` is made of dp."""
        writer = self.writer
        dv = "tl.dot(weights.to(cotangent.dtype), cotangent, dv_rows, input_precision=PRECISION)"
        with writer.block("if not OVERLAP:"):
            writer.let("dv_rows", dv)
        writer.let("dp", "tl.dot(values, tl.trans(cotangent), input_precision=PRECISION)")
        with writer.block("if OVERLAP:"):
            writer.let("dv_rows", dv)

    def finish(self) -> None:
        """Store, or add to what other passes left."""
        writer = self.writer
        self.scaled("dk_rows")
        if not self.parts:
            self.store_sums()
            return
        with writer.block("if slot >= 0:"):
            self.store_part("part_k", "dk_rows", "d")
            self.store_part("part_v", "dv_rows", "e")
        with writer.block("else:"):
            self.store_sums()

    def store_sums(self) -> None:
        writer = self.writer
        for tensor, axis in (("dk", "d"), ("dv", "e")):
            rows = f"{tensor}_head + j.to(tl.int64)[:, None] * {tensor}_sn"
            writer.let("out", f"{rows} + {axis}[None, :] * {tensor}_s{axis}")
            writer.let("out_ok", f"row_ok[:, None] & ({axis} < {axis.upper()})[None, :]")
            with writer.block("if ADDING:"):
                writer.let(f"{tensor}_rows", f"{tensor}_rows + tl.load(out, mask=out_ok, other=0.0)")
            writer.line(f"tl.store(out, {tensor}_rows.to({tensor}.dtype.element_ty), mask=out_ok)")


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
    rows = BackwardRows(plan, branch, branch.domain, f"backward_rows_{number}", by_row).kernel()
    keys = [
        BackwardKeys(plan, branch, domain, f"backward_keys_{number}_{at}", by_key).kernel()
        for at, domain in enumerate(branch.transposed)
    ]
    return [rows, *keys]

"""The streamed skeleton, forward: a tile of rows stays, live keys stream by, a running softmax.

One kernel a branch. Per tile the row-wise bounds of the domain give the key tiles that are touched and those that are
full; partial tiles are masked, full ones are not, and each touched tile is visited once. The running
maximum starts at a large finite negative number, so that no difference of infinities arises (Milakov and
Gimelshein 2018, arXiv 1805.02867, for the running softmax; Dao et al. 2022, arXiv 2205.14135, for the tiling).
"""

from __future__ import annotations

from attnc.compiler.emit.arguments import Signature
from attnc.compiler.emit.bounds import Loop
from attnc.compiler.emit.expressions import PAIRS, ROWS, TILE, View
from attnc.compiler.emit.kernel import Kernel, StreamedKernel
from attnc.compiler.emit.writer import Writer
from attnc.compiler.plan import Diagonals, KeySet, Plan
from attnc.dsl.source import Span


def emit_heads(writer: Writer) -> None:
    """Batch and query head of the program, and the key head that it reads."""
    writer.let("head", "tl.program_id(1)")
    writer.let("b", "head // H")
    writer.let("h", "head % H")
    writer.let("b64", "b.to(tl.int64)")
    writer.let("key_head", "h // GROUP")


class StreamedForward(StreamedKernel):
    """Writes the kernel of one branch."""

    signature = Signature(
        tensors=("q", "k", "v", "o"),
        buffers=("lse", "part_out", "part_lse", "schedule"),
        rows=("q",),
        streamed=("k", "v"),
    )

    def body(self) -> None:
        domain = self.domain
        emit_heads(self.writer)
        self.place_rows()
        masks = [key_set.mask for key_set in domain.key_sets]
        self.expressions.hoist([self.branch.score, *([self.branch.sink] if self.branch.sink else []), *masks])
        self.load_queries()
        self.start()
        self.stream()
        self.finish()

    def load_queries(self) -> None:
        self.lanes()
        for tensor in ("q", "k", "v"):
            self.base(tensor)
        self.load_row_tile("query", "q", "d", self.row)

    def start(self) -> None:
        """The running softmax before any key: `largest` (base 2), `total`, `acc`."""
        writer = self.writer
        writer.let("largest", "tl.full([BLOCK_M], FLOOR, tl.float32)")
        writer.let("total", "tl.zeros([BLOCK_M], tl.float32)")
        writer.let("acc", "tl.zeros([BLOCK_M, BLOCK_E], tl.float32)")
        if self.branch.sink is not None:
            writer.comment("the sink is a key without a value; the first part has it")
            text = self.expressions.text(self.branch.sink, ROWS)
            with writer.block("if part == 0:"):
                writer.let("largest", f"tl.maximum(largest, ({text}) * LOG2E)", self.branch.sink.span)
                writer.let("total", "total + 1.0")
        if self.factor is not None:
            writer.let("factor", f"({self.expressions.once(self.factor, ROWS)}) * LOG2E", self.factor.span)

    def step(self, key_set: KeySet, loop: Loop) -> None:
        """One tile of keys: scores, mask, running softmax, values."""
        self.expressions.local = {}
        writer = self.writer
        pairs = isinstance(key_set.walk, Diagonals)
        view = PAIRS if pairs else TILE
        self.load_streamed("keys", "k", "d", loop)
        self.load_streamed("values", "v", "e", loop)  # here, so that both copies are under way together
        if pairs:
            self.paired_scores()
        else:
            self.scores("query", "keys")
        self.expressions.share([self.branch.score], view)
        self.weigh(key_set, loop, view)
        writer.let("fade", "tl.exp2(largest - peak)")
        writer.let("largest", "peak")
        if pairs:
            writer.let("total", "total * fade + weights")
            writer.let("acc", "acc * fade[:, None] + weights[:, None] * values.to(tl.float32)")
        else:
            writer.let("total", "total * fade + tl.sum(weights, 1)")
            writer.let("acc", self.product(self.rounded("weights", "values"), "values", "acc * fade[:, None]"))

    def weigh(self, key_set: KeySet, loop: Loop, view: View) -> None:
        """`peak`, the new running maximum, and `weights` from the products `s`, which a condition may read."""
        writer = self.writer

        def mask(name: str) -> None:
            self.masked(key_set, loop, view, lambda live: self.dead(name, live, key_set.mask.span))

        def reduced(name: str) -> str:
            return name if view is PAIRS else f"tl.max({name}, 1)"

        def weigh_scaled() -> None:
            mask("logit")
            writer.let("peak", f"tl.maximum(largest, {reduced('logit')})")
            writer.let("weights", f"tl.exp2(logit - peak{view.i})")

        if self.factor is None:
            writer.let("logit", f"({self.expressions.text(self.raw, view)}) * LOG2E", self.raw.span)
            weigh_scaled()
            return
        with writer.block("if RAISING:"):
            mask("s")
            writer.let("peak", f"tl.maximum(largest, {reduced('s')} * factor)")
            writer.let("weights", f"tl.exp2(s * factor - peak{view.i})")
        with writer.block("else:"):
            writer.let("logit", "s * factor")
            weigh_scaled()

    def dead(self, name: str, live: str, span: Span | None) -> None:
        """Takes the other pairs out."""
        self.writer.let(name, f'tl.where({live}, {name}, float("-inf"))', span)

    def finish(self) -> None:
        """Write the rows' outputs and log-sum-exps, or those of a part of their keys."""
        writer = self.writer
        empty = 'float("-inf")'
        writer.let("seen", "total > 0.0")
        writer.let("whole", "tl.where(seen, total, 1.0)")
        writer.let("result", "acc / whole[:, None]")
        writer.let("statistic", f"tl.where(seen, (largest + tl.log2(whole)) / LOG2E, {empty})")
        with writer.block("if slot >= 0:"):
            writer.let("part_row", "(slot.to(tl.int64) * tl.num_programs(1) + head) * BLOCK_M + lane")
            writer.line("tl.store(part_out + part_row[:, None] * BLOCK_E + e[None, :], result)")
            writer.line("tl.store(part_lse + part_row, statistic)")
        with writer.block("else:"):
            self.base("o")
            writer.let("o_rows", f"o_head + {self.row}.to(tl.int64)[:, None] * o_sn + e[None, :] * o_se")
            writer.line("tl.store(o_rows, result.to(o.dtype.element_ty), mask=row_ok[:, None] & (e < E)[None, :])")
            writer.line(f"tl.store(lse + head.to(tl.int64) * N + {self.row}, statistic, mask=row_ok)")


def forward_kernels(plan: Plan) -> list[Kernel]:
    """One kernel a branch."""
    from attnc.compiler.emit.listed import listed_forward  # it extends these kernels

    return [
        StreamedForward(plan, branch, branch.domain, f"forward_{number}").kernel()
        if branch.selected is None
        else listed_forward(plan, branch, number)
        for number, branch in enumerate(plan.branches)
    ]

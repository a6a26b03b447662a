"""What the gradient kernels of the streamed skeleton share: weights made again, their gradients, sums and stores."""

from __future__ import annotations

from contextlib import nullcontext

from attnc.compiler.differentiate import Leaf, ScoreGradient, differentiate
from attnc.compiler.emit.arguments import Signature
from attnc.compiler.emit.bounds import Loop
from attnc.compiler.emit.expressions import PAIRS, View
from attnc.compiler.emit.kernel import Columns, StreamedKernel
from attnc.compiler.ir import Graph, Node, walk
from attnc.compiler.plan import Branch, Domain, KeySet, Plan

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

    def __init__(
        self, plan: Plan, branch: Branch, domain: Domain, name: str, leaves: tuple[int, ...], *, fuses: bool = False
    ) -> None:
        self.gradient: ScoreGradient = differentiate(branch.score)
        self.fuses = fuses
        if fuses:
            self.tensors = (*self.tensors, *self.fused)
            self.constants = (*self.constants, "FUSED")
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
    fused: tuple[str, ...] = ()  # gradients of the side that streams by
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

    def turn(self, key_set: KeySet, loop: Loop) -> None:
        super().turn(key_set, loop)
        if self.fuses:
            with self.writer.block("if FUSED:"):
                self.other_side()

    def other_side(self) -> None:
        """The gradients of the tile that streams by, where it has met all that it sees."""
        raise NotImplementedError

    def store_tile(self, target: str, axis: str, place: str, weights: str, operand: str) -> None:
        """The product of a tile's weights, turned, with the rows that stay, as the gradient of a streamed tile."""
        turned = f"tl.trans({self.rounded(weights, operand)})"
        for columns in self.columns(axis):
            with self.tail() if columns.suffix else nullcontext():
                self.writer.let("tile_rows", self.product(turned, f"{operand}{columns.suffix}"))
                if weights == "ds":
                    self.scaled("tile_rows")
                self.store_columns(target, f"({place})", f"{self.streamed}_ok", "tile_rows", columns)

    def store_columns(
        self, target: str, place: str, ok: str, name: str, columns: Columns, *, adding: bool = False
    ) -> None:
        """A tile of a gradient; `adding`: to what is there, where ADDING."""
        writer = self.writer
        rows = f"{target}_head + {place}.to(tl.int64)[:, None] * {target}_sn"
        writer.let("out", f"{rows} + {columns.places}[None, :] * {target}_s{columns.axis}")
        writer.let("out_ok", f"{ok}[:, None] & ({columns.places} < {columns.axis.upper()})[None, :]")
        if adding:
            with writer.block("if ADDING:"):
                writer.let(name, f"{name} + tl.load(out, mask=out_ok, other=0.0)")
        writer.line(f"tl.store(out, {name}.to({target}.dtype.element_ty), mask=out_ok)")

    def start_sum(self, name: str, axis: str) -> None:
        """A sum over what streams by, of the tile that stays."""
        for columns in self.columns(axis):
            with self.tail() if columns.suffix else nullcontext():
                self.writer.let(f"{name}{columns.suffix}", f"tl.zeros([BLOCK_M, {columns.width}], tl.float32)")

    def add_product(self, name: str, other: str) -> None:
        """ds times a tile of the other side, added to a sum."""
        self.writer.let(name, self.product(self.rounded("ds", other), other, name))
        with self.tail() as let:
            let(f"{name}_tail", self.product(self.rounded("ds", other), f"{other}_tail", f"{name}_tail"))

    def add_pairs(self, name: str, other: str) -> None:
        """The same where a row has one key."""
        self.writer.let(name, f"{name} + ds[:, None] * {other}.to(tl.float32)")
        with self.tail() as let:
            let(f"{name}_tail", f"{name}_tail + ds[:, None] * {other}_tail.to(tl.float32)")

    def scaled_sum(self, name: str, axis: str) -> None:
        for columns in self.columns(axis):
            with self.tail() if columns.suffix else nullcontext():
                self.scaled(f"{name}{columns.suffix}")

    def store_part(self, buffer: str, name: str, axis: str) -> None:
        """Sums over a part of what the rows see: `add_parts` joins them."""
        writer = self.writer
        writer.let("part_row", "(slot.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * BLOCK_M + lane")
        line = f"BLOCK_{axis.upper()}"
        if axis == "d" and self.tails:
            line = "(2 * BLOCK_D if TAIL > 0 else BLOCK_D)"
        for columns in self.columns(axis):
            with self.tail() if columns.suffix else nullcontext():
                place = f"part_row[:, None] * {line} + {columns.places}[None, :]"
                writer.line(f"tl.store({buffer} + {place}, {name}{columns.suffix})")

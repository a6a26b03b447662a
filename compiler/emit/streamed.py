"""The streamed skeleton, forward: a tile of rows stays, live keys stream by, a running softmax.

One kernel a branch. Per tile the row-wise bounds of the domain are reduced to the key tiles that are touched and
those that are full; full tiles run without a mask, partial ones with it, each touched tile once. The running
maximum starts at a large finite negative number, so that no difference of infinities arises (Milakov and
Gimelshein 2018, arXiv 1805.02867, for the running softmax; Dao et al. 2022, arXiv 2205.14135, for the tiling).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from attnc.compiler.emit.arguments import Argument, kernel_arguments, view_constant
from attnc.compiler.emit.expressions import PAIRS, ROWS, TILE, Array, Expressions, View
from attnc.compiler.emit.ranges import Loop, emit_ranges
from attnc.compiler.emit.rows import emit_rows
from attnc.compiler.emit.writer import Writer
from attnc.compiler.ir import Node
from attnc.compiler.plan import Branch, Diagonals, KeySet, Plan, Rows
from attnc.dsl.source import Span

CONSTANTS = ("BLOCK_M", "BLOCK_N", "BLOCK_D", "BLOCK_E", "EVEN_D", "EVEN_E", "PRECISION", "RAISING", "SPLIT")


@dataclass(frozen=True)
class Kernel:
    """A kernel's text, its name and its arguments in order (`CONSTANTS` follow them)."""

    name: str
    text: str
    arguments: tuple[Argument, ...]
    factor: Node | None  # the score's constant factor: RAISING says that it is not negative


def split_score(score: Node) -> tuple[Node, Node | None]:
    """score = (q @ k) * factor with a factor of parameters alone: (q @ k, factor); else (score, None)."""
    if score.op == "mul":
        for raw, factor in (score.args, score.args[::-1]):
            if raw.op == "dot" and factor.op in ("parameter", "literal"):
                return raw, factor
    return score, None


def branch_nodes(branch: Branch) -> list[Node]:
    """Every expression that the kernel of a branch evaluates."""
    nodes = [branch.score, *([branch.sink] if branch.sink else [])]
    for key_set in branch.domain.key_sets:
        nodes.append(key_set.mask)
        for run in key_set.runs:
            for bounds in (run.outer, *([run.inner] if run.inner else [])):
                nodes += [bounds.lo, bounds.hi]
    return nodes


def emit_heads(writer: Writer) -> None:
    """Batch and query head of the program, and the key head that it reads."""
    writer.let("head", "tl.program_id(1)")
    writer.let("b", "head // H")
    writer.let("h", "head % H")
    writer.let("b64", "b.to(tl.int64)")
    writer.let("key_head", "(h // GROUP).to(tl.int64)")


class StreamedForward:
    """Writes the kernel of one branch."""

    def __init__(self, plan: Plan, branch: Branch, name: str) -> None:
        self.branch = branch
        self.name = name
        self.writer = Writer()
        self.arguments = kernel_arguments(plan, branch_nodes(branch), branch.domain)
        arrays = {one.attribute: Array(one.name, one.axes) for one in self.arguments if one.role == "array"}
        self.expressions = Expressions(self.writer, arrays)
        self.raw, self.factor = split_score(branch.score)

    def kernel(self) -> Kernel:
        writer = self.writer
        plain = [argument.name for argument in self.arguments if not argument.specialised]
        writer.line(f"@triton.jit(do_not_specialize={plain!r})")
        names = [argument.name for argument in self.arguments]
        views = dict.fromkeys(view_constant(argument) for argument in self.arguments if argument.role == "view")
        parameters = ", ".join([*names, *(f"{constant}: tl.constexpr" for constant in (*CONSTANTS, *views))])
        with writer.block(f"def {self.name}({parameters}):"):
            self.body()
        return Kernel(self.name, writer.text(), self.arguments, self.factor)

    def body(self) -> None:
        domain = self.branch.domain
        emit_heads(self.writer)
        emit_rows(self.writer, domain.rows, self.row_steps(domain.rows))
        self.writer.let("i_ok", "row_ok")
        masks = [key_set.mask for key_set in domain.key_sets]
        self.expressions.hoist([self.branch.score, *([self.branch.sink] if self.branch.sink else []), *masks])
        self.load_queries()
        self.start()
        for number, key_set in enumerate(domain.key_sets):
            for loop in emit_ranges(self.writer, self.expressions, key_set, number):
                with self.writer.block(f"for n in range({loop.first}, {loop.last}):"):
                    loop.keys(self.writer)
                    self.step(key_set, loop)
        self.finish()

    def row_steps(self, rows: Rows) -> dict[str, str]:
        steps = {name: getattr(rows, name) for name in ("period", "step", "high_step", "low_step")}
        return {name: self.expressions.text(node, ROWS) for name, node in steps.items() if node is not None}

    def load_queries(self) -> None:
        writer = self.writer
        writer.let("lanes_n", "tl.arange(0, BLOCK_N)")
        writer.let("d", "tl.arange(0, BLOCK_D)")
        writer.let("e", "tl.arange(0, BLOCK_E)")
        writer.let("q_head", "q + b64 * q_sb + h.to(tl.int64) * q_sh")
        writer.let("q_rows", "q_head + row.to(tl.int64)[:, None] * q_sn + d[None, :] * q_sd")
        pointers = "_load_tile(q_rows, row_ok, d < D, True, not EVEN_D)"
        rows = self.branch.domain.rows
        if rows.period is not None:
            writer.let("query", pointers)
        else:
            place = "row_tile, 0" if rows.step is None else "tile // class_tiles, row_tile, 0"
            self.viewed("query", f"q_view.load([b, h, {place}]).reshape(BLOCK_M, BLOCK_D)", pointers, "_Q")
        writer.let("k_head", "k + b64 * k_sb + key_head * k_sh")
        writer.let("v_head", "v + b64 * v_sb + key_head * v_sh")

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
            writer.let("factor", f"({self.expressions.text(self.factor, ROWS)}) * LOG2E", self.factor.span)

    def step(self, key_set: KeySet, loop: Loop) -> None:
        """One tile of keys: scores, mask, running softmax, values."""
        writer = self.writer
        pairs = isinstance(key_set.walk, Diagonals)
        view = PAIRS if pairs else TILE
        self.expressions.local = {}
        guarded = loop.masked or not loop.contiguous
        self.load("keys", "k", "d", loop, guarded)
        self.load("values", "v", "e", loop, guarded)  # here, so that both copies are under way together
        if pairs:
            writer.let("s", "tl.sum(query.to(tl.float32) * keys.to(tl.float32), 1)")
        else:
            writer.let("s", "tl.dot(query, tl.trans(keys), input_precision=PRECISION)")
        self.expressions.share([self.branch.score, *([key_set.mask] if loop.masked else [])], view)
        self.weigh(view, self.live(key_set, view) if loop.masked else None, key_set.mask.span)
        writer.let("fade", "tl.exp2(largest - peak)")
        writer.let("largest", "peak")
        if pairs:
            writer.let("total", "total * fade + weights")
            writer.let("acc", "acc * fade[:, None] + weights[:, None] * values.to(tl.float32)")
        else:
            writer.let("total", "total * fade + tl.sum(weights, 1)")
            writer.let(
                "acc", "tl.dot(weights.to(values.dtype), values, acc * fade[:, None], input_precision=PRECISION)"
            )

    def viewed(self, name: str, view: str, pointers: str, suffix: str) -> None:
        """A tile through its tensor descriptor where there is one, else through pointers."""
        with self.writer.block(f"if VIEW{suffix}:"):
            self.writer.let(name, view)
        with self.writer.block("else:"):
            self.writer.let(name, pointers)

    def load(self, name: str, tensor: str, axis: str, loop: Loop, guarded: bool) -> None:
        """A tile of keys or values; a full one needs no guard."""
        if loop.contiguous:
            base = f"{tensor}_head + start.to(tl.int64) * {tensor}_sn + lanes_n[:, None] * {tensor}_sn"
        else:
            base = f"{tensor}_head + j.to(tl.int64)[:, None] * {tensor}_sn"
        pointer = f"{base} + {axis}[None, :] * {tensor}_s{axis}"
        pointers = f"_load_tile({pointer}, j_ok, {axis} < {axis.upper()}, {guarded}, not EVEN_{axis.upper()})"
        if loop.view is None:
            self.writer.let(name, pointers)
            return
        view = f"{tensor}_view{loop.view}.load([b, h // GROUP, {loop.place}]).reshape(BLOCK_N, BLOCK_{axis.upper()})"
        self.viewed(name, view, pointers, loop.view)

    def live(self, key_set: KeySet, view: View) -> str:
        mask = key_set.mask
        inside = "j_ok" + view.j
        if mask.op == "literal":
            return inside
        return f"{inside} & {self.expressions.text(mask, view)}"

    def weigh(self, view: View, live: str | None, span: Span | None) -> None:
        """`peak`, the new running maximum, and `weights` from the scores `s`."""
        writer = self.writer
        dead = f'tl.where({live}, s, float("-inf"))'
        reduced = "s" if view is PAIRS else "tl.max(s, 1)"
        if self.factor is None:
            writer.let("s", f"({self.expressions.text(self.raw, view)}) * LOG2E", self.raw.span)
            self.weigh_scaled(dead if live else None, reduced, view, span)
            return
        with writer.block("if RAISING:"):
            if live:
                writer.let("s", dead, span)
            writer.let("peak", f"tl.maximum(largest, {reduced} * factor)")
            writer.let("weights", f"tl.exp2(s * factor - peak{view.i})")
        with writer.block("else:"):
            writer.let("s", "s * factor")
            self.weigh_scaled(dead if live else None, reduced, view, span)

    def weigh_scaled(self, dead: str | None, reduced: str, view: View, span: Span | None) -> None:
        if dead:
            self.writer.let("s", dead, span)
        self.writer.let("peak", f"tl.maximum(largest, {reduced})")
        self.writer.let("weights", f"tl.exp2(s - peak{view.i})")

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
            writer.let("o_head", "o + b64 * o_sb + h.to(tl.int64) * o_sh")
            writer.let("o_rows", "o_head + row.to(tl.int64)[:, None] * o_sn + e[None, :] * o_se")
            writer.line("tl.store(o_rows, result.to(o.dtype.element_ty), mask=row_ok[:, None] & (e < E)[None, :])")
            writer.line("tl.store(lse + head.to(tl.int64) * N + row, statistic, mask=row_ok)")


def forward_kernels(plan: Plan) -> Sequence[Kernel]:
    """One kernel a branch."""
    return [StreamedForward(plan, branch, f"forward_{number}").kernel() for number, branch in enumerate(plan.branches)]

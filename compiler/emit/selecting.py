"""Kernels of selections: a tile of lines stays, members stream by, and each line's best so far are held.

Scores of a tile of members are sums over loops of one product (see `composition.Scores`). Where all members fit in one
tile (RESIDENT) the best are taken from registers. Else a line holds up to CAPACITY members that exceed the last of its
best in a buffer of its program, and takes the best of these whenever another tile may not fit. Programs are as many as
run at once, and each works on one tile of lines after the other: buffers do not grow with the sequence.
"""

from __future__ import annotations

from collections.abc import Sequence

from attnc.compiler.composition import Scores
from attnc.compiler.emit.arguments import PLAIN, Argument, Signature, kernel_arguments
from attnc.compiler.emit.expressions import ROWS, TILE, Array, Expressions
from attnc.compiler.emit.kernel import CONSTANTS, Kernel, split_score
from attnc.compiler.emit.listed import NOTHING
from attnc.compiler.emit.selecting_text import SELECTING
from attnc.compiler.emit.writer import Writer
from attnc.compiler.ir import Node

VECTORS = ("q", "k", "k_low")
BUFFERS = ("lists", "held", "held_used", "held_last")
# Sizes beside those of every kernel: lanes of a batch row, heads of a lane, entries of a list; and where a score sums
# over places: their number, width and stride, those of a member, the tokens that there are. A member has TURNS places
# at most, and the keys of each lie one after the other: see `runtime.cuda.launch_selecting.by_turns`
SIZES = ("LANES", "HEADS", "WANTED", "WIDTH", "TURNS")
PLACE_SIZES = ("PLACES", "PLACE_WIDTH", "PLACE_STRIDE", "MEMBER_WIDTH", "LENGTH")
SWITCHES = ("PARTS", "RESIDENT", "CAPACITY", "AT_ONCE", "PADDED", "FORCED", "FEW")


class SelectingKernel:
    """Writes the kernel of one selection."""

    def __init__(self, scores: Scores, name: str) -> None:
        self.scores = scores
        self.name = name
        self.writer = Writer()
        product = scores.query is not None
        signature = Signature(VECTORS, BUFFERS, rows=VECTORS[:1] if product else (), streamed=())
        given = kernel_arguments(scores.plan, self.nodes(), NOTHING, signature)
        streamed = VECTORS[1:] if product else ()
        views = [Argument(f"{one}_view", "view", one, PLAIN, specialised=True) for one in streamed]
        sizes = SIZES if scores.places is None else (*SIZES, *PLACE_SIZES)
        self.arguments = (*given, *views, *(Argument(size, "size", size) for size in sizes))
        arrays = {one.attribute: Array(one.name, one.axes) for one in self.arguments if one.role == "array"}
        self.expressions = Expressions(self.writer, arrays)

    def nodes(self) -> list[Node]:
        """Every expression that the kernel evaluates."""
        scores = self.scores
        bounds = [scores.bounds.lo, scores.bounds.hi] if scores.bounds else []
        return [node for node in (*self.score_nodes(), scores.condition, scores.force, *bounds) if node is not None]

    def score_nodes(self) -> list[Node]:
        return [self.scores.body, *([self.scores.live] if self.scores.live else [])]

    def kernel(self) -> Kernel:
        """Write it."""
        writer = self.writer
        plain = [argument.name for argument in self.arguments if not argument.specialised]
        writer.line(f"@triton.jit(do_not_specialize={plain!r})")
        constants = [f"{constant}: tl.constexpr" for constant in (*CONSTANTS, *SWITCHES, "VIEW", "VIEW_Q")]
        with writer.block(f"def {self.name}({', '.join([*(one.name for one in self.arguments), *constants])}):"):
            self.body()
        text = f"{SELECTING}\n\n\n{writer.text()}"
        return Kernel(self.name, text, self.arguments, None, NOTHING, splits=False)

    def lets(self, pairs: Sequence[tuple[str, str]]) -> None:
        for name, value in pairs:
            self.writer.let(name, value)

    def body(self) -> None:
        writer = self.writer
        self.lets(
            [
                ("lane_m", "tl.arange(0, BLOCK_M)"),
                ("lanes_n", "tl.arange(0, BLOCK_N)"),
                ("d", "tl.arange(0, BLOCK_D)"),
                ("tiles", "tl.cdiv(N, BLOCK_M)"),
                ("first_line", "tl.program_id(0) * BLOCK_M"),
                ("entries", "(first_line + lane_m) * CAPACITY"),
            ]
        )
        writer.comment("later lines first: under a causal condition they have most members")
        with writer.block("for work in range(tl.program_id(0), tiles * LANES * B, tl.num_programs(0)):"):
            self.tile()

    def tile(self) -> None:
        """One tile of lines."""
        writer = self.writer
        self.lets(
            [
                ("lane", "work % (LANES * B)"),
                ("b", "lane // LANES"),
                ("b64", "b.to(tl.int64)"),
                ("h", "lane % LANES * HEADS"),
                ("first_row", "(tiles - 1 - work // (LANES * B)) * BLOCK_M"),
                ("row", "first_row + lane_m"),
                ("row_ok", "row < N"),
                ("i", "row + OFFSET"),
                ("i_ok", "row_ok"),
                ("lines", "lists + (lane.to(tl.int64) * N + row) * WIDTH"),
            ]
        )
        scores = self.scores
        self.expressions.hoist([node for node in (scores.condition, scores.force) if node is not None])
        if scores.head is None:
            self.hoist()
            self.load_query()
        self.range()
        with writer.block("for n in range(first_tile, last_tile):"):
            self.lets([("member", "n * BLOCK_N + lanes_n"), ("member_ok", "member < M")])
            self.score()
            self.candidates()
            if scores.force is None:
                few = "_write_few(lines, row_ok, member, ranks, WIDTH, PADDED, FEW)"
                with writer.block("if RESIDENT and FEW > 0:"):
                    writer.line(few)
            with writer.block(f"{'if' if scores.force is not None else 'elif'} RESIDENT:"):
                writer.line("_write(lines, row_ok, member, ranks, must, WANTED, WIDTH, PADDED, FORCED, FEW)")
            with writer.block("else:"):
                writer.let("used", "_append(held, entries, member, ranks, must, last, used)")
                writer.let("limit", "tl.where(n == last_tile - 1, WANTED, CAPACITY - BLOCK_N)")
                with writer.block("if tl.max(used, 0) > limit:"):
                    writer.let("slack", "(limit - WANTED) // 4")
                    held = "held, held_used, held_last, first_line, used"
                    writer.line(
                        f"used, last = _compact({held}, WANTED, slack, BLOCK_M, CAPACITY, AT_ONCE, FORCED, FEW)"
                    )
        with writer.block("if not RESIDENT:"):
            writer.line("tl.debug_barrier()")
            writer.line("_unload(lines, row_ok, held, entries, used, WIDTH, PADDED)")
            writer.line("tl.debug_barrier()")

    def range(self) -> None:
        """The tiles of members that hold the candidates; nothing is held yet."""
        writer, bounds = self.writer, self.scores.bounds
        with writer.block("if RESIDENT:"):
            self.lets([("first_tile", "0"), ("last_tile", "1")])
        with writer.block("else:"):
            if bounds is None:
                self.lets([("first_tile", "0"), ("last_tile", "tl.cdiv(M, BLOCK_N)")])
            else:
                low, high = (self.expressions.text(bound, ROWS) for bound in (bounds.lo, bounds.hi))
                writer.let("low", f"_int32(tl.min(tl.where(row_ok, {low}, M), 0))", bounds.lo.span)
                writer.let("high", f"_int32(tl.max(tl.where(row_ok, {high}, 0), 0))", bounds.hi.span)
                writer.let("first_tile", "tl.maximum(low, 0) // BLOCK_N")
                writer.let("last_tile", "tl.cdiv(tl.minimum(high, M), BLOCK_N)")
            writer.let("last", "tl.full([BLOCK_M], NOTHING, tl.int32)")
            writer.let("used", "tl.zeros([BLOCK_M], tl.int32)")

    # Scores

    def load_query(self) -> None:
        """The lines' vectors of one head."""
        if self.scores.query is None:
            return
        pointers = "q + b64 * q_sb + h.to(tl.int64) * q_sh + row.to(tl.int64)[:, None] * q_sn + d[None, :] * q_sd"
        with self.writer.block("if VIEW_Q:"):
            self.writer.let("query", "q_view.load([b, h, first_row, 0]).reshape(BLOCK_M, BLOCK_D)")
        with self.writer.block("else:"):
            self.writer.let("query", f"_load_tile({pointers}, row_ok, d < D, True, not EVEN_D)")

    def load_keys(self, turn: str = "0") -> None:
        """The vectors of the members' places of a turn; in two parts where these are of more bits than the lines'."""
        if self.scores.key is None:
            return
        writer = self.writer
        writer.let("line", f"h // GROUP * TURNS + {turn}")

        def load(name: str, tensor: str) -> None:
            base = f"{tensor} + b64 * {tensor}_sb + line.to(tl.int64) * {tensor}_sh"
            pointers = f"{base} + member.to(tl.int64)[:, None] * {tensor}_sn + d[None, :] * {tensor}_sd"
            with writer.block("if VIEW:"):
                view = f"{tensor}_view.load([b, line, n * BLOCK_N, 0]).reshape(BLOCK_N, BLOCK_D)"
                writer.let(name, f"tl.trans({view})")
            with writer.block("else:"):
                writer.let(name, f"tl.trans(_load_tile({pointers}, member_ok, d < D, True, not EVEN_D))")

        load("keys", "k")
        with writer.block("if PARTS == 2:"):
            load("keys_low", "k_low")

    def score(self) -> None:
        """`score` of a tile of members."""
        writer, scores = self.writer, self.scores
        if scores.places is None and scores.head is None and scores.live is None:
            self.lets([("j", "member"), ("j_ok", "member_ok")])
            self.load_keys()
            self.product()
            self.expressions.share(self.score_nodes(), TILE)
            text = self.body_text()
            writer.let("score", f"tl.zeros([BLOCK_M, BLOCK_N], tl.float32) + {text}", scores.body.span)
            self.expressions.local = {}
            return
        writer.let("score", "tl.zeros([BLOCK_M, BLOCK_N], tl.float32)")
        if scores.places is None:
            self.lets([("j", "member"), ("j_ok", "member_ok")])
            self.heads()
            return
        start = "member * MEMBER_WIDTH"
        writer.let("place", f"tl.maximum(({start} - PLACE_WIDTH + PLACE_STRIDE) // PLACE_STRIDE, 0)")
        writer.let("stop", f"tl.minimum({start} + MEMBER_WIDTH, LENGTH)")
        writer.let("stop", "tl.minimum(tl.cdiv(stop, PLACE_STRIDE), PLACES)")
        with writer.block("for turn in range(0, TURNS):"):
            self.lets([("j", "place + turn"), ("j_ok", "member_ok & (j < stop)")])
            self.heads("turn")

    def heads(self, turn: str = "0") -> None:
        """Adds the scores at `j` of all heads of the lane."""
        self.load_keys(turn)
        if self.scores.head is None:
            self.add()
            return
        writer = self.writer
        writer.let("first_head", "h")
        with writer.block("for turn_h in range(0, HEADS):"):
            writer.let("h", "first_head + turn_h")
            self.hoist()
            self.load_query()
            self.add()
        writer.let("h", "first_head")

    def hoist(self) -> None:
        """What a line's scores of one head share; an exponent's parts in base 2."""
        self.expressions.hoist(self.score_nodes())
        exponent = self.exponent()
        if exponent is not None:
            _, factor, lse = exponent
            self.writer.let("base", f"{self.expressions.text(lse, ROWS)} * LOG2E")
            factor_text = "LOG2E" if factor is None else f"{self.expressions.text(factor, ROWS)} * LOG2E"
            self.writer.let("factor", factor_text)

    def exponent(self) -> tuple[Node, Node | None, Node] | None:
        """Where a score is exp(x * factor - y) with y of the line: x, the factor (None: 1) and y."""
        (inner,) = self.scores.body.args if self.scores.body.op == "exp" else (None,)
        if inner is None or inner.op != "sub" or inner.args[1].depends_on("j") or not inner.args[1].depends_on("i"):
            return None
        return *split_score(inner.args[0]), inner.args[1]

    def body_text(self) -> str:
        """The score of a pair."""
        exponent = self.exponent()
        if exponent is None:
            return self.expressions.text(self.scores.body, TILE)
        return f"tl.exp2({self.expressions.text(exponent[0], TILE)} * factor - base[:, None])"

    def product(self) -> None:
        if self.scores.query is None:
            return
        writer, precision = self.writer, "input_precision=PRECISION"
        writer.let("s", f"tl.dot(query, keys, {precision})")
        with writer.block("if PARTS == 2:"):
            writer.let("s", f"tl.dot(query, keys_low, s, {precision})")

    def add(self) -> None:
        """Adds the score of one head at `j`."""
        writer, scores = self.writer, self.scores
        self.product()
        self.expressions.share(self.score_nodes(), TILE)
        text = self.body_text()
        live = [] if scores.places is None else ["j_ok[None, :]"]
        if scores.live is not None and scores.live.op != "literal":
            live.append(self.expressions.text(scores.live, TILE))
        if live:
            text = f"tl.where({' & '.join(live)}, {text}, 0.0)"
        writer.let("score", f"score + {text}", scores.body.span)
        self.expressions.local = {}

    def candidates(self) -> None:
        """`ranks` of a tile's members, and which `must` be taken."""
        writer, scores = self.writer, self.scores
        self.lets([("j", "member"), ("j_ok", "member_ok")])
        parts = [node for node in (scores.condition, scores.force) if node is not None]
        self.expressions.share(parts, TILE)
        live = "i_ok[:, None] & j_ok[None, :]"
        if scores.condition.op != "literal":
            live += f" & {self.expressions.text(scores.condition, TILE)}"
        elif not scores.condition.attribute:
            live += " & False"
        writer.let("live", live, scores.condition.span)
        writer.let("ranks", "_ranking(score, live)")
        must = "live" if scores.force is None else f"live & {self.expressions.text(scores.force, TILE)}"
        writer.let("must", must if scores.force is not None else "live & (live == 0)")
        self.expressions.local = {}


def selecting_kernel(scores: Scores) -> Kernel:
    """The kernel of a selection."""
    return SelectingKernel(scores, "select").kernel()

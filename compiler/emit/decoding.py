"""The streamed skeleton for one new token a row of the batch: what decoding runs over what a cache keeps.

A tile is the query heads that share a key head, so that its keys are read once. Its keys are shared out over the
programs along axis 0, by the tiles that the bounds of the call leave, and `join_parts` joins all parts of all branches.
Where a row stands (START), and so its bounds, is read from memory: a captured graph goes on from token to token.
Arrays of keys may lie in pages of a pool: position j of row b is at j % PAGE of the page that line b of a table names.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence
from dataclasses import replace

from attnc.compiler.emit.arguments import Argument, Signature
from attnc.compiler.emit.bounds import Loop
from attnc.compiler.emit.expressions import PAIRS, TILE, View
from attnc.compiler.emit.kernel import Kernel
from attnc.compiler.emit.module import emit_module
from attnc.compiler.emit.streamed import StreamedForward
from attnc.compiler.emit.writer import Writer
from attnc.compiler.plan import Branch, Diagonals, KeySet, Plan
from attnc.dsl.source import Span

PAGE_SIZES = ("PAGE", "LINE", "POOL")  # places of a page, entries of a line of the table, pages that there are
SLOT_SIZES = ("SLOT", "SLOTS")  # the branch's first part, parts of all branches


class DecodedForward(StreamedForward):
    """Writes the kernel of one branch. `paged`: the arrays that lie in pages, k and v among them by these names."""

    tailed = False
    signature = Signature(
        tensors=("q", "k", "v", "o"), buffers=("lse", "part_out", "part_lse", "pages"), rows=(), streamed=()
    )

    def __init__(self, plan: Plan, branch: Branch, name: str, paged: frozenset[str]) -> None:
        super().__init__(plan, branch, branch.domain, name)
        self.paged = paged
        self.expressions.head_rows = True
        self.expressions.paged = paged
        at = next(place for place, one in enumerate(self.arguments) if one.role == "size")
        sizes = tuple(Argument(size, "size", size) for size in (*PAGE_SIZES, *SLOT_SIZES))
        self.arguments = (*self.arguments[:at], *sizes, *self.arguments[at:])

    def body(self) -> None:
        self.emit_tile()
        masks = [key_set.mask for key_set in self.domain.key_sets]
        self.expressions.hoist([self.branch.score, *([self.branch.sink] if self.branch.sink else []), *masks])
        self.load_queries()
        self.start()
        self.stream()
        self.finish()

    def emit_tile(self) -> None:
        """The program's heads, its part of their keys, and the one position of its rows."""
        let = self.writer.let
        let("key_heads", "H // GROUP")
        let("head_tiles", "tl.cdiv(GROUP, BLOCK_M)")
        let("b", "tl.program_id(1) // (key_heads * head_tiles)")
        let("key_head", "tl.program_id(1) // head_tiles % key_heads")
        let("b64", "b.to(tl.int64)")
        let("lane", "tl.arange(0, BLOCK_M)")
        let("member", "tl.program_id(1) % head_tiles * BLOCK_M + lane")
        let("row_ok", "member < GROUP")
        let("h", "key_head * GROUP + tl.minimum(member, GROUP - 1)")
        let("i", "lane * 0 + OFFSET")
        let("i_ok", "row_ok")
        let("i_low", "OFFSET + tl.zeros([], tl.int32)")
        let("i_high", "i_low")
        let("part", "tl.program_id(0)")
        let("parts", "tl.num_programs(0)")

    def base(self, tensor: str) -> None:
        """`tensor_head`: where what the tile reads of a tensor begins; a vector over the rows where heads differ."""
        streamed = tensor in ("k", "v")
        head = "key_head.to(tl.int64)" if streamed else "h.to(tl.int64)[:, None]"
        row = "" if streamed and self.paged else f" + b64 * {tensor}_sb"
        self.writer.let(f"{tensor}_head", f"{tensor}{row} + {head} * {tensor}_sh")

    def load_row_tile(self, name: str, tensor: str, axis: str, position: str) -> None:
        pointer = f"{tensor}_head + {axis}[None, :] * {tensor}_s{axis}"
        self.writer.let(name, f"_load_tile({pointer}, row_ok, {axis} < {axis.upper()}, True, not EVEN_{axis.upper()})")

    def load_streamed(self, name: str, tensor: str, axis: str, loop: Loop) -> None:
        if not self.paged:
            super().load_streamed(name, tensor, axis, replace(loop, view=None))
        else:
            if tensor == "k":
                line = "pages + b64 * LINE"
                self.writer.let("page", f"tl.load({line} + j // PAGE, mask=j_ok & (j >= 0), other=0).to(tl.int64)")
                self.writer.let("j_ok", "j_ok & (page >= 0) & (page < POOL)")  # a page that is not there has no key
                self.writer.let("place", "j % PAGE")
            base = f"{tensor}_head + page[:, None] * {tensor}_sb + place[:, None] * {tensor}_sn"
            pointer = f"{base} + {axis}[None, :] * {tensor}_s{axis}"
            guards = f"j_ok, {axis} < {axis.upper()}, True, not EVEN_{axis.upper()}"
            self.writer.let(name, f"_load_tile({pointer}, {guards})")
        self.writer.let(name, f"{name}.to(query.dtype)")

    def masked(self, key_set: KeySet, loop: Loop, view: View, write: Callable[[str], None]) -> None:
        """In pages every tile asks: a page may not be there."""
        if self.paged:
            self.alive(key_set, replace(loop, contiguous=False), view, write)
        else:
            super().masked(key_set, loop, view, write)

    def finish(self) -> None:
        """Leave a part: its outputs and log-sum-exps; or, where it is the only one, the result."""
        writer = self.writer
        writer.let("seen", "total > 0.0")
        writer.let("whole", "tl.where(seen, total, 1.0)")
        writer.let("result", "acc / whole[:, None]")
        writer.let("statistic", 'tl.where(seen, (largest + tl.log2(whole)) / LOG2E, float("-inf"))')
        writer.let("line", "b64 * H + h")
        with writer.block("if SPLIT:"):
            writer.let("slot", "line * SLOTS + SLOT + part")
            writer.line("tl.store(part_out + slot[:, None] * BLOCK_E + e[None, :], result, mask=row_ok[:, None])")
            writer.line("tl.store(part_lse + slot, statistic, mask=row_ok)")
        with writer.block("else:"):
            self.base("o")
            guard = "row_ok[:, None] & (e < E)[None, :]"
            writer.line(f"tl.store(o_head + e[None, :] * o_se, result.to(o.dtype.element_ty), mask={guard})")
            writer.line("tl.store(lse + line, statistic, mask=row_ok)")


class DecodedExtreme(DecodedForward):
    """The largest score, or the smallest, of what a program has of its rows' keys; FLOOR (-FLOOR) where it has none."""

    def __init__(self, plan: Plan, branch: Branch, name: str, paged: frozenset[str], largest: bool) -> None:
        super().__init__(plan, branch, name, paged)
        self.largest = largest

    def start(self) -> None:
        floor = "FLOOR" if self.largest else "-FLOOR"
        self.writer.let("found", f"tl.full([BLOCK_M], {floor}, tl.float32)")

    def step(self, key_set: KeySet, loop: Loop) -> None:
        self.expressions.local = {}
        writer, score = self.writer, self.branch.score
        view = PAIRS if isinstance(key_set.walk, Diagonals) else TILE
        self.load_streamed("keys", "k", "d", loop)
        if view is PAIRS:
            writer.let("s", "tl.sum(query.to(tl.float32) * keys.to(tl.float32), 1)")
        else:
            writer.let("s", "tl.dot(query, tl.trans(keys), input_precision=PRECISION)")
        self.expressions.share([score], view)
        writer.let("s", self.expressions.text(score, view), score.span)
        self.masked(key_set, loop, view, lambda live: self.dead("s", live, key_set.mask.span))
        which = "max" if self.largest else "min"
        reduced = "s" if view is PAIRS else f"tl.{which}(s, 1)"
        writer.let("found", f"tl.{which}imum(found, {reduced})")

    def dead(self, name: str, live: str, span: Span | None) -> None:
        floor = "FLOOR" if self.largest else "-FLOOR"
        self.writer.let(name, f"tl.where({live}, {name}, {floor})", span)

    def finish(self) -> None:
        self.writer.let("slot", "(b64 * H + h) * SLOTS + SLOT + part")
        self.writer.line("tl.store(part_lse + slot, found, mask=row_ok)")


JOIN = '''
@triton.jit(do_not_specialize=["H", "E", "SLOTS"])
def join_parts(part_out, part_lse, o, lse, o_sb, o_sh, o_se, H, E, SLOTS,
               BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr):
    """One softmax of all parts of a row, by their log-sum-exps. part_out (rows, SLOTS, BLOCK_E)."""
    line = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, BLOCK_S)
    e = tl.arange(0, BLOCK_E)
    there = slot < SLOTS
    statistic = tl.load(part_lse + line * SLOTS + slot, mask=there, other=float("-inf")) * LOG2E
    peak = tl.maximum(tl.max(statistic, 0), FLOOR)
    weight = tl.exp2(statistic - peak)
    total = tl.sum(weight, 0)
    whole = tl.where(total > 0.0, total, 1.0)
    parts = tl.load(part_out + (line * SLOTS + slot)[:, None] * BLOCK_E + e[None, :], mask=there[:, None], other=0.0)
    result = tl.sum(parts * weight[:, None], 0) / whole
    out = o + line // H * o_sb + line % H * o_sh + e * o_se
    tl.store(out, result.to(o.dtype.element_ty), mask=e < E)
    empty = float("-inf")
    tl.store(lse + line, tl.where(total > 0.0, (peak + tl.log2(whole)) / LOG2E, empty))
'''


def decoded_kernels(plan: Plan, paged: frozenset[str] = frozenset(), largest: bool | None = None) -> list[Kernel]:
    """One kernel a branch of a relocated plan. `largest`: of its extreme scores instead of a softmax."""
    found: list[DecodedForward] = []
    for number, one in enumerate(plan.branches):
        name = f"decoded_{number}"
        forward = DecodedForward(plan, one, name, paged)
        found.append(forward if largest is None else DecodedExtreme(plan, one, name, paged, largest))
    return [writer.kernel() for writer in found]


def decoded_module(plan: Plan, kernels: Sequence[Kernel]) -> str:
    """The module's text, with the kernel that joins the parts."""
    return emit_module(plan, kernels) + "\n" + JOIN


def entering_module(arrays: int, classes: int) -> str:
    """The kernel `enter`: one program a row of the batch copies its new token's values to their place in a cache.

    Its position is the number of tokens before, `tokens[b]`, which it then makes one more, and keeps in `now[b]`
    (where ADVANCE is on). Places: see `compiler.relocate.ringed`; where EVERYTHING is on, a place is a position.
    COUNTS: row b takes part where counts[b] > 0. An array is (rows, A, W) at the token, (rows, places, A, W) in memory.
    """
    writer = Writer()
    writer.line("import triton\nimport triton.language as tl\n\n")
    names = ["tokens", "now", "counts", "pages"]
    for n in range(arrays):
        names += [
            f"{stem}_{n}" for stem in ("x", "y", "x_sb", "x_sa", "x_sw", "y_sb", "y_sp", "y_sa", "y_sw", "A", "W")
        ]
    sizes = ["LENGTH", "FIRST", "WINDOW", *PAGE_SIZES]
    sizes += [f"{stem}_{n}" for n in range(classes) for stem in ("PERIOD", "LOW", "WIDTH", "AT")]
    plain = [*sizes, *(f"{stem}_{n}" for n in range(arrays) for stem in ("A", "W"))]
    constants = [f"{one}: tl.constexpr" for one in ("EVERYTHING", "PAGED", "ADVANCE", "COUNTS", "BLOCK")]
    writer.line(f"@triton.jit(do_not_specialize={plain!r})")
    with writer.block(f"def enter({', '.join([*names, *sizes, *constants])}):"):
        _emit_place(writer, classes)
        for n in range(arrays):
            _emit_copy(writer, n)
        with writer.block("if ADVANCE:"):
            writer.line("tl.debug_barrier()")
            writer.line("tl.store(now + b, position)")
            writer.line("tl.store(tokens + b, position + own)")
    text = writer.text()
    ast.parse(text)
    return text


def _emit_place(writer: Writer, classes: int) -> None:
    """`position`, `place`, `line` (the row or page) and `fits`, whether there is a place."""
    writer.let("b", "tl.program_id(0)")
    writer.let("own", "1")
    with writer.block("if COUNTS:"):
        writer.let("own", "tl.minimum(tl.load(counts + b), 1).to(tl.int32)")
    writer.let("position", "tl.load(tokens + b).to(tl.int32)")
    writer.let("fits", "(own > 0) & (position < LENGTH)")
    with writer.block("if EVERYTHING:"):
        writer.let("place", "position")
    with writer.block("else:"):
        writer.let("place", "FIRST + position % WINDOW")
        for n in reversed(range(classes)):
            writer.let("rest", f"position % PERIOD_{n} - LOW_{n}")
            member = f"AT_{n} + position // PERIOD_{n} * WIDTH_{n} + rest"
            writer.let("place", f"tl.where((rest >= 0) & (rest < WIDTH_{n}), {member}, place)")
        writer.let("place", "tl.where(position < FIRST, position, place)")
    writer.let("line", "b.to(tl.int64)")
    with writer.block("if PAGED:"):
        writer.let("line", "tl.load(pages + line * LINE + place // PAGE, mask=fits, other=0).to(tl.int64)")
        writer.let("fits", "fits & (line >= 0) & (line < POOL)")
        writer.let("place", "place % PAGE")


def _emit_copy(writer: Writer, n: int) -> None:
    writer.let("at", "tl.arange(0, BLOCK)")
    with writer.block(f"for start in range(0, A_{n} * W_{n}, BLOCK):"):
        writer.let("a", f"(start + at) // W_{n}")
        writer.let("w", f"(start + at) % W_{n}")
        writer.let("inside", f"(start + at < A_{n} * W_{n}) & fits")
        writer.let("value", f"tl.load(x_{n} + b.to(tl.int64) * x_sb_{n} + a * x_sa_{n} + w * x_sw_{n}, mask=inside)")
        target = f"y_{n} + line * y_sb_{n} + place.to(tl.int64) * y_sp_{n} + a.to(tl.int64) * y_sa_{n} + w * y_sw_{n}"
        writer.line(f"tl.store({target}, value.to(y_{n}.dtype.element_ty), mask=inside)")

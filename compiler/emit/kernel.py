"""What the kernels of the streamed skeleton share: signature, batch and heads, loads of tiles, masks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

from attnc.compiler.emit.arguments import Argument, Signature, kernel_arguments, view_constant
from attnc.compiler.emit.bounds import Exact, Loop
from attnc.compiler.emit.expressions import ROWS, Array, Expressions, View
from attnc.compiler.emit.ranges import emit_ranges
from attnc.compiler.emit.rows import emit_rows, row_nodes
from attnc.compiler.emit.writer import Writer
from attnc.compiler.ir import Graph, Node
from attnc.compiler.plan import Branch, Domain, KeySet, Plan, Rows
from attnc.dsl.types import Base, Type

CONSTANTS = (
    *("BLOCK_M", "BLOCK_N", "BLOCK_D", "BLOCK_E", "EVEN_D", "EVEN_E"),
    *("PRECISION", "PIECES", "RAISING", "SPLIT", "ADDING", "OVERLAP", "APART"),
)


@dataclass(frozen=True)
class Kernel:
    """A kernel's text, its name and its arguments in order (`constants` follow them).

    `factor`: the score's constant factor; RAISING says that it is positive. `splits`: whether what a row sees may be
    shared out over programs. `fuses`: whether it can give the other side's gradients, too (FUSED). `tails`: whether q
    and k may be two blocks of columns, BLOCK_D and TAIL.
    """

    name: str
    text: str
    arguments: tuple[Argument, ...]
    factor: Node | None
    domain: Domain
    splits: bool
    fuses: bool = False
    tails: bool = False


def split_score(score: Node) -> tuple[Node, Node | None]:
    """score = (q @ k) * factor with a factor of parameters alone: (q @ k, factor); else (score, None)."""
    if score.op == "mul":
        for raw, factor in (score.args, score.args[::-1]):
            if raw.op == "dot" and factor.op in ("parameter", "literal"):
                return raw, factor
    return score, None


def branch_nodes(branch: Branch, domain: Domain) -> list[Node]:
    """Every expression that a kernel of a branch evaluates over a domain."""
    nodes = [branch.score, *([branch.sink] if branch.sink else [])]
    for key_set in domain.key_sets:
        nodes.append(key_set.mask)
        for run in key_set.runs:
            for bounds in (run.outer, *([run.inner] if run.inner else [])):
                nodes += [bounds.lo, bounds.hi]
    return nodes


@dataclass(frozen=True)
class Columns:
    """A block of columns of a tile: the name of their places, how many, the axis, and what names of them end with."""

    places: str
    width: str
    axis: str
    suffix: str = ""

    def pointers(self, rows: str, tensor: str, ok: str) -> str:
        """The tile whose rows begin at `rows`, through pointers."""
        size = self.axis.upper()
        pointer = f"{rows} + {self.places}[None, :] * {tensor}_s{self.axis}"
        return f"_load_tile({pointer}, {ok}, {self.places} < {size}, True, not EVEN_{size})"


def placed_rows(plan: Plan) -> Node | None:
    """Where a row lies; None where rows lie in their order."""
    if plan.placed is None:
        return None
    axes = next(one.axes for one in plan.inputs if one.name == plan.placed.places)
    return Graph().make("input", type=Type(Base.INT, frozenset(axes)), attribute=plan.placed.places)


class StreamedKernel:
    """A kernel that keeps a tile of rows and streams the other side: queries stay, or keys do (`streamed`: i)."""

    signature: Signature
    streamed = "j"
    constants: tuple[str, ...] = ()
    fuses = False
    tailed = True  # whether q and k may be cut in two blocks of columns

    def __init__(self, plan: Plan, branch: Branch, domain: Domain, name: str, extra: list[Node] | None = None) -> None:
        self.branch = branch
        self.exact = plan.exact
        self.tails = self.tailed and plan.joined
        if self.tails:
            self.constants = (*self.constants, "TAIL")
        self.domain = domain
        self.name = name
        self.writer = Writer()
        self.placed = placed_rows(plan) if self.streamed == "j" else None  # keys that stay stream copies of placed rows
        self.row = "place" if self.placed else "row"  # where a row lies in its tensors
        nodes = [*branch_nodes(branch, domain), *(extra or []), *([self.placed] if self.placed else [])]
        self.arguments = kernel_arguments(
            plan, nodes, domain, self.signature, tails=self.tails, apart=bool(self.placed)
        )
        arrays = {one.attribute: Array(one.name, one.axes) for one in self.arguments if one.role == "array"}
        self.expressions = Expressions(self.writer, arrays, self.streamed)
        self.raw, self.factor = split_score(branch.score)
        self.whole = False  # whether the loop that is written has full tiles only

    def kernel(self) -> Kernel:
        """Write it."""
        writer = self.writer
        plain = [argument.name for argument in self.arguments if not argument.specialised]
        writer.line(f"@triton.jit(do_not_specialize={plain!r})")
        names = [argument.name for argument in self.arguments]
        views = dict.fromkeys(view_constant(argument) for argument in self.arguments if argument.role == "view")
        parameters = ", ".join(
            [*names, *(f"{constant}: tl.constexpr" for constant in (*CONSTANTS, *self.constants, *views))]
        )
        with writer.block(f"def {self.name}({parameters}):"):
            self.body()
        leaves = any(one.role == "tensor" and one.attribute.startswith("leaf_") for one in self.arguments)
        return Kernel(
            self.name, writer.text(), self.arguments, self.factor, self.domain, not leaves, self.fuses, self.tails
        )

    def body(self) -> None:
        raise NotImplementedError

    def row_steps(self, rows: Rows) -> dict[str, str]:
        """Text of what the rows' grouping depends on."""
        return {name: self.expressions.once(node, ROWS) for name, node in row_nodes(rows).items()}

    def place_rows(self) -> None:
        """The program's tile of rows, and where they lie."""
        emit_rows(self.writer, self.domain.rows, self.row_steps(self.domain.rows))
        self.writer.let("i_ok", "row_ok")
        if self.placed:
            self.writer.let("place", self.expressions.text(self.placed, ROWS))

    def lanes(self) -> None:
        """Lanes of a tile, and the first element of every tensor for this batch and head."""
        writer = self.writer
        writer.let("lanes_n", "tl.arange(0, BLOCK_N)")
        writer.let("d", "tl.arange(0, BLOCK_D)")
        writer.let("e", "tl.arange(0, BLOCK_E)")
        with self.tail() as let:
            let("far", "BLOCK_D + tl.arange(0, TAIL)")

    @contextmanager
    def tail(self) -> Iterator[Callable[[str, str], object]]:
        """What follows for the second block of columns of q and k, where the kernel may have one; gives `let`."""
        if not self.tails:
            yield lambda name, value: None
            return
        with self.writer.block("if TAIL > 0:"):
            yield self.writer.let

    def scores(self, left: str, right: str) -> None:
        """`s`: the products of two tiles."""
        self.writer.let("s", self.product(left, f"tl.trans({right})"))
        with self.tail() as let:
            let("s", self.product(f"{left}_tail", f"tl.trans({right}_tail)", "s"))

    def paired_scores(self) -> None:
        """`s` of rows that have one key each."""
        self.writer.let("s", "tl.sum(query.to(tl.float32) * keys.to(tl.float32), 1)")
        with self.tail() as let:
            let("s", "s + tl.sum(query_tail.to(tl.float32) * keys_tail.to(tl.float32), 1)")

    def base(self, tensor: str) -> None:
        """`tensor_head`: where the tensor's batch and head begin."""
        head = "key_head" if tensor in ("k", "v", "dk", "dv") else "h"
        self.writer.let(f"{tensor}_head", f"{tensor} + b64 * {tensor}_sb + {head}.to(tl.int64) * {tensor}_sh")

    def load_row_tile(self, name: str, tensor: str, axis: str, position: str) -> None:
        """A tile of the tensor that stays."""
        rows = self.domain.rows
        viewed = rows.period is None and rows.listed is None and not self.placed
        head = "key_head" if tensor in ("k", "v") else "h"
        place = "row_tile, 0" if rows.step is None else "row_class, row_tile, 0"
        for columns in self.columns(axis):
            pointer = f"{tensor}_head + {position}.to(tl.int64)[:, None] * {tensor}_sn"
            pointers = columns.pointers(pointer, tensor, "row_ok")
            view = f"{tensor}{columns.suffix}_view.load([b, {head}, {place}]).reshape(BLOCK_M, {columns.width})"
            with self.tail() if columns.suffix else nullcontext():
                if viewed:
                    self.viewed(f"{name}{columns.suffix}", view, pointers, "_Q")
                else:
                    self.writer.let(f"{name}{columns.suffix}", pointers)

    def columns(self, axis: str) -> list[Columns]:
        """The blocks of columns of an axis."""
        tail = [Columns("far", "TAIL", "d", "_tail")] if axis == "d" and self.tails else []
        return [Columns(axis, f"BLOCK_{axis.upper()}", axis), *tail]

    def product(self, left: str, right: str, total: str = "") -> str:
        """left @ right, added to `total`. Operands of an exact plan may differ in type."""
        if self.exact:
            return f"_exact_product({left}, {right}, {total or 'None'}, PIECES, PRECISION)"
        return f"tl.dot({left}, {right}, {total + ', ' if total else ''}input_precision=PRECISION)"

    def rounded(self, name: str, like: str) -> str:
        """What a kernel made, as an operand of a product with `like`."""
        return name if self.exact else f"{name}.to({like}.dtype)"

    def viewed(self, name: str, view: str, pointers: str, suffix: str) -> None:
        """A tile through its tensor descriptor where there is one, else through pointers."""
        with self.writer.block(f"if VIEW{suffix}:"):
            self.writer.let(name, view)
        with self.writer.block("else:"):
            self.writer.let(name, pointers)

    def load_streamed(self, name: str, tensor: str, axis: str, loop: Loop) -> None:
        """A tile of the side that streams by."""
        at = self.streamed
        shift = " - OFFSET" if at == "i" else ""
        if loop.contiguous:
            base = f"{tensor}_head + (start{shift}).to(tl.int64) * {tensor}_sn + lanes_n[:, None] * {tensor}_sn"
        else:
            base = f"{tensor}_head + ({at}{shift}).to(tl.int64)[:, None] * {tensor}_sn"
        head = "h // GROUP" if tensor in ("k", "v") else "h"
        for columns in self.columns(axis):
            pointers = columns.pointers(base, tensor, f"{at}_ok")
            view = f"{tensor}{columns.suffix}_view{loop.view}.load([b, {head}, {loop.place}, 0])"
            with self.tail() if columns.suffix else nullcontext():
                if loop.view is None:
                    self.writer.let(f"{name}{columns.suffix}", pointers)
                else:
                    view = f"{view}.reshape(BLOCK_N, {columns.width})"
                    self.viewed(f"{name}{columns.suffix}", view, pointers, loop.view)

    def stream(self) -> None:
        """The loops over the key sets, each turn a `step`; with APART, full tiles have one of their own."""
        for number, key_set in enumerate(self.domain.key_sets):
            loop = emit_ranges(self.writer, self.expressions, key_set, number, self.domain.rows)
            if loop.full is None:
                with self.writer.block(f"for n in range({loop.first}, {loop.last}):"):
                    self.turn(key_set, loop)
            else:
                self.stream_apart(key_set, loop, *loop.full)

    def turn(self, key_set: KeySet, loop: Loop) -> None:
        loop.keys(self.writer)
        self.step(key_set, loop)

    def stream_apart(self, key_set: KeySet, loop: Loop, full: str, full_end: str) -> None:
        """Partial tiles, with APART those before and after the full ones, and then the full ones; else all in order."""
        writer = self.writer
        writer.let("first_turn", loop.first)
        writer.let("last_turn", loop.last)
        writer.let("skipped", "0")
        with writer.block("if APART:"):
            writer.let("full_turn", f"tl.minimum(tl.maximum({full}, first_turn), last_turn)")
            writer.let("skipped", f"tl.maximum(tl.minimum({full_end}, last_turn) - full_turn, 0)")
        with writer.block("for n in range(first_turn, last_turn - skipped):"):
            with writer.block("if APART:"):
                writer.let("n", "tl.where(n < full_turn, n, n + skipped)")
            self.turn(key_set, loop)
        with writer.block("if APART:"), writer.block("for n in range(full_turn, full_turn + skipped):"):
            self.whole = True
            self.turn(key_set, loop)
            self.whole = False

    def step(self, key_set: KeySet, loop: Loop) -> None:
        """One tile of the streamed side."""
        raise NotImplementedError

    def masked(self, key_set: KeySet, loop: Loop, view: View, write: Callable[[str], None]) -> None:
        """`write` is given the text of which pairs are live, where the tile is one that needs it."""
        if self.whole:
            return
        if loop.partial is None:
            self.alive(key_set, loop, view, write)
            return
        condition = f"APART or {loop.partial}" if loop.full is not None else loop.partial
        with self.writer.block(f"if {condition}:"):
            self.alive(key_set, loop, view, write)

    def alive(self, key_set: KeySet, loop: Loop, view: View, write: Callable[[str], None]) -> None:
        """By bounds where they say all, else by the condition.

        Never by either as the tile has it: a branch within the branch of partial tiles, both within a loop of tensor
        descriptors, made wrong code of products in three tf32 passes (Triton 3.6, Hopper).
        """
        if loop.exact is not None:
            write(self.within(loop, loop.exact, view))
        else:
            self.conditioned(key_set, view, write)

    def within(self, loop: Loop, exact: Exact, view: View) -> str:
        """Whether a pair lies in the bounds of a run. Consecutive keys that do are in the tensor."""
        at = f"{self.streamed}{getattr(view, self.streamed)}"
        rows = view.i if self.streamed == "j" else view.j
        texts = []
        for one in exact.limits:
            above = f"({at} < {one.hi}{rows if one.hi_rows else ''})"
            below = f"({at} >= {one.lo}{rows if one.lo_rows else ''}) & " if one.lo else ""
            texts.append(f"({below}{above})" if below else above)
        inside = " | ".join(texts)
        if loop.contiguous:
            return inside
        return f"{self.streamed}_ok{getattr(view, self.streamed)} & ({inside})"

    def conditioned(self, key_set: KeySet, view: View, write: Callable[[str], None]) -> None:
        """Which pairs the condition lets through."""
        inside = f"{self.streamed}_ok{getattr(view, self.streamed)}"
        if key_set.mask.op == "literal":
            write(inside)
            return
        outside = dict(self.expressions.local)
        self.expressions.share([key_set.mask], view)
        write(f"{inside} & {self.expressions.text(key_set.mask, view)}")
        self.expressions.local = outside

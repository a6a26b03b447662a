"""The bounds of a row tile: which tiles of keys any row touches, which ones every row sees whole.

Bounds are functions of the row. Their extremes over a tile's rows come from the first and the last row where a bound
moves one way, else from a reduction over all rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from attnc.compiler.emit.expressions import ROWS, Expressions, View
from attnc.compiler.emit.rows import ordered
from attnc.compiler.emit.writer import Writer
from attnc.compiler.ir import Node
from attnc.compiler.plan import Bounds, KeySet, Rows
from attnc.compiler.trends import DOWN, trend

LOW, HIGH = View(i="_low", j="_low"), View(i="_high", j="_high")  # the first and the last row of a tile


@dataclass(frozen=True)
class Limits:
    """Bounds lo <= x < hi of one run as the kernel names them; whether each is a vector over the rows."""

    lo: str | None  # None: nothing below
    hi: str
    lo_rows: bool
    hi_rows: bool


@dataclass(frozen=True)
class Exact:
    """Bounds that say which pairs are live, without the condition itself: a pair is if it lies in one of them."""

    limits: tuple[Limits, ...]


@dataclass(frozen=True)
class Loop:
    """`for n in range(first, last)`; `keys` writes the positions of the n-th tile and which are real."""

    first: str
    last: str
    keys: Callable[[Writer], None]
    partial: str | None = None  # whether the tile needs its mask, a scalar of the kernel; None: every tile does
    exact: Exact | None = None
    contiguous: bool = False  # positions are start + 0 .. BLOCK_N
    view: str | None = None  # suffix of the tensor descriptors that hold its tiles
    place: str = ""  # the tile's place in them, after batch and head
    full: tuple[str, str] | None = None  # turns of full tiles that follow each other, from and to, where all do


class TileBounds:
    """What the loops of one key set have in common; names carry its number."""

    def __init__(self, writer: Writer, expressions: Expressions, key_set: KeySet, number: int, rows: Rows) -> None:
        self.at = expressions.streamed  # the streamed position: j, or i where the rows are keys
        self.ok = f"{self.at}_ok"
        self.row = "i" if self.at == "j" else "j"
        self.row_ok = f"{self.row}_ok"
        self.end = "M" if self.at == "j" else "(OFFSET + N)"
        self.inside = "(j < M)" if self.at == "j" else "((i >= OFFSET) & (i < OFFSET + N))"
        self.shift = "" if self.at == "j" else " - OFFSET"  # from a position to a place in its tensor
        self.writer = writer
        self.expressions = expressions
        # At one row: nothing is hoisted.
        self.scalars = Expressions(writer, expressions.arrays, expressions.streamed, numbers=expressions.numbers)
        self.key_set = key_set
        self.number = number
        self.ordered = ordered(rows)

    def name(self, stem: str) -> str:
        return f"{stem}_{self.number}"

    def let(self, stem: str, value: str) -> str:
        return self.writer.let(self.name(stem), value)

    def row_text(self, node: Node) -> str:
        return self.expressions.once(node, ROWS)

    # Bounds of the tile

    def by_head(self, node: Node) -> bool:
        """Whether a value differs by row because its head does."""
        return self.expressions.head_rows and node.depends_on("h")

    def extreme(self, node: Node, largest: bool) -> str | None:
        """The largest (smallest) value over the rows, if the last or the first has it for sure; else None."""
        way = trend(node, self.row) if not self.by_head(node) else None
        if way is None or (way and not self.ordered):
            return None
        at = HIGH if largest != (way == DOWN) else LOW
        text = self.scalars.once(node, at)
        return f"_int32({text})"

    def outer(self, bounds: Bounds, stem: str = "") -> tuple[str, str]:
        """Least lo and largest hi over the rows; those without a key may be left out."""
        lo = self.let(f"lo{stem}", self.row_text(bounds.lo))
        hi = self.let(f"hi{stem}", self.row_text(bounds.hi))
        first, last = self.extreme(bounds.lo, largest=False), self.extreme(bounds.hi, largest=True)
        if first is None or last is None:
            some = self.let(f"some{stem}", f"{self.row_ok} & ({lo} < {hi})")
            first = first or f"tl.min(tl.where({some}, {lo}, {self.end}), 0).to(tl.int32)"
            last = last or f"tl.max(tl.where({some}, {hi}, 0), 0).to(tl.int32)"
        return self.let(f"first{stem}", first), self.let(f"last{stem}", last)

    def inner(self, bounds: Bounds, stem: str = "") -> tuple[str, str]:
        """Largest lo and least hi: keys between them are live in every row."""
        first, last = self.extreme(bounds.lo, largest=True), self.extreme(bounds.hi, largest=False)
        if first is None:
            first = f"tl.max(tl.where({self.row_ok}, {self.row_text(bounds.lo)}, 0), 0).to(tl.int32)"
        if last is None:
            last = f"tl.min(tl.where({self.row_ok}, {self.row_text(bounds.hi)}, {self.end}), 0).to(tl.int32)"
        return self.let(f"full_first{stem}", first), self.let(f"full_last{stem}", last)

    def exact(self, stems: Sequence[str] = ("",)) -> Exact | None:
        """The bounds of the runs where they say all for sure: no outer bound differs from the inner one."""
        limits: list[Limits] = []
        for run, stem in zip(self.key_set.runs, stems, strict=True):
            lo, hi = run.outer.lo, run.outer.hi
            if run.inner is None or run.inner.lo is not lo or run.inner.hi is not hi:
                return None
            below = None if self.at == "j" and lo.op == "literal" and lo.attribute == 0 else self.name(f"lo{stem}")
            rows = tuple(one.depends_on(self.row) or self.by_head(one) for one in (lo, hi))
            limits.append(Limits(below, self.name(f"hi{stem}"), *rows))
        return Exact(tuple(limits))

    def share(self, count: str) -> tuple[str, str]:
        """The part of `count` iterations that this program runs."""
        return f"{count} * part // parts", f"{count} * (part + 1) // parts"

    def phase(self, stem: str, phase: str, step: str) -> str:
        """The one residue of a tile's rows."""
        return self.let(stem, f"tl.max(tl.where({self.row_ok}, _floor_mod({phase}, {step}), 0), 0)")

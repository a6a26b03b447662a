"""The plan: what the back ends execute. Plain data, made of nodes; no torch, no Triton.

A plan streams keys past rows of queries, once per branch. Which keys is said by key sets: closed-form
functions of the row, so that both back ends and the cost model find the live tiles of any length with O(1)
metadata. Positions in these functions are global: i = M - N + row where N < M, else i = row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from attnc.compiler.ir import Graph, Node
from attnc.dsl.source import Source, Span
from attnc.dsl.terms import Input, Parameter


@dataclass(frozen=True)
class Blocks:
    """A declared axis of blocks, as nodes."""

    over: str
    size: Node
    stride: Node | None


@dataclass(frozen=True)
class Bounds:
    """lo <= j < hi, each an int over (b, h, i); empty where lo >= hi."""

    lo: Node
    hi: Node


@dataclass(frozen=True)
class Run:
    """One interval of keys a row: no key outside of `outer` is live, every key inside of `inner` is."""

    outer: Bounds
    inner: Bounds | None


@dataclass(frozen=True)
class Stepped:
    """Keys j == phase (mod step)."""

    phase: Node
    step: Node


@dataclass(frozen=True)
class Grid:
    """Keys j = high * period + low with `low` in an interval of the row, by steps.

    `high_phase`/`low_phase`: only digits equal to them modulo the step (None: every digit).
    """

    period: Node
    low: Bounds
    high_phase: Node | None = None
    high_step: Node | None = None
    low_phase: Node | None = None
    low_step: Node | None = None


@dataclass(frozen=True)
class Listed:
    """Keys that a table lists: entry * width + 0 .. width, entries ascending.

    `table` and `rank` name derived tables over the same indices: `rank[p]` counts the entries below p. Where
    `row_block` is set, the table has one line per block of that many rows and no rank; with `starts`, lines are of
    any length: line n is table[starts[n] : starts[n + 1]].
    """

    table: str
    rank: str | None
    width: Node
    row_block: Node | None
    offset: Node  # key = entry * width + .. + offset
    starts: str | None = None


@dataclass(frozen=True)
class Diagonals:
    """One key a row and entry: j = i - entry + offset, entries from a derived table as in `Listed`.

    In a transposed domain the same pairs: i = j + entry - offset.
    """

    table: str
    rank: str
    offset: Node


Walk = Stepped | Grid | Listed | Diagonals | None  # None: consecutive keys


@dataclass(frozen=True)
class KeySet:
    """Keys that one loop visits, in the order that `walk` says; `mask` decides on tiles that are not full.

    Only a consecutive walk has several runs: their union is visited once. Key sets of a domain are disjoint.
    """

    walk: Walk
    runs: tuple[Run, ...]
    mask: Node
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Rows:
    """How rows are grouped into tiles, so that rows of a tile share keys.

    No period and no step: consecutive. `step`: rows of one residue class. `period`: a tile is a rectangle of
    high and low digits (a square of the grid where `square`, else part of one line), each by its step.

    Rows of a transposed domain may be few; what is not enumerated has no pair. `phase`: only that class.
    `low`, `high_phase`, `low_phase`: only these columns, only these classes of digits; a tile then takes the rows
    that are left in order, over several lines. `listed`: the rows that a table lists, which may differ by head.
    """

    step: Node | None = None
    period: Node | None = None
    high_step: Node | None = None
    low_step: Node | None = None
    square: bool = False
    phase: Node | None = None
    high_phase: Node | None = None
    low_phase: Node | None = None
    low: Bounds | None = None
    listed: Listed | None = None

    @property
    def packed(self) -> bool:
        """Whether a tile of the grid takes the rows that are left in order."""
        limited = self.low is not None or self.high_phase is not None or self.low_phase is not None
        return limited and not self.square


@dataclass(frozen=True)
class Domain:
    """The live pairs of a branch, row by row.

    Forward, rows are queries i and bounds give keys j. In a transposed domain rows are keys j in 0 .. M and bounds,
    over (b, h, j), give global query positions i, offset <= i < offset + N; masks are over (i, j) in both.
    """

    key_sets: tuple[KeySet, ...]
    rows: Rows
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Derived:
    """A table that a prologue makes before the kernel runs; linear in the sequence.

    kinds:
    - `equal_bounds` (args row side, key side: the four bounds of equal keys; attribute: the key index, j or i) and
      `ordered_bounds` (the same of the keys whose int is at most the row's)
    - `listing` (arg: an int vector; its distinct entries in 0 .. last, sorted, and the ranks of 0 .. last + 1, where
      last = attribute * max(offset + N, M))
    - `tabulated` (arg: an int of i - j; indexed by i - j + M)
    - `block_list` (args score, count, condition, force, width of the blocks; attribute: their axis: a selection that no
      tensor steers, a line per row block) and `block_rows` (the same args: for each key block the row blocks that chose
      it, rows[starts[c] : starts[c + 1]], ascending)
    """

    name: str
    kind: str
    args: tuple[Node, ...]
    parts: tuple[str, ...]
    attribute: str | None = None


@dataclass(frozen=True)
class Requirement:
    """`node`, an int of parameters and sizes, must be positive: it divides or sizes something in the text."""

    node: Node
    span: Span


@dataclass(frozen=True)
class Selected:
    """The keys of a branch as an array of the call lists them.

    `members`: an int32 input (B, 1 | Hk | H, lines, entries), each line ascending, -1 at its end. An entry is a key or,
    where `width` is set, the block of keys entry * width + 0 .. width (short at the end of the sequence). Row i has
    line i - offset or, where `row_block` is set, line i // row_block - offset // row_block.
    """

    members: str
    width: Node | None
    row_block: Node | None


@dataclass(frozen=True)
class Branch:
    """One softmax over the domain's keys and its sum of values.

    With `selected`, the keys are those it lists as far as `condition` holds, and the domain is empty.

    `score`: natural logits, over (b, h, i, j); the only dots in it are q @ k. `sink`: a logit that joins the
    denominator. `transposed`: disjoint domains with the roles of i and j swapped, that hold every live pair once;
    empty until `pipeline.transpose` made them.
    """

    score: Node
    condition: Node
    domain: Domain
    sink: Node | None
    transposed: tuple[Domain, ...] = ()
    selected: Selected | None = None


@dataclass(frozen=True)
class Placed:
    """Rows that lie elsewhere: row n of the plan is row `places`[n] of q, of the result and of its lse.

    `places`: an int input over i that lists each of those rows once; the first `count` of its line, an int input, take
    part, and the others have no key. Inputs over i are in the order of the plan's rows.
    """

    places: str
    count: str


@dataclass(frozen=True)
class Plan:
    """One softmax of queries over keys, or several (`merged`) that are joined by log-sum-exp.

    `derived`: tables of the forward; `transposed_derived`: those that only transposed domains read. `exact`: what is
    made of the result makes much of a rounding, so that products are of float32; q, k and v may differ in type.
    `joined`: q and k are vectors put end to end, whose width need not be near a power of two.
    `placed`: where the rows lie, unless in their order.
    """

    name: str
    source: Source
    parameters: tuple[Parameter, ...]
    inputs: tuple[Input, ...]
    branches: tuple[Branch, ...]
    merged: bool
    derived: tuple[Derived, ...]
    transposed_derived: tuple[Derived, ...] = ()
    graph: Graph | None = field(default=None, repr=False, compare=False)  # that made the nodes
    blocks: Mapping[str, Blocks] = field(default_factory=dict, repr=False, compare=False)
    exact: bool = False
    joined: bool = False
    placed: Placed | None = None

"""The composition: what a pattern compiles to. Steps over whole arrays, in order, each linear in the sequence.

An array is a tensor by name: q, k, v, a declared input, or what an earlier step left. A step's array is laid out by
the type of its node: the indices in layout order (`Type.ordered_indices`), then the vector axes; an index that it does
not vary over is 1 long, and h may be as long as the key heads. No step makes an array over pairs of positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from attnc.compiler.absorb import Projection
from attnc.compiler.ir import Graph, Node
from attnc.compiler.plan import Bounds, Plan, Requirement
from attnc.dsl.source import Source
from attnc.dsl.terms import Axis, Input, Parameter


@dataclass(frozen=True)
class Compute:
    """An array by torch operators: pointwise maths, products, pools and prefix sums over one sequence.

    `node` reads inputs and earlier steps (as `input` nodes of their names).
    """

    name: str
    node: Node


@dataclass(frozen=True)
class Heads:
    """The heads `first` <= h < `last` of a call, as far as it has them (see `compiler.heads`).

    Both are numbers of sizes and parameters.
    """

    first: Node
    last: Node


@dataclass(frozen=True)
class Attend:
    """One softmax of rows over keys and its sum of values, by the streamed skeleton.

    `plan` is a plan in which q, k and v stand for the arrays `query` (b, h, rows; d), `key` (b, h, keys; d) and `value`
    (b, h, keys; e), its i for the index or axis `rows` of the pattern and its j for `keys`. Leaves the output
    `name` (b, h, rows; e) and the natural log-sum-exp of its rows `lse` (b, h, rows). `heads`: the only ones whose
    output is read, None for all; arrays then have those alone.
    """

    name: str
    lse: str
    plan: Plan
    query: str
    key: str
    value: str
    rows: str = "i"
    keys: str = "j"
    heads: Heads | None = None


@dataclass(frozen=True)
class Extreme:
    """The largest (or smallest) score of each row over its keys; 0 where it has none.

    `attend` says which scores, as for a softmax of them; its value plays no part. Leaves `name` (b, h, rows).
    """

    name: str
    attend: Attend
    largest: bool


@dataclass(frozen=True)
class Order:
    """Positions of one side sorted by `group` (an int; None: all are in one), those alone for which `live` holds.

    Both read arrays. `indices`: which of b and h the order differs by. `most`: how many positions of a line take part
    at most, an int of parameters and sizes; None: any number.
    """

    group: Node | None
    live: Node | None
    indices: frozenset[str]
    most: Node | None = None


@dataclass(frozen=True)
class Moved:
    """The array `source`, over positions of a side (`i` or `j`), in that side's order: the array `name` over slots."""

    name: str
    source: str
    side: str
    operand: bool  # one of query, key and value; else laid out as its source, and by the order's indices


@dataclass(frozen=True)
class Range:
    """Arrays over rows: the slots `first` .. `last` of the row's group whose positions are in low <= j < high."""

    first: str
    last: str
    low: Node | None
    high: Node | None


@dataclass(frozen=True)
class Regroup:
    """An `Attend` whose rows, keys, or both are in an order of their own, which tensors decide: by group, or only some.

    `attend` reads arrays over slots: `moved` ones, `positions` (by side: global positions, past every other in empty
    slots) and `ranges`. Rows are read and written where they lie (`Plan.placed`); keys are copied into their order. A
    row that takes no part is one without a key. Costs the pairs inside of the groups.
    """

    name: str
    lse: str
    attend: Attend
    rows: Order | None
    keys: Order | None
    row: str
    key: str
    positions: Mapping[str, str]
    moved: tuple[Moved, ...]
    ranges: tuple[Range, ...]

    @property
    def made(self) -> frozenset[str]:
        """The arrays that the step makes for its attention."""
        ranges = (name for one in self.ranges for name in (one.first, one.last))
        placed = self.attend.plan.placed
        rows = () if placed is None else (placed.places, placed.count)
        return frozenset((*self.positions.values(), *(moved.name for moved in self.moved), *ranges, *rows))


@dataclass(frozen=True)
class Extent:
    """Which keys a row of a carried sum sees: `all`; `lag`: j <= i - amount; `period`: j < (i // amount) * amount.

    `same`: the array (b, t) of ints that must agree at i and j (packed documents, non-decreasing), or None.
    """

    kind: str
    amount: Node | None = None
    same: str | None = None


@dataclass(frozen=True)
class Handing:
    """What a step that carries a state takes from an earlier call and leaves to a later one (see `compiler.handing`).

    `before` (b, h; f, e): the state before the first key, an input that may have no element (then it is 0); `after`:
    that behind the last key, left beside the step's result. With a total, e has one more place, for sums of the keys.
    `document`, where documents are packed: the input (b,) that holds the last call's last one, and the array of this
    call's. `early`: a row reads the state before the update of its own position; `i - 1` in the place of i.
    """

    before: str
    after: str
    document: tuple[str, str] | None = None
    early: bool = False

    @property
    def left(self) -> tuple[str, ...]:
        """What the step leaves for it."""
        return (self.after,) if self.document is None else (self.after, self.document[1])


@dataclass(frozen=True)
class Near:
    """The weights of a carried sum as powers of a score: w_ij = sum over n of coefficients[n] * (query_i @ key_j) ** n.

    `query` (b, h, i; d) and `key` (b, h, j; d). Pairs of a block of positions are weighed so, not by features.
    """

    query: str
    key: str
    coefficients: tuple[Node, ...]


@dataclass(frozen=True)
class Carry:
    """A sum over keys with separable weights, by the chunked skeleton: a state runs along the keys.

    out_i = sum over j in extent(i) of w_ij v_j,  w_ij = sum_f Q_if K_jf exp(sum of g_uf for j < u <= i)

    `query` (b, h, i; f), `key` (b, h, j; f), `value` (b, h, j; e); `decay` is None, an array of log decays g (b, h, t)
    or one for each feature (b, h, t; f). Leaves `name` (b, h, i; e) and, where `total` is set, `total` (b, h, i): the
    sum of the weights. `near`: how pairs that are near one another are weighed, where that is not by the features.
    `handing`: the state from before the first key, and behind the last one. `heads` as of `Attend`.
    """

    name: str
    query: str
    key: str
    value: str
    extent: Extent
    decay: str | None = None
    total: str | None = None
    near: Near | None = None
    handing: Handing | None = None
    heads: Heads | None = None


@dataclass(frozen=True)
class Recur:
    """A state with a diagonal decay and a change of rank one (the delta family), read after its update:

    S_t = diag(exp g_t) S_{t-1} + x_t (y_t^T S_{t-1}) + k_t v_t^T,   out_t = q_t^T S_t

    `query` (b, h, i; d), `key` (b, h, j; d), `value` (b, h, j; e), `decay` g: None, (b, h, t) or (b, h, t; d); `left` x
    and `right` y: (b, h, j; d). A read before the update is the read of the position before.
    """

    name: str
    query: str
    key: str
    value: str
    decay: str | None
    left: str
    right: str
    handing: Handing | None = None
    heads: Heads | None = None


@dataclass(frozen=True)
class Scores:
    """The scores of a selection as a kernel computes them: for line i and member j (see `compiler.selecting`)

    sum over the heads h of a lane, sum over the places p of member j, of body(q_hi @ k_hp, ..)

    `query` (b, h, i; d) and `key` (b, h, j or p; d) are the vectors, None where the body has no product. `head` names
    what a lane's heads are: query heads of a group (h), a vector axis, or nothing (one head a lane). `places`: the
    axis, or j, whose places overlap a member; None: the member itself. `body`, `live` (which places count),
    `condition`, `force` and `bounds` (members that hold every candidate of line i) are pointwise over i, j and the
    `arrays`, each a value of lines, places or members alone. `plan` has no branch: it names the arrays' layouts.
    """

    plan: Plan
    body: Node
    live: Node | None
    condition: Node
    force: Node | None
    bounds: Bounds | None
    query: Node | None
    key: Node | None
    head: str | None
    places: str | None
    arrays: Mapping[str, Node]


@dataclass(frozen=True)
class Choose:
    """A selection by scores: which members of `axis` each row takes (see `runtime.steps.choices`).

    `form` is topk, threshold or mass; `amount` its count, bound or share. `score`, `condition` (which are candidates)
    and `force` (which of them come first; None: none) are over b, h, `rows` and `axis`: i, a declared axis of i or
    nothing (empty), and a declared axis of j, or j. Torch evaluates them for some rows at a time: memory is that of a
    chunk of rows times the members. `scores`: how a kernel does, whose memory does not grow with either; None where it
    takes no such selection, which `reason` tells. Nothing of it has a gradient.

    Leaves `name` (b, heads, lines; entries), int32: each row's members, ascending, -1 at the end. `heads` are all query
    heads (`each`), the first of each key head (`group`), or 1 (`one`); lines are the rows, or the members of the axis
    `rows` from the first that holds a query on. Entries: the count, or for a threshold and a mass the most that a row
    takes.
    """

    name: str
    form: str
    axis: str
    rows: str
    heads: str
    score: Node
    amount: Node | None
    condition: Node
    force: Node | None
    scores: Scores | None = None
    reason: str = ""


@dataclass(frozen=True)
class Sequential:
    """A `scan` block of no known form: its steps at one position after the other. Correct, and slow."""

    name: str
    node: Node
    reason: str


Step = Compute | Attend | Regroup | Extreme | Carry | Recur | Choose | Sequential


@dataclass(frozen=True)
class Handed:
    """A tensor that goes from call to call: its name for the caller, the input that it is, the array that is left."""

    name: str
    before: str
    after: str


@dataclass(frozen=True)
class Composition:
    """The steps of a pattern; the last one's array is the result, over the layout `output_axes`.

    `arrays`: every array by name with its layout; q, k, v and the declared inputs among them.
    """

    name: str
    source: Source
    parameters: tuple[Parameter, ...]
    inputs: tuple[Input, ...]
    axes: tuple[Axis, ...]
    steps: tuple[Step, ...]
    arrays: Mapping[str, Input]
    requirements: tuple[Requirement, ...]
    output_axes: tuple[str, ...]
    uses_value: bool
    projections: tuple[Projection, ...] = ()  # of the keys, that a call with few queries takes over
    handed: tuple[Handed, ...] = ()  # what goes from call to call, where that is asked for
    graph: Graph | None = field(default=None, repr=False, compare=False)

    @property
    def attention(self) -> Attend | None:
        """The step that is all of the pattern: one attention over q, k and v as they are given."""
        (step, *others) = self.steps
        if others or not isinstance(step, Attend) or (step.query, step.key, step.value) != ("q", "k", "v"):
            return None
        return step if self.output_axes == ("b", "h", "i", "e") else None

    @property
    def is_one_softmax(self) -> bool:
        """Whether the result is one softmax over keys, or a merge: its rows have a log-sum-exp."""
        return isinstance(self.steps[-1], Attend | Regroup) and self.output_axes == ("b", "h", "i", "e")

    def widest(self, sizes: Mapping[str, int]) -> int:
        """The longest query, key or value of a step that attends, for these lengths of axes."""
        attends = [step for step in self.steps if isinstance(step, Attend)]
        axes = [self.arrays[name].axes[-1] for step in attends for name in (step.query, step.key, step.value)]
        return max((sum(sizes[part] for part in axis.split("+")) for axis in axes), default=0)

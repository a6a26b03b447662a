"""The composition: what a pattern compiles to. Steps over whole arrays, in order, each linear in the sequence.

An array is a tensor by name: q, k, v, a declared input, or what an earlier step left. A step's array is laid out by
the type of its node: the indices in layout order (`Type.ordered_indices`), then the vector axes; an index that it does
not vary over is 1 long, and h may be as long as the key heads. No step makes an array over pairs of positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from attnc.compiler.ir import Graph, Node
from attnc.compiler.plan import Plan, Requirement
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
class Attend:
    """One softmax of rows over keys and its sum of values, by the streamed skeleton.

    `plan` is a plan in which q, k and v stand for the arrays `query` (b, h, rows; d), `key` (b, h, keys; d) and `value`
    (b, h, keys; e), its i for the index or axis `rows` of the pattern and its j for `keys`. Leaves the output
    `name` (b, h, rows; e) and the natural log-sum-exp of its rows `lse` (b, h, rows).
    """

    name: str
    lse: str
    plan: Plan
    query: str
    key: str
    value: str
    rows: str = "i"
    keys: str = "j"


@dataclass(frozen=True)
class Extent:
    """Which keys a row of a carried sum sees: `all`; `lag`: j <= i - amount; `period`: j < (i // amount) * amount.

    `same`: the array (b, t) of ints that must agree at i and j (packed documents, non-decreasing), or None.
    """

    kind: str
    amount: Node | None = None
    same: str | None = None


@dataclass(frozen=True)
class Carry:
    """A sum over keys with separable weights, by the chunked skeleton: a state runs along the keys.

    out_i = sum over j in extent(i) of w_ij v_j,  w_ij = sum_f Q_if K_jf exp(sum of g_uf for j < u <= i)

    `query` (b, h, i; f), `key` (b, h, j; f), `value` (b, h, j; e); `decay` is None, an array of log decays g (b, h, t)
    or one for each feature (b, h, t; f). Leaves `name` (b, h, i; e) and, where `total` is set, `total` (b, h, i): the
    sum of the weights.
    """

    name: str
    query: str
    key: str
    value: str
    extent: Extent
    decay: str | None = None
    total: str | None = None


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


@dataclass(frozen=True)
class Sequential:
    """A `scan` block of no known form: its steps at one position after the other. Correct, and slow."""

    name: str
    node: Node
    reason: str


Step = Compute | Attend | Carry | Recur | Sequential


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
    notes: tuple[str, ...] = ()
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
        return isinstance(self.steps[-1], Attend) and self.output_axes == ("b", "h", "i", "e")

"""The checked tree: what a pattern means, with names resolved, functions inlined and every type known.

A term is a node of a directed acyclic graph (a name used twice is one term with two users). The float64
reference (`runtime/reference/meaning.py`) evaluates terms as they stand; the compiler builds its graph from them.
`FORMS` is the closed list of what a term can be.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from attnc.dsl.source import Source, Span
from attnc.dsl.types import Base, Type

Scalar = bool | int | float
Attribute = Scalar | str | tuple["Attribute", ...] | None


@dataclass(frozen=True, eq=False)
class Term:
    """One value: `form` is a key of `FORMS`; `attribute` is what that form says it holds."""

    form: str
    args: tuple[Term, ...]
    type: Type
    attribute: Attribute = None
    block: Scan | Repeat | None = None
    span: Span = field(kw_only=True, repr=False)


@dataclass(frozen=True, eq=False)
class Scan:
    """A recurrence over `index`: states start at zero, `steps` run in order at every position.

    A step assigns a state or a local; inside a step, `state` terms read the latest value of a state and
    `local` terms that of an earlier step. The term holding the scan varies over `index` and gives the value
    of the step called `result`.
    """

    index: str
    states: tuple[tuple[str, Type], ...]
    steps: tuple[tuple[str, Term], ...]
    result: str


@dataclass(frozen=True, eq=False)
class Repeat:
    """A fixed number of rounds: `states` start at the term's args (after the count), `steps` run in order."""

    states: tuple[tuple[str, Type], ...]
    steps: tuple[tuple[str, Term], ...]
    result: str


FORMS: dict[str, str] = {
    # leaves
    "literal": "a bool, int or float: attribute",
    "parameter": "a parameter by name (`scale` too); an element of a tuple parameter is `segments.0`",
    "size": "the length of an index or axis named by attribute: b h i j d e t, a declared axis, an input's axis",
    "index": "the position along the index named by attribute; `i` is global: M - N + row where N < M",
    "start": "first key (or query) position of a member of the declared axis named by attribute",
    "stop": "one past the last position of a member of the declared axis named by attribute",
    "input": "q, k, v or a declared input, by name",
    "state": "a state of the enclosing scan or repeat, by name",
    "local": "the value of an earlier step of the enclosing scan or repeat, by name",
    # pointwise; operands broadcast by name; the vector axes of one are the leading ones of the other: all, the d of
    # d and e, or none
    "to_real": "int to real",
    "neg": "-x",
    "not": "not x",
    "abs": "|x|",
    "exp": "e to the x",
    "log": "natural logarithm",
    "tanh": "hyperbolic tangent",
    "sigmoid": "1 / (1 + exp(-x))",
    "relu": "max(x, 0)",
    "elu": "x if x > 0 else exp(x) - 1",
    "silu": "x * sigmoid(x)",
    "softplus": "log(1 + exp(x))",
    "sin": "sine, radians",
    "cos": "cosine, radians",
    "sqrt": "square root",
    "floor": "largest int not above x (real to int)",
    "add": "x + y",
    "sub": "x - y",
    "mul": "x * y",
    "div": "x / y, real",
    "floordiv": "x // y on ints, towards minus infinity",
    "mod": "x % y on ints, the sign of y",
    "pow": "x ** y",
    "minimum": "the smaller of x and y",
    "maximum": "the larger of x and y",
    "lt": "x < y",
    "le": "x <= y",
    "eq": "x == y",
    "ne": "x != y",
    "and": "x and y",
    "or": "x or y",
    "select": "if args[0] then args[1] else args[2]",
    "uniform": "a real in [0, 1) hashed from the int args (seed first); see `runtime/compute/hashing.py`",
    # structure
    "rename": "args[0] with one index read at another: attribute (from, to), such as (t, i)",
    "shift": "args[0] read at the int args[1] along the index named by attribute; out of range reads 0",
    "take": "args[0] at the int args[1] along the vector axis named by attribute; the axis goes",
    "dot": "sum of x * y over the shared vector axis or index named by attribute",
    "matmul": "matrix product of x's last and y's first of two vector axes",
    "outer": "vector x times vector y: axes of x, then of y",
    "concat": "vectors x and y end to end; attribute names the new axis",
    "matrix": "args[0] with the indices named by attribute (a tuple) made vector axes, in that order",
    "transpose": "args[0] with its last two vector axes exchanged",
    "identity": "the identity matrix over the axis named by attribute (twice)",
    "orthogonal_gaussian": "(features, width, seed) -> real over axes attribute; see `attnc.orthogonal_gaussian`",
    # reductions: attribute (index or vector axis, within axis or None); args (body, condition, ...)
    "sum": "sum over the live members; none live gives 0. A vector body is summed element by element",
    "mean": "mean over the live members; none live gives 0",
    "max": "maximum over the live members; none live gives 0",
    "min": "minimum over the live members; none live gives 0",
    "cumsum": "inclusive prefix sum along the index; the index stays",
    "softmax": "exp(body) / sum of exp(body) over the live members, which keep the index; dead ones and empty rows"
    " give 0. args[2], if there, is a sink: a logit that joins the denominator only",
    "normalize": "body / (sum + args[2]) with args[2] = eps, or body / max(|sum|, args[3]); dead ones give 0",
    # selections: attribute is the axis chosen from; args as listed; type.selects is set
    "topk": "(score, count, condition, force): forced members first, then the best; ties to the lowest index",
    "threshold": "(score, bound, condition, force): members with score >= bound, and forced ones",
    "mass": "(score, share, condition, force): forced first, then the largest until sum >= share * row total",
    "argmax": "(score, condition): position (int) of the largest score; ties to the lowest; attribute is the axis",
    "member": "args[0], an int position, is in args[1]: a selection, or an int vector (negative entries are padding)."
    " Positions are looked for in the members' ranges, but an `index` of the axis chosen from is a member itself",
    "group_sum": "sum over the query heads that share a key head, given to each of them",
    # whole branches
    "merge": "args are softmax branches `dot(softmax, value)`; one softmax over the multiset union of their keys",
    "detach": "args[0] without a gradient",
    "scan": "the result of block (a Scan)",
    "repeat": "the result of block (a Repeat); args: count, initial states",
}


@dataclass(frozen=True, eq=False)
class Parameter:
    """A parameter of a pattern. `default` is None where the caller must give it.

    `base` is the type of the value or, where `is_tuple`, of each element; a tuple's length is static: the
    checked pattern holds for `len(default)` elements.
    """

    name: str
    base: Base
    default: Scalar | tuple[int, ...] | None
    is_tuple: bool
    span: Span = field(kw_only=True, repr=False)


@dataclass(frozen=True, eq=False)
class Input:
    """A declared input. `axes` is the declared layout, such as (b, h, t, d) or (h, buckets)."""

    name: str
    base: Base
    axes: tuple[str, ...]
    default: Term | None
    span: Span = field(kw_only=True, repr=False)


@dataclass(frozen=True, eq=False)
class Axis:
    """A declared axis. blocks: member n covers positions n * stride .. n * stride + size of `over` (i or j).

    Without a stride the blocks tile the sequence and the last may be short; with one, a block exists only
    if it lies wholly inside. segments: `count` members of ceil(length / count) positions each, the last
    ones short or empty.
    """

    name: str
    kind: str  # "blocks" or "segments"
    over: str
    size: Term  # block size, or number of segments
    stride: Term | None
    span: Span = field(kw_only=True, repr=False)


@dataclass(frozen=True, eq=False)
class Pattern:
    """A checked pattern. `out` is real over (b, h, i) and one vector axis, or over the axes `output_axes`."""

    name: str
    source: Source
    parameters: tuple[Parameter, ...]
    inputs: tuple[Input, ...]  # without q, k, v
    axes: tuple[Axis, ...]
    out: Term
    output_axes: tuple[str, ...]  # layout of the result, such as (b, h, i, e)
    uses_value: bool  # false where v plays no part (it may then be None)
    sizes: tuple[tuple[str, Term], ...] = ()  # axis name -> its size where the text fixes it, such as buckets, 3
    span: Span = field(kw_only=True, repr=False)

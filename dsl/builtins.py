"""The functions, reductions and selections that the language itself knows, and what each takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from attnc.dsl import products, reductions
from attnc.dsl.builder import UNKNOWN
from attnc.dsl.diagnostics import did_you_mean
from attnc.dsl.pointwise import Operand, chosen, pointwise, promoted, require_int, require_number, require_value
from attnc.dsl.reductions import REDUCTIONS, SELECTIONS
from attnc.dsl.rejection import rejection
from attnc.dsl.source import Span
from attnc.dsl.syntax import Call, Expression, Reduction
from attnc.dsl.terms import Term
from attnc.dsl.types import Base, Type

if TYPE_CHECKING:
    from attnc.dsl.expressions import Expressions

Handler = Callable[["Expressions", Call], Term]

# Options of a reduction by keyword, and of a selection: positional bound and keywords.
OPTIONS = {"softmax": ("sink",), "normalize": ("eps", "floor")}
BOUNDS = {"topk": "count", "threshold": "bound", "mass": "share"}


def _real_function(form: str) -> Handler:
    """`exp(x)` and its like: a real of a number, elementwise."""

    def handler(at: Expressions, call: Call) -> Term:
        (argument,) = at.arguments(call, ("x",))
        operands = promoted(at.build, [at.operand(argument)], real=True)
        return pointwise(at.build, form, operands, Base.REAL, call.span)

    return handler


def _absolute(at: Expressions, call: Call) -> Term:
    (argument,) = at.arguments(call, ("x",))
    operand = at.operand(argument)
    require_number(operand)
    return pointwise(at.build, "abs", [operand], operand.type.base, call.span)


def _floor(at: Expressions, call: Call) -> Term:
    (argument,) = at.arguments(call, ("x",))
    operand = at.operand(argument)
    require_number(operand)
    if operand.type.base is Base.INT:
        return operand.term
    return pointwise(at.build, "floor", [operand], Base.INT, call.span)


def _real(at: Expressions, call: Call) -> Term:
    """`real(x)`: an int as a real, a condition as 1 or 0."""
    (argument,) = at.arguments(call, ("x",))
    operand = at.operand(argument)
    require_value(operand)
    if operand.type.base is not Base.BOOL:
        return at.build.to_real(operand.term, call.span)
    one, zero = (Operand(at.build.literal(value, call.span), call.span) for value in (1.0, 0.0))
    return chosen(at.build, operand, one, zero, call.span)


def _extremum(at: Expressions, form: str, left: Operand, right: Operand, span: Span) -> Term:
    operands = promoted(at.build, [left, right])
    real = any(operand.type.base is Base.REAL for operand in operands)
    return pointwise(at.build, form, operands, Base.REAL if real else Base.INT, span)


def _binary_extremum(form: str) -> Handler:
    def handler(at: Expressions, call: Call) -> Term:
        left, right = (at.operand(argument) for argument in at.arguments(call, ("x", "y")))
        return _extremum(at, form, left, right, call.span)

    return handler


def _clamp(at: Expressions, call: Call) -> Term:
    """`clamp(x, low, high)` = min(max(x, low), high)."""
    value, low, high = (at.operand(argument) for argument in at.arguments(call, ("x", "low", "high")))
    raised = Operand(_extremum(at, "maximum", value, low, call.span), call.span)
    return _extremum(at, "minimum", raised, high, call.span)


def _outer(at: Expressions, call: Call) -> Term:
    left, right = (at.operand(argument) for argument in at.arguments(call, ("x", "y")))
    return products.outer(at.build, left, right, call.span)


def _transpose(at: Expressions, call: Call) -> Term:
    (argument,) = at.arguments(call, ("x",))
    return products.transpose(at.build, at.operand(argument), call.span)


def _concat(at: Expressions, call: Call) -> Term:
    left, right = (at.operand(argument) for argument in at.arguments(call, ("x", "y")))
    return _joined(at, left, right, None, call.span)


def _joined(at: Expressions, left: Operand, right: Operand, name: str | None, span: Span) -> Term:
    """`concat`, with the length of its new axis noted among the pattern's sizes."""
    term = products.concat(at.build, left, right, name, span)
    if term.type is not UNKNOWN:
        lengths = [_length(at, operand.type.axes[0], span) for operand in (left, right)]
        _note_size(at, str(term.attribute), at.build.make("add", tuple(lengths), Type(Base.INT), span), span)
    return term


def _length(at: Expressions, axis: str, span: Span) -> Term:
    return at.context.sizes.get(axis) or at.build.size(axis, span)


def _note_size(at: Expressions, axis: str, size: Term, span: Span) -> None:
    """Record the length of an axis that the text itself makes; two lengths for one name are an error."""
    known = at.context.sizes.setdefault(axis, size)
    if not _alike(known, size):
        raise rejection(
            "axis-mismatch",
            f"the axis `{axis}` is made twice, with different lengths",
            span,
            (known.span, "the other one"),
            help="give the new axis a name: `concat[name](x, y)`",
        )


def _alike(one: Term, other: Term) -> bool:
    """Whether two terms are written the same way."""
    if one is other:
        return True
    same = one.form == other.form and one.attribute == other.attribute and len(one.args) == len(other.args)
    return (
        same
        and bool(one.args or one.form in ("literal", "size", "parameter"))
        and all(_alike(a, b) for a, b in zip(one.args, other.args, strict=True))
    )


def _uniform(at: Expressions, call: Call) -> Term:
    """`uniform(seed, x, ..)`: one real in [0, 1) for each value of the ints."""
    names = ("seed", *(f"x{n}" for n in range(1, max(len(call.arguments), 2))))
    operands = [at.operand(argument) for argument in at.arguments(call, names)]
    for operand in operands:
        require_int(operand, "an argument of `uniform`")
    return pointwise(at.build, "uniform", operands, Base.REAL, call.span)


def _unchanged(form: str) -> Handler:
    """`detach(x)`, `group_sum(x)`: a real of x's own type."""

    def handler(at: Expressions, call: Call) -> Term:
        (argument,) = at.arguments(call, ("x",))
        (operand,) = promoted(at.build, [at.operand(argument)], real=True)
        if form == "group_sum" and operand.type is not UNKNOWN and "h" not in operand.type.indices:
            message = f"`group_sum` sums over query heads, and this does not vary over `h`: it is {operand.type}"
            raise rejection("unknown-axis", message, operand.span)
        return at.build.make(form, (operand.term,), operand.type, call.span)

    return handler


def _orthogonal_gaussian(at: Expressions, call: Call) -> Term:
    """`orthogonal_gaussian(features, width, seed)`: (features, width), the axes named for the two sizes."""
    arguments = at.arguments(call, ("features", "width", "seed"))
    operands = [at.operand(argument) for argument in arguments]
    for operand in operands:
        require_int(operand, "an argument of `orthogonal_gaussian`")
        if operand.type.indices:
            raise rejection("type-mismatch", f"a size and a seed are one int each, found {operand.type}", operand.span)
    names = [_axis_name(operand) for operand in operands[:2]]
    if names[0] == names[1]:
        names[0] += "'"
    for name, operand in zip(names, operands, strict=False):
        if operand.term.form != "size" or operand.term.attribute != name:
            _note_size(at, name, operand.term, call.span)
    type = Type(Base.REAL, frozenset(), tuple(names))
    args = tuple(operand.term for operand in operands)
    return at.build.make("orthogonal_gaussian", args, type, call.span, tuple(names))


def _axis_name(operand: Operand) -> str:
    """An axis named for its length: `d` for D, `features` for a parameter, `16` for a number, else the text."""
    if operand.term.form in ("size", "parameter", "literal"):
        return str(operand.term.attribute)
    return " ".join(operand.span.text.split())


def _merge(at: Expressions, call: Call) -> Term:
    """`merge(a, b)` or `merge(a for x in xs)`: softmax branches, each `softmax[j](..) @ value`."""
    if call.where is not None:
        raise rejection("argument", "`merge` takes no `where`", call.where.span, help="write it in the branches")
    named = next((argument for argument in call.arguments if argument.name is not None), None)
    if named is not None:
        raise rejection("argument", f"`merge` has no keyword `{named.name}`", named.span)
    branches = _unrolled(at, call) if call.loop is not None else [at.operand(a.value) for a in call.arguments]
    if not branches:
        raise rejection("argument", "`merge` needs a branch", call.span)
    for branch in branches:
        if branch.term.form != "dot" or branch.term.args[0].form != "softmax":
            raise rejection(
                "merge",
                "`merge` takes softmax branches",
                branch.span,
                help="a branch is `softmax[j](..) @ v`, with nothing after it",
            )
    if len({branch.type.axes for branch in branches}) > 1:
        raise rejection("axis-mismatch", "the branches of `merge` have different vector axes", call.span)
    return pointwise(at.build, "merge", branches, Base.REAL, call.span)


MAX_UNROLLED = 64


def _unrolled(at: Expressions, call: Call) -> list[Operand]:
    """The body of `body for x, y in xs, ys`, once for every element of the tuples."""
    loop = call.loop
    assert loop is not None
    if len(call.arguments) != 1:
        raise rejection("argument", "one expression stands before `for`", call.span)
    if len(loop.names) != len(loop.iterables):
        message = f"`for` has names and tuples of other numbers: {len(loop.names)} and {len(loop.iterables)}"
        raise rejection("loop", message, loop.span, help="one name for each tuple: `for x, y in (1, 2), (3, 4)`")
    columns = [at.elements(iterable) for iterable in loop.iterables]
    if len({len(column) for column in columns}) > 1:
        lengths = ", ".join(str(len(column)) for column in columns)
        raise rejection("loop", f"the tuples of `for` have different lengths: {lengths}", loop.span)
    if len(columns[0]) > MAX_UNROLLED:
        raise rejection(
            "too-large", f"`for` runs over at most {MAX_UNROLLED} elements, found {len(columns[0])}", loop.span
        )
    body = call.arguments[0].value
    rows = zip(*columns, strict=True)
    return [at.binding(dict(zip(loop.names, row, strict=True))).operand(body) for row in rows]


FUNCTIONS: dict[str, Handler] = {
    **{
        name: _real_function(name)
        for name in ("exp", "log", "tanh", "sigmoid", "relu", "elu", "silu", "softplus", "sin", "cos", "sqrt")
    },
    "abs": _absolute,
    "clamp": _clamp,
    "concat": _concat,
    "detach": _unchanged("detach"),
    "floor": _floor,
    "group_sum": _unchanged("group_sum"),
    "max": _binary_extremum("maximum"),
    "merge": _merge,
    "min": _binary_extremum("minimum"),
    "orthogonal_gaussian": _orthogonal_gaussian,
    "outer": _outer,
    "real": _real,
    "transpose": _transpose,
    "uniform": _uniform,
}

# `name[axis](..)`, beside the reductions and selections.
BRACKETED = {"concat", "matrix"}
RESERVED = set(FUNCTIONS) | REDUCTIONS | SELECTIONS | {"matrix", "identity", "blocks", "segments"}


def reduced(at: Expressions, syntax: Reduction) -> Term:
    """`softmax[j](..)`, `mean[j in c](..)`, `topk[s](..)`, `concat[f](..)`, `matrix[m, n](..)`."""
    name = syntax.function
    if name in BRACKETED:
        return _bracketed(at, syntax)
    if name not in REDUCTIONS | SELECTIONS:
        help = did_you_mean(name, REDUCTIONS | SELECTIONS | BRACKETED)
        raise rejection("unknown-function", f"there is no reduction or selection `{name}`", syntax.span, help=help)
    if syntax.second is not None:
        raise rejection("argument", f"`{name}` runs along one index, not two", syntax.span)
    index = at.index(syntax.index)
    within = None if syntax.within is None else at.index(syntax.within)
    if within is not None:
        reductions.members(index, within, at.context.axes, syntax.span)
    if at.context.scanning and index == "t":
        raise rejection("scan", "a scan sees one position at a time: nothing runs along t inside it", syntax.span)
    condition = Operand(at.build.literal(True, syntax.span), syntax.span)
    if syntax.where is not None:
        condition = at.operand(syntax.where)
    positional = [argument.value for argument in syntax.arguments if argument.name is None]
    keywords = _keywords(syntax)
    if name in SELECTIONS:
        return _selected(at, syntax, index, positional, keywords, condition)
    if len(positional) != 1:
        raise rejection(
            "argument", f"`{name}[{syntax.index}](..)` takes one value, found {len(positional)}", syntax.span
        )
    body = at.operand(positional[0])
    options = {key: promoted(at.build, [at.operand(value)], real=True)[0] for key, value in keywords.items()}
    if name == "normalize":
        if len(options) > 1:
            raise rejection("argument", "`normalize` takes `eps` or `floor`, not both", syntax.span)
        none = Operand(at.build.literal(0.0, syntax.span), syntax.span)
        options = {"eps": none, **options}
    return reductions.reduction(at.build, name, index, within, body, condition, options, syntax.span)


def _keywords(syntax: Reduction) -> dict[str, Expression]:
    """Keyword arguments by name, all of them known and none given twice."""
    known = ("force",) if syntax.function in BOUNDS else OPTIONS.get(syntax.function, ())
    found: dict[str, Expression] = {}
    for argument in syntax.arguments:
        if argument.name is None:
            continue
        if argument.name not in known:
            help = did_you_mean(argument.name, known)
            raise rejection(
                "argument", f"`{syntax.function}` has no keyword `{argument.name}`", argument.span, help=help
            )
        if argument.name in found:
            raise rejection("argument", f"`{argument.name}` is given twice", argument.span)
        found[argument.name] = argument.value
    return found


def _selected(
    at: Expressions,
    syntax: Reduction,
    index: str,
    positional: list[Expression],
    keywords: dict[str, Expression],
    condition: Operand,
) -> Term:
    name = syntax.function
    names = ["score"] + ([BOUNDS[name]] if name in BOUNDS else [])
    if len(positional) != len(names):
        call = f"`{name}[{syntax.index}]({', '.join(names)} where ..)`"
        raise rejection("argument", f"{call} takes {len(names)} values, found {len(positional)}", syntax.span)
    score = at.operand(positional[0])
    bound = at.operand(positional[1]) if len(positional) > 1 else None
    force = Operand(at.build.literal(False, syntax.span), syntax.span)
    if "force" in keywords:
        force = at.operand(keywords["force"])
    return reductions.selection(at.build, name, index, score, bound, condition, force, syntax.span)


def _bracketed(at: Expressions, syntax: Reduction) -> Term:
    """`concat[f](x, y)` names the new axis; `matrix[m, n](x)` makes indices vector axes."""
    if syntax.where is not None:
        raise rejection("argument", f"`{syntax.function}` takes no `where`", syntax.where.span)
    named = next((argument for argument in syntax.arguments if argument.name is not None), None)
    if named is not None or syntax.within is not None:
        span = named.span if named is not None else syntax.span
        raise rejection("argument", f"`{syntax.function}` takes only values between its parentheses", span)
    operands = [at.operand(argument.value) for argument in syntax.arguments]
    if syntax.function == "concat" and syntax.second is not None:
        raise rejection("argument", "`concat[f](x, y)` names one new axis", syntax.span)
    count = 1 if syntax.function == "matrix" else 2
    if len(operands) != count:
        raise rejection(
            "argument", f"`{syntax.function}[..](..)` takes {count} values, found {len(operands)}", syntax.span
        )
    if syntax.function == "matrix":
        names = tuple(at.index(name) for name in (syntax.index, syntax.second) if name is not None)
        return products.matrix(at.build, names, operands[0], syntax.span)
    return _joined(at, operands[0], operands[1], syntax.index, syntax.span)

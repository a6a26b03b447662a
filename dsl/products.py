"""Type rules of `@` and of what makes and takes apart vectors and matrices."""

from __future__ import annotations

from attnc.dsl.builder import UNKNOWN, Builder
from attnc.dsl.pointwise import Operand, joined_indices, promoted
from attnc.dsl.rejection import RejectionError, listed, rejection
from attnc.dsl.source import Span
from attnc.dsl.terms import Term
from attnc.dsl.types import Base, Type

# Indices that `@` never contracts: a result keeps its batch, head, query and position.
KEPT = frozenset("bhit")


def contract(build: Builder, left: Operand, right: Operand, span: Span) -> Term:
    """`left @ right`: over the one vector axis that both share, or else over the one index that both share."""
    left, right = promoted(build, (left, right), real=True)
    args = (left.term, right.term)
    if UNKNOWN in (left.type, right.type):
        return build.make("dot", args, UNKNOWN, span, "?")
    indices = joined_indices((left, right), span)
    a, b = left.type.axes, right.type.axes
    shared = [axis for axis in a if axis in b]
    if _are_matrices(a, b):
        return build.make("matmul", args, Type(Base.REAL, indices, (a[0], b[1])), span)
    if len(shared) == 1 and a.count(shared[0]) == b.count(shared[0]) == 1:
        rest = tuple(axis for axis in a + b if axis != shared[0])
        return build.make("dot", args, Type(Base.REAL, indices, rest), span, shared[0])
    common = sorted((left.type.indices & right.type.indices) - KEPT)
    if not shared and len(common) == 1:
        return build.make("dot", args, Type(Base.REAL, indices - {common[0]}, a + b), span, common[0])
    raise _no_contraction(left, right, shared or common, span)


def _are_matrices(a: tuple[str, ...], b: tuple[str, ...]) -> bool:
    """Whether two values multiply as matrices: the inner axes meet, and contracting by name would be ambiguous."""
    if len(a) != 2 or len(b) != 2 or a[1] != b[0]:
        return False
    return len(set(a)) < 2 or len(set(b)) < 2 or a[0] in b


def _no_contraction(left: Operand, right: Operand, shared: list[str], span: Span) -> RejectionError:
    labels = ((left.span, f"this is {left.type}"), (right.span, f"this is {right.type}"))
    crossed = (set(left.type.axes) & right.type.indices) | (set(right.type.axes) & left.type.indices)
    if shared:
        axes = listed(shared)
        return rejection("contraction", f"`@` needs one axis to contract, and both sides have {axes}", span, *labels)
    side = left if crossed & left.type.indices else right
    help = "`@` contracts the vector axis that both sides have; `*` multiplies without contracting"
    if crossed:
        axis = min(crossed)
        help = f"make the index a vector axis: `matrix[{axis}]({side.span.text})`"
    message = f"nothing to contract: {_named(left)} and {_named(right)} share no vector axis"
    return rejection("contraction", message, span, *labels, help=help)


def _named(operand: Operand) -> str:
    axes = operand.type.axes
    return f"`{operand.span.text}` (vector axes: {listed(axes)})"


def outer(build: Builder, left: Operand, right: Operand, span: Span) -> Term:
    """`outer(x, y)`: the matrix of all products of two vectors' elements."""
    left, right = promoted(build, (left, right), real=True)
    args = (left.term, right.term)
    if UNKNOWN in (left.type, right.type):
        return build.make("outer", args, UNKNOWN, span)
    for operand in (left, right):
        if len(operand.type.axes) != 1:
            raise rejection("axis-mismatch", f"`outer` takes two vectors, found {operand.type}", operand.span)
    axes = left.type.axes + right.type.axes
    if axes[0] == axes[1]:
        raise rejection("axis-mismatch", f"`outer` needs two different axes, and both are `{axes[0]}`", span)
    return build.make("outer", args, Type(Base.REAL, joined_indices((left, right), span), axes), span)


def concat(build: Builder, left: Operand, right: Operand, name: str | None, span: Span) -> Term:
    """`concat(x, y)` or `concat[name](x, y)`: two vectors end to end, over a new axis."""
    left, right = promoted(build, (left, right), real=True)
    args = (left.term, right.term)
    if UNKNOWN in (left.type, right.type):
        return build.make("concat", args, UNKNOWN, span, name or "?")
    for operand in (left, right):
        if len(operand.type.axes) != 1:
            raise rejection("axis-mismatch", f"`concat` takes two vectors, found {operand.type}", operand.span)
    axis = name or f"{left.type.axes[0]}+{right.type.axes[0]}"
    return build.make("concat", args, Type(Base.REAL, joined_indices((left, right), span), (axis,)), span, axis)


def matrix(build: Builder, names: tuple[str, ...], operand: Operand, span: Span) -> Term:
    """`matrix[m, n](x)`: the named indices become vector axes, before those that there are."""
    (operand,) = promoted(build, (operand,), real=True)
    if operand.type is UNKNOWN:
        return build.make("matrix", (operand.term,), UNKNOWN, span, names)
    for name in names:
        if name not in operand.type.indices:
            raise rejection("unknown-axis", f"{operand.type} does not vary over `{name}`", operand.span)
    type = Type(Base.REAL, operand.type.indices - set(names), names + operand.type.axes)
    return build.make("matrix", (operand.term,), type, span, names)


def transpose(build: Builder, operand: Operand, span: Span) -> Term:
    """`transpose(x)`: the last two vector axes change places."""
    (operand,) = promoted(build, (operand,), real=True)
    axes = operand.type.axes
    if operand.type is UNKNOWN:
        return build.make("transpose", (operand.term,), UNKNOWN, span)
    if len(axes) < 2:
        raise rejection(
            "axis-mismatch",
            f"`transpose` takes a matrix, found {operand.type}",
            operand.span,
            help="`matrix[m, n](x)` makes the indices m and n of x its vector axes",
        )
    type = Type(Base.REAL, operand.type.indices, (*axes[:-2], axes[-1], axes[-2]))
    return build.make("transpose", (operand.term,), type, span)

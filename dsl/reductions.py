"""Type rules of what runs along an index: reductions, selections and membership."""

from __future__ import annotations

from collections.abc import Mapping

from attnc.dsl.builder import UNKNOWN, Builder
from attnc.dsl.diagnostics import did_you_mean
from attnc.dsl.pointwise import (
    Operand,
    joined_axes,
    joined_indices,
    promoted,
    require_bool,
    require_int,
    require_number,
    require_value,
)
from attnc.dsl.rejection import listed, rejection
from attnc.dsl.source import Span
from attnc.dsl.terms import Axis, Term
from attnc.dsl.types import Base, Type

KEEPS_INDEX = {"softmax", "normalize", "cumsum"}
REDUCTIONS = {"sum", "mean", "max", "min"} | KEEPS_INDEX
SELECTIONS = {"topk", "threshold", "mass", "argmax"}


def _along(index: str, operands: list[Operand], span: Span, what: str) -> bool:
    """Whether `index` is a vector axis of the operands (else it is one of their indices)."""
    if any(index in operand.type.axes for operand in operands):
        return True
    if any(index in operand.type.indices for operand in operands):
        return False
    has = sorted(frozenset().union(*({*operand.type.indices, *operand.type.axes} for operand in operands)))
    body = operands[0]
    help = did_you_mean(index, has)
    if help is None and index in ("i", "j") and "t" in has:
        help = f"say at which position it is read: `{body.span.text}[{index}]`"
    if help is None:
        help = "between the brackets stands an index that the value or its condition varies over"
    raise rejection(
        "unknown-axis",
        f"nothing in this {what} varies over `{index}`",
        span,
        (body.span, f"this is {body.type}, which varies over {listed(has, none='nothing')}"),
        help=help,
    )


def reduction(
    build: Builder,
    form: str,
    index: str,
    within: str | None,
    body: Operand,
    condition: Operand,
    options: Mapping[str, Operand],
    span: Span,
) -> Term:
    """`form[index in within](body where condition, options)`; `within` is checked by `members`."""
    require_bool(condition, "`where`")
    require_number(body)
    if form in ("mean", "softmax", "normalize"):
        (body,) = promoted(build, (body,), real=True)
    operands = [body, condition, *options.values()]
    args = [body.term, condition.term, *(option.term for option in options.values())]
    if any(operand.type is UNKNOWN for operand in operands):
        return build.make(form, tuple(args), UNKNOWN, span, (index, within))
    is_axis = _along(index, [body, condition], span, f"`{form}`")
    for name, option in options.items():
        if index in option.type.indices or index in option.type.axes:
            raise rejection(
                "axis-mismatch", f"`{name}` may not vary over `{index}`, along which `{form}` runs", option.span
            )
    indices = joined_indices(operands, span)
    axes = joined_axes([body, condition, *options.values()], span)
    if form not in KEEPS_INDEX:
        indices, axes = indices - {index}, tuple(axis for axis in axes if axis != index)
        if within is not None:
            indices |= {within}
    elif within is not None:
        help = "only what gives one value a member can: `mean`, `sum`, `max` and `min`"
        raise rejection("unknown-axis", f"`{form}` cannot run inside the members of `{within}`", span, help=help)
    if is_axis and within is not None:
        raise rejection("unknown-axis", f"`{index}` is a vector axis, and `{within}` groups positions", span)
    return build.make(form, tuple(args), Type(body.type.base, indices, axes), span, (index, within))


def members(index: str, within: str, axes: Mapping[str, Axis], span: Span) -> None:
    """Check `index in within`: a declared axis over that index, or over what that axis is made of."""
    if within not in axes:
        raise rejection(
            "unknown-axis", f"`{within}` is not a declared axis", span, help=f"declare it: `axis {within} = blocks(..)`"
        )
    over = axes[within].over
    if index == over or (index in axes and axes[index].over == over and index != within):
        return
    what = f"the axis `{index}`, which is over `{axes[index].over}`" if index in axes else f"`{index}`"
    raise rejection("unknown-axis", f"`{within}` groups `{over}`, not {what}", span)


def selection(
    build: Builder,
    form: str,
    index: str,
    score: Operand,
    bound: Operand | None,
    condition: Operand,
    force: Operand,
    span: Span,
) -> Term:
    """`topk[index](score, count where condition, force = force)` and its like."""
    require_bool(condition, "`where`")
    require_bool(force, "`force`")
    (score,) = promoted(build, (score,), real=True)
    operands = [score, condition, *([] if form == "argmax" else [force])]
    if form == "topk":
        assert bound is not None
        require_int(bound, "how many to select")
        operands.insert(1, bound)
    elif bound is not None:
        require_number(bound)
        operands.insert(1, promoted(build, (bound,), real=True)[0])
    _along(index, [score, condition], span, f"`{form}`")
    if bound is not None and index in bound.type.indices:
        raise rejection("axis-mismatch", f"how much to select may not vary over `{index}`", bound.span)
    indices = joined_indices(operands, span) - {index}
    axes = tuple(axis for axis in joined_axes(operands, span) if axis != index)
    type = Type(Base.INT, indices, axes, None if form == "argmax" else index)
    return build.make(form, tuple(operand.term for operand in operands), type, span, index)


def member(build: Builder, left: Operand, right: Operand, axes: Mapping[str, Axis], span: Span) -> Term:
    """`left in right`: a position in a selection, or an int in a vector of ints."""
    require_int(left, "what `in` looks for")
    selects = right.type.selects
    if selects is None and (right.type.base is not Base.INT or len(right.type.axes) != 1):
        raise rejection(
            "type-mismatch",
            f"`in` looks in a selection or in a vector of ints, found {right.type}",
            right.span,
            help="`topk`, `threshold` and `mass` give a selection",
        )
    if selects is None:
        require_value(right)
    elif left.term.form == "index" and left.term.attribute != selects:
        _require_position(str(left.term.attribute), selects, axes, left)
    return build.make("member", (left.term, right.term), Type(Base.BOOL, joined_indices((left, right), span)), span)


def _require_position(index: str, selects: str, axes: Mapping[str, Axis], left: Operand) -> None:
    """The index that is looked for must run over what the selection holds: its members, or positions in them."""
    over = axes[selects].over if selects in axes else selects
    fits = index == over or (over == "t" and index in ("i", "j")) or {index, over} == {"i", "j"}
    if not fits or selects == "h":
        help = None
        if selects in axes:
            position, number = f"`{axes[selects].over} in ..`", f"`{selects}.index in ..`"
            help = f"ask for a position, {position}, or for a member by its number, {number}"
        message = f"`{left.span.text}` is no member of a selection of `{selects}`"
        raise rejection("axis-mismatch", message, left.span, help=help)

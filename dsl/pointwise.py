"""Type rules of arithmetic, comparison and logic: operands broadcast by name, ints become reals beside reals."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from attnc.dsl.builder import UNKNOWN, Builder, is_negative, is_zero
from attnc.dsl.rejection import listed, rejection
from attnc.dsl.source import Span
from attnc.dsl.terms import Term
from attnc.dsl.types import Base, Type

ARITHMETIC = {"+": "add", "-": "sub", "*": "mul", "/": "div", "//": "floordiv", "%": "mod", "**": "pow"}
COMPARISONS = {"<": "lt", "<=": "le", ">": "lt", ">=": "le", "==": "eq", "!=": "ne"}
# Forms in which an operand that is zero so far leaves the other's type.
_KEEPS_OTHER = {"add", "sub", "minimum", "maximum", "select", "concat"}


@dataclass(frozen=True, eq=False)
class Operand:
    """A term, and the text that uses it (the term's own span is where it was made)."""

    term: Term
    span: Span

    @property
    def type(self) -> Type:
        return self.term.type


def require_value(operand: Operand) -> None:
    """Reject a selection, which is no number."""
    selects = operand.type.selects
    if selects is not None:
        raise rejection(
            "type-mismatch",
            f"a selection of `{selects}` is no number",
            operand.span,
            help=f"ask whether something is in it: `{_membership(selects)} in {operand.span.text}`",
        )


def _membership(selects: str) -> str:
    return selects if selects in ("h", "i", "j") else "i" if selects == "t" else "j"


def require_number(operand: Operand) -> None:
    """Reject selections and bools."""
    require_value(operand)
    if operand.type.base is Base.BOOL:
        raise rejection(
            "type-mismatch",
            "expected a number, found a condition (bool)",
            operand.span,
            help=f"write `if {operand.span.text} then 1 else 0`",
        )


def require_bool(operand: Operand, role: str) -> None:
    """Reject anything but a bool; `role` says what it was to be."""
    require_value(operand)
    if operand.type.base is not Base.BOOL and operand.type is not UNKNOWN:
        raise rejection(
            "not-a-condition",
            f"{role} must be a condition (bool), found {operand.type}",
            operand.span,
            help="compare it with something, such as `x > 0`",
        )


def require_int(operand: Operand, role: str) -> None:
    """Reject anything but an int without vector axes."""
    require_number(operand)
    if operand.type is not UNKNOWN and (operand.type.base is not Base.INT or operand.type.axes):
        raise rejection("type-mismatch", f"{role} must be an int, found {operand.type}", operand.span)


def joined_indices(operands: Sequence[Operand], span: Span) -> frozenset[str]:
    """Union of the operands' indices; positions `t` do not mix with `i` and `j`."""
    union: frozenset[str] = frozenset().union(*(operand.type.indices for operand in operands))
    if "t" not in union or not union & {"i", "j"}:
        return union
    unread = next(operand for operand in operands if "t" in operand.type.indices)
    other = next(operand for operand in operands if operand.type.indices & {"i", "j"})
    text = unread.span.text
    plain = re.fullmatch(r"\w+([\[(].*)?", text)
    first = re.search(r"\b[A-Za-z_]\w*\b(?!\s*\()", text)
    name = text if plain or first is None else first[0]
    raise rejection(
        "unread-position",
        f"`{text}` varies over the position t, and is used together with {listed(sorted(union & {'i', 'j'}))}",
        unread.span,
        (other.span, f"this is {other.type}"),
        help=f"say at which position {'it' if plain else 'each value in it'} is read: `{name}[i]` or `{name}[j]`",
    )


def joined_axes(operands: Sequence[Operand], span: Span) -> tuple[str, ...]:
    """The vector axes of a pointwise result: those of the widest operand; another has the leading ones, or none."""
    widest = max(operands, key=lambda operand: len(operand.type.axes))
    axes = widest.type.axes
    for operand in operands:
        own = operand.type.axes
        if own != axes[: len(own)]:
            raise rejection(
                "axis-mismatch",
                f"the vector axes differ: ({', '.join(own)}) and ({', '.join(axes)})",
                span,
                (operand.span, f"this is {operand.type}"),
                (widest.span, f"this is {widest.type}"),
                help=_remedy(own, axes),
            )
    return axes


def _remedy(own: tuple[str, ...], axes: tuple[str, ...]) -> str:
    if len(own) < len(axes) and set(own) <= set(axes):
        return "a vector goes with the first axis of a matrix: `transpose(transpose(S) * x)` is for the second one"
    return "`@` contracts a shared axis; `outer(x, y)` makes a matrix of two vectors"


def pointwise(build: Builder, form: str, operands: Sequence[Operand], base: Base, span: Span) -> Term:
    """A term of an elementwise form over operands that have been promoted; `base` is that of the result."""
    args = tuple(operand.term for operand in operands)
    sized = [operand for operand in operands if operand.type is not UNKNOWN]
    if len(sized) < len(operands) and (form not in _KEEPS_OTHER or not sized):
        return build.make(form, args, UNKNOWN, span)
    type = Type(base, joined_indices(sized, span), joined_axes(sized, span))
    return build.known(form, args, type, span) if len(sized) < len(operands) else build.make(form, args, type, span)


def promoted(build: Builder, operands: Sequence[Operand], *, real: bool = False) -> list[Operand]:
    """Numbers of one base: reals where one of them is real, or where `real` asks for it."""
    for operand in operands:
        require_number(operand)
    if not real and all(operand.type.base is Base.INT for operand in operands):
        return list(operands)
    if not real and all(operand.type.base is Base.INT or operand.type is UNKNOWN for operand in operands):
        return list(operands)  # a state that counts: zero so far, of whatever base is added to it
    return [Operand(build.to_real(operand.term, operand.span), operand.span) for operand in operands]


def arithmetic(build: Builder, operator: str, left: Operand, right: Operand, span: Span) -> Term:
    """`+ - * / // % **`."""
    if operator in ("/", "//", "%") and is_zero(right.term):
        raise rejection("division-by-zero", f"`{span.text}` divides by zero", right.span)
    if operator in ("//", "%") and is_negative(right.term):
        # Every rule that solves a condition relies on positive divisors; calls are held to it as well.
        raise rejection("not-positive", f"`{operator}` divides by a positive int, not by {right.span.text}", right.span)
    operands = promoted(build, (left, right), real=operator == "/")
    base = Base.REAL if any(operand.type.base is Base.REAL for operand in operands) else Base.INT
    if all(operand.type.base is Base.INT or operand.type is UNKNOWN for operand in operands):
        base = Base.INT
    if operator in ("//", "%") and base is Base.REAL:
        real = left if left.type.base is Base.REAL else right
        raise rejection(
            "type-mismatch",
            f"`{operator}` divides ints, found {real.type}",
            real.span,
            help="`floor(x / y)` is the same on reals" if operator == "//" else "write `x - floor(x / y) * y`",
        )
    exponent = right.term
    negative = exponent.form == "literal" and isinstance(exponent.attribute, int) and exponent.attribute < 0
    if operator == "**" and base is Base.INT and negative:
        raise rejection(
            "type-mismatch", "an int to a negative power is not an int", span, help="make one of the two a real: `2.0`"
        )
    return pointwise(build, ARITHMETIC[operator], operands, base, span)


def comparison(build: Builder, operator: str, left: Operand, right: Operand, span: Span) -> Term:
    """`< <= > >= == !=`; `x > y` is `y < x`."""
    if operator in ("==", "!=") and left.type.base is right.type.base is Base.BOOL:
        require_value(left)
        require_value(right)
        operands = [left, right]
    else:
        operands = promoted(build, (left, right))
    if operator in (">", ">="):
        operands.reverse()
    return pointwise(build, COMPARISONS[operator], operands, Base.BOOL, span)


def logic(build: Builder, operator: str, operands: Sequence[Operand], span: Span) -> Term:
    """`and`, `or`, `not`."""
    for operand in operands:
        require_bool(operand, f"an operand of `{operator}`")
    return pointwise(build, operator, operands, Base.BOOL, span)


def negated(build: Builder, operand: Operand, span: Span) -> Term:
    """`-x`; of a literal, the literal."""
    require_number(operand)
    value = operand.term.attribute
    if operand.term.form == "literal" and isinstance(value, (int, float)):
        return build.literal(-value, span)
    return pointwise(build, "neg", (operand,), operand.type.base, span)


def chosen(build: Builder, condition: Operand, accepted: Operand, otherwise: Operand, span: Span) -> Term:
    """`if condition then accepted else otherwise`."""
    require_bool(condition, "what `if` tests")
    require_value(accepted)
    require_value(otherwise)
    if accepted.type.base is otherwise.type.base is Base.BOOL:
        branches = [accepted, otherwise]
    elif Base.BOOL in (accepted.type.base, otherwise.type.base):
        raise rejection(
            "type-mismatch",
            "the two branches of `if` differ",
            span,
            (accepted.span, f"this is {accepted.type}"),
            (otherwise.span, f"this is {otherwise.type}"),
        )
    else:
        branches = promoted(build, (accepted, otherwise))
    base = next((branch.type.base for branch in branches if branch.type is not UNKNOWN), Base.REAL)
    return pointwise(build, "select", [condition, *branches], base, span)

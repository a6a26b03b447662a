"""`x[..]` and `s.start`: a value read at a position, at a member, or at an element of a vector."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attnc.dsl.diagnostics import did_you_mean
from attnc.dsl.pointwise import Operand, joined_indices, require_int
from attnc.dsl.rejection import RejectionError, listed, rejection
from attnc.dsl.source import Span
from attnc.dsl.syntax import Expression, Name, Read
from attnc.dsl.terms import Term
from attnc.dsl.types import BUILT_IN_INDICES, Base, Type

if TYPE_CHECKING:
    from attnc.dsl.expressions import Expressions

ATTRIBUTES = ("index", "start", "stop")
TRANSPOSED = ("T", "mT", "t")  # what those who know torch write


def attribute(at: Expressions, value: Expression, name: str, span: Span) -> Term:
    """`s.index`, `s.start`, `s.stop` of a declared axis."""
    axis = at.scope.axis(value.identifier) if isinstance(value, Name) else None
    if axis is None or axis not in at.context.axes:
        help = did_you_mean(value.span.text, at.context.axes)
        if name in TRANSPOSED:
            help = "`@` contracts the vector axis that both sides have, so that nothing is transposed: `q @ k`"
        raise rejection(
            "unknown-attribute", f"`{value.span.text}` is not a declared axis: it has no attributes", span, help=help
        )
    if name not in ATTRIBUTES:
        raise rejection(
            "unknown-attribute",
            f"an axis has no attribute `{name}`",
            span,
            help=did_you_mean(name, ATTRIBUTES) or "it has `.index`, `.start` and `.stop`",
        )
    return at.build.make(name, (), Type(Base.INT, frozenset({axis})), span, axis)


def read(at: Expressions, syntax: Read) -> Term:
    """`x[items]`, item by item: an index name, a shifted position, or an element of the first vector axis."""
    if isinstance(syntax.value, Name) and syntax.value.identifier == "identity" and at.scope.value("identity") is None:
        return _identity(at, syntax)
    operand = at.operand(syntax.value)
    for item in syntax.items:
        operand = Operand(_item(at, operand, item, syntax.span), syntax.span)
    return operand.term


def _identity(at: Expressions, syntax: Read) -> Term:
    """`identity[m]`: the identity matrix over an axis."""
    (item, *more) = syntax.items
    if more or not isinstance(item, Name):
        raise rejection("argument", "`identity[m]` takes the name of one axis", syntax.span)
    axis = at.scope.axis(item.identifier) or item.identifier
    return at.build.make("identity", (), Type(Base.REAL, frozenset(), (axis, axis)), syntax.span, axis)


def _index_name(at: Expressions, item: Expression) -> str | None:
    """The index that an item names, if it is a bare name of one."""
    if not isinstance(item, Name):
        return None
    if item.identifier in BUILT_IN_INDICES:
        return "t" if at.context.scanning and item.identifier in ("i", "j") else item.identifier
    axis = at.scope.axis(item.identifier)
    return axis if axis in at.context.axes else None


def _item(at: Expressions, operand: Operand, item: Expression, span: Span) -> Term:
    type = operand.type
    index = _index_name(at, item)
    if index is not None and index in type.indices:
        return operand.term
    if index in ("i", "j") and "t" in type.indices:
        return at.build.rename(operand.term, "t", index, span)
    if index is not None and index in at.context.axes:
        raise _no_read(operand, item)
    position = at.operand(item)
    require_int(position, "a position in brackets")
    if index is None and "t" in type.indices and position.type.indices & {"i", "j", "t"}:
        return _shifted(at, operand, position, "t", span)
    if type.axes:
        taken = Type(type.base, joined_indices((operand, position), span), type.axes[1:], type.selects)
        return at.build.make("take", (operand.term, position.term), taken, span, type.axes[0])
    if index is not None:
        raise _no_read(operand, item)
    own = sorted(type.indices & {"i", "j"} & position.type.indices)
    blocks = sorted(type.indices & set(at.context.axes))
    if len(own) == 1:
        return _shifted(at, operand, position, own[0], span)
    # Of several declared axes, the one over the positions that the expression gives: `score[i // block]`.
    if len(blocks) > 1:
        blocks = [name for name in blocks if at.context.axes[name].over in position.type.indices]
    if len(blocks) == 1:
        return _shifted(at, operand, position, blocks[0], span)
    raise _no_read(operand, item)


def _shifted(at: Expressions, operand: Operand, position: Operand, index: str, span: Span) -> Term:
    """A value read along `index` at an int position, which gives the result its indices."""
    type = operand.type
    rest = Operand(operand.term, operand.span)
    indices = (type.indices - {index}) | position.type.indices
    if "t" in indices and indices & {"i", "j"}:
        joined_indices((rest, position), span)
    shifted = Type(type.base, indices, type.axes, type.selects)
    return at.build.make("shift", (operand.term, position.term), shifted, span, index)


def _no_read(operand: Operand, item: Expression) -> RejectionError:
    has = listed(operand.type.ordered_indices(), none="no index")
    axes = listed(operand.type.axes, none="no vector axis")
    return rejection(
        "unknown-axis",
        f"`{operand.span.text}` cannot be read at `{item.span.text}`: it has {has} and {axes}",
        item.span,
        (operand.span, f"this is {operand.type}"),
    )

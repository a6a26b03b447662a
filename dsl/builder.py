"""Makes the terms of one pattern, and keeps them within the limits of the language."""

from __future__ import annotations

from attnc.dsl.rejection import rejection
from attnc.dsl.source import Span
from attnc.dsl.terms import FORMS, Attribute, Repeat, Scalar, Scan, Term
from attnc.dsl.types import Base, Type

MAX_TERMS = 20_000
MAX_DEPTH = 200

# The type of a state of a scan before anything is known about it: it is zero, of whatever shape is asked for.
UNKNOWN = Type(Base.REAL, frozenset(), ("?",))


class Builder:
    """Counts the terms it makes; every term of a pattern, also one that is inlined from elsewhere, is made here."""

    def __init__(self) -> None:
        self.count = 0
        self._depths: dict[Term, int] = {}
        self._renamed: dict[tuple[Term, str, str], Term] = {}

    def make(
        self,
        form: str,
        args: tuple[Term, ...],
        type: Type,
        span: Span,
        attribute: Attribute = None,
        block: Scan | Repeat | None = None,
    ) -> Term:
        """A term of a form whose rule has been applied; an operand of unknown type makes it unknown."""
        assert form in FORMS, form
        self.count += 1
        if self.count > MAX_TERMS:
            raise rejection(
                "too-large", f"the pattern has more than {MAX_TERMS} operations once its functions are inlined", span
            )
        inner = args + tuple(value for _, value in block.steps) if block else args
        depth = 1 + max((self._depths[arg] for arg in inner), default=0)
        if depth > MAX_DEPTH:
            raise rejection(
                "too-large", f"a chain of more than {MAX_DEPTH} operations, each of which needs the one before", span
            )
        if any(arg.type is UNKNOWN for arg in args) and type is not UNKNOWN:
            type = UNKNOWN
        term = Term(form, args, type, attribute, block, span=span)
        self._depths[term] = depth
        return term

    def known(self, form: str, args: tuple[Term, ...], type: Type, span: Span, attribute: Attribute = None) -> Term:
        """Like `make`, for a rule that knows the type although an operand is unknown (`0 + x` has the type of x)."""
        term = Term(form, args, type, attribute, span=span)
        self.count += 1
        self._depths[term] = 1 + max(self._depths[arg] for arg in args)
        return term

    def literal(self, value: Scalar, span: Span) -> Term:
        base = Base.BOOL if isinstance(value, bool) else Base.INT if isinstance(value, int) else Base.REAL
        return self.make("literal", (), Type(base), span, value)

    def size(self, axis: str, span: Span) -> Term:
        return self.make("size", (), Type(Base.INT), span, axis)

    def to_real(self, term: Term, span: Span) -> Term:
        """An int as a real; a real as it is."""
        if term.type.base is Base.REAL or term.type is UNKNOWN:
            return term
        if term.form == "literal":
            assert isinstance(term.attribute, int)
            return self.literal(float(term.attribute), term.span)
        return self.make("to_real", (term,), Type(Base.REAL, term.type.indices, term.type.axes), span)

    def rename(self, term: Term, old: str, new: str, span: Span) -> Term:
        """`term` with index `old` read at `new`; asking twice gives one term."""
        key = (term, old, new)
        if key not in self._renamed:
            of = term.type
            renamed = Type(of.base, of.indices - {old} | {new}, of.axes, of.selects)
            self._renamed[key] = self.make("rename", (term,), renamed, span, (old, new))
        return self._renamed[key]


def is_zero(term: Term) -> bool:
    """Whether a term is the literal 0."""
    return term.form == "literal" and not isinstance(term.attribute, (bool, str)) and term.attribute == 0


def is_negative(term: Term) -> bool:
    """Whether a term is a literal below 0."""
    return term.form == "literal" and isinstance(term.attribute, (int, float)) and term.attribute < 0

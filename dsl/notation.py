"""Terms in the notation of the language, with names resolved and functions inlined, for people to read."""

from __future__ import annotations

import re
from collections.abc import Callable

from attnc.dsl.terms import Attribute, Term
from attnc.dsl.types import BUILT_IN_INDICES

# A term's own name where it has one in the text around it, else None.
Name = Callable[[Term], str | None]

_INFIX = {"or": "or", "and": "and", "lt": "<", "le": "<=", "eq": "==", "ne": "!=", "member": "in"}
_INFIX |= {"add": "+", "sub": "-", "mul": "*", "dot": "@", "matmul": "@", "div": "/", "floordiv": "//", "mod": "%"}
_INFIX |= {"pow": "**"}
# How tightly a form binds; what is not listed is an atom or a call.
_STRENGTH = {"select": 0, "or": 1, "and": 2, "not": 3, **dict.fromkeys(("lt", "le", "eq", "ne", "member"), 4)}
_STRENGTH |= {
    **dict.fromkeys(("add", "sub"), 5),
    **dict.fromkeys(("mul", "dot", "matmul", "div", "floordiv", "mod"), 6),
}
_STRENGTH |= {"neg": 7, "pow": 8}
_ATOM = 9
_CALLED = {"minimum": "min", "maximum": "max"}
_OPTIONS = {"softmax": ("sink",), "normalize": ("eps", "floor")}
_COMPARED = ("lt", "le")


def notation(term: Term, name: Name = lambda term: None, where: str | None = None) -> str:
    """One line of text; `name` is asked about every term below `term`, and what it names is not written out.

    `where` stands for the conditions of reductions and selections, if given.
    """
    return _Writer(name, where).written(term)


class _Writer:
    def __init__(self, name: Name, where: str | None) -> None:
        self.name = name
        self.where = where

    def operand(self, term: Term, strength: int = 0) -> str:
        """A term inside another that binds with a strength."""
        named = self.name(term)
        if named is not None:
            return named
        text = self.written(term)
        return f"({text})" if _strength(term) < strength else text

    def arguments(self, terms: tuple[Term, ...]) -> str:
        return ", ".join(self.operand(term) for term in terms)

    def written(self, term: Term) -> str:
        form, args = term.form, term.args
        if form == "literal":
            return _literal(term.attribute)
        if form in ("parameter", "input", "state", "local"):
            return re.sub(r"\.(\d+)$", r"[\1]", str(term.attribute))
        if form == "index" and term.attribute in BUILT_IN_INDICES:
            return str(term.attribute)
        if form == "size":
            return {"i": "N", "j": "M"}.get(str(term.attribute), str(term.attribute).upper())
        if form in ("index", "start", "stop"):
            return f"{term.attribute}.{form}"
        if form == "to_real":
            return self.operand(args[0], _strength(term))
        if form == "and":
            return self._conjunction(term)
        if form in _INFIX:
            strength = _STRENGTH[form]
            right = strength if form in ("and", "or", "pow") else strength + 1
            left = strength + 1 if form in ("pow", "lt", "le", "eq", "ne", "member") else strength
            return f"{self.operand(args[0], left)} {_INFIX[form]} {self.operand(args[1], right)}"
        return self._prefix(term)

    def _prefix(self, term: Term) -> str:
        form, args = term.form, term.args
        match form:
            case "not":
                return f"not {self.operand(args[0], _STRENGTH['not'])}"
            case "neg":
                return f"-{self.operand(args[0], _STRENGTH['neg'])}"
            case "select":
                condition, accepted, otherwise = (self.operand(arg) for arg in args)
                return f"if {condition} then {accepted} else {otherwise}"
            case "rename":
                assert isinstance(term.attribute, tuple)
                return f"{self.operand(args[0], _ATOM)}[{term.attribute[1]}]"
            case "shift" | "take":
                return f"{self.operand(args[0], _ATOM)}[{self.operand(args[1])}]"
            case "identity":
                return f"identity[{term.attribute}]"
            case "scan" | "repeat":
                assert term.block is not None
                return term.block.result
        return self._call(term)

    def _call(self, term: Term) -> str:
        """`exp(x)`, `softmax[j](x where c)`: reductions and selections have their condition among the arguments."""
        form, args = term.form, term.args
        along = ""
        if isinstance(term.attribute, tuple):
            parts = [str(part) for part in term.attribute if part is not None]
            reduces = form not in ("matrix", "orthogonal_gaussian")
            along = f"[{(' in ' if reduces else ', ').join(parts)}]" if form != "orthogonal_gaussian" else ""
        elif form in ("topk", "threshold", "mass", "argmax", "concat"):
            along = f"[{term.attribute}]"
        place = condition_place(term)
        if place is None:
            return f"{_CALLED.get(form, form)}{along}({self.arguments(args)})"
        where = "" if is_true(args[place]) else f" where {self.where or self.operand(args[place])}"
        options = zip(_OPTIONS.get(form, ("force",)), args[place + 1 :], strict=False)
        given = [f", {option} = {self.operand(value)}" for option, value in options if not _is_absent(value)]
        return f"{form}{along}({self.arguments(args[:place])}{where}{''.join(given)})"

    def _conjunction(self, term: Term) -> str:
        """`a and b`; where one ends as the other starts, the chain that it was: `0 <= x < n`."""
        left, right = term.args
        if left.form in _COMPARED and right.form in _COMPARED and self.name(left) is self.name(right) is None:
            middle = self.operand(left.args[1], 5)
            if middle == self.operand(right.args[0], 5):
                first, last = self.operand(left.args[0], 5), self.operand(right.args[1], 5)
                return f"{first} {_INFIX[left.form]} {middle} {_INFIX[right.form]} {last}"
        return f"{self.operand(left, 2)} and {self.operand(right, 2)}"


def condition_place(term: Term) -> int | None:
    """Where among its arguments a reduction or selection has its condition."""
    if term.form in ("sum", "mean", "max", "min", "cumsum", "softmax", "normalize", "argmax"):
        return 1
    return 2 if term.form in ("topk", "threshold", "mass") else None


def is_true(term: Term) -> bool:
    """Whether a term is the condition that always holds."""
    return term.form == "literal" and term.attribute is True


def _literal(value: Attribute) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return str(int(value)) if isinstance(value, float) and value.is_integer() and abs(value) < 1e6 else repr(value)


def _is_absent(option: Term) -> bool:
    """Whether an option has the value that it has where the text leaves it out."""
    return option.form == "literal" and option.attribute in (False, 0.0)


def given_name(term: Term) -> str | None:
    """The name that a line of the text gives to just this term: `near` of `near = ..`."""
    text = term.span.source.text
    before = text[: term.span.start].rpartition("\n")[2]
    after = text[term.span.stop :].partition("\n")[0]
    assigned = re.fullmatch(r"\s*(\w+)\s*=\s*", before)
    return assigned[1] if assigned and re.fullmatch(r"\s*(#.*)?", after) else None


def _strength(term: Term) -> int:
    return _strength(term.args[0]) if term.form == "to_real" else _STRENGTH.get(term.form, _ATOM)

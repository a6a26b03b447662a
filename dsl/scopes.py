"""Names: what each one stands for, and where it was defined."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum

from attnc.dsl.source import Span
from attnc.dsl.syntax import Function, PatternDeclaration
from attnc.dsl.terms import Term
from attnc.dsl.types import BUILT_IN_INDICES

# Size names that are always there, with the index or axis that each one measures.
SIZES = {"B": "b", "H": "h", "N": "i", "M": "j", "T": "t", "D": "d", "E": "e"}
PREDEFINED = ("q", "k", "v", "scale")


class Bad(Enum):
    """Stands for the value of a statement that was rejected."""

    VALUE = "bad"


Value = Term | tuple[Term, ...] | Bad


@dataclass(frozen=True, eq=False)
class FunctionDefinition:
    """A function of the language and the scope that its body reads."""

    syntax: Function
    scope: Scope


@dataclass(frozen=True, eq=False)
class PatternDefinition:
    """A pattern that others may call; `sound` is false where its own check failed."""

    syntax: PatternDeclaration
    scope: Scope
    sound: bool


@dataclass(eq=False)
class Scope:
    """A region of names inside a wider one (`parent`): a file, a pattern, a function's body or a block.

    `axes` maps the name of an index or axis to the one it means; the two differ inside a pattern that
    another one calls, where `d` may be the caller's `x`.
    """

    parent: Scope | None = None
    values: dict[str, Value] = field(default_factory=dict)
    axes: dict[str, str] = field(default_factory=dict)
    functions: dict[str, FunctionDefinition] = field(default_factory=dict)
    patterns: dict[str, PatternDefinition] = field(default_factory=dict)
    places: dict[str, Span] = field(default_factory=dict)

    def chain(self) -> Iterator[Scope]:
        """This scope and the ones around it, innermost first."""
        scope: Scope | None = self
        while scope is not None:
            yield scope
            scope = scope.parent

    def value(self, name: str) -> Value | None:
        return next((scope.values[name] for scope in self.chain() if name in scope.values), None)

    def axis(self, name: str) -> str | None:
        return next((scope.axes[name] for scope in self.chain() if name in scope.axes), None)

    def callee(self, name: str) -> FunctionDefinition | PatternDefinition | None:
        """The function or pattern of a name; that of an inner scope comes first."""
        for scope in self.chain():
            found = scope.functions.get(name) or scope.patterns.get(name)
            if found is not None:
                return found
        return None

    def place(self, name: str) -> Span | None:
        """Where a name was defined, if a text defines it."""
        return next((scope.places[name] for scope in self.chain() if name in scope.places), None)

    def size(self, name: str) -> str | None:
        """The axis whose length an upper-case name is: `D`, or `R` for an axis `r`."""
        if name in SIZES:
            return self.axis(SIZES[name]) or SIZES[name]
        return self.axis(name.lower()) if name.isupper() else None

    def value_names(self) -> set[str]:
        """Every name that can stand for a value here."""
        names = {name for scope in self.chain() for name in scope.values}
        sizes = {name.upper() for scope in self.chain() for name in scope.axes if name.upper() != name}
        return names | sizes | set(SIZES) | set(BUILT_IN_INDICES)

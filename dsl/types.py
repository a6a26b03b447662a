"""Types of the language: a base type, the index variables a value varies over, and its vector axes."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

# The order in which indices are printed and in which arrays lay them out.
BUILT_IN_INDICES = ("b", "h", "i", "j", "t")


class Base(Enum):
    BOOL = "bool"
    INT = "int"
    REAL = "real"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class Type:
    """Type of a value.

    `indices` are the index variables that it varies over: `b h i j t` and the names of declared axes
    (`axis s = blocks(..)`). `axes` are its vector axes in order: `d` of a query, `e` of a value, and every
    other axis of an input (`r`, `m`, `x`, or a number such as `3`). `selects` names the declared axis (or
    `j`) whose members a selection holds; such a value is used by `in` only.
    """

    base: Base
    indices: frozenset[str] = frozenset()
    axes: tuple[str, ...] = ()
    selects: str | None = None

    def ordered_indices(self) -> tuple[str, ...]:
        """Index variables in layout order: the built-in ones first, then declared axes by name."""
        built_in = tuple(name for name in BUILT_IN_INDICES if name in self.indices)
        return built_in + tuple(sorted(self.indices.difference(BUILT_IN_INDICES)))

    def __str__(self) -> str:
        names = ", ".join(self.ordered_indices())
        vector = ", ".join(self.axes)
        head = f"set of {self.selects}" if self.selects else str(self.base)
        if not names and not vector:
            return head
        return f"{head}[{names}{'; ' if vector and names else ''}{vector}]"

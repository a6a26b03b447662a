"""Values of parameters as the operator takes them: ints and floats in the order of declaration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from attnc.dsl.types import Base
from attnc.runtime.program import Program


def pack(program: Program, parameters: dict[str, Any]) -> tuple[list[int], list[float]]:
    """Values of parameters (tuples whole) as the operator takes them."""
    ints: list[int] = []
    floats: list[float] = []
    for declared in program.parameters:
        value = parameters[declared.name]
        into: list[Any] = floats if declared.base is Base.REAL else ints
        if declared.base is Base.BOOL:
            value = 1 if value else 0  # a list that holds a symbolic int takes no bool
        into.extend(value if declared.is_tuple else (value,))
    return ints, floats


def unpack(program: Program, ints: Sequence[int], floats: Sequence[float]) -> dict[str, Any]:
    """Inverse of `pack`, with the elements of tuples as `segments.0` .."""
    values: dict[str, Any] = {}
    reals: list[Any] = list(reversed(floats))
    others: list[Any] = list(reversed(ints))
    for declared in program.parameters:
        pool = reals if declared.base is Base.REAL else others
        count = program.lengths.get(declared.name)
        names = [declared.name] if count is None else [f"{declared.name}.{at}" for at in range(count)]
        for name in names:
            value = pool.pop()
            values[name] = bool(value) if declared.base is Base.BOOL else value
    return values

"""Ints and reals that depend on parameters and sizes only, worked out in Python: axis sizes, input defaults."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from attnc.dsl.terms import Term

if TYPE_CHECKING:
    from attnc.compiler.ir import Node

Number = bool | int | float


class Expression(Protocol):
    """What terms and graph nodes have in common."""

    @property
    def args(self) -> tuple[Any, ...]: ...
    @property
    def attribute(self) -> Any: ...


SCALAR: dict[str, Callable[..., Any]] = {
    "to_real": float,
    "neg": operator.neg,
    "not": operator.not_,
    "abs": abs,
    "exp": math.exp,
    "log": math.log,
    "sqrt": math.sqrt,
    "sin": math.sin,
    "cos": math.cos,
    "tanh": math.tanh,
    "floor": math.floor,
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": operator.truediv,
    "floordiv": operator.floordiv,
    "mod": operator.mod,
    "pow": operator.pow,
    "minimum": min,
    "maximum": max,
    "lt": operator.lt,
    "le": operator.le,
    "eq": operator.eq,
    "ne": operator.ne,
    "and": lambda x, y: x and y,
    "or": lambda x, y: x or y,
    "select": lambda condition, accepted, otherwise: accepted if condition else otherwise,
}


def scalar(
    expression: Expression, kind: Callable[[Any], str], parameters: Mapping[str, Number], sizes: Mapping[str, int]
) -> Number | None:
    """Value of an expression of parameters and sizes; None where it depends on anything else or leaves 64 bits.

    `kind` gives the form of a term or the op of a node. Raises ZeroDivisionError as Python does.
    """
    done: dict[int, Number | None] = {}  # expressions share parts

    def value(expression: Expression) -> Number | None:
        if id(expression) not in done:
            done[id(expression)] = compute(expression)
        return done[id(expression)]

    def compute(expression: Expression) -> Number | None:
        form = kind(expression)
        if form == "literal":
            return expression.attribute  # type: ignore[no-any-return]
        if form == "parameter":
            return parameters.get(expression.attribute)
        if form == "size":
            return sizes.get(expression.attribute)
        if form not in SCALAR:
            return None
        operands = [value(arg) for arg in expression.args]
        if any(operand is None for operand in operands):
            return None
        if form == "pow" and isinstance(operands[1], int) and operands[1] > 64 and isinstance(operands[0], int):
            return operands[0] if operands[0] in (0, 1) else None
        result: Number = SCALAR[form](*operands)
        return None if isinstance(result, int) and abs(result) >= 2**63 else result

    return value(expression)


def of_term(term: Term, parameters: Mapping[str, Number], sizes: Mapping[str, int]) -> Number | None:
    """`scalar` of a term."""
    return scalar(term, lambda x: x.form, parameters, sizes)


def of_node(node: Node, parameters: Mapping[str, Number], sizes: Mapping[str, int]) -> Number | None:
    """`scalar` of a graph node."""
    return scalar(node, lambda x: x.op, parameters, sizes)

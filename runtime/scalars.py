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
    """Value of an expression of parameters and sizes; None where it depends on anything else.

    `kind` gives the form of a term or the op of a node. Raises ZeroDivisionError as Python does.
    """
    form = kind(expression)
    if form == "literal":
        return expression.attribute  # type: ignore[no-any-return]
    if form == "parameter":
        return parameters.get(expression.attribute)
    if form == "size":
        return sizes.get(expression.attribute)
    if form not in SCALAR:
        return None
    operands = [scalar(arg, kind, parameters, sizes) for arg in expression.args]
    if any(operand is None for operand in operands):
        return None
    return SCALAR[form](*operands)  # type: ignore[no-any-return]


def of_term(term: Term, parameters: Mapping[str, Number], sizes: Mapping[str, int]) -> Number | None:
    """`scalar` of a term."""
    return scalar(term, lambda x: x.form, parameters, sizes)


def of_node(node: Node, parameters: Mapping[str, Number], sizes: Mapping[str, int]) -> Number | None:
    """`scalar` of a graph node."""
    return scalar(node, lambda x: x.op, parameters, sizes)

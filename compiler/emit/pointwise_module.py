"""The generated Python module of kernels of rows, and the texts of ops that are its own."""

from __future__ import annotations

import ast

from attnc.compiler.emit.arithmetic import FLOORS, TANH
from attnc.compiler.ir import Node
from attnc.compiler.ops import OPS
from attnc.dsl.types import Base

PRELUDE = (
    """
import triton
import triton.language as tl


"""
    + FLOORS
    + """

"""
    + TANH
    + """

@triton.jit
def _least(x, y):
    return tl.minimum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _most(x, y):
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _pow(x, y):
    # Of a negative x where y is whole, as torch has it
    y = tl.zeros([], tl.float32) + y
    size = tl.exp2(tl.log2(tl.abs(x)) * y)
    whole = tl.floor(y) == y
    odd = tl.floor(y * 0.5) * 2.0 != y
    signed = tl.where(odd, -size, size)
    return tl.where(y == 0.0, 1.0, tl.where(x < 0.0, tl.where(whole, signed, float("nan")), size))


@triton.jit
def _load(pointers, row_ok, column_ok, other, EVEN: tl.constexpr):
    if EVEN:
        return tl.load(pointers, mask=row_ok, other=other)
    else:
        return tl.load(pointers, mask=row_ok & column_ok, other=other)


@triton.jit
def _store(pointers, value, row_ok, column_ok, EVEN: tl.constexpr):
    if EVEN:
        tl.store(pointers, value.to(pointers.dtype.element_ty), mask=row_ok)
    else:
        tl.store(pointers, value.to(pointers.dtype.element_ty), mask=row_ok & column_ok)


@triton.jit
def _sum(x, column_ok, EVEN: tl.constexpr):
    if EVEN:
        return tl.sum(x, 1)
    else:
        return tl.sum(tl.where(column_ok, x, 0.0), 1)


@triton.jit
def _max(x, column_ok, EVEN: tl.constexpr):
    if EVEN:
        return tl.max(x, 1)
    else:
        return tl.max(tl.where(column_ok, x, float("-inf")), 1)


@triton.jit
def _min(x, column_ok, EVEN: tl.constexpr):
    if EVEN:
        return tl.min(x, 1)
    else:
        return tl.min(tl.where(column_ok, x, float("inf")), 1)


@triton.jit
def _full(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return tl.zeros([ROWS, COLUMNS], tl.float32) + x


@triton.jit
def _each(x, ROWS: tl.constexpr):
    return tl.zeros([ROWS], tl.float32) + x
"""
)

# Texts of their own where the op table's would lose a NaN, which arrays must show. Ints have 64 bits, as torch's.
TEXTS = {
    "to_real": "({0} * 1.0)",
    "floor": "tl.floor({0}).to(tl.int64)",
    "relu": "tl.where({0} <= 0.0, 0.0, {0})",
    "elu": "tl.where({0} > 0.0, {0}, tl.exp({0}) - 1.0)",
    "minimum": "_least({0}, {1})",
    "maximum": "_most({0}, {1})",
}


def template(node: Node) -> str:
    """The text of a pointwise node over its operands' texts."""
    if node.op == "pow":
        return power(node)
    own = node.type.base is Base.REAL or node.op == "floor"
    found = (TEXTS.get(node.op) if own else None) or OPS[node.op].triton
    assert found is not None
    return found


def power(node: Node) -> str:
    """A power: by products where the exponent is a small whole number."""
    y = node.args[1]
    if y.op == "literal" and y.attribute == 0:
        return "({0} * 0.0 + 1.0)"
    if y.op == "literal" and y.attribute in (1, 2, 3, 4):
        return "(" + " * ".join(["{0}"] * int(y.attribute)) + ")"
    if node.type.base is not Base.REAL:
        raise TypeError("a power of ints has no text in a kernel of rows")
    return "_pow({0}, {1})"


def module(*kernels: str) -> str:
    """The module's text. It parses."""
    text = "\n\n".join([PRELUDE.lstrip(), *kernels])
    ast.parse(text)
    return text

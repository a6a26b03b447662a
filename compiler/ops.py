"""The op table: the one place that says what an op of the graph is.

`triton` is the text of a pointwise op over its operands' texts; the torch meaning is the dict of the same
keys in `runtime/evaluate.py` (a test compares them). Ops without a text are not pointwise: a stage lowers
them, or the compiler says that it can't yet.
"""

from __future__ import annotations

from dataclasses import dataclass

from attnc.dsl.terms import FORMS
from attnc.dsl.types import Base


@dataclass(frozen=True)
class OpInfo:
    """`base` is the result's base type; None: real if an operand is, else the last operand's."""

    pointwise: bool = False
    base: Base | None = None
    triton: str | None = None


def _pointwise(triton: str, base: Base | None = None) -> OpInfo:
    return OpInfo(pointwise=True, base=base, triton=triton)


POINTWISE: dict[str, OpInfo] = {
    "to_real": _pointwise("({0}).to(tl.float32)", Base.REAL),
    "neg": _pointwise("-{0}"),
    "not": _pointwise("({0} == 0)", Base.BOOL),
    "abs": _pointwise("tl.abs({0})"),
    "exp": _pointwise("tl.exp({0})", Base.REAL),
    "log": _pointwise("tl.log({0})", Base.REAL),
    "tanh": _pointwise("_tanh({0})", Base.REAL),
    "sigmoid": _pointwise("tl.sigmoid({0})", Base.REAL),
    "relu": _pointwise("tl.maximum({0}, 0.0)", Base.REAL),
    "elu": _pointwise("tl.where({0} > 0, {0}, tl.exp(tl.minimum({0}, 0.0)) - 1.0)", Base.REAL),
    "silu": _pointwise("({0} * tl.sigmoid({0}))", Base.REAL),
    "softplus": _pointwise("(tl.maximum({0}, 0.0) + tl.log(1.0 + tl.exp(-tl.abs({0}))))", Base.REAL),
    "sin": _pointwise("tl.sin({0})", Base.REAL),
    "cos": _pointwise("tl.cos({0})", Base.REAL),
    "sqrt": _pointwise("tl.sqrt({0})", Base.REAL),
    "floor": _pointwise("tl.floor({0}).to(tl.int32)", Base.INT),
    "add": _pointwise("({0} + {1})"),
    "sub": _pointwise("({0} - {1})"),
    "mul": _pointwise("({0} * {1})"),
    "div": _pointwise("({0} / {1})", Base.REAL),
    "floordiv": _pointwise("_floor_div({0}, {1})", Base.INT),
    "mod": _pointwise("_floor_mod({0}, {1})", Base.INT),
    "pow": _pointwise("_pow({0}, {1})"),
    "minimum": _pointwise("tl.minimum({0}, {1})"),
    "maximum": _pointwise("tl.maximum({0}, {1})"),
    "lt": _pointwise("({0} < {1})", Base.BOOL),
    "le": _pointwise("({0} <= {1})", Base.BOOL),
    "eq": _pointwise("({0} == {1})", Base.BOOL),
    "ne": _pointwise("({0} != {1})", Base.BOOL),
    "and": _pointwise("({0} & {1})", Base.BOOL),
    "or": _pointwise("({0} | {1})", Base.BOOL),
    "select": _pointwise("tl.where({0}, {1}, {2})"),
}

OPS: dict[str, OpInfo] = {
    **{form: OpInfo() for form in FORMS},
    **POINTWISE,
    # `derived`: a table that a prologue step makes, by name (see plan.Derived)
    "derived": OpInfo(),
    # `features`: vectors and scalars end to end; `kronecker`: all products of elements of two vectors, the first's
    # outermost; `symmetric`: the monomials of a vector of the degree `attribute`, times the square root of how many
    # orders each has
    "features": OpInfo(),
    "kronecker": OpInfo(),
    "symmetric": OpInfo(),
    # `part`: a vector of those that stand end to end in another; attribute: how many segments are before it
    "part": OpInfo(),
    # `unmatrix`: the first vector axis as the index named by attribute, the inverse of `matrix`
    "unmatrix": OpInfo(),
    # `fold`: the vectors of each block end to end: attribute (index, its axis of blocks, last first); 0 where none is
    "fold": OpInfo(),
}

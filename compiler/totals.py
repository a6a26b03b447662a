"""Live pairs in closed form: the sum over rows of how many keys each has, as a sympy expression.

A row's keys are an interval, or the members of a residue class within one. The ends are least and largest of affine
functions of i, so that the length is max(0, min(i + a, c, b - i)), and its sum over rows a sum over a clamped ramp.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from math import prod
from typing import Any

import sympy

from attnc.compiler.algebra import Algebra, Expr, FloorDiv, FloorMod
from attnc.compiler.describe import SIZES
from attnc.compiler.ir import Graph, Node
from attnc.compiler.plan import Domain, KeySet, Run, Stepped

ROWS = sympy.Symbol("N", integer=True, nonnegative=True)
BEFORE = sympy.Symbol("offset", integer=True, nonnegative=True)  # keys before the first row: M - N
KEYS = ROWS + BEFORE
ROW = sympy.Symbol("i", integer=True)
MOST_RUNS = 3  # intervals whose union is counted by inclusion and exclusion
ZERO, ONE = sympy.Integer(0), sympy.Integer(1)


def total_keys(domain: Domain) -> Expr | None:
    """Live pairs of a batch row and head for N <= M: an expression in N, offset = M - N and parameters.

    None where there is no such form: a mask decides inside of the bounds, a tensor steers them, or they are none of
    the kind above.
    """
    rows = domain.rows
    if rows.phase is not None or rows.listed is not None or rows.packed:
        return None
    total: Expr = ZERO
    for key_set in domain.key_sets:
        part = _of_key_set(key_set)
        if part is None:
            return None
        total += part
    return total


MEANING: dict[type, Callable[..., Any]] = {
    sympy.Add: lambda *x: sum(x),
    sympy.Mul: lambda *x: prod(x),
    sympy.Pow: pow,
    sympy.Min: min,
    sympy.Max: max,
    FloorDiv: lambda x, y: x // y,
    FloorMod: lambda x, y: x % y,
}


def value_of(expression: Expr, values: Mapping[str, int]) -> Fraction:
    """The number that an expression is for values by name, exactly."""
    if isinstance(expression, sympy.Symbol):
        return Fraction(values[expression.name])
    if isinstance(expression, sympy.Rational):
        return Fraction(expression.p, expression.q)
    return Fraction(MEANING[expression.func](*(value_of(arg, values) for arg in expression.args)))


@dataclass(frozen=True)
class Ends:
    """Keys from the largest of `lows` to below the least of `highs`."""

    lows: tuple[Expr, ...]
    highs: tuple[Expr, ...]


def _of_key_set(key_set: KeySet) -> Expr | None:
    walk = key_set.walk
    if not (walk is None or isinstance(walk, Stepped)) or len(key_set.runs) > MOST_RUNS:
        return None
    runs = [_ends(run) for run in key_set.runs]
    if None in runs:
        return None
    total = ZERO
    for chosen in range(1, 2 ** len(runs)):
        some = [run for at, run in enumerate(runs) if run is not None and chosen >> at & 1]
        met = Ends(sum((run.lows for run in some), ()), sum((run.highs for run in some), ()))
        counted = _of_interval(met) if walk is None else _of_class(met, _read(walk.phase), _read(walk.step))
        if counted is None:
            return None
        total += counted if len(some) % 2 else -counted
    return total


def _ends(run: Run) -> Ends | None:
    if run.inner is not run.outer:
        return None
    lows = [_read(node) for node in operands(run.outer.lo, "maximum")]
    highs = [_read(node) for node in operands(run.outer.hi, "minimum")]
    return None if None in (*lows, *highs) else Ends(tuple(lows), tuple(highs))


def operands(node: Node, op: str) -> list[Node]:
    """The operands of nested uses of an op."""
    if node.op != op:
        return [node]
    return [operand for arg in node.args for operand in operands(arg, op)]


def _read(node: Node) -> Expr | None:
    """A node over the symbols of this module; None where it is more than arithmetic of i, sizes and parameters."""
    algebra = Algebra(Graph())
    found = algebra.expression(node)
    values = {symbol: _symbol(algebra.node(symbol)) for symbol in found.free_symbols}
    return None if None in values.values() else sympy.expand(found.xreplace(values))


def _symbol(node: Node) -> Expr | None:
    if node.op == "index":
        return ROW if node.attribute == "i" else None
    if node.op == "parameter":
        return sympy.Symbol(str(node.attribute), integer=True)
    if node.op != "size":
        return None
    name = SIZES.get(str(node.attribute), str(node.attribute))
    return {"N": ROWS, "M": KEYS, "offset": BEFORE}.get(name)


def _of_interval(ends: Ends) -> Expr | None:
    """Lengths, summed over rows."""
    ramp = _ramp(high - low for high in ends.highs for low in ends.lows)
    return None if ramp is None else ramp.total()


def _of_class(ends: Ends, phase: Expr | None, step: Expr | None) -> Expr | None:
    """Members of a residue class, from the first that is not negative or up to the row itself, summed over rows."""
    if phase is None or step is None or step.has(ROW):
        return None
    if phase == ROW and ROW + 1 in ends.highs:  # (length + step - 1) // step
        ramp, more = _ramp(ROW + 1 - low for low in ends.lows), step - 1
        if {*ends.highs} - {ROW + 1, KEYS}:
            return None
    elif not phase.has(ROW) and {*ends.lows} == {ZERO}:
        ramp, more = _ramp(ends.highs), step - 1 - FloorMod(phase, step)
    else:
        return None
    return None if ramp is None or ramp.down is not None else ramp.total_divided(more, step)


@dataclass(frozen=True)
class Ramp:
    """max(0, min(i + up, flat, down - i)); `up` or `down` may be absent."""

    up: Expr | None
    flat: Expr
    down: Expr | None

    def total(self) -> Expr:
        """Over the rows. Where neither slope is cut off by the other, they take away from a plateau."""
        flat = self.flat
        if self.up is not None and self.down is not None:
            flat = sympy.Min(flat, FloorDiv(self.up + self.down, 2))
        flat = sympy.Max(flat, 0)
        total = ROWS * flat
        if self.up is not None:
            missing = flat - self.up  # at row 0; one less a row
            total -= _clamped(missing - BEFORE + 1, flat) - _clamped(missing - KEYS + 1, flat)
        if self.down is not None:
            missing = flat - self.down
            total -= _clamped(KEYS + missing, flat) - _clamped(BEFORE + missing, flat)
        return total

    def total_divided(self, more: Expr, step: Expr) -> Expr:
        """Of (this + more) // step for 0 <= more < step."""
        flat = sympy.Max(self.flat, 0)
        if self.up is None:
            return ROWS * FloorDiv(flat + more, step)
        total = ZERO
        for end, sign in ((KEYS + self.up, 1), (BEFORE + self.up, -1)):
            below = _quotients(sympy.Min(sympy.Max(end, 0), flat) + more, step)
            total += sign * (below + sympy.Max(end - flat, 0) * FloorDiv(flat + more, step))
        return total


def _ramp(lengths: Iterable[Expr]) -> Ramp | None:
    """The least of lengths; there are never more than M."""
    by_slope: dict[Expr, list[Expr]] = {-ONE: [], ZERO: [KEYS], ONE: []}
    for length in map(sympy.expand, lengths):
        slope = length.coeff(ROW)
        rest = sympy.expand(length - slope * ROW)
        if slope not in by_slope or rest.has(ROW):
            return None
        by_slope[slope].append(rest)
    up, flat, down = (sympy.Min(*by_slope[slope]) if by_slope[slope] else None for slope in (ONE, ZERO, -ONE))
    return Ramp(up, flat, down)


def _clamped(end: Expr, most: Expr) -> Expr:
    """The sum of min(max(k, 0), most) over k < end."""
    within = sympy.Min(sympy.Max(end, 0), most)
    return within * (within - 1) / 2 + most * sympy.Max(end - most, 0)


def _quotients(end: Expr, step: Expr) -> Expr:
    """The sum of k // step over 0 <= k < end."""
    whole = FloorDiv(end, step)
    return step * whole * (whole - 1) / 2 + whole * (end - step * whole)

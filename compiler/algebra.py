"""Integer algebra: graph nodes to sympy and back, and solving a comparison for one index.

Division and remainder round towards minus infinity. A divisor is taken to be positive: the runtime refuses a
call in which it is not (`plan.Requirement`), so every rule here may use it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import sympy

from attnc.compiler.ir import Graph, Node
from attnc.dsl.types import Base

Expr = Any  # a sympy expression; sympy's own annotations are too loose to check against

# How large the sympy form of a node may be once it is written out (sympy shares nothing, a product of sums has all
# products); a larger one stays opaque, so that its comparison is left to the mask.
LARGEST = 200


class FloorDiv(sympy.Function):
    """floor(a / b), kept as written."""

    nargs = 2
    is_integer = True


class FloorMod(sympy.Function):
    """a - b * floor(a / b), kept as written."""

    nargs = 2
    is_integer = True


ARITHMETIC: dict[str, Callable[..., Expr]] = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul": lambda x, y: x * y,
    "neg": lambda x: -x,
    "floordiv": FloorDiv,
    "mod": FloorMod,
}


@dataclass(frozen=True)
class Coordinate:
    """A view of a position p: p itself, its `high` digit p // period or its `low` digit p % period."""

    digit: str = "all"
    period: Node | None = None


@dataclass(frozen=True)
class Interval:
    """lo <= coordinate < hi; None is unbounded."""

    coordinate: Coordinate
    lo: Node | None
    hi: Node | None


@dataclass(frozen=True)
class Congruence:
    """coordinate == phase (mod step).

    `exact`: it says all that the comparison says. Not exact: a remainder was compared with a value that may
    lie outside of 0 .. step.
    """

    coordinate: Coordinate
    phase: Node
    step: Node
    exact: bool


Constraint = Interval | Congruence


@dataclass(frozen=True)
class Limit:
    """One side of an interval while it is solved: `value`, or none at all where `free`, or out of reach where `dead`.

    Both come from `min` and `max`: lo <= max(x, c) asks nothing of x where lo <= c; min(x, c) < hi likewise. `dead`
    goes before `free`.
    """

    value: Expr
    free: Node | None = None
    dead: Node | None = None

    def map(self, change: Callable[[Expr], Expr]) -> Limit:
        return Limit(sympy.expand(change(self.value)), self.free, self.dead)

    @property
    def plain(self) -> bool:
        return self.free is None and self.dead is None


Bound = Limit | None


class Algebra:
    """Translates between nodes and sympy. A node that is no integer arithmetic becomes an opaque symbol."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self._symbols: dict[Node, Expr] = {}
        self._nodes: dict[Expr, Node] = {}
        self._expressions: dict[Node, Expr] = {}
        self._terms: dict[Node, int] = {}

    def symbol(self, node: Node) -> Expr:
        if node not in self._symbols:
            made = sympy.Symbol(f"{node.op}_{node.attribute}_{len(self._symbols)}", integer=True)
            self._symbols[node] = made
            self._nodes[made] = node
        return self._symbols[node]

    def expression(self, node: Node) -> Expr:
        """The sympy form of an int node."""
        stack = [node]  # operands first, without recursion: a chain may be as long as the language allows
        while stack:
            top = stack[-1]
            missing = [arg for arg in top.args if arg not in self._expressions] if self._is_arithmetic(top) else []
            if top not in self._expressions and not missing:
                self._expressions[top] = self._translate(top)
            if missing:
                stack.extend(reversed(missing))
            else:
                stack.pop()
        return self._expressions[node]

    @staticmethod
    def _is_arithmetic(node: Node) -> bool:
        """Whether sympy sees into a node. A divisor that varies cannot be promised to be positive."""
        divides = node.op in ("floordiv", "mod")
        return node.op in ARITHMETIC and node.type.base is Base.INT and not (divides and node.args[1].type.indices)

    def _translate(self, node: Node) -> Expr:
        if node.op == "literal":
            return sympy.Integer(node.attribute)
        if not self._is_arithmetic(node):
            return self.symbol(node)
        sizes = [self._terms.get(arg, 1) for arg in node.args]
        size = max(sum(sizes), prod(sizes) if node.op == "mul" else 0) + (node.op in ("floordiv", "mod"))
        if size > LARGEST:
            return self.symbol(node)
        self._terms[node] = size
        return ARITHMETIC[node.op](*(self._expressions[arg] for arg in node.args))

    def node(self, expression: Expr) -> Node:
        """The node of a sympy form."""
        graph = self.graph
        if expression.is_Integer:
            return graph.literal(int(expression))
        if isinstance(expression, sympy.Symbol):
            return self._nodes[expression]
        if isinstance(expression, FloorDiv | FloorMod):
            op = "floordiv" if isinstance(expression, FloorDiv) else "mod"
            return graph.make(op, *(self.node(arg) for arg in expression.args))
        if isinstance(expression, sympy.Pow) and expression.exp.is_Integer and expression.exp > 0:
            return self._reduce("mul", [expression.base] * int(expression.exp))
        if isinstance(expression, sympy.Mul) and expression.as_coeff_Mul()[0] == -1:
            return graph.make("neg", self.node(-expression))
        if isinstance(expression, sympy.Mul):
            return self._reduce("mul", list(expression.args))
        if isinstance(expression, sympy.Add):
            return self._sum(expression)
        raise TypeError(f"no integer form of {expression}")

    def _reduce(self, op: str, operands: list[Expr]) -> Node:
        result = self.node(operands[0])
        for operand in operands[1:]:
            result = self.graph.make(op, result, self.node(operand))
        return result

    def _sum(self, expression: Expr) -> Node:
        """Positive terms first, then the others subtracted, numbers last."""
        terms = sorted(expression.args, key=lambda term: (term.could_extract_minus_sign(), term.is_Integer, str(term)))
        result: Node | None = None
        for term in terms:
            if result is None:
                result = self.node(term)
            elif term.could_extract_minus_sign():
                result = self.graph.make("sub", result, self.node(-term))
            else:
                result = self.graph.make("add", result, self.node(term))
        assert result is not None
        return result

    def difference(self, x: Node, y: Node) -> Expr:
        return sympy.expand(self.expression(x) - self.expression(y))

    def contains(self, expression: Expr, index: str) -> bool:
        """Whether any symbol of the expression varies over the index."""
        return any(index in self._nodes[symbol].type.indices for symbol in expression.free_symbols)


def solve(algebra: Algebra, comparison: Node, index: str) -> Constraint | None:
    """A comparison of ints, solved for `index`; None where the rules don't reach it.

    `i - j < w` gives the interval i - w + 1 <= j, `j // p == i // p` gives i // p * p <= j < i // p * p + p,
    `(i - j) % s == 0` the congruence j == i (mod s), `j % p >= c` an interval of the low digit.
    """
    if comparison.op not in ("lt", "le", "eq") or comparison.args[0].type.base is not Base.INT:
        return None
    difference = algebra.difference(*comparison.args)
    if difference.free_symbols and len(sympy.Add.make_args(difference)) > 64:
        return None
    zero, one = Limit(sympy.Integer(0)), Limit(sympy.Integer(1))
    lo, hi = {"lt": (None, zero), "le": (None, one), "eq": (zero, one)}[comparison.op]
    return _peel(algebra, difference, lo, hi, index)


def _shift(bound: Bound, by: Expr) -> Bound:
    return None if bound is None else bound.map(lambda value: value + by)


def _peel(algebra: Algebra, expression: Expr, lo: Bound, hi: Bound, index: str) -> Constraint | None:
    """lo <= expression < hi, unwrapped from the outside until the index stands alone."""
    target = algebra.symbol(algebra.graph.index(index))
    if expression == target:
        return _interval(algebra, Coordinate(), lo, hi)
    if isinstance(expression, sympy.Symbol):
        return _peel_call(algebra, algebra.node(expression), lo, hi, index)
    if isinstance(expression, sympy.Add):
        inner, rest = _split(algebra, expression, index)
        return None if inner is None else _peel(algebra, inner, _shift(lo, -rest), _shift(hi, -rest), index)
    if isinstance(expression, sympy.Mul):
        return _peel_product(algebra, expression, lo, hi, index)
    if isinstance(expression, FloorDiv) and not algebra.contains(expression.args[1], index):
        inner, period = expression.args
        return _peel(algebra, inner, _times(lo, period), _times(hi, period), index)
    if isinstance(expression, FloorMod) and not algebra.contains(expression.args[1], index):
        inner, period = expression.args
        if lo is not None and hi is not None and lo.plain and hi.plain and sympy.expand(hi.value - lo.value) == 1:
            return _congruence(algebra, inner, lo.value, period, index)
        if inner == target:
            return _interval(algebra, Coordinate("low", algebra.node(period)), lo, hi)
    return None


def _peel_call(algebra: Algebra, node: Node, lo: Bound, hi: Bound, index: str) -> Constraint | None:
    """lo <= min(x, c) < hi  <=>  lo <= x and lo <= c, and x < hi or c < hi; max the other way round; |x| < hi."""
    if node.op == "abs" and lo is None and hi is not None:
        return _peel(algebra, algebra.expression(node.args[0]), hi.map(lambda value: 1 - value), hi, index)
    if node.op not in ("minimum", "maximum"):
        return None
    x, constant = node.args if node.args[0].depends_on(index) else node.args[::-1]
    if constant.depends_on(index):
        return None
    below = None if hi is None else algebra.graph.make("lt", constant, algebra.node(hi.value))
    above = None if lo is None else algebra.graph.make("le", algebra.node(lo.value), constant)
    if node.op == "minimum":
        lo, hi = _required(algebra, lo, above), _spared(algebra, hi, below)
    else:
        lo, hi = _spared(algebra, lo, above), _required(algebra, hi, below)
    return _peel(algebra, algebra.expression(x), lo, hi, index)


def _spared(algebra: Algebra, bound: Bound, holds: Node | None) -> Bound:
    """The bound where `holds` does not satisfy it already."""
    if bound is None or holds is None:
        return None
    return Limit(bound.value, algebra.graph.any_of([*([bound.free] if bound.free else []), holds]), bound.dead)


def _required(algebra: Algebra, bound: Bound, holds: Node | None) -> Bound:
    """The bound, out of reach where `holds` fails."""
    if bound is None or holds is None:
        return None
    graph = algebra.graph
    fails = graph.make("not", graph.any_of([*([bound.free] if bound.free else []), holds]))
    return Limit(bound.value, bound.free, graph.any_of([*([bound.dead] if bound.dead else []), fails]))


def _split(algebra: Algebra, expression: Expr, index: str) -> tuple[Expr | None, Expr]:
    """The one term with the index, and the sum of the others; (None, ..) where several have it."""
    terms = sympy.Add.make_args(expression)
    inside = [term for term in terms if algebra.contains(term, index)]
    if len(inside) != 1:
        return None, expression
    return inside[0], sympy.Add(*(term for term in terms if term is not inside[0]))


def _peel_product(algebra: Algebra, expression: Expr, lo: Bound, hi: Bound, index: str) -> Constraint | None:
    """c * x with c an integer: divide, turning the interval around where c is negative."""
    factor, inner = expression.as_coeff_Mul()
    if not factor.is_Integer or factor == 1:
        return None
    if factor < 0:  # lo <= -x < hi  is  1 - hi <= x < 1 - lo
        flipped = sympy.expand(-factor * inner)
        return _peel(algebra, flipped, _complement(hi), _complement(lo), index)
    return _peel(algebra, inner, _ceiling(lo, factor), _ceiling(hi, factor), index)


def _times(bound: Bound, factor: Expr) -> Bound:
    return None if bound is None else bound.map(lambda value: value * factor)


def _ceiling(bound: Bound, divisor: Expr) -> Bound:
    return None if bound is None else bound.map(lambda value: -FloorDiv(sympy.expand(-value), divisor))


def _complement(bound: Bound) -> Bound:
    return None if bound is None else bound.map(lambda value: 1 - value)


def _interval(algebra: Algebra, coordinate: Coordinate, lo: Bound, hi: Bound) -> Interval:
    graph = algebra.graph
    first, last = graph.literal(0), coordinate.period or graph.make("add", graph.size("i"), graph.size("j"))
    return Interval(coordinate, _settle(algebra, lo, first, last), _settle(algebra, hi, last, first))


def _settle(algebra: Algebra, bound: Bound, none: Node, out_of_reach: Node) -> Node | None:
    """The bound as a node: `none` where it is free, `out_of_reach` where it is dead."""
    if bound is None:
        return None
    node = algebra.node(bound.value)
    if bound.free is not None:
        node = algebra.graph.make("select", bound.free, none, node)
    return node if bound.dead is None else algebra.graph.make("select", bound.dead, out_of_reach, node)


def _congruence(algebra: Algebra, expression: Expr, phase: Expr, step: Expr, index: str) -> Congruence | None:
    """expression == phase (mod step), unwrapped until a coordinate of the index stands alone."""
    exact = phase == 0 or phase == step - 1 or (isinstance(phase, FloorMod) and phase.args[1] == step)
    inner, rest = _split(algebra, expression, index)
    if inner is None:
        return None
    phase = sympy.expand(phase - rest)
    if inner.as_coeff_Mul()[0] == -1:
        inner, phase = -inner, sympy.expand(-phase)
    coordinate = _coordinate(algebra, inner, index)
    if coordinate is None:
        return None
    return Congruence(coordinate, algebra.node(_drop_modulus(phase, step)), algebra.node(step), exact)


def _coordinate(algebra: Algebra, expression: Expr, index: str) -> Coordinate | None:
    """The index itself or a digit of it."""
    target = algebra.symbol(algebra.graph.index(index))
    if expression == target:
        return Coordinate()
    if not isinstance(expression, FloorDiv | FloorMod) or expression.args[0] != target:
        return None
    if algebra.contains(expression.args[1], index):
        return None
    return Coordinate("high" if isinstance(expression, FloorDiv) else "low", algebra.node(expression.args[1]))


def _drop_modulus(phase: Expr, step: Expr) -> Expr:
    """x % s == y (mod s) where x == y (mod s)."""
    return phase.args[0] if isinstance(phase, FloorMod) and phase.args[1] == step else phase


def at_most(algebra: Algebra, x: Node, y: Node) -> bool:
    """Whether x <= y is certain. Uses a - p < a // p * p <= a."""
    difference = algebra.difference(x, y)
    for _ in range(4):
        if difference.is_Integer:
            return bool(difference <= 0)
        replaced = sympy.expand(sum(largest(term) for term in sympy.Add.make_args(difference)))
        if replaced == difference:
            return False
        difference = replaced
    return False


def largest(term: Expr) -> Expr:
    """An upper bound of c * p * (a // p): the term itself where it is not of that form."""
    for factor in sympy.Mul.make_args(term):
        if isinstance(factor, FloorDiv):
            inner, period = factor.args
            coefficient = term / factor / period
            if coefficient.is_Integer:
                return coefficient * (inner if coefficient > 0 else inner - period + 1)
    return term

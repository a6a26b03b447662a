"""What a plan costs, as formulas: the keys that one row visits, from the closed forms of its key sets."""

from __future__ import annotations

import sympy

from attnc.compiler.algebra import Algebra
from attnc.compiler.describe import formula
from attnc.compiler.ir import Graph, Node
from attnc.compiler.plan import Bounds, Diagonals, Domain, Grid, KeySet, Listed, Stepped


def row_keys(domain: Domain) -> list[str]:
    """One line a key set: how many keys row i has, for N <= M. A negative number means none.

    Several runs of a set overlap or not; they are visited once, so their sum is an upper bound.
    """
    algebra = Algebra(Graph())
    return [_key_set(algebra, key_set) for key_set in domain.key_sets]


def _key_set(algebra: Algebra, key_set: KeySet) -> str:
    walk = key_set.walk
    counts = [_count(algebra, run.outer) for run in key_set.runs]
    written = " + ".join(counts) if counts else "0"
    at_most = "at most " if len(counts) > 1 or any(run.inner is not run.outer for run in key_set.runs) else ""
    if isinstance(walk, Stepped):
        return f"{at_most}ceil({written} / {formula(walk.step)})"
    if isinstance(walk, Grid):
        lines = f"ceil(({written}) / {formula(_product(algebra, walk.period, walk.high_step))})"
        columns = _count(algebra, walk.low)
        columns = f"ceil(({columns}) / {formula(walk.low_step)})" if walk.low_step else columns
        return f"at most {lines} lines of {columns}"
    if isinstance(walk, Listed):
        return f"at most {formula(walk.width)} for each entry of {walk.table}, no more than {written}"
    if isinstance(walk, Diagonals):
        return f"at most one for each entry of {walk.table}"
    return f"{at_most}{written}"


def _product(algebra: Algebra, x: Node, y: Node | None) -> Node:
    return x if y is None else algebra.node(algebra.expression(x) * algebra.expression(y))


def _count(algebra: Algebra, bounds: Bounds) -> str:
    """hi - lo. min(a, b) - max(c, d) is the least of a - c, a - d, b - c, b - d, without those never the least."""
    differences = {
        sympy.expand(algebra.expression(hi) - algebra.expression(lo)): None
        for hi in _operands(bounds.hi, "minimum")
        for lo in _operands(bounds.lo, "maximum")
    }
    least = [x for x in differences if not any(y != x and _never_below(algebra, x, y) for y in differences)]
    written = [formula(algebra.node(x)) for x in least or differences]
    return written[0] if len(written) == 1 else f"min({', '.join(written)})"


def _operands(node: Node, op: str) -> list[Node]:
    if node.op != op:
        return [node]
    return [operand for arg in node.args for operand in _operands(arg, op)]


def _never_below(algebra: Algebra, x: sympy.Expr, y: sympy.Expr) -> bool:
    """Whether x >= y for 0 <= i < M and parameters that are not negative."""
    row = sympy.Symbol("row", integer=True, nonnegative=True)
    beyond = sympy.Symbol("beyond", integer=True, nonnegative=True)
    values = {}
    for symbol in (x - y).free_symbols:
        node = algebra.node(symbol)
        if node.op == "index" and node.attribute == "i":
            values[symbol] = row
        elif node.op == "size" and node.attribute in ("j", "t"):
            values[symbol] = row + 1 + beyond
        elif node.op in ("parameter", "size"):
            values[symbol] = sympy.Symbol(f"p{len(values)}", integer=True, nonnegative=True)
    return bool(sympy.expand((x - y).subs(values, simultaneous=True)).is_nonnegative)

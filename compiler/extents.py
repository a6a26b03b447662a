"""Conditions that a carried sum can meet: which keys a row sees, as one prefix of the keys.

A row i sees all keys, those of j <= i - amount, or those of earlier periods, j < i // amount * amount; in each case
maybe only where an array agrees at i and j (packed documents). What depends on the row alone or the key alone is no
extent but a factor of the weight, 0 or 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import sympy

from attnc.compiler.algebra import Algebra, Coordinate, FloorDiv, Interval, at_most, solve
from attnc.compiler.conditions import disjunction
from attnc.compiler.ir import Graph, Node
from attnc.compiler.separate import Inseparable, at_row, is_mixed
from attnc.dsl.types import Base


@dataclass(frozen=True)
class Reach:
    """Which keys a row sees: kind and amount as in `composition.Extent`; `same` (b, t) as a node over t.

    `masks`: conditions of the row alone or the key alone that must hold too.
    """

    kind: str
    amount: Node | None
    same: Node | None
    masks: tuple[Node, ...]


class Reaches:
    """Reads conditions of one graph."""

    def __init__(self, graph: Graph, algebra: Algebra) -> None:
        self.graph = graph
        self.algebra = algebra

    def read(self, condition: Node) -> Reach:
        """The extent of a condition. Raises Inseparable for what no state can carry."""
        conjunctions = disjunction(self.graph, condition)
        if len(conjunctions) != 1:
            raise Inseparable("its keys are a union of several sets", condition)
        masks, limits = [], dict[Node, Node]()
        same: Node | None = None
        for atom in conjunctions[0]:
            if not is_mixed(atom):
                masks.append(atom)
            elif (agreed := self.agreement(atom)) is not None:
                if same not in (None, agreed):
                    raise Inseparable("two arrays must agree at once", atom)
                same = agreed
            else:
                limits[self.limit(atom)] = atom
        kind, amount = self.extent(list(limits), condition)
        if same is not None and (kind == "all" or looks_ahead(amount)):
            raise Inseparable("packed rows that see keys behind them; let the condition hold j <= i", condition)
        return Reach(kind, amount, same, tuple(masks))

    def agreement(self, atom: Node) -> Node | None:
        """x of `x[i] == x[j]`, an int of tokens."""
        if atom.op != "eq" or atom.args[0].type.base is not Base.INT:
            return None
        for row, key in (atom.args, atom.args[::-1]):
            if key.op == "rename" and key.attribute == ("t", "j") and at_row(self.graph, key) is row:
                (found,) = key.args
                return found if found.type.indices <= {"b", "t"} and not found.type.axes else None
        return None

    def limit(self, atom: Node) -> Node:
        """hi of an atom that says j < hi."""
        solved = solve(self.algebra, atom, "j")
        if not isinstance(solved, Interval) or solved.coordinate != Coordinate() or solved.lo or not solved.hi:
            raise Inseparable("it is no upper bound of the keys: a state only ever takes keys in", atom)
        return solved.hi

    def extent(self, limits: Sequence[Node], condition: Node) -> tuple[str, Node | None]:
        """Kind and amount of the smallest limit."""
        if not limits:
            return "all", None
        smallest = next(
            (one for one in limits if all(other is one or at_most(self.algebra, one, other) for other in limits)), None
        )
        if smallest is None:
            raise Inseparable("which of its upper bounds of the keys is the smallest depends on the call", condition)
        i = self.algebra.symbol(self.graph.index("i"))
        bound = self.algebra.expression(smallest)
        lag = sympy.expand(i + 1 - bound)
        for kind, amount in (("lag", lag), ("period", _period(bound, i))):
            if amount is not None and not any(self.algebra.contains(amount, name) for name in "bhij"):
                return kind, self.algebra.node(amount)
        raise Inseparable("the keys that a row sees do not grow with it in equal steps", condition)


def looks_ahead(amount: Node | None) -> bool:
    """Whether a lag lets rows see keys behind them."""
    return amount is not None and amount.op in ("literal", "neg") and not is_literal_at_least_0(amount)


def is_literal_at_least_0(node: Node) -> bool:
    """Whether a node is a number that is not negative."""
    return node.op == "literal" and node.attribute is not None and float(node.attribute) >= 0  # type: ignore[arg-type]


def _period(bound: sympy.Expr, i: sympy.Expr) -> sympy.Expr | None:
    """p of i // p * p."""
    for factor in sympy.Mul.make_args(bound):
        if isinstance(factor, FloorDiv) and factor.args[0] == i and bound == factor * factor.args[1]:
            return factor.args[1]
    return None

"""Conditions that a carried sum can meet: which keys a row sees, as one prefix of the keys.

A row i sees all keys, those of j <= i - amount, or those of earlier periods, j < i // amount * amount; in each case
maybe only where an array agrees at i and j (packed documents). What depends on the row alone or the key alone is no
extent but a factor of the weight, 0 or 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import sympy

from attnc.compiler.algebra import Algebra, Coordinate, Expr, FloorDiv, Interval, at_most, solve
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
        conjunctions = [one for one in disjunction(self.graph, condition) if not self.contradicts(one)]
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

    def contradicts(self, atoms: Sequence[Node]) -> bool:
        """Whether no key meets all of the atoms, for certain: a bound from above lies at or below one from below."""
        solved = [solve(self.algebra, atom, "j") for atom in atoms if atom.depends_on("j")]
        bounds = [one for one in solved if isinstance(one, Interval) and one.coordinate == Coordinate()]
        lows, highs = [one.lo for one in bounds if one.lo], [one.hi for one in bounds if one.hi]
        return any(at_most(self.algebra, high, low) for low in lows for high in highs)

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
        smallest = [one for one in limits if all(other is one or at_most(self.algebra, one, other) for other in limits)]
        found = [self.amount(one) for one in smallest[:1] or limits]
        if len(found) == 1 and found[0] is not None:
            kind, amount = found[0]
            return kind, self.algebra.node(amount)
        lags = [one[1] for one in found if one is not None and one[0] == "lag"]
        if len(lags) == len(limits) > 1:
            furthest = self.algebra.node(lags[0])
            for lag in lags[1:]:
                furthest = self.graph.make("maximum", furthest, self.algebra.node(lag))
            return "lag", furthest
        raise Inseparable("the keys that a row sees do not grow with it in equal steps", condition)

    def amount(self, limit: Node) -> tuple[str, Expr] | None:
        """Kind and amount of one limit."""
        i = self.algebra.symbol(self.graph.index("i"))
        bound = self.algebra.expression(limit)
        for kind, amount in (("lag", sympy.expand(i + 1 - bound)), ("period", _period(bound, i))):
            if amount is not None and not any(self.algebra.contains(amount, name) for name in "bhij"):
                return kind, amount
        return None


def looks_ahead(amount: Node | None) -> bool:
    """Whether a lag lets rows see keys behind them."""
    return amount is not None and amount.op in ("literal", "neg") and not is_literal_at_least_0(amount)


def is_literal_at_least_0(node: Node) -> bool:
    """Whether a node is a number that is not negative."""
    return node.op == "literal" and node.attribute is not None and float(node.attribute) >= 0  # type: ignore[arg-type]


def _period(bound: Expr, i: Expr) -> Expr:
    """p of i // p * p, else None."""
    for factor in sympy.Mul.make_args(bound):
        if isinstance(factor, FloorDiv) and factor.args[0] == i and bound == factor * factor.args[1]:
            return factor.args[1]
    return None

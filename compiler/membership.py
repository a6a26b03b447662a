"""Conditions that a table answers: equal tables, lists of keys, lists of distances, fixed random blocks.

Each becomes a derived table (a prologue makes it once a call, linear in the sequence) and a walk or bounds
that read it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import sympy

from attnc.compiler.algebra import Algebra
from attnc.compiler.build import unlowered
from attnc.compiler.ir import Graph, Node, substitute, walk
from attnc.compiler.plan import Blocks, Bounds, Derived, Diagonals, Listed
from attnc.dsl.types import Base, Type

SHARED = frozenset({"b", "h"})


@dataclass(frozen=True)
class Roles:
    """Which index numbers the rows, which the keys that stream by, and the keys' positions: first <= key < end."""

    row: str
    key: str
    first: Node
    end: Node

    @staticmethod
    def forward(graph: Graph) -> Roles:
        """Queries see keys 0 .. M."""
        return Roles("i", "j", graph.literal(0), graph.size("j"))

    @staticmethod
    def transposed(graph: Graph) -> Roles:
        """Keys are seen by queries offset .. offset + N, offset = max(M - N, 0)."""
        queries, keys = graph.size("i"), graph.size("j")
        offset = graph.make("maximum", graph.make("sub", keys, queries), graph.literal(0))
        return Roles("j", "i", offset, graph.make("maximum", keys, queries))


@dataclass(frozen=True, eq=False)
class Member:
    """A membership of keys: how to visit the members. `row_block`: the list is one per block of that many rows."""

    walk: Listed | Diagonals
    row_block: Node | None = None


class Tables:
    """The derived tables of a pattern, each made once. `made`: those that there are already."""

    def __init__(
        self, graph: Graph, algebra: Algebra, axes: Mapping[str, Blocks], made: Sequence[Derived] = ()
    ) -> None:
        self.graph = graph
        self.algebra = algebra
        self.axes = axes
        self.derived = list(made)
        self._made: dict[tuple[object, ...], Derived] = {(one.kind, one.args, one.attribute): one for one in made}
        self._members: dict[tuple[Node, str], Member | None] = {}

    def table(self, kind: str, args: tuple[Node, ...], parts: tuple[str, ...], attribute: str | None = None) -> Derived:
        key = (kind, args, attribute)
        if key not in self._made:
            derived = Derived(f"{kind}{len(self.derived)}", kind, args, parts, attribute)
            self._made[key] = derived
            self.derived.append(derived)
        return self._made[key]

    def part(self, derived: Derived, part: str, indices: frozenset[str], axes: tuple[str, ...] = ()) -> Node:
        return self.graph.make("derived", type=Type(Base.INT, indices, axes), attribute=f"{derived.name}.{part}")

    def equal_bounds(self, atom: Node, roles: Roles) -> tuple[Bounds, Bounds] | None:
        """The bounds (outer, inner) of `x(row) == y(key)` for two int tables; None for another form."""
        if atom.op != "eq" or any(arg.type.base is not Base.INT for arg in atom.args):
            return None
        for x, y in (atom.args, atom.args[::-1]):
            if x.depends_on(roles.key) or y.depends_on(roles.row):
                continue
            parts = ("lo", "hi", "inner_lo", "inner_hi")
            derived = self.table("equal_bounds", (x, y), parts, roles.key)
            indices = (x.type.indices | y.type.indices) - {roles.key}
            lo, hi, inner_lo, inner_hi = (self.part(derived, part, indices) for part in derived.parts)
            return Bounds(lo, hi), Bounds(inner_lo, inner_hi)
        return None

    def member(self, atom: Node, key: str) -> Member | None:
        """How to visit the keys of `key in collection` or `i - j in collection`; None for another form."""
        if atom.op != "member":
            return None
        if (atom, key) not in self._members:
            self._members[atom, key] = self._member(atom.args[0], atom.args[1], key)
        return self._members[atom, key]

    def _member(self, element: Node, collection: Node, key: str) -> Member | None:
        if collection.type.selects is not None:
            return self._fixed_blocks(element, collection, key)
        if len(collection.type.axes) != 1 or not collection.type.indices <= SHARED:
            return None
        i, j = (self.algebra.symbol(self.graph.index(name)) for name in "ij")
        expression = sympy.expand(self.algebra.expression(element))
        offset = sympy.expand((i if key == "i" else j) - expression)
        slant = sympy.expand(expression + j - i)
        listing = self.table("listing", (collection,), ("list", "rank"))
        names = (f"{listing.name}.list", f"{listing.name}.rank")
        one = self.graph.literal(1)
        if not self.algebra.contains(offset, "j") and not self.algebra.contains(offset, "i"):
            return Member(Listed(*names, one, None, self.algebra.node(offset)))
        if not self.algebra.contains(slant, "j") and not self.algebra.contains(slant, "i"):
            return Member(Diagonals(*names, self.algebra.node(slant)))
        return None

    def _fixed_blocks(self, element: Node, selection: Node, key: str) -> Member | None:
        """A selection of key blocks that no tensor steers: a list per block of rows, made by a prologue."""
        axis = self.axes.get(selection.type.selects or "")
        if selection.op != "topk" or axis is None or axis.over != "j" or axis.stride is not None:
            return None
        if element is not self.graph.index("j") or any(node.op == "input" for node in walk(selection)):
            return None
        for node in walk(selection):
            by_block = node.op == "floordiv" and node.args[1] is axis.size
            if any(arg is self.graph.index("i") for arg in node.args) and not by_block:
                return None
        args, zero = (*selection.args, axis.size), self.graph.literal(0)
        if key == "j":
            derived = self.table("block_list", args, ("list",), selection.type.selects)
            return Member(Listed(f"{derived.name}.list", None, axis.size, axis.size, zero), row_block=axis.size)
        derived = self.table("block_rows", args, ("starts", "rows"), selection.type.selects)
        rows, starts = (f"{derived.name}.{part}" for part in ("rows", "starts"))
        return Member(Listed(rows, None, axis.size, axis.size, zero, starts), row_block=axis.size)

    def readable(self, mask: Node) -> Node:
        """The mask with every membership turned into two reads of a rank table."""
        replacements: dict[Node, Node] = {}
        for node in walk(mask):
            if node.op != "member":
                continue
            element, collection = node.args
            if collection.type.selects is not None:
                raise unlowered(node, "a selection that steers which pairs are live")
            replacements[node] = self._ranked(element, collection)
        return substitute(self.graph, mask, replacements) if replacements else mask

    def _ranked(self, element: Node, collection: Node) -> Node:
        """rank[x] < rank[x + 1], with x held inside 0 .. M: outside of it both are the same."""
        graph = self.graph
        listing = self.table("listing", (collection,), ("list", "rank"))
        rank = self.part(listing, "rank", collection.type.indices, ("position",))

        def at(position: Node) -> Node:
            held = graph.make("maximum", graph.make("minimum", position, graph.size("j")), graph.literal(0))
            type = Type(Base.INT, rank.type.indices | held.type.indices)
            return graph.make("take", rank, held, type=type, attribute="position")

        return graph.make("lt", at(element), at(graph.make("add", element, graph.literal(1))))

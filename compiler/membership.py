"""Conditions that a table answers: equal and ordered tables, lists of keys, lists of distances, fixed random blocks.

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
from attnc.compiler.ops import OPS
from attnc.compiler.plan import Blocks, Bounds, Derived, Diagonals, Listed
from attnc.compiler.reach import reach
from attnc.compiler.simplify import is_literal
from attnc.dsl.types import Base, Type

SHARED = frozenset({"b", "h"})
READABLE = frozenset({"literal", "parameter", "size", "index", "input", "take", "rename"})  # in a derived table
FARTHEST = 4  # a table of ranks is at most so many times as long as the sequence


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
        """Keys are seen by queries offset .. offset + N."""
        return Roles("j", "i", graph.size("offset"), graph.make("add", graph.size("offset"), graph.size("i")))


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

    def bounds_of(self, atom: Node, roles: Roles) -> tuple[Bounds, Bounds] | None:
        """The bounds (outer, inner) that a table of ints gives; None for another form."""
        return self.equal_bounds(atom, roles) or self.ordered_bounds(atom, roles)

    def equal_bounds(self, atom: Node, roles: Roles) -> tuple[Bounds, Bounds] | None:
        """The bounds (outer, inner) of `x(row) == y(key)` for two int tables; None for another form."""
        if atom.op != "eq" or any(arg.type.base is not Base.INT for arg in atom.args):
            return None
        for x, y in (atom.args, atom.args[::-1]):
            if x.depends_on(roles.key) or y.depends_on(roles.row):
                continue
            return self.bounds("equal_bounds", x, y, roles.key)
        return None

    def ordered_bounds(self, atom: Node, roles: Roles) -> tuple[Bounds, Bounds] | None:
        """The bounds (outer, inner) of `x(row) <= y(key)`, `<` and `>=`, for ints of tables; None for another form.

        Exact where y ascends or descends along the keys; else the hull of the keys where it holds.
        """
        if atom.op not in ("lt", "le") or any(arg.type.base is not Base.INT for arg in atom.args):
            return None
        difference = self.algebra.difference(*atom.args)
        terms = sympy.Add.make_args(difference)
        of_key = [term for term in terms if self.algebra.contains(term, roles.key)]
        if any(self.algebra.contains(term, roles.row) for term in of_key) or not of_key:
            return None
        y = self.algebra.node(sympy.Add(*of_key))
        rest = sympy.Add(*of_key) - difference - (1 if atom.op == "lt" else 0)
        x = self.algebra.node(sympy.expand(rest))
        if any(node.op not in READABLE and not OPS[node.op].pointwise for node in walk(x, y)):
            return None
        return self.bounds("ordered_bounds", x, y, roles.key)

    def bounds(self, kind: str, x: Node, y: Node, key: str) -> tuple[Bounds, Bounds]:
        """Outer and inner bounds from a derived table of an int of the row and one of the key."""
        parts = ("lo", "hi", "inner_lo", "inner_hi")
        derived = self.table(kind, (x, y), parts, key)
        indices = (x.type.indices | y.type.indices) - {key}
        lo, hi, inner_lo, inner_hi = (self.part(derived, part, indices) for part in parts)
        return Bounds(lo, hi), Bounds(inner_lo, inner_hi)

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
        found = self._listing(element, collection)
        if found is None:
            return None
        listing, position = found
        i, j = (self.algebra.symbol(self.graph.index(name)) for name in "ij")
        expression = sympy.expand(self.algebra.expression(position))
        offset = sympy.expand((i if key == "i" else j) - expression)
        slant = sympy.expand(expression + j - i)
        names = (f"{listing.name}.list", f"{listing.name}.rank")
        one = self.graph.literal(1)
        if not self.algebra.contains(offset, "j") and not self.algebra.contains(offset, "i"):
            return Member(Listed(*names, one, None, self.algebra.node(offset)))
        if not self.algebra.contains(slant, "j") and not self.algebra.contains(slant, "i"):
            return Member(Diagonals(*names, self.algebra.node(slant)))
        return None

    def _listing(self, element: Node, collection: Node) -> tuple[Derived, Node] | None:
        """The table of a list's entries, and the position that is looked for in it; None where no table holds it.

        What the element adds to positions is taken off the entries instead, so that `j + shift in list` asks for j.
        A distance that may be negative is lifted above 0 along with them.
        """
        graph = self.graph
        if len(collection.type.axes) != 1 or not collection.type.indices <= SHARED:
            return None
        terms = sympy.Add.make_args(sympy.expand(self.algebra.expression(element)))
        moving = [term for term in terms if self.algebra.contains(term, "i") or self.algebra.contains(term, "j")]
        shift = self.algebra.node(sympy.Add(*(term for term in terms if term not in moving)))
        position = self.algebra.node(sympy.Add(*moving))
        low, high = reach(position)
        if max(low, high) > FARTHEST or not shift.type.indices <= SHARED:
            return None
        entries = collection
        if not is_literal(shift, 0):
            lift = graph.make("mul", graph.literal(int(low)), self.length)
            if low:
                position, shift = graph.make("add", position, lift), graph.make("sub", shift, lift)
            padding = graph.make("lt", collection, graph.literal(0))
            shifted = graph.make("sub", collection, shift)
            entries, high = graph.make("select", padding, graph.literal(-1), shifted), high + low
        return self.table("listing", (entries,), ("list", "rank"), str(int(high))), position

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

    def settled(self, condition: Node) -> Node:
        """The condition with memberships inside of numbers made readable; those that say which keys live stay."""
        replacements: dict[Node, Node] = {}
        for node in walk(condition):
            numbers = [arg for arg in node.args if arg.type.base is not Base.BOOL and arg.type.selects is None]
            if node.type.base is Base.BOOL and any(inner.op == "member" for inner in walk(*numbers)):
                args = tuple(self.readable(arg) if arg in numbers else arg for arg in node.args)
                replacements[node] = self.graph.rebuild(node, args)
        return substitute(self.graph, condition, replacements) if replacements else condition

    def readable(self, mask: Node) -> Node:
        """The mask with every membership turned into two reads of a rank table."""
        replacements: dict[Node, Node] = {}
        for node in walk(mask):
            if node.op != "member":
                continue
            element, collection = node.args
            if collection.type.selects is not None:
                raise unlowered(node, "a selection that steers which pairs are live")
            replacements[node] = self._ranked(node, element, collection)
        return substitute(self.graph, mask, replacements) if replacements else mask

    def _ranked(self, member: Node, element: Node, collection: Node) -> Node:
        """rank[x] < rank[x + 1], with x held inside of the table: outside of it both are the same."""
        graph = self.graph
        found = self._listing(element, collection)
        if found is None:
            raise unlowered(
                member,
                "looking for this value in this list",
                "what is looked for must be a position or a distance, as in `j in columns[h]` and `i - j in offsets`,"
                " and the list may vary over b and h",
            )
        listing, position = found
        (entries,) = listing.args
        rank = self.part(listing, "rank", entries.type.indices, ("position",))
        reaches = graph.make("mul", graph.literal(int(listing.attribute or 0)), self.length)
        last = graph.make("add", reaches, graph.literal(1))

        def at(position: Node) -> Node:
            held = graph.make("maximum", graph.make("minimum", position, last), graph.literal(0))
            type = Type(Base.INT, rank.type.indices | held.type.indices)
            return graph.make("take", rank, held, type=type, attribute="position")

        return graph.make("lt", at(position), at(graph.make("add", position, graph.literal(1))))

    @property
    def length(self) -> Node:
        """The longer side: every position is below it."""
        rows = self.graph.make("add", self.graph.size("offset"), self.graph.size("i"))
        return self.graph.make("maximum", rows, self.graph.size("j"))

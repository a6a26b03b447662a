"""The rule for attention in an order of its own: rows and keys that are regrouped by what was computed from tensors.

A query that sees the keys of its own cluster, or only some tokens that take part as rows or as keys: the condition
says which, and where the result is asked for (`compiler.needs`) does as well. Rows and keys are put in the order of
their groups, those that take no part are left out, and the attention runs on what is left: "same group" and "at most
my position" are then intervals of slots, so that the cost is that of the groups and not of all pairs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from attnc.compiler.algebra import Algebra, Coordinate, Interval, solve
from attnc.compiler.attention import Attention, is_attention, sides
from attnc.compiler.composition import Attend, Moved, Order, Range, Regroup
from attnc.compiler.conditions import Conjunction, disjunction
from attnc.compiler.decompose import Decomposer, depends
from attnc.compiler.ir import Graph, Node, walk
from attnc.compiler.plan import Placed
from attnc.compiler.streaming import Softmax, stream
from attnc.dsl.terms import Input
from attnc.dsl.types import Base, Type

CHOICES = frozenset({"topk", "threshold", "mass", "argmax"})
SIDES = {"i": "rows", "j": "keys"}  # as the step's plan calls them


@dataclass(frozen=True)
class Partition:
    """A condition taken apart. `same`: ints of row and key that are equal in a live pair. `rows`, `keys`: what must
    hold of a row, and of a key, for it to take part. `rest`: the other atoms, by conjunction."""

    same: tuple[Node, Node] | None
    rows: tuple[Node, ...]
    keys: tuple[Node, ...]
    rest: tuple[Conjunction, ...]

    @property
    def moves_rows(self) -> bool:
        return self.same is not None or bool(self.rows)

    @property
    def moves_keys(self) -> bool:
        return self.same is not None or bool(self.keys)


def regroup(at: Decomposer, node: Node) -> Node | None:
    """`softmax[j](score where condition) @ value` whose rows or keys are chosen, or grouped, by computed values."""
    if not is_attention(at, node):
        return None
    attention = Regrouped(at, node, (node,))
    found = sides(node)
    assert found is not None
    attention.part = partition(at.graph, found[0].args[1], at.need(node), attention.row, attention.key)
    return attention.step() if attention.fits() else None


def partition(graph: Graph, condition: Node, need: Node, row: str, key: str) -> Partition:
    """The parts of a condition that decide which rows and keys meet at all, and what is left."""
    conjunctions = disjunction(graph, condition)
    shared = [atom for atom in conjunctions[0] if all(atom in one for one in conjunctions)] if conjunctions else []
    same = next((pair for atom in shared if (pair := equal_groups(atom, row, key))), None)
    rows = [atom for atom in shared if depends(atom, row) and not depends(atom, key) and is_computed(atom)]
    keys = [atom for atom in shared if depends(atom, key) and not depends(atom, row) and is_computed(atom)]
    taken = {*rows, *keys, *(atom for atom in shared if same is not None and equal_groups(atom, row, key) == same)}
    rest = tuple(tuple(atom for atom in one if atom not in taken) for one in conjunctions)
    if depends(need, row) and not depends(need, key) and any(one.op == "input" for one in walk(need)):
        rows.append(need)
    return Partition(same, tuple(rows), tuple(keys), rest)


def equal_groups(atom: Node, row: str, key: str) -> tuple[Node, Node] | None:
    """(row's int, key's int) of an equality between what tensors of reals decide on both sides."""
    if atom.op != "eq" or any(arg.type.base is not Base.INT for arg in atom.args):
        return None
    for x, y in (atom.args, atom.args[::-1]):
        if depends(x, row) and depends(y, key) and not depends(x, key) and not depends(y, row):
            return (x, y) if is_computed(x) and is_computed(y) else None
    return None


def is_computed(node: Node) -> bool:
    """Whether reals of tensors, or a choice among them, decide a value: its pattern over positions is not known."""
    return any(one.op in CHOICES or (one.op == "input" and one.type.base is Base.REAL) for one in walk(node))


def most(graph: Graph, atoms: Iterable[Node], index: str) -> Node | None:
    """How many positions of an index fulfil all of the atoms at most: the count of a topk among them, the least."""
    found: Node | None = None
    for atom in atoms:
        if atom.op != "member" or atom.args[0] is not graph.index(index):
            continue
        choice = atom.args[1]
        while choice.op == "rename":
            choice = choice.args[0]
        count = choice.args[1] if choice.op == "topk" else None
        if choice.type.selects in (index, "t") and count is not None and not count.type.indices:
            found = count if found is None else graph.make("minimum", found, count)
    return found


@dataclass
class Regrouped(Attention):
    """One attention whose rows, keys, or both are in an order of their own."""

    part: Partition = field(default_factory=lambda: Partition(None, (), (), ()))
    moved: dict[str, Moved] = field(default_factory=dict)
    positions: dict[str, str] = field(default_factory=dict)
    ranges: list[Range] = field(default_factory=list)

    def fits(self) -> bool:
        """Whether anything moves, and the rest can be asked in the new order."""
        part = self.part
        if not (part.moves_rows or part.moves_keys) or (part.moves_keys and self.key != "j") or self.row != "i":
            return False
        if any(axis.over == "i" for axis in self.at.axes.values()):
            return False
        listed = [atom for one in part.rest for atom in one if any(node.op == "member" for node in walk(atom))]
        return not any(depends(atom, self.row) and depends(atom, self.key) for atom in listed)

    def moves(self, side: str) -> bool:
        """Whether a side, i or j of the step's plan, is in an order of its own."""
        return self.part.moves_rows if side == "i" else self.part.moves_keys

    def step(self) -> Node:
        at = self.at
        orders = {side: self.order(side) if self.moves(side) else None for side in SIDES}
        self.indices = {side: order.indices if order else frozenset[str]() for side, order in orders.items()}
        (weights,) = self.weights
        score, _, *sink = weights.args
        joined = self.join_products([score, *sink])
        score, *sink = (self.transcribe(joined.get(root, root)) for root in (score, *sink))
        softmax = Softmax(score, self.condition(), sink[0] if sink else None)
        query, key = self.operands()
        value = at.array(self.value_vector())
        placed = self.placed()
        plan = replace(stream(at, [softmax], self.inputs, merged=False), placed=placed)
        name, lse = at.fresh("attention"), at.fresh("lse")
        inner = Attend(name, lse, plan, *self.operand_names(query, key, value))
        at.steps.append(
            Regroup(
                name,
                lse,
                inner,
                orders["i"],
                orders["j"],
                self.row,
                self.key,
                dict(self.positions),
                tuple(self.moved.values()),
                tuple(self.ranges),
            )
        )
        return self.result(name)

    def order(self, side: str) -> Order:
        """Which group a row or key belongs to, and whether it takes part."""
        part, graph = self.part, self.graph
        group = None if part.same is None else part.same[0 if side == "i" else 1]
        atoms = part.rows if side == "i" else part.keys
        live = graph.all_of(atoms) if atoms else None
        arrays = [None if node is None else self.at.read(self.at.array(node)) for node in (group, live)]
        indices = frozenset(name for node in arrays if node is not None for name in node.type.indices if name in "bh")
        return Order(arrays[0], arrays[1], indices, most(graph, atoms, self.row if side == "i" else self.key))

    def operand_names(self, query: str, key: str, value: str) -> tuple[str, str, str]:
        """The operands; keys and values that move under a name of their own. Rows are read where they lie."""
        key, value = (self.move("j", name).name if self.moves("j") else name for name in (key, value))
        return query, key, value

    def placed(self) -> Placed | None:
        """Where the rows lie."""
        if not self.moves("i"):
            return None
        places = self.declare("0_places_rows", Type(Base.INT, self.indices["i"] | {"i"}))
        return Placed(str(places.attribute), str(self.count().attribute))

    def count(self) -> Node:
        """How many rows take part."""
        return self.declare("0_count_rows", Type(Base.INT, self.indices["i"]))

    def move(self, side: str, source: str, *, operand: bool = True) -> Moved:
        """An array in the order of its side."""
        name = f"0_{source}_{SIDES[side]}"
        self.moved[name] = Moved(name, source, side, operand)
        return self.moved[name]

    # Conditions

    def condition(self) -> Node:
        """What is left of the condition, over slots."""
        return self.graph.any_of(self.over_slots(atoms) for atoms in self.part.rest)

    def over_slots(self, atoms: Conjunction) -> Node:
        """One conjunction. Where the keys move, what bounds their positions becomes an interval of slots."""
        graph = self.graph
        if not self.part.moves_keys:
            filled = graph.make("lt", graph.index("i"), self.count())
            return graph.all_of([filled, *(self.transcribe(atom) for atom in atoms)])
        lows, highs, left = self.bounds(atoms)
        low, high = self.extreme("maximum", lows), self.extreme("minimum", highs)
        number = len(self.ranges)
        first, last = (self.slot_bound(f"0_{end}_slot_{number}", (low, high)) for end in ("first", "last"))
        self.ranges.append(Range(str(first.attribute), str(last.attribute), low, high))
        slot = graph.index("j")
        inside = [graph.make("le", first, slot), graph.make("lt", slot, last)]
        return graph.all_of([*inside, *(self.transcribe(atom) for atom in left)])

    def bounds(self, atoms: Conjunction) -> tuple[list[Node], list[Node], list[Node]]:
        """Lower and upper bounds of a key's position that depend on the row alone, and the atoms that are none."""
        algebra = Algebra(self.graph)
        lows: list[Node] = []
        highs: list[Node] = []
        left: list[Node] = []
        for atom in atoms:
            solved = solve(algebra, atom, "j") if depends(atom, "j") else None
            if not isinstance(solved, Interval) or solved.coordinate != Coordinate():
                left.append(atom)
                continue
            lows += [self.at.lower(solved.lo)] if solved.lo else []
            highs += [self.at.lower(solved.hi)] if solved.hi else []
        return lows, highs, left

    def extreme(self, op: str, nodes: list[Node]) -> Node | None:
        result: Node | None = None
        for node in nodes:
            result = node if result is None else self.graph.make(op, result, node)
        return result

    def slot_bound(self, name: str, ends: tuple[Node | None, ...]) -> Node:
        """The array that says where a row's slots begin, or end."""
        indices = self.indices["i"] | self.indices["j"] | {"i"}
        indices |= {index for end in ends if end is not None for index in end.type.indices}
        return self.declare(name, Type(Base.INT, indices))

    # What varies over a side

    def declare(self, name: str, type: Type) -> Node:
        """An input of the plan that the step makes."""
        axes = (*type.ordered_indices(), *type.axes)
        self.inputs[name] = Input(name, type.base, axes, None, span=self.at.pattern.span)
        return self.graph.make("input", type=type, attribute=name)

    def leaf(self, side: str, what: str) -> Node:
        """The positions of a side."""
        name = self.positions.setdefault(side, f"0_{what}_{SIDES[side]}")
        return self.declare(name, Type(Base.INT, self.indices[side] | {side}))

    def position(self, node: Node) -> Node:
        for side, name in (("i", self.row), ("j", self.key)):
            if node.attribute == name and self.moves(side):
                return self.leaf(side, "positions")
        return super().position(node)

    def size(self, node: Node) -> Node:
        for side, name in (("i", self.row), ("j", self.key)):
            if node.attribute == name and self.moves(side):
                return self.graph.size(f"outer_{name}")
        return super().size(node)

    def in_place(self, node: Node) -> bool:
        assert isinstance(node.attribute, tuple)
        return super().in_place(node) and not self.moves(str(node.attribute[1]))

    def membership(self, node: Node) -> Node:
        _, collection = node.args
        keys_stay = collection.type.selects is None and not self.part.moves_keys
        if keys_stay or (depends(node, self.row) and depends(node, self.key)):
            return super().membership(node)
        return self.alias(self.at.array(node))

    def alias(self, name: str) -> Node:
        node = super().alias(name)
        for side in SIDES:
            if node.depends_on(side) and self.moves(side):
                source = str(node.attribute)
                self.inputs.pop(source)
                moved = self.move(side, source, operand=False)
                type = replace(node.type, indices=node.type.indices | self.indices[side])
                return self.declare(moved.name, type)
        return node


__all__ = ["partition", "regroup"]

"""A plan for queries and keys that are not where its text counts them from: what decoding runs.

Queries may begin at another position in every row of the batch; keys may lie in places that say which position they
are of, in any order, because a softmax over keys has no order. Then closed forms of the key's position say nothing of
its place: every place is visited and the condition is a mask, which costs nothing where only live keys are kept.
Which position a place has is given, or, in a ring of fixed places, a closed form of the number of tokens (`ringed`).
"""

from __future__ import annotations

from dataclasses import replace

from attnc.compiler.algebra import Algebra
from attnc.compiler.domains import DomainBuilder
from attnc.compiler.ir import Graph, Node, walk
from attnc.compiler.membership import Tables
from attnc.compiler.plan import Bounds, Branch, Domain, KeySet, Plan, Rows, Run
from attnc.dsl.source import Span
from attnc.dsl.terms import Input
from attnc.dsl.types import Base, Type

# Names that no text can give: those of the language do not begin with a digit.
START, PLACE = "0start", "0place"
FIRST, WINDOW = "0first", "0window"  # parameters of `ringed`
CLASS = ("0period_{}", "0low_{}", "0width_{}", "0at_{}")  # of each of its classes


def at_rows(name: str) -> str:
    """The values of an array over tokens at the new rows, as an input of a relocated plan."""
    return f"0rows_{name}"


def obstacle(plan: Plan, *, places: bool) -> str | None:
    """Why a plan cannot be relocated; None where it can."""
    if any(branch.selected is not None for branch in plan.branches):
        return "its keys are chosen by number"
    lists = {table.name for table in plan.derived if table.kind not in ("tabulated", "equal_bounds")}
    if lists and places:
        return "a list of keys or distances is looked up by number"
    for node in walk(*(branch.score for branch in plan.branches)):
        if node.op == "derived" and str(node.attribute).partition(".")[0] in lists:
            return "a score looks positions up in a list"
    return None


def relocated(plan: Plan, *, start: bool, places: bool) -> Plan:
    """The plan with arrays over t that are read at i given for the rows alone, as `at_rows` of their name.

    `start`: row i lies at position i + START[b], an int input [b]; else at i. `places`: key j has the position
    PLACE[b, j], an int input [b, j], negative where there is none; else j.
    `obstacle` says which plans have none.
    """
    assert plan.graph is not None
    return _relocated(plan, _Mover(plan, start, _given_place(plan.graph) if places else None), None)


def ringed(plan: Plan, classes: int) -> Plan:
    """The plan for one query a row, which is the last of START[b] + 1 tokens, and keys in the places of a ring.

    Places are, in this order: the first FIRST positions, the last WINDOW ones in turn, and for each of `classes` the
    positions with low <= position % period < low + width, which begin at a place of their own (parameters CLASS). A
    position has one place: the first ones' own, else that of the first class that has it, else the ring's.
    """
    assert plan.graph is not None
    ring = _Ring(plan.graph, classes)
    return _relocated(plan, _Mover(plan, True, ring.position()), ring.used())


def scattered(plan: Plan) -> Plan:
    """The plan for one query a row, at START[b], over all keys up to it: the condition is a mask."""
    assert plan.graph is not None
    graph = plan.graph
    after = graph.make("add", _start(graph), graph.literal(1))
    return _relocated(plan, _Mover(plan, True, graph.index("j")), graph.make("minimum", graph.size("j"), after))


def _relocated(plan: Plan, mover: _Mover, end: Node | None) -> Plan:
    """`end`: the places that are looked at, where every one of them is; else the condition says which."""
    assert plan.graph is not None
    graph, algebra = plan.graph, Algebra(plan.graph)
    tables = Tables(graph, algebra, plan.blocks)
    branches = []
    for branch in plan.branches:
        score, condition = mover.moved(branch.score), mover.moved(branch.condition)
        sink = None if branch.sink is None else mover.moved(branch.sink)
        if mover.place is not None:
            condition = graph.make("and", graph.make("le", graph.literal(0), mover.place), condition)
            domain = everywhere(graph, condition, end)
        else:
            domain = DomainBuilder(graph, algebra, tables).build(condition)
        branches.append(Branch(tables.readable(score), condition, domain, sink))
    inputs = {entry.name: entry for entry in plan.inputs}
    for name in mover.rows:
        axes = tuple("i" if axis == "t" else axis for axis in inputs[name].axes)
        inputs[at_rows(name)] = replace(inputs[name], name=at_rows(name), axes=axes, span=inputs[name].span)
    span = Span(source=plan.source, start=0, stop=0)
    if mover.start:
        inputs[START] = Input(START, Base.INT, ("b",), None, span=span)
    if mover.place is not None and mover.place.op == "input":
        inputs[PLACE] = Input(PLACE, Base.INT, ("b", "j"), None, span=span)
    return replace(plan, branches=tuple(branches), inputs=tuple(inputs.values()), derived=tuple(tables.derived))


def everywhere(graph: Graph, mask: Node, end: Node | None = None) -> Domain:
    """Every key, those below `end`, with a mask."""
    bounds = Bounds(graph.literal(0), graph.size("j") if end is None else end)
    return Domain((KeySet(None, (Run(bounds, None),), mask),), Rows())


def _start(graph: Graph) -> Node:
    return graph.make("input", type=Type(Base.INT, frozenset("b")), attribute=START)


def _given_place(graph: Graph) -> Node:
    return graph.make("input", type=Type(Base.INT, frozenset("bj")), attribute=PLACE)


class _Ring:
    """The position that a place holds, -1 for none, as nodes of the place and the number of tokens."""

    def __init__(self, graph: Graph, classes: int) -> None:
        self.graph = graph
        self.first, self.window = self.parameter(FIRST), self.parameter(WINDOW)
        self.classes = [tuple(self.parameter(name.format(n)) for name in CLASS) for n in range(classes)]
        self.last = _start(graph)
        self.nothing = graph.literal(-1)

    def parameter(self, name: str) -> Node:
        return self.graph.make("parameter", type=Type(Base.INT, frozenset()), attribute=name)

    def used(self) -> Node:
        """The places, in order, that can hold a key."""
        make = self.graph.make
        if len(self.classes) > 1:
            return self.graph.size("j")
        end = make("add", self.first, self.window)
        for period, low, width, _ in self.classes:
            tokens = make("add", self.last, self.graph.literal(1))
            rest = make("maximum", make("sub", make("mod", tokens, period), low), self.graph.literal(0))
            whole = make("mul", make("floordiv", tokens, period), width)
            end = make("add", end, make("add", whole, make("minimum", rest, width)))
        return make("minimum", self.graph.size("j"), end)

    def position(self) -> Node:
        make, place = self.graph.make, self.graph.index("j")
        ring = make("sub", place, self.first)
        turn = make("sub", self.last, make("mod", make("sub", self.last, ring), self.window))
        found = self.own(turn, len(self.classes))
        for number, (period, low, width, at) in enumerate(self.classes):
            member = make("sub", place, at)
            position = make("mul", make("floordiv", member, width), period)
            position = make("add", position, make("add", make("mod", member, width), low))
            found = make("select", make("le", at, place), self.own(position, number), found)
        found = make("select", make("lt", place, self.first), place, found)
        return make("select", make("le", found, self.last), found, self.nothing)

    def own(self, position: Node, before: int) -> Node:
        """A position where neither the first places nor some classes have it."""
        make = self.graph.make
        free = make("le", self.first, position)
        for period, low, width, _ in self.classes[:before]:
            rest = make("sub", make("mod", position, period), low)
            inside = make("and", make("le", self.graph.literal(0), rest), make("lt", rest, width))
            free = make("and", free, make("not", inside))
        return make("select", free, position, self.nothing)


class _Mover:
    """Rewrites the nodes of one plan."""

    def __init__(self, plan: Plan, start: bool, place: Node | None) -> None:
        assert plan.graph is not None
        self.graph = graph = plan.graph
        self.tabulated = {f"{one.name}.table": one.args[0] for one in plan.derived if one.kind == "tabulated"}
        self.rows: dict[str, None] = {}
        self.start, self.place = start, place
        self.done: dict[Node, Node] = {}
        if start:
            self.done[graph.index("i")] = graph.make("add", graph.index("i"), _start(graph))
        if place is not None:
            self.done[graph.index("j")] = place

    def moved(self, root: Node) -> Node:
        for node in walk(root):
            if node not in self.done:
                self.done[node] = self._moved(node)
        return self.done[root]

    def _moved(self, node: Node) -> Node:
        if node.op == "rename" and node.attribute == ("t", "i") and node.args[0].op == "input":
            return self.row_read(node)
        if node.op == "take" and node.args[0].op == "derived":
            return self.moved(self.tabulated[str(node.args[0].attribute)])
        args = tuple(self.done[arg] for arg in node.args)
        if node.op in ("take", "member") and args != node.args:
            indices = frozenset[str]().union(*(arg.type.indices for arg in args))
            type = Type(node.type.base, indices, node.type.axes)
            return self.graph.make(node.op, *args, type=type, attribute=node.attribute, span=node.span)
        return self.graph.rebuild(node, args)

    def row_read(self, node: Node) -> Node:
        name = str(node.args[0].attribute)
        self.rows[name] = None
        return self.graph.make("input", type=node.type, attribute=at_rows(name), span=node.span)

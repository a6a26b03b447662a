"""A plan for queries and keys that are not where its text counts them from: what decoding runs.

Queries may begin at another position in every row of the batch; keys may lie in places that say which position they
are of, in any order, because a softmax over keys has no order. Then closed forms of the key's position say nothing of
its place: every place is visited and the condition is a mask, which costs nothing where only live keys are kept.
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
    mover = _Mover(plan, start, places)
    graph, algebra = plan.graph, Algebra(plan.graph)
    tables = Tables(graph, algebra, plan.blocks)
    branches = []
    for branch in plan.branches:
        score, condition = mover.moved(branch.score), mover.moved(branch.condition)
        sink = None if branch.sink is None else mover.moved(branch.sink)
        if places:
            condition = graph.make("and", graph.make("le", graph.literal(0), mover.place), condition)
            domain = everywhere(graph, condition)
        else:
            domain = DomainBuilder(graph, algebra, tables).build(condition)
        branches.append(Branch(tables.readable(score), condition, domain, sink))
    inputs = {entry.name: entry for entry in plan.inputs}
    for name in mover.rows:
        axes = tuple("i" if axis == "t" else axis for axis in inputs[name].axes)
        inputs[at_rows(name)] = replace(inputs[name], name=at_rows(name), axes=axes, span=inputs[name].span)
    span = Span(source=plan.source, start=0, stop=0)
    if start:
        inputs[START] = Input(START, Base.INT, ("b",), None, span=span)
    if places:
        inputs[PLACE] = Input(PLACE, Base.INT, ("b", "j"), None, span=span)
    return replace(plan, branches=tuple(branches), inputs=tuple(inputs.values()), derived=tuple(tables.derived))


def everywhere(graph: Graph, mask: Node) -> Domain:
    """Every key, with a mask."""
    bounds = Bounds(graph.literal(0), graph.size("j"))
    return Domain((KeySet(None, (Run(bounds, None),), mask),), Rows())


class _Mover:
    """Rewrites the nodes of one plan."""

    def __init__(self, plan: Plan, start: bool, places: bool) -> None:
        assert plan.graph is not None
        self.graph = graph = plan.graph
        self.tabulated = {f"{one.name}.table": one.args[0] for one in plan.derived if one.kind == "tabulated"}
        self.rows: dict[str, None] = {}
        begin = graph.make("input", type=Type(Base.INT, frozenset("b")), attribute=START)
        self.place = graph.make("input", type=Type(Base.INT, frozenset("bj")), attribute=PLACE)
        self.done: dict[Node, Node] = {}
        if start:
            self.done[graph.index("i")] = graph.make("add", graph.index("i"), begin)
        if places:
            self.done[graph.index("j")] = self.place

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

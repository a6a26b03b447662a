"""Scan blocks as nodes.

A `scan` node's args are the values that its steps assign to states, in order, then its result; its attribute is the
index and the states' names, in the order of assignment. A `state` node inside says how many assignments of its state
came before it: (name, count). Locals are nothing but names, and are gone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from attnc.compiler.ir import Graph, Node
from attnc.dsl.terms import Scan, Term

Build = Callable[[Graph, Term, dict[int, Node]], Node]


class Names:
    """What the names of a scan stand for at one place of it."""

    def __init__(self, graph: Graph, block: Scan) -> None:
        self.graph = graph
        self.counts = {name: 0 for name, _ in block.states}
        self.locals: dict[str, Node] = {}

    def read(self, term: Term) -> Node:
        """The node of a `state` or `local` term."""
        name = str(term.attribute)
        if name in self.locals:
            return self.locals[name]
        return self.graph.make("state", type=term.type, attribute=(name, self.counts[name]), span=term.span)

    def assign(self, name: str, value: Node) -> None:
        if name in self.counts:
            self.counts[name] += 1
        else:
            self.locals[name] = value


def build_scan(graph: Graph, term: Term, done: dict[int, Node], build: Build) -> Node:
    """The node of a scan. A term that two steps share is read once, where it comes first."""
    block = term.block
    assert isinstance(block, Scan)
    names = Names(graph, block)
    assigned: list[tuple[str, Node]] = []
    last: dict[str, Node] = {}
    for name, step in block.steps:
        for inner in terms_of(step, done):
            if inner.form in ("state", "local"):
                done[id(inner)] = names.read(inner)
        value = build(graph, step, done)
        names.assign(name, value)
        last[name] = value
        if name in names.counts:
            assigned.append((name, value))
    attribute = (block.index, *(name for name, _ in assigned))
    args = (*(value for _, value in assigned), last[block.result])
    return graph.make("scan", *args, type=term.type, attribute=attribute, span=term.span)


def scan_names(scan: Node) -> tuple[str, list[str]]:
    """The index of a scan node, and the states that its args are assigned to."""
    assert isinstance(scan.attribute, tuple)
    index, *names = (str(name) for name in scan.attribute)
    return index, names


def terms_of(root: Term, done: dict[int, Node]) -> Iterator[Term]:
    """The terms below one that have no node yet."""
    seen: set[int] = set()
    stack = [root]
    while stack:
        term = stack.pop()
        if id(term) not in seen and id(term) not in done:
            seen.add(id(term))
            yield term
            stack.extend(term.args)

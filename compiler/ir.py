"""The graph of a pattern: one interned, immutable node type.

A node is built once per graph, so identity is equality and hashing costs nothing. Operands live in `args`;
networkx gives a view of them (`uses`), a multigraph because `mul(x, x)` has two edges.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from attnc.compiler.ops import OPS
from attnc.dsl.source import Span
from attnc.dsl.terms import Attribute
from attnc.dsl.types import Base, Type

if TYPE_CHECKING:
    import networkx as nx


@dataclass(frozen=True, eq=False)
class Block:
    """The steps of a `repeat` (or, with `index`, of a `scan`), in order: each assigns a state or a local.

    A block is closed: steps read `state` and `local` nodes only. The node that holds it has as last args the initial
    states (of a repeat) and the values of `captured`, which the steps read as locals of these names.
    """

    index: str | None
    states: tuple[str, ...]
    captured: tuple[str, ...]
    steps: tuple[tuple[str, Node], ...]
    result: str


@dataclass(frozen=True, eq=False)
class Node:
    """One value: `op` is a key of `OPS`; `attribute` is what the op table says it holds."""

    op: str
    args: tuple[Node, ...]
    type: Type
    attribute: Attribute = None
    block: Block | None = field(default=None, kw_only=True, repr=False)
    span: Span | None = field(default=None, kw_only=True, repr=False)

    def depends_on(self, index: str) -> bool:
        return index in self.type.indices


class Graph:
    """Makes the nodes of one pattern, each value once."""

    def __init__(self) -> None:
        self._nodes: dict[tuple[object, ...], Node] = {}

    def make(
        self,
        op: str,
        *args: Node,
        type: Type | None = None,
        attribute: Attribute = None,
        block: Block | None = None,
        span: Span | None = None,
    ) -> Node:
        """The node of this value. A pointwise op needs no type: its operands give it."""
        if op not in OPS:
            raise KeyError(f"unknown op {op!r}")
        result = type or pointwise_type(op, args)
        key = (op, tuple(id(arg) for arg in args), result, attribute.__class__, attribute, id(block))
        node = self._nodes.get(key)
        if node is None:
            span = span or next((arg.span for arg in args if arg.span), None)
            node = self._nodes[key] = Node(op, args, result, attribute, block=block, span=span)
        return node

    def literal(self, value: bool | int | float) -> Node:
        base = Base.BOOL if isinstance(value, bool) else Base.INT if isinstance(value, int) else Base.REAL
        return self.make("literal", type=Type(base), attribute=value)

    def index(self, name: str) -> Node:
        return self.make("index", type=Type(Base.INT, frozenset({name})), attribute=name)

    def size(self, name: str) -> Node:
        return self.make("size", type=Type(Base.INT), attribute=name)

    def all_of(self, conditions: Iterable[Node]) -> Node:
        """Conjunction; of nothing: true."""
        return self._fold("and", conditions, neutral=True)

    def any_of(self, conditions: Iterable[Node]) -> Node:
        """Disjunction; of nothing: false."""
        return self._fold("or", conditions, neutral=False)

    def _fold(self, op: str, conditions: Iterable[Node], *, neutral: bool) -> Node:
        result: Node | None = None
        for condition in dict.fromkeys(conditions):
            if condition.op == "literal" and condition.attribute is neutral:
                continue
            if condition.op == "literal":
                return condition
            result = condition if result is None else self.make(op, result, condition)
        return self.literal(neutral) if result is None else result

    def rebuild(self, node: Node, args: tuple[Node, ...]) -> Node:
        """The same op over other operands; `node` itself where they are the same."""
        if args == node.args:
            return node
        type = None if OPS[node.op].pointwise else node.type
        return self.make(node.op, *args, type=type, attribute=node.attribute, block=node.block, span=node.span)


def pointwise_type(op: str, args: tuple[Node, ...]) -> Type:
    """Type of a pointwise op: the union of the operands' indices, their common vector axes, the op's base."""
    info = OPS[op]
    if not info.pointwise:
        raise TypeError(f"{op} needs an explicit type")
    indices = frozenset[str]().union(*(arg.type.indices for arg in args))
    axes = next((arg.type.axes for arg in args if arg.type.axes), ())
    base = info.base
    if base is None:
        base = Base.REAL if any(arg.type.base is Base.REAL for arg in args) else args[-1].type.base
    return Type(base, indices, axes)


def walk(*roots: Node) -> Iterator[Node]:
    """Every node once, operands before users."""
    seen: set[int] = set()
    stack: list[tuple[Node, bool]] = [(root, False) for root in reversed(roots)]
    while stack:
        node, expanded = stack.pop()
        if expanded:
            yield node
        elif id(node) not in seen:
            seen.add(id(node))
            stack.append((node, True))
            stack.extend((arg, False) for arg in reversed(node.args))


def uses(*roots: Node) -> nx.MultiDiGraph:
    """Operand -> user, keyed by operand slot."""
    import networkx as nx  # here: compiling needs no view, and the import takes a fifth of a second

    graph = nx.MultiDiGraph()
    for node in walk(*roots):
        graph.add_node(node)
        for slot, arg in enumerate(node.args):
            graph.add_edge(arg, node, key=slot)
    return graph


def substitute(graph: Graph, root: Node, replacements: dict[Node, Node]) -> Node:
    """`root` with nodes replaced; pointwise types above them are derived anew."""
    done: dict[Node, Node] = {}
    for node in walk(root):
        done[node] = replacements.get(node) or graph.rebuild(node, tuple(done[arg] for arg in node.args))
    return done[root]


def text(*roots: Node) -> str:
    """The graph as numbered assignments, one a line; values used once and leaves are written in place."""
    users = Counter(arg for node in walk(*roots) for arg in node.args)
    names: dict[Node, str] = {}
    lines: list[str] = []
    for node in walk(*roots):
        operands = ", ".join(names[arg] for arg in node.args)
        if node.op == "literal":
            written = str(node.attribute).lower() if isinstance(node.attribute, bool) else repr(node.attribute)
        elif not node.args:
            written = (
                str(node.attribute) if node.op in ("index", "input", "parameter") else f"{node.op}[{node.attribute}]"
            )
        else:
            written = f"{node.op}{f'[{node.attribute}]' if node.attribute is not None else ''}({operands})"
        if node.args and (node in roots or users[node] > 1):
            names[node] = f"%{len(lines)}"
            lines.append(f"{names[node]}: {node.type} = {written}")
        else:
            names[node] = written
    lines.append("return " + ", ".join(names[root] for root in roots))
    return "\n".join(lines)

"""From a graph to steps: what attends, what carries a state, and what is computed over whole arrays.

Rules look at a node from the outside in; the first that knows it gives a node that reads what its steps leave. What no
rule knows is a value over one sequence, computed by torch operators, or, over pairs of positions, an error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from attnc.compiler.build import build_term, unlowered
from attnc.compiler.composition import Compute, Step
from attnc.compiler.ir import Graph, Node, substitute
from attnc.compiler.needs import needs
from attnc.compiler.ops import OPS
from attnc.compiler.plan import Blocks, Selected
from attnc.compiler.simplify import simplify
from attnc.dsl.terms import Axis, Input, Pattern, Term
from attnc.dsl.types import Base, Type

SEQUENCES = frozenset("ijt")
SHARED = frozenset({"mean", "sum", "max", "min", "cumsum", "dot", "matmul", "member", "softmax", "normalize", "repeat"})
BUILT_IN = {"q": ("b", "h", "i", "d"), "k": ("b", "h", "j", "d"), "v": ("b", "h", "j", "e")}


class Decomposer:
    """Collects the steps of one pattern. `rules` are tried in order on every node."""

    def __init__(self, graph: Graph, pattern: Pattern, rules: Sequence[Rule]) -> None:
        self.graph = graph
        self.pattern = pattern
        self.rules = rules
        self.steps: list[Step] = []
        self.notes: list[str] = []
        self.inputs = {name: Input(name, Base.REAL, axes, None, span=pattern.span) for name, axes in BUILT_IN.items()}
        self.inputs |= {entry.name: entry for entry in pattern.inputs}
        self.axes: dict[str, Axis] = {axis.name: axis for axis in pattern.axes}
        self.selected: dict[str, Selected] = {}  # the lists that selections left, by the names of their steps
        self.chosen: dict[Node, Node] = {}  # what reads the lists of a selection
        self._needs: dict[Node, Node] = {}
        self._lowered: dict[Node, Node] = {}
        self._arrays: dict[Node, str] = {}
        self._copies: dict[Node, str] = {}

    def finish(self, root: Node) -> None:
        """The steps of a result; the last one leaves it."""
        self._needs = needs(self.graph, root)
        lowered = self.lower(root)
        last = self.steps[-1] if self.steps else None
        if lowered.op == "input" and last is not None and lowered.attribute == last.name:
            return
        self.steps.append(Compute(self.fresh("out"), self.shared(lowered)))

    def lower(self, node: Node) -> Node:
        """The node over inputs and steps only: nothing in it is over pairs of positions."""
        if node not in self._lowered:
            self._lowered[node] = self._lower(node)
        return self._lowered[node]

    def _lower(self, node: Node) -> Node:
        for rule in self.rules:
            found = rule(self, node)
            if found is not None:
                return found
        if self.over_pairs(node):
            raise self.refused(node)
        return self.graph.rebuild(node, tuple(self.lower(arg) for arg in node.args))

    def need(self, node: Node) -> Node:
        """Where a value of the text matters: a bool over some of its indices (see `compiler.needs`)."""
        return self._needs.get(node) or self.graph.literal(True)

    def nodes(self) -> tuple[Node, ...]:
        """Every node of the text's result."""
        return tuple(self._needs)

    def refused(self, node: Node) -> Exception:
        """The error for a value over pairs; the place is the reduction or product that asks for it."""
        over = " and ".join(sorted(self.long(node)))
        return unlowered(node, f"a value over all pairs of {over} (`{node.op}`)")

    def long(self, node: Node) -> frozenset[str]:
        """The indices of a node, and what it chooses from, that grow with the sequence; segments are few."""
        return frozenset(
            name
            for name in {*node.type.indices, node.type.selects}
            if name in SEQUENCES or (name in self.axes and self.axes[name].kind == "blocks")
        )

    def over_pairs(self, node: Node) -> bool:
        """Whether a value has an element for each pair of positions."""
        return len(self.long(node)) > 1

    def over_queries(self, name: str) -> bool:
        """Whether a name is a declared axis of the queries."""
        return name in self.axes and self.axes[name].over == "i"

    def term(self, term: Term) -> Node:
        """The node of a term of the checked tree, such as the size of an axis."""
        return simplify(self.graph, build_term(self.graph, term))

    def blocks(self) -> dict[str, Blocks]:
        """The declared axes of blocks, as nodes."""
        return {
            axis.name: Blocks(axis.over, self.term(axis.size), self.term(axis.stride) if axis.stride else None)
            for axis in self.axes.values()
            if axis.kind == "blocks"
        }

    # Arrays

    def fresh(self, what: str = "") -> str:
        """A name that no input has: names of the language do not begin with a digit."""
        return f"{len(self.steps)}_{what or 'value'}"

    def array(self, node: Node) -> str:
        """The name of an array with this value: an input's own, or a step's."""
        lowered = self.lower(node)
        if lowered.op == "input":
            return str(lowered.attribute)
        if lowered not in self._arrays:
            name = self.fresh()
            self.steps.append(Compute(name, self.shared(lowered)))
            self._arrays[lowered] = name
            self.declare(name, lowered.type)
        return self._arrays[lowered]

    def shared(self, lowered: Node) -> Node:
        """The node with what earlier steps left read from there, where making it again takes more than a pass."""
        made = {node: self.read(name) for node, name in self._arrays.items() if node.op in SHARED}
        return substitute(self.graph, lowered, made) if made else lowered

    def copied(self, name: str) -> str:
        """A step's array that is another one, under a name of its own."""
        held = self.read(name)
        if held not in self._copies:
            made = self.fresh(name)
            self.steps.append(Compute(made, held))
            self.declare(made, held.type)
            self._copies[held] = made
        return self._copies[held]

    def declare(self, name: str, type: Type) -> Node:
        """What a step leaves: from now on it is read as an input, laid out by its type."""
        axes = (*type.ordered_indices(), *type.axes)
        self.inputs[name] = Input(name, type.base, axes, None, span=self.pattern.span)
        return self.graph.make("input", type=Type(type.base, type.indices, type.axes), attribute=name)

    def read(self, name: str) -> Node:
        """The node that reads a step's array."""
        entry = self.inputs[name]
        indices = frozenset(axis for axis in entry.axes if axis in "bhijt" or axis in self.axes)
        axes = tuple(axis for axis in entry.axes if axis not in indices)
        return self.graph.make("input", type=Type(entry.base, indices, axes), attribute=name)


Rule = Callable[[Decomposer, Node], Node | None]


def depends(node: Node, name: str) -> bool:
    """Whether a value varies over an index or vector axis."""
    return name in node.type.indices or name in node.type.axes


def is_pointwise(node: Node) -> bool:
    """Whether a node is maths of its operands, element by element."""
    return OPS[node.op].pointwise


def vector(base: Base, indices: str, *axes: str) -> Type:
    """The type of a value over built-in indices, given by their letters, and vector axes."""
    return Type(base, frozenset(indices), axes)

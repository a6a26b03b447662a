"""A row's value in few ops: maths element by element, sums and extrema along a vector axis, vectors end to end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from attnc.compiler.ir import Graph, Node
from attnc.compiler.ops import OPS
from attnc.dsl.types import Base, Type


class Lowering:
    """Makes the nodes of one group. What reductions mean is said by runtime/compute/array_reductions.py too."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph

    def at(self, type: Type, along: str) -> Type:
        """A type with its sequence called `along`."""
        named = frozenset(one if one in ("b", "h") else along for one in type.indices)
        return replace(type, indices=named)

    def made(self, node: Node, args: Sequence[Node], along: str) -> Node:
        """The value of a row-wise node over lowered operands."""
        if OPS[node.op].pointwise:
            return self.graph.make(node.op, *self.reals(node, args), span=node.span)
        if node.op == "dot":
            return self.total(self.graph.make("mul", *args))
        if node.op in ("features", "concat", "detach"):
            type = replace(self.at(node.type, along), base=Base.REAL)
            op = "detach" if node.op == "detach" else "features"
            return self.graph.make(op, *args, type=type, span=node.span)
        return getattr(self, f"_{node.op}")(*args)  # type: ignore[no-any-return]

    def reals(self, node: Node, args: Sequence[Node]) -> list[Node]:
        """Operands of a real op as reals: its text would take ints for what they are."""
        if node.type.base is not Base.REAL or node.op in ("to_real", "pow", "floor"):
            return list(args)
        mixed = [self.real(arg) if arg.type.base is Base.INT else arg for arg in args]
        return mixed if node.op != "select" else [args[0], *mixed[1:]]

    def real(self, node: Node) -> Node:
        if node.op == "literal":
            return self.graph.literal(float(node.attribute))  # type: ignore[arg-type]
        return self.graph.make("to_real", node)

    # Reductions

    def reduced(self, op: str, body: Node) -> Node:
        (axis,) = body.type.axes
        type = replace(body.type, axes=())
        return self.graph.make(op, body, self.graph.literal(True), type=type, attribute=(axis, None), span=body.span)

    def total(self, body: Node) -> Node:
        """The sum along a body's axis."""
        return self.reduced("sum", body)

    def live(self, body: Node, condition: Node, otherwise: float) -> Node:
        """A body with dead members replaced."""
        if condition.op == "literal" and condition.attribute is True:
            return body
        return self.graph.make("select", condition, body, self.graph.literal(otherwise))

    def count(self, body: Node, condition: Node) -> Node:
        """How many members are live, as a real."""
        (axis,) = body.type.axes
        if not condition.type.axes:
            width = self.graph.make("to_real", self.graph.size(axis))
            return self.live(width, condition, 0.0)
        return self.total(self.live(self.graph.literal(1.0), condition, 0.0))

    def _sum(self, body: Node, condition: Node) -> Node:
        return self.total(self.live(body, condition, 0.0))

    def _mean(self, body: Node, condition: Node) -> Node:
        count = self.graph.make("maximum", self.count(body, condition), self.graph.literal(1.0))
        return self.graph.make("div", self._sum(body, condition), count)

    def _extreme(self, op: str, body: Node, condition: Node) -> Node:
        bound = float("-inf") if op == "max" else float("inf")
        found = self.reduced(op, self.live(body, condition, bound))
        if condition.op == "literal" and condition.attribute is True:
            return found
        some = self.graph.make("lt", self.graph.literal(0.0), self.count(body, condition))
        return self.graph.make("select", some, found, self.graph.literal(0.0))

    def _max(self, body: Node, condition: Node) -> Node:
        return self._extreme("max", body, condition)

    def _min(self, body: Node, condition: Node) -> Node:
        return self._extreme("min", body, condition)

    def _softmax(self, body: Node, condition: Node, sink: Node | None = None) -> Node:
        """exp(body - top) / (sum of it + exp(sink - top)); 0 where that is 0."""
        graph = self.graph
        score = self.live(body, condition, float("-inf"))
        top = self.reduced("max", score)
        if sink is not None:
            top = graph.make("maximum", top, sink)
        zero = graph.literal(0.0)
        if score is not body:
            top = graph.make("select", graph.make("eq", top, graph.literal(float("-inf"))), zero, top)
        top = graph.make("detach", top, type=top.type)
        weights = graph.make("exp", graph.make("sub", score, top))
        total = self.total(weights)
        if sink is not None:
            total = graph.make("add", total, graph.make("exp", graph.make("sub", sink, top)))
        if score is not body:
            total = graph.make("select", graph.make("eq", total, zero), graph.literal(1.0), total)
        return graph.make("mul", weights, graph.make("div", graph.literal(1.0), total))

    def _normalize(self, body: Node, condition: Node, eps: Node | None = None, floor: Node | None = None) -> Node:
        """body / (sum + eps), or body / max(|sum + eps|, floor); 0 where that is 0."""
        graph = self.graph
        body = self.live(body, condition, 0.0)
        total = self.total(body)
        total = total if eps is None else graph.make("add", total, eps)
        total = total if floor is None else graph.make("maximum", graph.make("abs", total), floor)
        none = graph.make("eq", total, graph.literal(0.0))
        inverse = graph.make("div", graph.literal(1.0), graph.make("select", none, graph.literal(1.0), total))
        return graph.make("mul", body, graph.make("select", none, graph.literal(0.0), inverse))

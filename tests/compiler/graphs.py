"""Random typed graphs, and their values in plain Python."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from hypothesis import strategies as st

from attnc.compiler.ir import Graph, Node
from attnc.dsl.types import Base, Type

Value = Any  # a bool, int or float, or a list of floats for a value with a vector axis


def _divide(x: float, y: float) -> float:
    return x / y if y else math.nan


MEANING: dict[str, Callable[..., Any]] = {
    "to_real": float,
    "neg": operator.neg,
    "not": operator.not_,
    "abs": abs,
    "exp": lambda x: math.exp(min(x, 50.0)),
    "tanh": math.tanh,
    "relu": lambda x: max(x, 0.0),
    "floor": math.floor,
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": _divide,
    "floordiv": operator.floordiv,
    "mod": operator.mod,
    "pow": operator.pow,
    "minimum": min,
    "maximum": max,
    "lt": operator.lt,
    "le": operator.le,
    "eq": operator.eq,
    "ne": operator.ne,
    "and": lambda x, y: x and y,
    "or": lambda x, y: x or y,
    "select": lambda condition, x, y: x if condition else y,
}


@dataclass(frozen=True)
class At:
    """Where a graph is evaluated. `inputs` give a value from the positions of their indices, in layout order."""

    positions: Mapping[str, int]
    parameters: Mapping[str, int | float | bool] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)
    inputs: Mapping[str, Callable[..., Value]] = field(default_factory=dict)


def value(root: Node, at: At) -> Value:
    """The value of a node."""
    done: dict[Node, Value] = {}

    def of(node: Node) -> Value:
        if node not in done:
            if node.op == "rename":
                source, target = map(str, node.attribute)  # type: ignore[arg-type]
                elsewhere = replace(at, positions={**at.positions, source: at.positions[target]})
                done[node] = value(node.args[0], elsewhere)
            else:
                done[node] = _apply(node, [of(arg) for arg in node.args]) if node.args else _leaf(node, at)
        return done[node]

    return of(root)


def _leaf(node: Node, at: At) -> Value:
    name = str(node.attribute)
    if node.op == "literal":
        return node.attribute
    if node.op == "input":
        return at.inputs[name](*(at.positions[index] for index in node.type.ordered_indices()))
    return {"index": at.positions, "parameter": at.parameters, "size": at.sizes}[node.op][name]


def _apply(node: Node, args: list[Value]) -> Value:
    if node.op == "dot":
        return sum(x * y for x, y in zip(*args, strict=True))
    width = next((len(arg) for arg in args if isinstance(arg, list)), None)
    meaning = MEANING[node.op]
    if width is None:
        return meaning(*args)
    return [meaning(*(arg[n] if isinstance(arg, list) else arg for arg in args)) for n in range(width)]


def same(x: Value, y: Value) -> bool:
    """Equal, reals up to rounding."""
    if isinstance(x, list):
        return len(x) == len(y) and all(map(same, x, y))
    if isinstance(x, float):
        return math.isclose(x, y, rel_tol=1e-9, abs_tol=1e-9) or (math.isnan(x) and math.isnan(y))
    return type(x) is type(y) and bool(x == y)


# Random graphs


@dataclass
class Maker:
    """Draws the nodes of one graph."""

    draw: st.DrawFn
    graph: Graph = field(default_factory=Graph)

    def choose(self, *options: Callable[[int], Node], depth: int) -> Node:
        return self.draw(st.sampled_from(options))(depth)

    def integer(self, depth: int) -> Node:
        """An int over b, h, i and j. Divisors are positive."""
        if depth <= 0:
            leaves = [self.graph.index(name) for name in ("i", "j", "i", "j", "h")]
            leaves += [self.graph.size("j"), self.parameter("w", Base.INT)]
            return self.draw(st.sampled_from(leaves) | st.integers(-4, 7).map(self.graph.literal))
        options = [self._sum, self._sum, self._scaled, self._divided, self._divided, self._sign, self._extreme]
        return self.choose(*options, self._chosen, self.integer_leaf, depth=depth)

    def integer_leaf(self, depth: int) -> Node:
        return self.integer(0)

    def _sum(self, depth: int) -> Node:
        op = self.draw(st.sampled_from(["add", "sub"]))
        return self.graph.make(op, self.integer(depth - 1), self.integer(depth - 1))

    def _scaled(self, depth: int) -> Node:
        return self.graph.make("mul", self.graph.literal(self.draw(st.integers(-3, 3))), self.integer(depth - 1))

    def _divided(self, depth: int) -> Node:
        op = self.draw(st.sampled_from(["floordiv", "mod"]))
        return self.graph.make(op, self.integer(depth - 1), self.divisor())

    def divisor(self) -> Node:
        return self.draw(st.sampled_from([self.parameter("p", Base.INT), *map(self.graph.literal, (1, 2, 3, 5))]))

    def _sign(self, depth: int) -> Node:
        return self.graph.make(self.draw(st.sampled_from(["neg", "abs"])), self.integer(depth - 1))

    def _extreme(self, depth: int) -> Node:
        op = self.draw(st.sampled_from(["minimum", "maximum"]))
        return self.graph.make(op, self.integer(depth - 1), self.integer(depth - 1))

    def _chosen(self, depth: int) -> Node:
        return self.graph.make("select", self.boolean(depth - 1), self.integer(depth - 1), self.integer(depth - 1))

    def comparison(self, depth: int) -> Node:
        op = self.draw(st.sampled_from(["lt", "le", "eq"]))
        return self.graph.make(op, self.integer(depth), self.integer(depth))

    def boolean(self, depth: int) -> Node:
        """A condition over b, h, i and j."""
        if depth <= 0:
            flag = self.parameter("f", Base.BOOL)
            return self.draw(st.sampled_from([flag, self.graph.literal(True), self.graph.literal(False)]))
        options = [self._compared, self._compared, self._joined, self._joined, self._negated, self._compared_real]
        return self.choose(*options, lambda depth: self.boolean(0), depth=depth)

    def _compared(self, depth: int) -> Node:
        op = self.draw(st.sampled_from(["lt", "le", "eq", "ne"]))
        return self.graph.make(op, self.integer(depth - 1), self.integer(depth - 1))

    def _compared_real(self, depth: int) -> Node:
        op = self.draw(st.sampled_from(["lt", "le", "eq", "ne"]))
        return self.graph.make(op, self.real(depth - 1), self.real(depth - 1))

    def _joined(self, depth: int) -> Node:
        op = self.draw(st.sampled_from(["and", "or"]))
        return self.graph.make(op, self.boolean(depth - 1), self.boolean(depth - 1))

    def _negated(self, depth: int) -> Node:
        return self.graph.make("not", self.boolean(depth - 1))

    def real(self, depth: int) -> Node:
        """A real score over b, h, i and j."""
        if depth <= 0:
            slope = self.graph.make("input", type=Type(Base.REAL, frozenset({"h"})), attribute="slope")
            literals = [self.graph.literal(x) for x in (0.0, 1.0, 2.0, -1.5)]
            return self.draw(st.sampled_from([slope, *literals, self.read_token(0), self.scores(0)]))
        return self.choose(
            self._real_pair,
            self._real_pair,
            self._real_unary,
            self.read_token,
            self.scores,
            self._real_int,
            depth=depth,
        )

    def _real_pair(self, depth: int) -> Node:
        op = self.draw(st.sampled_from(["add", "sub", "mul", "div", "minimum", "maximum", "select", "pow"]))
        if op == "pow":
            return self.graph.make("pow", self.real(depth - 1), self.graph.literal(self.draw(st.integers(1, 3))))
        if op == "select":
            return self.graph.make("select", self.boolean(depth - 1), self.real(depth - 1), self.real(depth - 1))
        return self.graph.make(op, self.real(depth - 1), self.real(depth - 1))

    def _real_unary(self, depth: int) -> Node:
        op = self.draw(st.sampled_from(["neg", "abs", "tanh", "relu"]))
        return self.graph.make(op, self.real(depth - 1))

    def _real_int(self, depth: int) -> Node:
        return self.graph.make("to_real", self.integer(depth - 1))

    def read_token(self, depth: int) -> Node:
        """An expression of tokens, read at i or j."""
        token = self.graph.make("input", type=Type(Base.REAL, frozenset({"t"})), attribute="gate")
        for _ in range(depth):
            op = self.draw(st.sampled_from(["add", "mul"]))
            where = self.graph.make("to_real", self.graph.index("t"))
            token = self.graph.make(op, token, self.draw(st.sampled_from([where, self.graph.literal(2.0), token])))
        target = self.draw(st.sampled_from("ij"))
        indices = token.type.indices - {"t"} | {target}
        return self.graph.make("rename", token, type=Type(Base.REAL, indices), attribute=("t", target))

    def scores(self, depth: int) -> Node:
        """q @ k, each perhaps times or over a scalar."""
        sides = []
        for name, index in (("q", "i"), ("k", "j")):
            side = self.graph.make("input", type=Type(Base.REAL, frozenset({index}), ("d",)), attribute=name)
            if depth > 0 and self.draw(st.booleans()):
                scalar = self.draw(st.sampled_from([self.parameter("scale", Base.REAL), self.graph.literal(4.0)]))
                op = self.draw(st.sampled_from(["mul", "div"]))
                swapped = op == "mul" and self.draw(st.booleans())
                side = self.graph.make(op, *((scalar, side) if swapped else (side, scalar)))
            sides.append(side)
        return self.graph.make("dot", *sides, type=Type(Base.REAL, frozenset("ij")), attribute="d")

    def parameter(self, name: str, base: Base) -> Node:
        return self.graph.make("parameter", type=Type(base), attribute=name)


@st.composite
def graphs(draw: st.DrawFn, kind: str, depth: int = 4) -> tuple[Graph, Node]:
    """A graph and a root: `integer`, `comparison`, `boolean` or `real`."""
    maker = Maker(draw)
    return maker.graph, getattr(maker, kind)(depth)


@st.composite
def places(draw: st.DrawFn) -> At:
    """A place: everything that a random graph reads."""
    keys = draw(st.integers(1, 12))
    rows = draw(st.integers(1, 12))
    positions = {"i": draw(st.integers(0, rows - 1)), "j": draw(st.integers(0, keys - 1)), "h": draw(st.integers(0, 2))}
    parameters = {"w": draw(st.integers(-3, 6)), "p": draw(st.integers(1, 6)), "f": draw(st.booleans()), "scale": 0.5}
    return At(positions, parameters, {"i": rows, "j": keys}, INPUTS)


INPUTS: Mapping[str, Callable[..., Value]] = {
    "slope": lambda h: 0.25 + h,
    "gate": lambda t: 0.5 * t - 1.0,
    "q": lambda i: [i + 0.5, 1.0 - i, 0.25],
    "k": lambda j: [1.0, j - 2.0, 3.0 * j],
}

"""Values of graph nodes at given positions, in numpy: a plain reading of the op table for tests."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import combinations_with_replacement
from math import factorial, prod, sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnc.compiler.ir import Node

Value = Any  # a number, or an array over the node's vector axes
LENGTH = 7

POINTWISE: dict[str, Callable[..., Value]] = {
    "to_real": lambda x: np.asarray(x, dtype=np.float64),
    "neg": np.negative,
    "abs": np.abs,
    "exp": np.exp,
    "log": np.log,
    "relu": lambda x: np.maximum(x, 0.0),
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "softplus": lambda x: np.log1p(np.exp(x)),
    "elu": lambda x: np.where(x > 0, x, np.exp(np.minimum(x, 0)) - 1),
    "sin": np.sin,
    "cos": np.cos,
    "sqrt": np.sqrt,
    "tanh": np.tanh,
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "floordiv": np.floor_divide,
    "mod": np.mod,
    "pow": np.power,
    "maximum": np.maximum,
    "minimum": np.minimum,
    "lt": np.less,
    "le": np.less_equal,
    "eq": np.equal,
    "and": np.logical_and,
    "or": np.logical_or,
    "not": np.logical_not,
    "select": np.where,
}


@dataclass(frozen=True)
class World:
    """Tensors laid out by the indices of their nodes, then vector axes; one batch row and one head."""

    tensors: Mapping[str, NDArray[Any]]
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def at(self, node: Node, **positions: int) -> Value:
        """The value of a node at positions of i, j and t."""
        if node.op in POINTWISE:
            return POINTWISE[node.op](*(self.at(arg, **positions) for arg in node.args))
        return RULES[node.op](self, node, positions)


Rule = Callable[[World, Node, Mapping[str, int]], Value]


def _input(world: World, node: Node, positions: Mapping[str, int]) -> Value:
    tensor = world.tensors[str(node.attribute)]
    return tensor[tuple(positions[name] for name in "ijt" if name in node.type.indices)]


def _rename(world: World, node: Node, positions: Mapping[str, int]) -> Value:
    assert isinstance(node.attribute, tuple)
    source, target = node.attribute
    return world.at(node.args[0], **{**positions, str(source): positions[str(target)]})


def _shift(world: World, node: Node, positions: Mapping[str, int]) -> Value:
    place = int(world.at(node.args[1], **positions))
    if not 0 <= place < LENGTH:
        return np.zeros_like(world.at(node.args[0], **{**positions, str(node.attribute): 0}))
    return world.at(node.args[0], **{**positions, str(node.attribute): place})


def _cumsum(world: World, node: Node, positions: Mapping[str, int]) -> Value:
    body, condition = node.args
    places = [{**positions, "t": at} for at in range(positions["t"] + 1)]
    return sum(world.at(body, **place) for place in places if world.at(condition, **place))


def _dot(world: World, node: Node, positions: Mapping[str, int]) -> Value:
    x, y = (world.at(arg, **positions) for arg in node.args)
    left, right = (arg.type.axes.index(str(node.attribute)) for arg in node.args)
    return np.tensordot(x, y, axes=(left, right))


def _softmax(world: World, node: Node, positions: Mapping[str, int]) -> Value:
    x = np.exp(world.at(node.args[0], **positions))
    return x / x.sum()


def symmetric(x: NDArray[Any], degree: int) -> NDArray[Any]:
    """Monomials of the elements, each times the square root of how many orders it has."""
    found = []
    for places in combinations_with_replacement(range(len(x)), degree):
        orders = factorial(degree) // prod(factorial(places.count(at)) for at in set(places))
        found.append(sqrt(orders) * prod(x[at] for at in places))
    return np.asarray(found)


def _features(world: World, node: Node, positions: Mapping[str, int]) -> Value:
    return np.concatenate([np.atleast_1d(world.at(arg, **positions)) for arg in node.args])


def _symmetric(world: World, node: Node, positions: Mapping[str, int]) -> Value:
    assert isinstance(node.attribute, int)
    return symmetric(world.at(node.args[0], **positions), node.attribute)


RULES: dict[str, Rule] = {
    "literal": lambda world, node, positions: node.attribute,
    "parameter": lambda world, node, positions: world.parameters[str(node.attribute)],
    "size": lambda world, node, positions: LENGTH,
    "index": lambda world, node, positions: positions.get(str(node.attribute), 0),
    "input": _input,
    "rename": _rename,
    "shift": _shift,
    "cumsum": _cumsum,
    "dot": _dot,
    "softmax": _softmax,
    "sum": lambda world, node, positions: world.at(node.args[0], **positions).sum(),
    "outer": lambda world, node, positions: np.outer(*(world.at(arg, **positions) for arg in node.args)),
    "take": lambda world, node, positions: world.at(node.args[0], **positions)[
        int(world.at(node.args[1], **positions))
    ],
    "concat": _features,
    "features": _features,
    "kronecker": lambda world, node, positions: np.outer(*(world.at(arg, **positions) for arg in node.args)).ravel(),
    "symmetric": _symmetric,
}

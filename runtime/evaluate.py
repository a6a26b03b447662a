"""The torch meaning of the graph's ops: a node's value at given positions.

The executor asks for scores and masks of a tile, the prologue for whole rows or columns. Positions are tensors of
one rank that broadcast together, one a index, so that a tile is evaluated as it lies, whatever its shape.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attnc.compiler.ir import Node
from attnc.compiler.plan import Plan
from attnc.dsl.diagnostics import InternalError
from attnc.dsl.types import Base
from attnc.runtime.compute.hashing import uniform

if TYPE_CHECKING:
    from attnc.runtime.call import Call


def _softplus(x: Tensor) -> Tensor:
    return x.clamp(min=0) + torch.log1p(torch.exp(-x.abs()))


def _floor_divide(x: Tensor, y: Tensor) -> Tensor:
    return torch.div(x, _divisor(y), rounding_mode="floor")


def _modulo(x: Tensor, y: Tensor) -> Tensor:
    return torch.remainder(x, _divisor(y))


def _divisor(y: Tensor) -> Tensor:
    """Divisors without zeros. A parameter's was checked; one that varies by position may be 0 where no pair is live."""
    if y.is_floating_point():
        return y
    return torch.where(y == 0, 1, y)


MEANING: dict[str, Callable[..., Tensor]] = {
    "neg": torch.neg,
    "not": torch.logical_not,
    "abs": torch.abs,
    "exp": torch.exp,
    "log": torch.log,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "relu": torch.relu,
    "elu": torch.nn.functional.elu,
    "silu": torch.nn.functional.silu,
    "softplus": _softplus,
    "sin": torch.sin,
    "cos": torch.cos,
    "sqrt": torch.sqrt,
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.true_divide,
    "floordiv": _floor_divide,
    "mod": _modulo,
    "pow": torch.pow,
    "minimum": torch.minimum,
    "maximum": torch.maximum,
    "lt": torch.lt,
    "le": torch.le,
    "eq": torch.eq,
    "ne": torch.ne,
    "and": torch.logical_and,
    "or": torch.logical_or,
    "select": torch.where,
    "floor": lambda x: torch.floor(x).to(torch.int64),
    "to_real": lambda x: x,  # the cast itself is the environment's, which knows the type of reals
}


class Environment:
    """Positions at which nodes are evaluated.

    `positions`: index -> int64 tensor, all of one rank and broadcastable; `i` is global. A value is a scalar
    tensor, or has that rank and then its vector axes. Reals are of type `real`. `dot`: q @ k at these positions.
    `blocks`: width of a declared axis of blocks.
    """

    def __init__(
        self,
        plan: Plan,
        call: Call,
        positions: Mapping[str, Tensor],
        real: torch.dtype,
        *,
        dot: Tensor | None = None,
        blocks: Mapping[str, int] | None = None,
    ) -> None:
        self.plan = plan
        self.call = call
        self.positions = dict(positions)
        self.real = real
        self.dot = dot
        self.blocks = dict(blocks or {})
        self.rank = next(iter(self.positions.values())).dim()
        self._values: dict[Node, Tensor] = {}

    def value(self, root: Node) -> Tensor:
        """The value of a node; every node below is evaluated once."""
        values = self._values
        stack = [root]
        while stack:
            node = stack[-1]
            missing = [] if node in values else [arg for arg in self._operands(node) if arg not in values]
            if missing:
                stack += missing
                continue
            if node not in values:
                values[node] = self._compute(node)
            stack.pop()
        return values[root]

    def at(self, **positions: Tensor) -> Environment:
        """The same with other positions of some indices."""
        return Environment(
            self.plan,
            self.call,
            self.positions | positions,
            self.real,
            dot=self.dot,
            blocks=self.blocks,
        )

    @staticmethod
    def _operands(node: Node) -> tuple[Node, ...]:
        """Arguments that are evaluated at the same positions."""
        if node.op in ("rename", "dot"):
            return ()
        return node.args[1:] if node.op == "shift" else node.args

    def _compute(self, node: Node) -> Tensor:
        if node.op in MEANING:
            operands = self._aligned(node)
            if node.op == "to_real" or (node.type.base is Base.REAL and node.op != "select"):
                operands = [operand if operand.dtype == self.real else operand.to(self.real) for operand in operands]
            return MEANING[node.op](*operands)
        rule = RULES.get(node.op)
        if rule is None:
            raise InternalError(f"no evaluation of {node.op}")
        return rule(self, node)

    def _aligned(self, node: Node) -> list[Tensor]:
        """The operands' values: one without vector axes broadcasts against those with."""
        most = max(len(arg.type.axes) for arg in node.args)
        aligned = []
        for arg in node.args:
            value, missing = self._values[arg], most - len(arg.type.axes)
            aligned.append(value[(..., *(None,) * missing)] if value.dim() and missing else value)
        return aligned

    def read(self, node: Node, tensor: Tensor, layout: Sequence[str]) -> Tensor:
        """A tensor, laid out by index and axis names, at the positions."""
        places, tail = [], []
        for at, axis in enumerate(layout):
            if axis in node.type.indices:
                places.append(at)
            elif axis in node.type.axes:
                tail.append(at)
        tail.sort(key=lambda at: node.type.axes.index(layout[at]))
        single = [at for at in range(len(layout)) if at not in places and at not in tail]
        tensor = tensor.permute((*places, *tail, *single))
        for _ in single:
            tensor = tensor.select(-1, 0)
        if not places:
            value = self._cast(node, tensor)
            return value[(None,) * self.rank] if tail else value
        place = tuple(self._place(layout[at], tensor.shape[n]) for n, at in enumerate(places))
        return self._cast(node, tensor[place])

    def _cast(self, node: Node, tensor: Tensor) -> Tensor:
        """Reals to the type of reals, ints to int64."""
        if node.type.base is Base.BOOL:
            return tensor
        return tensor.to(self.real if node.type.base is Base.REAL else torch.int64)

    def _place(self, index: str, length: int) -> Tensor:
        """Positions along one axis of a tensor: rows count from the call's offset, heads may be shared."""
        position = self.positions[index]
        if index == "i":
            return position - self.call.offset if self.call.offset else position
        if index == "h" and length != self.call.sizes["h"]:
            return position // (self.call.sizes["h"] // length)
        return position

    def length(self, index: str) -> int:
        return self.call.sizes[index]


def _literal(at: Environment, node: Node) -> Tensor:
    return _scalar(at, node, node.attribute)


def _parameter(at: Environment, node: Node) -> Tensor:
    return _scalar(at, node, at.call.parameters[str(node.attribute)])


def _size(at: Environment, node: Node) -> Tensor:
    return _scalar(at, node, at.length(str(node.attribute)))


def _scalar(at: Environment, node: Node, value: object) -> Tensor:
    dtype = {Base.REAL: at.real, Base.INT: torch.int64, Base.BOOL: torch.bool}[node.type.base]
    return torch.tensor(value, dtype=dtype)


def _index(at: Environment, node: Node) -> Tensor:
    return at.positions[str(node.attribute)]


def _start(at: Environment, node: Node) -> Tensor:
    name = str(node.attribute)
    return (at.positions[name] * at.blocks[name]).clamp(max=at.length("j"))


def _stop(at: Environment, node: Node) -> Tensor:
    name = str(node.attribute)
    return ((at.positions[name] + 1) * at.blocks[name]).clamp(max=at.length("j"))


def _input(at: Environment, node: Node) -> Tensor:
    name = str(node.attribute)
    layout = next((one.axes for one in at.plan.inputs if one.name == name), None)
    if layout is None:
        raise InternalError(f"{name} is read outside of q @ k")
    return at.read(node, at.call.inputs[name], layout)


def _derived(at: Environment, node: Node) -> Tensor:
    return at.read(node, at.call.derived[str(node.attribute)], (*node.type.ordered_indices(), *node.type.axes))


def _dot(at: Environment, node: Node) -> Tensor:
    if at.dot is None:
        raise InternalError("q @ k is not at hand here")
    return at.dot


def _rename(at: Environment, node: Node) -> Tensor:
    assert isinstance(node.attribute, tuple)
    source, target = node.attribute
    return at.at(**{str(source): at.positions[str(target)]}).value(node.args[0])


def _shift(at: Environment, node: Node) -> Tensor:
    """Read at another position; what lies outside reads 0."""
    index = str(node.attribute)
    position = at.value(node.args[1])
    origin = at.call.offset if index == "i" else 0
    last = origin + at.length(index) - 1
    inside = (position >= origin) & (position <= last)
    found = at.at(**{index: position.clamp(origin, last)}).value(node.args[0])
    inside = inside[(..., *(None,) * len(node.type.axes))]
    return torch.where(inside, found, torch.zeros((), dtype=found.dtype))


def _take(at: Environment, node: Node) -> Tensor:
    """One element of a vector axis; what lies outside reads 0. A derived table is never read outside."""
    source, place = node.args
    vector, position = at.value(source), at.value(place)
    if vector.dim() == 0 or position.dim() == 0:
        position = position.expand((1,) * at.rank) if position.dim() == 0 else position
    along = source.type.axes.index(str(node.attribute))
    vector = vector.movedim(at.rank + along, at.rank)
    length, tail = vector.shape[at.rank], vector.shape[at.rank + 1 :]
    held = position if source.op == "derived" else position.clamp(0, length - 1)
    if all(size == 1 for size in vector.shape[: at.rank]):
        found = vector.reshape(length, *tail)[held]
    else:
        shape = torch.broadcast_shapes(vector.shape[: at.rank], held.shape)
        vector = vector.expand(*shape, length, *tail)
        if vector.requires_grad:  # the gradient of a gather sums in any order on a GPU, that of a read in one
            places = [
                torch.arange(size, device=vector.device).view(-1, *(1,) * (at.rank - n - 1))
                for n, size in enumerate(shape)
            ]
            found = vector[(*places, held.expand(shape))]
        else:
            index = held.expand(shape).reshape(*shape, 1, *(1,) * len(tail)).expand(*shape, 1, *tail)
            found = torch.gather(vector, at.rank, index).squeeze(at.rank)
    if source.op == "derived":
        return found
    inside = ((position >= 0) & (position < length))[(..., *(None,) * len(tail))]
    return torch.where(inside, found, torch.zeros((), dtype=found.dtype))


def _uniform(at: Environment, node: Node) -> Tensor:
    return uniform([at.value(arg) for arg in node.args]).to(at.real)


RULES: dict[str, Callable[[Environment, Node], Tensor]] = {
    "literal": _literal,
    "parameter": _parameter,
    "size": _size,
    "index": _index,
    "start": _start,
    "stop": _stop,
    "input": _input,
    "derived": _derived,
    "dot": _dot,
    "rename": _rename,
    "shift": _shift,
    "take": _take,
    "uniform": _uniform,
}

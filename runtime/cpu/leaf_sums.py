"""Sums of a score's cotangent over pairs: the gradients of its leaves on a CPU (see `compiler.differentiate.Leaf`)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attnc.compiler.differentiate import Leaf
from attnc.compiler.ir import Node, walk
from attnc.compiler.plan import Plan
from attnc.runtime.backward import table_shape
from attnc.runtime.call import Call
from attnc.runtime.cpu.batches import Shifted, Step
from attnc.runtime.cpu.distances import Line, by_distance
from attnc.runtime.evaluate import Environment

if TYPE_CHECKING:
    from attnc.runtime.cpu.executor import Work

# Finite wherever their operands are, so that a dead pair, whose cotangent is 0, gives 0 and never NaN.
FINITE = frozenset({"literal", "parameter", "size", "index", "input", "derived", "rename", "take", "dot", "to_real"})
FINITE |= {"neg", "abs", "tanh", "sigmoid", "relu", "elu", "sin", "cos", "add", "sub", "mul", "floordiv", "mod"}
FINITE |= {"minimum", "maximum", "select", "lt", "le", "eq", "ne", "and", "or", "not"}


class Derivative:
    """What a cotangent of the score is multiplied with: over pairs, or over fewer of their indices."""

    def __init__(self, plan: Plan, call: Call, node: Node) -> None:
        self.node = node
        self.finite = all(one.op in FINITE for one in walk(node))
        self.line = Line(plan, call, node, call.compute_dtype) if by_distance(node) else None

    def value(self, work: Work, step: Step, at: Environment) -> Tensor:
        """Broadcasts against (x, tiles, g, rows, keys)."""
        found = self.line.pairs(work, step) if self.line else None
        return at.value(self.node) if found is None else found

    def times(self, change: Tensor, work: Work, step: Step, at: Environment) -> Tensor:
        """The product with a cotangent (x, tiles, g, rows, keys)."""
        if self.node.op == "literal" and self.node.attribute == 1:
            return change
        product = change * self.value(work, step, at)
        return product if self.finite else torch.where(change == 0, 0, product)


@dataclass(frozen=True)
class LeafSum:
    """The gradient of a leaf while it is summed.

    total: (B, Hk, g, ..) in whole, (x, g, ..) for lanes; over the rows, the keys, or the cells of a table. A table
    read at a distance collects by distance first, in `distances` (.., N + M - 1). Tables are summed in float64: a
    cell takes many pairs one after the other.
    """

    leaf: Leaf
    derivative: Derivative
    total: Tensor
    distances: Tensor | None

    @classmethod
    def zero(cls, plan: Plan, call: Call, leaf: Leaf) -> LeafSum:
        heads = (call.sizes["b"], call.k.shape[1], call.sizes["h"] // call.k.shape[1])
        derivative = Derivative(plan, call, leaf.adjoint)
        rows, keys = call.sizes["i"], call.sizes["j"]
        if leaf.side != "pair":
            length = rows if leaf.side == "row" else keys
            return cls(leaf, derivative, torch.zeros(*heads, length, dtype=call.compute_dtype), None)
        total = torch.zeros(*heads, *table_shape(leaf, call)[2:], dtype=torch.float64)
        far = torch.zeros(*heads, rows + keys - 1, dtype=torch.float64) if by_distance(leaf.value) else None
        return cls(leaf, derivative, total, far)

    def lanes(self, *place: slice) -> LeafSum:
        """Of some heads: views, so that what is added there is in the whole."""
        far = None if self.distances is None else self.distances[place].flatten(0, 1)
        return replace(self, total=self.total[place].flatten(0, 1), distances=far)

    def part(self, start: int, stop: int) -> LeafSum:
        """Of some lanes."""
        far = None if self.distances is None else self.distances[start:stop]
        return replace(self, total=self.total[start:stop], distances=far)

    def add(self, work: Work, step: Step, change: Tensor, at: Environment) -> None:
        """Adds what a step gives. `change`: cotangent of the score, (x, tiles, g, rows, keys)."""
        if self.leaf.side == "row" and not self.leaf.adjoint.depends_on("j"):
            amount = self.derivative.times(change.sum(-1, keepdim=True), work, step, at)
        else:
            amount = self.derivative.times(change, work, step, at)
        if self.leaf.side == "row":
            work.batch.rows.add(self.total.unsqueeze(-1), amount.sum(-1, keepdim=True).transpose(1, 2))
        elif self.leaf.side == "pair":
            if not self.add_by_distance(work, step, amount):
                self.add_cells(work, step, amount, at)
        elif step.per_row:
            step.keys.add(self.total.unsqueeze(-1), amount.transpose(1, 2).unsqueeze(-1))
        else:
            step.keys.add(self.total.unsqueeze(-1), amount.sum(3).transpose(1, 2).unsqueeze(-1))

    def add_by_distance(self, work: Work, step: Step, amount: Tensor) -> bool:
        """Sums the diagonals of every tile; False where its positions are no progressions of one step."""
        rows, keys = work.batch.rows, step.keys
        if self.distances is None or not (isinstance(rows, Shifted) and isinstance(keys, Shifted)):
            return False
        if rows.step != keys.step and rows.count > 1 and keys.count > 1:
            return False
        stride = keys.step if keys.count > 1 else rows.step
        # The last row first, each row one place further to the right: diagonals become columns.
        width = rows.count + keys.count - 1
        shape = amount.shape[:3]
        skewed = amount.new_zeros(*shape, rows.count, width + 1)
        skewed[..., : keys.count] = amount.flip(3)
        columns = skewed.flatten(3)[..., : rows.count * width].view(*shape, rows.count, width).sum(3)
        last = rows.start + rows.step * (rows.count - 1)
        first = keys.start - last + work.call.sizes["i"] - 1
        places = Shifted(first, keys.shift - rows.shift, stride, keys.tiles, width)
        if places.shift < 0:
            places = replace(places, start=first + places.shift * (keys.tiles - 1), shift=-places.shift)
            columns = columns.flip(1)
        places.add(self.distances.unsqueeze(-1), columns.transpose(1, 2).unsqueeze(-1))
        return True

    def add_cells(self, work: Work, step: Step, amount: Tensor, at: Environment) -> None:
        """Adds the amounts to the cells that the pairs read."""
        x, tiles, shared, rows = work.shape
        cell, inside = self.cells(at)
        table, stride = self.leaf.value.args[0], self.total.shape[-1]
        if table.depends_on("j"):
            cell = cell + step.positions().clamp(min=0) * stride
            stride *= work.call.sizes["j"]
        if table.depends_on("i"):
            cell = cell + (work.rows - work.call.offset) * stride
        amount = torch.where(inside, amount, 0).transpose(1, 2).reshape(x, shared, -1).double()
        lanes, _, members = cell.shape[:3]
        cell = cell.expand(lanes, tiles, members, rows, amount.shape[-1] // (tiles * rows))
        cell = cell.transpose(1, 2).reshape(lanes, members, -1).expand(amount.shape)
        self.total.view(x, shared, -1).scatter_add_(2, cell, amount)

    def cells(self, at: Environment) -> tuple[Tensor, Tensor]:
        """Which element of the table's axis is read, and whether there is one."""
        cell: Tensor = at.value(self.leaf.value.args[1])
        length = self.total.shape[-1]
        return cell.clamp(0, length - 1), (cell >= 0) & (cell < length)

    def result(self, plan: Plan, call: Call) -> Tensor:
        """The gradient as `BranchGradients` has it."""
        total = self.total.flatten(1, 2)
        if self.distances is None:
            return total
        amount = self.distances.flatten(1, 2)
        positions: dict[str, Any] = call.positions("b", "h", "j")
        distance = call.offset + call.sizes["i"] - 1 - torch.arange(amount.shape[-1])
        positions |= {"i": distance.view(1, 1, -1), "j": torch.zeros(1, 1, 1, dtype=torch.int64)}
        cell, inside = self.cells(Environment(plan, call, positions, call.compute_dtype))
        amount = torch.where(inside, amount, 0)
        return total.scatter_add(2, cell.expand(amount.shape), amount)

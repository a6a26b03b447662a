"""Values over the tokens of one call of decoding: `Compute` steps where the sequence goes on from a cache.

Positions count from the first new token, members of blocks from the first that is not whole. What needs earlier values
(prefix sums, shifted reads, pools) has them in a `Trail`, which the call leaves as the next one needs it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from attnc.compiler.cache_plan import TOKENS, Trailing
from attnc.compiler.ir import Node
from attnc.runtime.compute.arrays import RULES, Arrays, Frame, Members
from attnc.runtime.scalars import of_node


@dataclass
class Trail:
    """What trailing nodes keep, by node: the running sum, the last values, or those of members not whole yet."""

    values: dict[Node, Tensor] = field(default_factory=dict)
    most: dict[Node, int] = field(default_factory=dict)  # bytes that a node's values take at most

    @property
    def nbytes(self) -> int:
        return sum(value.nbytes for value in self.values.values())

    def keep(self, node: Node, values: Tensor, place: int, most: int) -> None:
        """Keeps a copy of values, at most so many along dimension `place` in any call: where they were, if they fit."""
        before = self.values.get(node)
        if before is not None and before.shape == values.shape and before.dtype == values.dtype:
            before.copy_(values)
            return
        self.values[node] = values.clone()
        shape = list(values.shape)
        shape[place] = most
        self.most[node] = values.element_size() * math.prod(shape)


@dataclass(frozen=True)
class Stretch:
    """Tokens start .. start + count of the sequence, and of every axis of blocks the members that become whole."""

    start: int
    count: int
    members: Mapping[str, Members]  # by axis: those of the whole sequence, counted up to its end
    first: Mapping[str, int]

    @staticmethod
    def of(frame: Frame, start: int, count: int) -> Stretch:
        """`frame`: of the new tokens."""
        members, first = {}, {}
        for name, axis in frame.axes.items():
            sizes = {**frame.sizes, axis.over: start + count}
            one = replace(frame, sizes=sizes, offset=0, members={}).axis(name)
            members[name] = replace(one, count=whole(one, start + count))
            first[name] = whole(one, start)
        return Stretch(start, count, members, first)

    def new(self, axis: str) -> int:
        """How many members become whole."""
        return self.members[axis].count - self.first[axis]


def whole(members: Members, length: int) -> int:
    """Members that lie wholly in so many positions."""
    return max((length - members.width) // members.stride + 1, 0)


def framed(frame: Frame, stretch: Stretch) -> Frame:
    """The frame of the new tokens and members alone: every index over the sequence begins at the first of them."""
    members = {
        name: replace(one, count=stretch.new(name), length=stretch.new(name) * one.stride)
        for name, one in stretch.members.items()
    }
    return replace(frame, sizes={**frame.sizes, **dict.fromkeys("ijt", stretch.count)}, offset=0, members=members)


class NewTokens(Arrays):
    """Evaluates nodes at the new tokens. `frame`: see `framed`. `begin` (b,): where the first one stands, for all rows
    alike, if the device counts."""

    def __init__(
        self,
        frame: Frame,
        stretch: Stretch,
        trailing: Mapping[Node, Trailing],
        trail: Trail,
        begin: Tensor | None = None,
    ) -> None:
        super().__init__(frame)
        self.begin = begin
        self.stretch = stretch
        self.trailing = trailing
        self.trail = trail

    @cached_property
    def row_positions(self) -> Tensor:
        """Where rows find their token among the new ones."""
        return torch.arange(self.stretch.count, device=self.frame.device)

    def positions(self, name: str) -> Tensor:
        start: int | Tensor = self.stretch.first.get(name, 0 if name in ("b", "h") else self.stretch.start)
        if self.begin is not None and name in TOKENS:
            start = self.begin[0]
        return torch.arange(self.length(name), device=self.frame.device) + start

    def scalar(self, node: Node, value: object) -> Tensor:
        """Filled on the device: a graph cannot copy from the host."""
        if not isinstance(value, int | float):
            return super().scalar(node, value)
        return torch.full((), value, dtype=self.frame.dtype(node.type.base), device=self.frame.device)

    def _compute(self, node: Node) -> Tensor:
        if node in self.trailing:
            return {"sum": self.running, "shift": self.shifted, "pool": self.pooled}[self.trailing[node].kind](node)
        if node.op in ("start", "stop"):
            members = self.stretch.members[str(node.attribute)]
            start = self.positions(str(node.attribute)) * members.stride
            return start if node.op == "start" else start + members.width
        return super()._compute(node)

    def operand(self, node: Node, along: str) -> tuple[Tensor, int]:
        """The first operand at every new token, and the dimension of the index along which earlier ones count."""
        source = node.args[0]
        place = source.type.ordered_indices().index(along)
        return self.full(self.value(source), place, along), place

    def running(self, node: Node) -> Tensor:
        """The prefix sums go on from the last one, in float64."""
        assert isinstance(node.attribute, tuple)
        values, place = self.operand(node, str(node.attribute[0]))
        sums = values.to(torch.float64).cumsum(place)
        if node in self.trail.values:
            sums = sums + self.trail.values[node]
        self.trail.keep(node, sums.narrow(place, self.stretch.count - 1, 1), place, 1)
        return sums.to(values.dtype)

    def shifted(self, node: Node) -> Tensor:
        """The values `amount` tokens before; 0 before the first."""
        values, place = self.operand(node, str(node.attribute))
        amount = self.trailing[node].amount
        assert amount is not None
        behind = of_node(amount, self.frame.parameters, self.frame.sizes)
        assert isinstance(behind, int)
        before = self.trail.values.get(node)
        if before is None:
            shape = list(values.shape)
            shape[place] = behind
            before = values.new_zeros(shape)
        joined = torch.cat([before, values], place)
        self.trail.keep(node, joined.narrow(place, self.stretch.count, behind), place, behind)
        return joined.narrow(place, 0, self.stretch.count)

    def pooled(self, node: Node) -> Tensor:
        """The members that become whole, pooled from the values since the first of them began."""
        assert isinstance(node.attribute, tuple)
        along, within = (str(name) for name in node.attribute)
        values, place = self.operand(node, along)
        members, first, count = self.stretch.members[within], self.stretch.first[within], self.stretch.new(within)
        start = self.stretch.start
        before = self.trail.values.get(node)
        if before is not None:
            values, start = torch.cat([before, values], place), start - before.shape[place]
        skipped = min(max(first * members.stride - start, 0), values.shape[place])  # between strided members
        values = values.narrow(place, skipped, values.shape[place] - skipped)
        used = min(count * members.stride, values.shape[place])
        self.trail.keep(node, values.narrow(place, used, values.shape[place] - used), place, members.width - 1)
        length = values.shape[place]
        own = replace(members, count=count, length=length)
        at = Arrays(replace(self.frame, sizes={**self.frame.sizes, along: length}, members={within: own}))
        at.known |= {node.args[0]: values, node.args[1]: self.value(node.args[1])}
        return RULES[node.op](at, node)

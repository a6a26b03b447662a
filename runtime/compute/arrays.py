"""Values of whole arrays with torch: what a `Compute` step does, differentiable.

A value is laid out by its node's type: the indices in layout order, then the vector axes. An index that a value does
not vary over is 1 long; h is as long as the key heads where only they are read. Nothing here is over pairs of
positions: `compiler.decompose` sees to that.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor

from attnc.compiler.ir import Node
from attnc.dsl.diagnostics import InternalError
from attnc.dsl.terms import Axis
from attnc.dsl.types import BUILT_IN_INDICES, Base, Type
from attnc.runtime.evaluate import MEANING
from attnc.runtime.scalars import of_node, of_term


@dataclass(frozen=True)
class Members:
    """The members of a declared axis in one call: member n covers n * stride .. n * stride + width, up to `length`.

    `first`: the number of the member at place 0, where a frame has some of the rows only.
    """

    over: str
    count: int
    width: int
    stride: int
    length: int
    first: int = 0

    def numbers(self, device: torch.device) -> Tensor:
        return torch.arange(self.first, self.first + self.count, device=device)

    def starts(self, device: torch.device) -> Tensor:
        return (self.numbers(device) * self.stride).clamp(max=self.length)

    def stops(self, device: torch.device) -> Tensor:
        return (self.numbers(device) * self.stride + self.width).clamp(max=self.length)


Span = tuple[int, int]


@dataclass(frozen=True)
class Frame:
    """One call of a composition: its tensors by name with their layouts, and the length of everything.

    `sizes`: b h i j t d e and the axes of inputs. `offset`: global position of row 0. `real`: what reals are kept in.
    """

    tensors: Mapping[str, Tensor]
    layouts: Mapping[str, tuple[str, ...]]
    parameters: Mapping[str, int | float | bool]
    sizes: Mapping[str, int]
    offset: int
    axes: Mapping[str, Axis]
    real: torch.dtype
    device: torch.device
    members: dict[str, Members] = field(default_factory=dict)
    totals: Mapping[str, int] = field(default_factory=dict)  # lengths as the text has them, where these are a part's
    tracing: bool = False  # only shapes and types are asked for
    rounded: frozenset[str] = frozenset()  # steps whose arrays every reader rounds to the type of q
    kept: dict[str, list[Tensor]] | None = None  # by step, what forward keeps beside its results for its gradient
    spans: Mapping[str, Span] = field(default_factory=dict)  # arrays of heads first .. last alone: nobody needs others

    def axis(self, name: str) -> Members:
        """The members of a declared axis."""
        if name not in self.members:
            self.members[name] = self._members(self.axes[name])
        return self.members[name]

    def _members(self, axis: Axis) -> Members:
        size = _whole(of_term(axis.size, self.parameters, self.sizes))
        length = self.sizes[axis.over] + (self.offset if axis.over == "i" else 0)
        if axis.kind == "segments":
            width = -(-length // size)
            return Members(axis.over, size, width, width, length)
        if axis.stride is None:
            return Members(axis.over, -(-length // size), size, size, length)
        stride = _whole(of_term(axis.stride, self.parameters, self.sizes))
        return Members(axis.over, max(0, (length - size) // stride + 1), size, stride, length)

    def length(self, name: str) -> int:
        """Length of an index or of a vector axis."""
        if name in self.axes:
            return self.axis(name).count
        return int(name) if name.isdigit() else self.sizes[name]

    def dtype(self, base: Base) -> torch.dtype:
        return {Base.REAL: self.real, Base.INT: torch.int64, Base.BOOL: torch.bool}[base]


def _whole(value: float | None) -> int:
    if value is None:
        raise InternalError("the size of an axis is not an int of parameters and sizes")
    return cast(int, value)


def layout(names: Iterable[str]) -> tuple[str, ...]:
    """Indices in layout order."""
    return Type(Base.INT, frozenset(names)).ordered_indices()


def is_index(name: str, frame: Frame) -> bool:
    """Whether a name counts positions, heads or members; else it is a vector axis."""
    return name in BUILT_IN_INDICES or name in frame.axes


class Arrays:
    """Evaluates nodes in one frame; every node once.

    `rows`: only these places of the index i (for work by chunks). `rounding`: products whose readers round them to q's
    type anyway. What is only moved stays in the type that it came in (`held`); maths is done in the type of sums.
    """

    def __init__(self, frame: Frame, rows: slice | None = None, rounding: Collection[Node] = ()) -> None:
        self.frame = frame
        self.rows = rows
        self.rounding = rounding
        self.known: dict[Node, Tensor] = {}
        self.widened: dict[Node, Tensor] = {}
        self.products: dict[Node, Tensor] = {}  # results that are at hand, of products whose gradients are wanted
        self.names: dict[str, Tensor] = {}  # states and locals of the enclosing block
        self.tables: dict[tuple[int, int], list[Tensor]] = {}  # of monomials, by width and degree

    def value(self, root: Node) -> Tensor:
        """The value of a node, in its layout; a real one in the type of sums."""
        held = self.held(root)
        if root.type.base is not Base.REAL or held.dtype == self.frame.real:
            return held
        if root not in self.widened:
            self.widened[root] = held.to(self.frame.real)
        return self.widened[root]

    def held(self, root: Node) -> Tensor:
        """The same, exact, in whatever real type it is at hand."""
        stack = [root]
        while stack:
            node = stack[-1]
            missing = [] if node in self.known else [arg for arg in first_read(node) if arg not in self.known]
            if missing:
                stack += missing
                continue
            if node not in self.known:
                self.known[node] = self._compute(node)
            stack.pop()
        return self.known[root]

    def _compute(self, node: Node) -> Tensor:
        if node.op in MEANING:
            return self._pointwise(node)
        rule = RULES.get(node.op)
        if rule is None:
            raise InternalError(f"no evaluation of {node.op} over whole arrays")
        return rule(self, node)

    def _pointwise(self, node: Node) -> Tensor:
        operands = self.aligned(node.args)
        if node.op == "to_real" or (node.type.base is Base.REAL and node.op != "select"):
            operands = [one if one.dtype == self.frame.real else one.to(self.frame.real) for one in operands]
        return MEANING[node.op](*operands)

    # Layout

    def aligned(self, nodes: Sequence[Node], read: Callable[[Node], Tensor] | None = None) -> list[Tensor]:
        """The values of nodes, broadcastable: dimensions of all their indices, then of the most vector axes."""
        indices = layout(name for node in nodes for name in node.type.indices)
        rank = max(len(node.type.axes) for node in nodes)
        return self.same_heads(indices, [self.over(node, indices, rank, read) for node in nodes])

    def over(
        self,
        node: Node,
        indices: Sequence[str],
        rank: int | None = None,
        read: Callable[[Node], Tensor] | None = None,
    ) -> Tensor:
        """A node's value with a dimension for each of `indices` (its own among them) and `rank` vector axes.

        `read`: `value`, or `held` by who can use that.
        """
        tensor, own = (read or self.value)(node), node.type.ordered_indices()
        for at, name in enumerate(indices):
            if name not in own:
                tensor = tensor.unsqueeze(at)
        for _ in range((rank or 0) - len(node.type.axes)):
            tensor = tensor.unsqueeze(-1)
        return tensor

    def same_heads(self, indices: Sequence[str], tensors: Sequence[Tensor]) -> list[Tensor]:
        """Key heads are repeated where others have every query head."""
        if "h" not in indices:
            return list(tensors)
        at = indices.index("h")
        lengths = [tensor.shape[at] for tensor in tensors if tensor.dim() > at and tensor.shape[at] != 1]
        if all(length == lengths[0] for length in lengths):  # symbolic ints, in tracing, have no hash
            return list(tensors)
        most = max(lengths)
        return [self.heads(tensor, at, most) for tensor in tensors]

    @staticmethod
    def heads(tensor: Tensor, at: int, count: int) -> Tensor:
        """A tensor with `count` heads along dimension `at`, unless it has one for all."""
        length = tensor.shape[at]
        return tensor if length in (1, count) else tensor.repeat_interleave(count // length, at)

    def full(self, tensor: Tensor, at: int, name: str) -> Tensor:
        """A tensor that has every place of an index along dimension `at`."""
        length = self.length(name)
        if name == "h" and tensor.shape[at] not in (1, length):
            return self.heads(tensor, at, length)
        shape = list(tensor.shape)
        shape[at] = length
        return tensor if tensor.shape[at] == length else tensor.expand(shape)

    def length(self, name: str) -> int:
        """Length of an index here: i may be a chunk of the rows."""
        if name == "i" and self.rows is not None:
            return len(range(*self.rows.indices(self.frame.sizes["i"])))
        return self.frame.length(name)

    @cached_property
    def row_positions(self) -> Tensor:
        """Global positions of the rows."""
        position = torch.arange(self.frame.sizes["i"], device=self.frame.device) + self.frame.offset
        return position if self.rows is None else position[self.rows]

    def positions(self, name: str) -> Tensor:
        """Positions along an index; global for i."""
        if name in self.frame.axes:
            return self.frame.axis(name).numbers(self.frame.device)
        return self.row_positions if name == "i" else torch.arange(self.length(name), device=self.frame.device)

    def scalar(self, node: Node, value: Any) -> Tensor:
        dtype = self.frame.dtype(node.type.base)
        return torch.full((), value, dtype=dtype, device=self.frame.device)  # a copy from the host would be waited for

    def integer(self, node: Node) -> int:
        """An int of parameters and sizes."""
        sizes = {**self.frame.sizes, **{name: self.frame.length(name) for name in self.frame.axes}, **self.frame.totals}
        return _whole(of_node(node, self.frame.parameters, sizes))


# Leaves


def _literal(at: Arrays, node: Node) -> Tensor:
    return at.scalar(node, node.attribute)


def _parameter(at: Arrays, node: Node) -> Tensor:
    return at.scalar(node, at.frame.parameters[str(node.attribute)])


def _size(at: Arrays, node: Node) -> Tensor:
    name = str(node.attribute)
    return at.scalar(node, at.frame.totals.get(name) or at.frame.length(name))


def _index(at: Arrays, node: Node) -> Tensor:
    return at.positions(str(node.attribute))


def _start(at: Arrays, node: Node) -> Tensor:
    return at.frame.axis(str(node.attribute)).starts(at.frame.device)


def _stop(at: Arrays, node: Node) -> Tensor:
    return at.frame.axis(str(node.attribute)).stops(at.frame.device)


def _input(at: Arrays, node: Node) -> Tensor:
    """A tensor in its node's layout; a `1` among the declared indices is one that it does not vary over."""
    name = str(node.attribute)
    tensor, declared = at.frame.tensors[name], list(at.frame.layouts[name])
    if name in at.frame.spans:
        tensor = padded(tensor, declared.index("h"), at.frame.spans[name], at.frame.sizes["h"])
    for place in reversed(range(len(declared))):
        if declared[place] == "1" and any(is_index(axis, at.frame) for axis in declared[place:]):
            tensor = tensor.select(place, 0)
            del declared[place]
    wanted = [*node.type.ordered_indices(), *node.type.axes]
    tensor = tensor.permute([declared.index(axis) for axis in wanted])
    if at.rows is not None and "i" in node.type.indices:
        along = wanted.index("i")
        start, stop, _ = at.rows.indices(tensor.shape[along])
        tensor = tensor.narrow(along, start, stop - start)
    return tensor if node.type.base is Base.REAL else tensor.to(at.frame.dtype(node.type.base))


def padded(tensor: Tensor, place: int, span: Span, count: int) -> Tensor:
    """An array of some heads with all of them. Nobody needs the others: they are 1, so that none is divided by 0."""
    before, after = (list(tensor.shape) for _ in range(2))
    before[place], after[place] = span[0], count - span[1]
    parts = [tensor.new_ones(before), tensor, tensor.new_ones(after)]
    return torch.cat([part for part in parts if part.shape[place]], place)


# Reads


def _rename(at: Arrays, node: Node) -> Tensor:
    """An array over tokens read at the keys or at the queries, which are the last ones; queries that are none are 0."""
    assert isinstance(node.attribute, tuple)
    source, target = (str(name) for name in node.attribute)
    tensor, own = at.held(node.args[0]), node.args[0].type.ordered_indices()
    place = own.index(source)
    if tensor.shape[place] != 1 or at.length(source) == 1:
        if target == "i":
            tensor = tensor.index_select(place, at.row_positions)
        elif source == "i" and at.frame.offset:
            before = list(tensor.shape)
            before[place] = at.frame.offset
            tensor = torch.cat([tensor.new_zeros(before), tensor], place)
    return arranged(tensor, [target if name == source else name for name in own], len(node.type.axes))


def arranged(tensor: Tensor, names: Sequence[str], rank: int) -> Tensor:
    """Leading dimensions `names` (indices in any order) in layout order."""
    order = [list(names).index(name) for name in layout(names)]
    return tensor.permute([*order, *range(len(order), len(order) + rank)])


Rule = Callable[[Arrays, Node], Tensor]

CONDITIONED = {"sum", "mean", "max", "min", "softmax"}


def first_read(node: Node) -> tuple[Node, ...]:
    """Operands that an op has use of in any case: sizes alone may decide a condition, and a kernel may make others."""
    if node.op == "repeat":
        return ()
    return (*node.args[:1], *node.args[2:]) if node.op in CONDITIONED else node.args


RULES: dict[str, Rule] = {
    "literal": _literal,
    "parameter": _parameter,
    "size": _size,
    "index": _index,
    "start": _start,
    "stop": _stop,
    "input": _input,
    "rename": _rename,
}

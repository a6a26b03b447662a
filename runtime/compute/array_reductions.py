"""Reductions over whole arrays with torch: over an index, a vector axis, or the members of a declared axis.

Differentiable, and what the float64 reference means: dead members take no part, an empty set gives 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attnc.compiler.ir import Node
from attnc.dsl.types import Base
from attnc.runtime.compute.arrays import RULES, Arrays, Members, arranged, layout
from attnc.runtime.compute.settling import settled


@dataclass(frozen=True)
class Reduced:
    """A body with the dimension `dim` to reduce and, where not all members take part, which are live (broadcastable).

    `indices`: names of the leading dimensions, without `dim` where an index is reduced. `rank`: vector axes left.
    """

    body: Tensor
    live: Tensor | None
    dim: int
    indices: tuple[str, ...]
    rank: int

    def filled(self, value: float) -> Tensor:
        """The body with dead members replaced."""
        return self.body if self.live is None else self.body.masked_fill(~self.live, value)

    def finish(self, tensor: Tensor) -> Tensor:
        """A result without `dim`, in layout order."""
        return arranged(tensor, self.indices, self.rank)

    def any_live(self) -> Tensor | None:
        """Whether a member is live; None: always."""
        if self.live is None:
            return None
        return self.live.expand(torch.broadcast_shapes(self.live.shape, self.body.shape)).any(self.dim)


def reduced(at: Arrays, node: Node, read: Callable[[Node], Tensor] | None = None) -> Reduced:
    """Body and condition of a reduction. `read`: the body by `held`, for rules that widen what they leave, not it."""
    assert isinstance(node.attribute, tuple)
    axis, within = node.attribute
    body, condition, *options = node.args
    axis = str(axis)
    nodes = [body, condition, *options]
    indices = layout(name for one in nodes for name in one.type.indices)
    rank = max(len(body.type.axes), len(condition.type.axes))
    nodes = [body] if settled(at, condition) else [body, condition]
    tensors = at.same_heads(indices, [at.over(one, indices, rank, read) for one in nodes])
    live = None if len(nodes) == 1 else tensors[1]
    if axis not in indices:
        axes = body.type.axes if axis in body.type.axes else condition.type.axes
        dim = len(indices) + axes.index(axis)
        tensor = _expanded(tensors[0], dim, at.frame.length(axis))
        return _full(Reduced(tensor, live, dim, indices, rank - 1))
    dim = indices.index(axis)
    tensor = at.full(tensors[0], dim, axis)
    rest = tuple(name for name in indices if name != axis)
    if within is None:
        return _full(Reduced(tensor, live, dim, rest, rank))
    live = None if live is None else at.full(live, dim, axis)
    return over_members(at, Reduced(tensor, live, dim, rest, rank), axis, str(within))


def _expanded(tensor: Tensor, dim: int, length: int) -> Tensor:
    if tensor.shape[dim] == length:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = length
    return tensor.expand(shape)


def _full(part: Reduced) -> Reduced:
    if part.live is None:
        return part
    shape = torch.broadcast_shapes(part.body.shape, part.live.shape)
    return replace(part, body=part.body.expand(shape))


def over_members(at: Arrays, part: Reduced, axis: str, within: str) -> Reduced:
    """The places of `axis` that belong to each member of `within`, which becomes an index."""
    if within in part.indices:
        raise NotImplementedError("a value that varies over the members that it is pooled into")
    members = at.frame.axis(within)
    if axis in at.frame.axes:
        places, present = _overlapping(at, axis, members)
        real: Tensor | None = present
        body = part.body.index_select(part.dim, places.flatten()).unflatten(part.dim, places.shape)
        live = part.live
        if live is not None:
            live = live.index_select(part.dim, places.flatten()).unflatten(part.dim, places.shape)
    else:
        first = at.frame.offset if axis == "i" else 0
        body, real = windows(part.body, part.dim, members, first)
        live = None if part.live is None else windows(part.live, part.dim, members, first)[0]
    if real is None:
        mask = live
    else:
        lengths = [1] * body.dim()
        lengths[part.dim : part.dim + 2] = real.shape
        mask = real.view(lengths) if live is None else live & real.view(lengths)
    indices = (*part.indices[: part.dim], within, *part.indices[part.dim :])
    return _full(Reduced(body, mask, part.dim + 1, indices, part.rank))


def windows(tensor: Tensor, dim: int, members: Members, first: int) -> tuple[Tensor, Tensor | None]:
    """Dimension `dim` (positions from `first` on) as (members, width), and which of these are there; None: all."""
    count, width, stride = members.count, members.width, members.stride
    start = members.first * stride
    first, length = first - start, members.length - start  # from the first of the members on
    needed = (count - 1) * stride + width if count else 0
    after = max(needed - length, 0)
    if first or after:
        padding = [0, 0] * (tensor.dim() - dim - 1) + [first, after]
        tensor = torch.nn.functional.pad(tensor, padding)
    real = None
    if first or after:
        place = torch.arange(count, device=tensor.device)[:, None] * stride + torch.arange(width, device=tensor.device)
        real = (place >= first) & (place < length)
    tensor = tensor.narrow(dim, 0, min(needed, tensor.shape[dim]))
    if count == 0 or width == 0:
        shape = list(tensor.shape)
        shape[dim : dim + 1] = [count, width]
        return tensor.new_zeros(shape), real
    if stride == width:
        return tensor.unflatten(dim, (count, width)), real
    return tensor.unfold(dim, width, stride).movedim(-1, dim + 1), real


def _overlapping(at: Arrays, axis: str, members: Members) -> tuple[Tensor, Tensor]:
    """For every member, the members of another declared axis whose ranges overlap: (members, most), which are real."""
    device, other = at.frame.device, at.frame.axis(axis)
    start, stop = other.starts(device), other.stops(device)
    first = torch.searchsorted(stop, members.starts(device), right=True)
    last = torch.searchsorted(start, members.stops(device))
    # Members of `axis` that touch a range of `width` positions, wherever it begins.
    most = min(other.count, (members.width + other.width - 2) // max(other.stride, 1) + 1) if members.count else 0
    places = first[:, None] + torch.arange(most, device=device)
    real = places < last[:, None]
    return places.clamp(max=max(other.count - 1, 0)), real


# Rules


def _sum(at: Arrays, node: Node) -> Tensor:
    part = reduced(at, node, at.held)
    return part.finish(_total(at, node, part))


def _total(at: Arrays, node: Node, part: Reduced) -> Tensor:
    """Sums of real values in the type of sums, whatever they are held in."""
    return part.filled(0).sum(part.dim, dtype=at.frame.real if node.type.base is Base.REAL else None)


def _mean(at: Arrays, node: Node) -> Tensor:
    part = reduced(at, node, at.held)
    total = _total(at, node, part)
    if part.live is None:
        return part.finish(total / max(part.body.shape[part.dim], 1))
    count = part.live.expand(part.body.shape).sum(part.dim).clamp(min=1)
    return part.finish(total / count)


def _extremum(largest: bool) -> Callable[[Arrays, Node], Tensor]:
    """Maximum or minimum; equal extrema share the gradient."""

    def rule(at: Arrays, node: Node) -> Tensor:
        part = reduced(at, node, at.held)
        if part.body.shape[part.dim] == 0:
            return part.finish(part.body.sum(part.dim))
        if node.type.base is Base.REAL:
            limit: float = -math.inf if largest else math.inf
        else:
            limit = torch.iinfo(torch.int64).min if largest else torch.iinfo(torch.int64).max
        body = part.filled(limit)
        found = body.amax(part.dim) if largest else body.amin(part.dim)
        alive = part.any_live()
        return part.finish(found if alive is None else found.masked_fill(~alive, 0))

    return rule


def _cumsum(at: Arrays, node: Node) -> Tensor:
    """Inclusive prefix sum, in float64: later differences of it lose less."""
    part = reduced(at, node)
    return part.filled(0).to(torch.float64).cumsum(part.dim).to(part.body.dtype)


def _option(at: Arrays, node: Node, which: int) -> Tensor | None:
    """An option of a reduction, laid out as the body: 1 long along what is reduced."""
    if len(node.args) <= which:
        return None
    nodes = node.args
    indices = layout(name for one in nodes for name in one.type.indices)
    rank = max(len(one.type.axes) for one in nodes[:2])
    value = at.over(node.args[which], indices, rank)
    return value.to(at.frame.real)


def _softmax(at: Arrays, node: Node) -> Tensor:
    part = reduced(at, node)
    sink = _option(at, node, 2)
    if part.live is None and sink is None:
        return torch.softmax(part.body, part.dim)
    if part.live is not None and sink is None and part.body.is_cuda:
        from attnc.runtime.cuda.launch_ordering import few, weigh_few  # late: it brings triton

        body, live = part.body.movedim(part.dim, -1), part.live.movedim(part.dim, -1)
        if few(body):
            return weigh_few(body, live).movedim(-1, part.dim)
    score = part.filled(-math.inf)
    if score.shape[part.dim] == 0:
        return score
    if sink is None:
        dead = score == -math.inf
        empty = dead.all(part.dim, keepdim=True)
        return torch.softmax(score.masked_fill(empty, 0), part.dim).masked_fill(dead, 0)
    top = torch.maximum(score.detach().amax(part.dim, keepdim=True), sink.detach())
    top = torch.where(top == -math.inf, torch.zeros_like(top), top)
    weights = (score - top).exp()
    total = weights.sum(part.dim, keepdim=True) + (sink - top).exp()
    return weights / torch.where(total == 0, torch.ones_like(total), total)


def _normalize(at: Arrays, node: Node) -> Tensor:
    """body / (sum + eps), or body / max(|sum + eps|, floor); a denominator of 0 gives 0."""
    part = reduced(at, node)
    body = part.filled(0)
    total = body.sum(part.dim, keepdim=True)
    eps, floor = _option(at, node, 2), _option(at, node, 3)
    return body / denominator(total, eps, floor)


def denominator(total: Tensor, eps: Tensor | None, floor: Tensor | None) -> Tensor:
    """What `normalize` divides by; infinite where it is 0, so that the quotient is 0."""
    total = total if eps is None else total + eps
    total = total if floor is None else torch.maximum(total.abs(), floor)
    return torch.where(total == 0, torch.full_like(total, math.inf), total)


def _fold(at: Arrays, node: Node) -> Tensor:
    """The vectors of each block end to end, zeros for positions that are not there."""
    (arg,) = node.args
    assert isinstance(node.attribute, tuple)
    index, axis, reverse = node.attribute
    own = arg.type.ordered_indices()
    place = own.index(str(index))
    tensor = at.full(at.value(arg), place, str(index))
    first = at.frame.offset if index == "i" else 0
    blocks, _ = windows(tensor, place, at.frame.axis(str(axis)), first)
    if reverse:
        blocks = blocks.flip(place + 1)
    blocks = blocks.movedim(place + 1, -2).flatten(-2)
    return arranged(blocks, [str(axis) if name == index else name for name in own], 1)


def _argmax(at: Arrays, node: Node) -> Tensor:
    """Global position of the largest score, ties to the lowest; -1 where there is no candidate."""
    axis = str(node.attribute)
    origin = at.frame.offset if axis == "i" else 0
    part = reduced(at, at_axis(node))
    if part.body.shape[part.dim] == 0:
        return part.finish(part.body.sum(part.dim).to(torch.int64) - 1)
    body = part.filled(-math.inf)
    body = body.detach().nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
    place = body.argmax(part.dim) + origin
    alive = part.any_live()
    return part.finish(place if alive is None else place.masked_fill(~alive, -1))


def at_axis(node: Node) -> Node:
    """A selection's node in the form of a reduction: its attribute with the (absent) group."""
    return replace(node, attribute=(str(node.attribute), None))


RULES |= {
    "sum": _sum,
    "mean": _mean,
    "max": _extremum(largest=True),
    "min": _extremum(largest=False),
    "cumsum": _cumsum,
    "softmax": _softmax,
    "normalize": _normalize,
    "argmax": _argmax,
    "fold": _fold,
}

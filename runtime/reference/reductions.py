"""Float64 meaning of reductions: over an index, over a vector axis, or over the members of a declared axis."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attnc.dsl.terms import Term
from attnc.dsl.types import Base
from attnc.runtime.reference.arrays import Array, aligned, arranged, common_shape, layout
from attnc.runtime.reference.scopes import Rule, Scope


@dataclass(frozen=True)
class Reduced:
    """A body laid out for a reduction: dimensions `others`, then the reduced one, then the vector axes left.

    `live` (bool) has the same dimensions; those of vector axes that the condition doesn't have are of size 1.
    """

    axis: str
    others: tuple[str, ...]
    axes: tuple[str, ...]
    body: Tensor
    live: Tensor
    vector_place: int | None  # place of the reduced axis among the body's vector axes

    @property
    def dim(self) -> int:
        return len(self.others)

    def filled(self, value: float | int | bool) -> Tensor:
        """The body with dead members replaced."""
        return torch.where(self.live, self.body, torch.as_tensor(value, dtype=self.body.dtype, device=self.body.device))

    def without(self, data: Tensor) -> Array:
        """The array of a result that lost the axis."""
        return arranged(data, self.others, self.axes)

    def keeping(self, data: Tensor) -> Array:
        """The array of a result that kept the axis."""
        if self.vector_place is None:
            return arranged(data, (*self.others, self.axis), self.axes)
        axes = (*self.axes[: self.vector_place], self.axis, *self.axes[self.vector_place :])
        return Array(data.movedim(self.dim, self.dim + self.vector_place), self.others, axes)


def reduced(scope: Scope, term: Term) -> Reduced:
    """Body and condition of a reduction term, in full size."""
    assert isinstance(term.attribute, tuple)
    axis, within = term.attribute
    condition = scope.value(term.args[1])
    body = scope.where(condition).value(term.args[0])
    axis = str(axis)
    for option in term.args[2:]:  # a sink of each head makes the weights vary over heads
        for name in scope.value(option).indices:
            body = body.expand(name, scope.index_size(name))
    if axis not in (*body.indices, *condition.indices) and axis in (*body.axes, *condition.axes):
        return over_vector(axis, body, condition)
    length = scope.index_size(axis)
    body = body.expand(axis, length)
    if within is not None:
        return over_members(scope, axis, str(within), body, condition.expand(axis, length))
    others = layout(name for name in (*body.indices, *condition.indices) if name != axis)
    axes = body.axes or condition.axes
    tensor, live = body.over((*others, axis), len(axes)), condition.over((*others, axis), len(axes))
    return full(Reduced(axis, others, axes, tensor, live, None))


def full(part: Reduced) -> Reduced:
    """With the body expanded to the shape that it has together with the condition."""
    body = part.body.expand(common_shape(part.body.shape, part.live.shape))
    live = part.live.expand(*body.shape[: part.dim + 1], *part.live.shape[part.dim + 1 :])
    return replace(part, body=body, live=live)


def over_vector(axis: str, body: Array, condition: Array) -> Reduced:
    """A vector axis of the body; or of the condition."""
    others, axes, tensors = aligned(body, condition)
    place = axes.index(axis)
    tensor, live = (tensor.movedim(len(others) + place, len(others)) for tensor in tensors)
    return full(Reduced(axis, others, axes[:place] + axes[place + 1 :], tensor, live, place))


def member_positions(scope: Scope, axis: str, within: str) -> tuple[Tensor, Tensor]:
    """For every member of `within`, the places along `axis` that belong to it: (members, most) and which are real.

    `axis` is a token index (its positions inside the member's range) or a declared axis (its members that
    overlap the range).
    """
    first, last = (bound[:, None] for bound in scope.members(within))
    if axis in scope.binding.axes:
        start, stop = scope.members(axis)
        belongs = (start < last) & (first < stop)
    else:
        position = torch.arange(scope.index_size(axis), device=scope.binding.device) + scope.binding.origin(axis)
        belongs = (first <= position) & (position < last)
    most = int(belongs.sum(1).max()) if belongs.numel() else 0
    places = belongs.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :most]
    return places, belongs.gather(1, places)


def over_members(scope: Scope, axis: str, within: str, body: Array, condition: Array) -> Reduced:
    """Members of `within` become an index; each reduces over the places of `axis` that belong to it."""
    places, real = member_positions(scope, axis, within)
    count = len(places)
    indices = (*body.indices, *condition.indices)
    rest = layout(name for name in indices if name not in (axis, within))
    others = (*rest, within)
    axes = body.axes or condition.axes
    tensor, live = body.over((*others, axis), len(axes)), condition.over((*others, axis), len(axes))
    at = len(rest)
    row = torch.arange(count, device=places.device)[:, None]

    def gathered(source: Tensor) -> Tensor:
        member = row if source.shape[at] == count else 0
        return source[(*(slice(None),) * at, member, places)]

    live = gathered(live) & real.reshape(*real.shape, *(1,) * len(axes))
    return full(Reduced(axis, others, axes, gathered(tensor), live, None))


# Rules


def sum_rule(scope: Scope, term: Term) -> Array:
    """Sum over the live members."""
    part = reduced(scope, term)
    return part.without(part.filled(0).sum(part.dim))


def mean_rule(scope: Scope, term: Term) -> Array:
    """Mean over the live members."""
    part = reduced(scope, term)
    count = part.live.sum(part.dim).clamp(min=1)
    return part.without(part.filled(0).to(torch.float64).sum(part.dim) / count)


def extremum(largest: bool) -> Rule:
    """Maximum or minimum; equal extrema share the gradient."""

    def rule(scope: Scope, term: Term) -> Array:
        part = reduced(scope, term)
        if part.body.shape[part.dim] == 0:
            return part.without(part.body.sum(part.dim))
        limit: float | int
        if term.type.base is Base.REAL:
            limit = -torch.inf if largest else torch.inf
        else:
            limit = torch.iinfo(torch.int64).min if largest else torch.iinfo(torch.int64).max
        body = part.filled(limit)
        found = body.amax(part.dim) if largest else body.amin(part.dim)
        return part.without(torch.where(part.live.any(part.dim), found, torch.zeros_like(found)))

    return rule


def cumsum_rule(scope: Scope, term: Term) -> Array:
    """Inclusive prefix sum; dead members add nothing."""
    part = reduced(scope, term)
    return part.keeping(part.filled(0).cumsum(part.dim))


def softmax_with_lse(scope: Scope, term: Term) -> tuple[Array, Array]:
    """Weights, and the logarithm of their denominator (-inf where no member is live and no sink is there)."""
    part = reduced(scope, term)
    dim, minus_infinity = part.dim, -torch.inf
    score = part.filled(minus_infinity)
    if score.shape[dim]:
        top = score.detach().amax(dim)
    else:
        top = score.new_full(score.shape[:dim] + score.shape[dim + 1 :], minus_infinity)
    sink = None
    if len(term.args) > 2:
        sink = scope.value(term.args[2]).over(part.others, len(part.axes))
        top = torch.maximum(top, sink.detach())
    top = torch.where(top == minus_infinity, torch.zeros_like(top), top)
    # A dead score may lie far above the live ones: its exp is infinite, and 0 * inf in the chain rule is NaN.
    shifted = torch.where(part.live, part.body - top.unsqueeze(dim), torch.zeros_like(part.body))
    weights = torch.where(part.live, shifted.exp(), torch.zeros_like(shifted))
    total = weights.sum(dim)
    if sink is not None:
        total = total + (sink - top).exp()
    empty = total == 0
    safe = torch.where(empty, torch.ones_like(total), total)
    lse = torch.where(empty, torch.full_like(total, minus_infinity), top + safe.log())
    return part.keeping(weights / safe.unsqueeze(dim)), part.without(lse)


def softmax_rule(scope: Scope, term: Term) -> Array:
    """The weights of `softmax_with_lse`."""
    return softmax_with_lse(scope, term)[0]


def normalize_rule(scope: Scope, term: Term) -> Array:
    """body / (sum + eps), or body / max(|sum + eps|, floor). A denominator of 0 gives 0."""
    part = reduced(scope, term)
    body = part.filled(0)
    total = body.sum(part.dim)
    extra = [scope.value(arg).over(part.others, len(part.axes)) for arg in term.args[2:]]
    if extra:
        total = total + extra[0]
    if len(extra) > 1:
        total = torch.maximum(total.abs(), extra[1])
    zero = total == 0
    weights = body / torch.where(zero, torch.ones_like(total), total).unsqueeze(part.dim)
    return part.keeping(torch.where(zero.unsqueeze(part.dim), torch.zeros_like(weights), weights))


def group_sum(scope: Scope, term: Term) -> Array:
    """Sum over the query heads of a key head, given to each of them."""
    value = scope.value(term.args[0]).expand("h", scope.index_size("h"))
    at, group = value.indices.index("h"), scope.binding.group
    data = value.data.unflatten(at, (-1, group)).sum(at + 1).repeat_interleave(group, at)
    return Array(data, value.indices, value.axes)


REDUCTIONS: dict[str, Rule] = {
    "sum": sum_rule,
    "mean": mean_rule,
    "max": extremum(largest=True),
    "min": extremum(largest=False),
    "cumsum": cumsum_rule,
    "softmax": softmax_rule,
    "normalize": normalize_rule,
    "group_sum": group_sum,
}

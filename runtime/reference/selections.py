"""Float64 meaning of selections. A selection is a bool array whose one vector axis is the axis chosen from.

Scores are detached: a hard selection has no gradient. Only members where the condition holds are candidates,
forced ones included; forced members come first and count among the chosen. A NaN counts as -inf: it comes after every
number, never reaches a threshold and adds nothing to a mass.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnc.dsl.terms import Term
from attnc.runtime.reference.arrays import Array, aligned, arranged, common_shape, layout
from attnc.runtime.reference.scopes import Rule, Scope


@dataclass(frozen=True)
class Ballot:
    """Scores, candidates and forced members with the axis chosen from last, after other indices and vector axes."""

    others: tuple[str, ...]
    axes: tuple[str, ...]
    score: Tensor
    candidate: Tensor
    forced: Tensor

    def ranked(self) -> Tensor:
        """Places in order of choice: forced, then by score, then by position; others last."""
        score = torch.where(self.score.isnan(), -torch.inf, self.score)
        order = score.argsort(dim=-1, descending=True, stable=True)
        group = torch.where(self.candidate, torch.where(self.forced, 0, 1), 2)
        return order.gather(-1, group.gather(-1, order).argsort(dim=-1, stable=True))


def ballot(scope: Scope, term: Term, condition: Term, force: Term | None) -> Ballot:
    """Score, condition and force of a selection in full size."""
    axis = str(term.attribute)
    live = scope.value(condition)
    score = scope.where(live).value(term.args[0])
    forced = scope.value(force) if force is not None else None
    parts = [score, live] + ([forced] if forced is not None else [])
    others, axes, _ = aligned(*parts)
    if axis in others:
        parts = [part.expand(axis, scope.index_size(axis)) for part in parts]
        others = tuple(name for name in others if name != axis)
        tensors = [part.over((*others, axis), len(axes)).movedim(len(others), -1) for part in parts]
    else:
        place = axes.index(axis)
        tensors = [part.over(others, len(axes)).movedim(len(others) + place, -1) for part in parts]
        axes = axes[:place] + axes[place + 1 :]
    shape = common_shape(*(tensor.shape for tensor in tensors))
    tensors = [tensor.expand(shape) for tensor in tensors]
    candidate = tensors[1]
    must = tensors[2] if forced is not None else torch.zeros_like(candidate)
    return Ballot(others, axes, tensors[0].detach(), candidate, must)


def bound(scope: Scope, value: Array, votes: Ballot) -> tuple[Ballot, Tensor]:
    """A count, bound or share laid out beside the votes, which take on indices that only it has."""
    extra = [name for name in value.indices if name not in votes.others]
    for name in extra:
        size = scope.index_size(name)
        parts = (votes.score, votes.candidate, votes.forced)
        score, candidate, forced = (part.unsqueeze(0).expand(size, *part.shape) for part in parts)
        votes = Ballot((name, *votes.others), votes.axes, score, candidate, forced)
    return votes, value.over(votes.others, len(votes.axes)).unsqueeze(-1)


def chosen(votes: Ballot, mask: Tensor, term: Term) -> Array:
    """The selection of a mask."""
    return arranged(mask, votes.others, (*votes.axes, str(term.attribute)))


def topk(scope: Scope, term: Term) -> Array:
    """The first `count` of the ranking; fewer candidates: all of them."""
    votes = ballot(scope, term, term.args[2], term.args[3] if len(term.args) > 3 else None)
    votes, count = bound(scope, scope.value(term.args[1]), votes)
    rank = votes.ranked().argsort(dim=-1)
    return chosen(votes, (rank < count) & votes.candidate, term)


def threshold(scope: Scope, term: Term) -> Array:
    """Candidates that reach the bound, and the forced ones."""
    votes = ballot(scope, term, term.args[2], term.args[3] if len(term.args) > 3 else None)
    votes, least = bound(scope, scope.value(term.args[1]), votes)
    return chosen(votes, votes.candidate & ((votes.score >= least.detach()) | votes.forced), term)


def mass(scope: Scope, term: Term) -> Array:
    """The shortest prefix of the ranking that covers the share, and every forced member."""
    votes = ballot(scope, term, term.args[2], term.args[3] if len(term.args) > 3 else None)
    votes, share = bound(scope, scope.value(term.args[1]), votes)
    ranked = votes.ranked()
    score = torch.where(votes.candidate & ~votes.score.isnan(), votes.score, torch.zeros_like(votes.score))
    ordered = score.gather(-1, ranked)
    before = ordered.cumsum(-1) - ordered
    needed = before < share.detach() * score.sum(-1, keepdim=True)
    taken = torch.zeros_like(votes.candidate).scatter(-1, ranked, needed)
    return chosen(votes, (taken | votes.forced) & votes.candidate, term)


def argmax(scope: Scope, term: Term) -> Array:
    """Global position of the largest score; -1 where there is no candidate."""
    votes = ballot(scope, term, term.args[1], None)
    if votes.score.shape[-1] == 0:
        return Array(torch.full(votes.score.shape[:-1], -1, device=votes.score.device), votes.others, votes.axes)
    best = votes.ranked()[..., 0] + scope.binding.origin(str(term.attribute))
    return Array(torch.where(votes.candidate.any(-1), best, -1), votes.others, votes.axes)


def member(scope: Scope, term: Term) -> Array:
    """Whether a position is in a selection, or among the (not negative) entries of an int vector.

    A token index is in a selection of blocks if one of the chosen blocks covers it; any other int is a
    position along the axis chosen from.
    """
    position, group = term.args
    where, chosen = scope.value(position), scope.value(group)
    if group.type.selects is None:
        order, _, (at, entries) = aligned(where, chosen)
        return Array(((entries == at) & (entries >= 0)).any(-1), order)
    axis = group.type.selects
    if axis in scope.binding.axes and position.form == "index" and position.attribute in ("i", "j", "t"):
        return covered(scope, axis, where, chosen)
    order = layout((*where.indices, *chosen.indices))
    mask, at = chosen.over(order), where.over(order) - scope.binding.origin(axis)
    length = mask.shape[-1]
    shape = common_shape(mask.shape[:-1], at.shape)
    if length == 0:
        return Array(torch.zeros(shape, dtype=torch.bool, device=mask.device), order)
    place = at.clamp(0, length - 1).expand(shape).unsqueeze(-1)
    found = mask.expand(*shape, length).gather(-1, place).squeeze(-1)
    return Array(found & (at >= 0) & (at < length), order)


def covered(scope: Scope, axis: str, position: Array, chosen: Array) -> Array:
    """Which token positions (one index) lie in a chosen block."""
    start, stop = scope.members(axis)
    belongs = (start[:, None] <= position.data) & (position.data < stop[:, None])
    (index,) = position.indices
    if index not in chosen.indices:
        # As a matrix product over the blocks: the number of chosen blocks that cover the position.
        count = chosen.data.to(torch.float64) @ belongs.to(torch.float64)
        return arranged(count > 0, (*chosen.indices, index), ())
    order = (*(name for name in chosen.indices if name != index), index)
    return arranged((chosen.over(order) & belongs.T).any(-1), order, ())


SELECTIONS: dict[str, Rule] = {
    "topk": topk,
    "threshold": threshold,
    "mass": mass,
    "argmax": argmax,
    "member": member,
}

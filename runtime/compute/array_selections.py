"""Selections over whole arrays with torch: bools over what is chosen from, beside one sequence at most.

A selection is laid out like every array (`runtime.compute.arrays`), with the axis chosen from as its last dimension.
The choice itself is that of `runtime.steps.choices`; it has no gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnc.compiler.ir import Node
from attnc.runtime.compute.array_reads import gathered
from attnc.runtime.compute.arrays import RULES, Arrays, arranged, layout
from attnc.runtime.steps.choices import choose_argmax, mask_mass, mask_threshold, mask_topk

MASKS = {"topk": mask_topk, "threshold": mask_threshold, "mass": mask_mass}


@dataclass(frozen=True)
class Ballot:
    """Scores, candidates and forced members (None: no member is), with the axis chosen from last."""

    indices: tuple[str, ...]
    score: Tensor
    allowed: Tensor
    forced: Tensor | None

    @property
    def members(self) -> int:
        return self.score.shape[-1]


def ballot(at: Arrays, node: Node, condition: Node, others: tuple[Node, ...], force: Node | None = None) -> Ballot:
    """What a selection chooses by. `others`: bounds and counts, whose indices it takes on."""
    axis, score = str(node.attribute), node.args[0]
    parts = [score, condition, *([force] if force is not None else [])]
    indices = layout(name for one in (*parts, *others) for name in one.type.indices)
    along = next((one.type.axes for one in parts if axis in one.type.axes), ())
    rank = max(len(one.type.axes) for one in parts)
    tensors = at.same_heads(indices, [at.over(one, indices, rank) for one in parts])
    place = indices.index(axis) if axis in indices else len(indices) + along.index(axis)
    length = at.length(axis)
    full = [
        tensor.expand([length if dim == place else size for dim, size in enumerate(tensor.shape)]).movedim(place, -1)
        for tensor in tensors
    ]
    shape = torch.broadcast_shapes(*(tensor.shape for tensor in full))
    votes, allowed, *forced = (tensor.expand(shape) for tensor in full)
    rest = tuple(name for name in indices if name != axis)
    return Ballot(rest, votes.detach(), allowed, forced[0] if forced else None)


def limit(at: Arrays, node: Node, votes: Ballot) -> Tensor:
    """A count, bound or share beside the votes, without the axis chosen from."""
    value = at.over(node, votes.indices, votes.score.dim() - 1 - len(votes.indices)).detach()
    shape = torch.broadcast_shapes(value.shape, votes.score.shape[:-1])
    return value.expand(shape)


def always(node: Node, value: bool) -> bool:
    """Whether a condition is that literal."""
    return node.op == "literal" and node.attribute is value


def _choose(at: Arrays, node: Node) -> Tensor:
    """topk, threshold and mass: (score, bound, condition, force)."""
    _, bound, condition, *rest = node.args
    force = rest[0] if rest and not always(rest[0], False) else None
    votes = ballot(at, node, condition, (bound,), force)
    value = limit(at, bound, votes)
    shape = (*value.shape, votes.members)
    score, allowed = votes.score.expand(shape), votes.allowed.expand(shape)
    forced = None if votes.forced is None else votes.forced.expand(shape)
    return MASKS[node.op](score, value, allowed, forced)


def _argmax(at: Arrays, node: Node) -> Tensor:
    """Global position of the largest score, ties to the lowest; -1 where there is no candidate."""
    votes = ballot(at, node, node.args[1], ())
    best = choose_argmax(votes.score, votes.allowed)
    origin = at.frame.offset if node.attribute == "i" else 0
    return torch.where(best < 0, -1, best + origin)


def _member(at: Arrays, node: Node) -> Tensor:
    """Whether a position is in a selection, or among the entries of an int vector that are not negative."""
    position, group = node.args
    axis = group.type.selects
    if axis is None:
        where, entries = at.aligned([position, group])
        return ((entries == where) & (entries >= 0)).any(-1)
    if axis in at.frame.axes and position.op == "index" and position.attribute in ("i", "j", "t"):
        return covered(at, node, axis)
    chosen = at.value(group)
    origin = at.frame.offset if axis == "i" else 0
    if position.op == "index" and is_own(at, str(position.attribute), axis, chosen.shape[-1]):
        return arranged(chosen, (*group.type.ordered_indices(), str(position.attribute)), 0)
    return gathered(at, node, chosen, group.type.ordered_indices(), position, origin)


def is_own(at: Arrays, index: str, axis: str, length: int) -> bool:
    """Whether the members that are chosen from are the positions of an index, in order."""
    if at.rows is not None or axis in at.frame.axes or at.length(index) != length:
        return False
    return index == axis or (axis == "t" and (index == "j" or (index == "i" and at.frame.offset == 0)))


def covered(at: Arrays, node: Node, axis: str) -> Tensor:
    """Which positions of one index lie in a chosen member of a declared axis."""
    position, group = node.args
    index, own = str(position.attribute), group.type.ordered_indices()
    members, chosen = at.frame.axis(axis), at.value(group)
    start, stop = members.starts(chosen.device), members.stops(chosen.device)
    where = at.positions(index)
    if index in own:  # every position has a choice of its own
        belongs = (start <= where[:, None]) & (where[:, None] < stop)
        lengths = [belongs.shape[0] if name == index else 1 for name in own]
        return (chosen & belongs.view(*lengths, -1)).any(-1)
    steps = torch.zeros(*chosen.shape[:-1], members.length + 1, dtype=torch.int64, device=chosen.device)
    count = chosen.to(torch.int64)
    steps = steps.scatter_add(-1, start.expand(count.shape), count).scatter_add(-1, stop.expand(count.shape), -count)
    inside = steps.cumsum(-1)[..., :-1] > 0
    there = (where < members.length) & (members.length > 0)
    found = inside.index_select(-1, where.clamp(max=members.length - 1)) & there if members.length else there
    return arranged(found, (*own, index), 0)


RULES |= {"topk": _choose, "threshold": _choose, "mass": _choose, "argmax": _argmax, "member": _member}

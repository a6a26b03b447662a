"""Hard choices: which members of an axis a row takes, from its scores. Pure functions of tensors.

Scores (.., S) have the axis chosen from last; candidates `allowed` and `forced` members are bools that broadcast
against them. Only candidates are ever chosen, forced ones first; ties go to the lowest member, and where fewer
candidates are there than asked, all are chosen. A NaN counts as -inf: it comes after every number, never reaches a
threshold and adds nothing to a mass. No choice has a gradient.

A choice is a list of members (.., width), int32, ascending, -1 at the end; a row of -1 is empty. Memory is that of
the scores: callers give the rows in chunks.
"""

from __future__ import annotations

import torch
from torch import Tensor

KEYS = {torch.float32: torch.int32, torch.float64: torch.int64}


@torch.no_grad()
def choose_topk(scores: Tensor, count: int | Tensor, allowed: Tensor, forced: Tensor | None = None) -> Tensor:
    """The `count` best: (.., width), width = the largest count, at most S. A tensor (..) has a count for each row."""
    members = scores.shape[-1]
    wanted = torch.as_tensor(count, device=scores.device).to(torch.int64).clamp(0, members).unsqueeze(-1)
    if isinstance(count, Tensor):
        width = int(wanted.max()) if wanted.numel() else 0
    else:
        width = min(max(count, 0), members)
    keys = ranking(scores, allowed)
    if forced is not None:
        must = (allowed & forced).expand(scores.shape)
        if bool((must.sum(-1, keepdim=True) > wanted).any()):  # too many: the best of them
            must = best(keys.masked_fill(~must, torch.iinfo(keys.dtype).min), wanted, width)
            rest = best(ranking(scores, allowed & ~forced), wanted - must.sum(-1, keepdim=True), width)
            return listed(must | rest, width)
        keys = keys.masked_fill(must, torch.iinfo(keys.dtype).max)
    if width == 0 or keys.numel() == 0:
        return torch.full((*keys.shape[:-1], width), -1, dtype=torch.int32, device=keys.device)
    if not isinstance(count, Tensor) and (found := untied(keys, width)) is not None:
        return found
    return listed(best(keys, wanted, width), width)


def untied(keys: Tensor, width: int) -> Tensor | None:
    """The lists of the first `width`; None where several members tie for the last place and torch may take any."""
    none, members = torch.iinfo(keys.dtype).min, keys.shape[-1]
    values, places = keys.topk(width)
    least = values[..., -1:]
    open_ties = (keys == least).sum(-1) > (values == least).sum(-1)
    if bool((open_ties & (least.squeeze(-1) > none)).any()):
        return None
    taken = places.to(torch.int32).masked_fill_(values == none, members).sort(-1).values
    return taken.masked_fill_(taken == members, -1)


def best(keys: Tensor, wanted: Tensor, width: int) -> Tensor:
    """Which members (.., S) are among the first `wanted` (.., 1), at most `width`, of a ranking."""
    if width == 0 or keys.numel() == 0:
        return torch.zeros(keys.shape, dtype=torch.bool, device=keys.device)
    top = keys.topk(width).values
    least = top.gather(-1, (wanted.expand(*keys.shape[:-1], 1) - 1).clamp(0, width - 1))
    above, tied = keys > least, keys == least
    room = wanted - above.sum(-1, keepdim=True)
    taken = above | (tied & (tied.cumsum(-1, dtype=torch.int32) <= room))
    return taken & (wanted > 0) & (keys > torch.iinfo(keys.dtype).min)


@torch.no_grad()
def choose_threshold(scores: Tensor, bound: float | Tensor, allowed: Tensor, forced: Tensor | None = None) -> Tensor:
    """Candidates with score >= bound, and forced ones: (.., largest count). A tensor (..) has a bound for each row."""
    return listed(mask_threshold(scores, bound, allowed, forced))


@torch.no_grad()
def mask_threshold(scores: Tensor, bound: float | Tensor, allowed: Tensor, forced: Tensor | None = None) -> Tensor:
    """The members of `choose_threshold` as a bool (.., S)."""
    least = bound.unsqueeze(-1) if isinstance(bound, Tensor) else bound
    chosen = scores >= least
    return (chosen if forced is None else chosen | forced) & allowed


@torch.no_grad()
def choose_mass(scores: Tensor, share: float | Tensor, allowed: Tensor, forced: Tensor | None = None) -> Tensor:
    """Forced members, then the largest until their scores sum to `share` of all candidates': (.., largest count).

    Sums are float64, so that the order in which they are made does not decide.
    """
    return listed(mask_mass(scores, share, allowed, forced))


@torch.no_grad()
def mask_mass(scores: Tensor, share: float | Tensor, allowed: Tensor, forced: Tensor | None = None) -> Tensor:
    """The members of `choose_mass` as a bool (.., S)."""
    keys = ranking(scores, allowed)
    order = keys.sort(dim=-1, descending=True, stable=True).indices
    if forced is not None:
        later = (~(allowed & forced)).expand(keys.shape).gather(-1, order).to(torch.int8)
        order = order.gather(-1, later.sort(dim=-1, stable=True).indices)
    amount = torch.where(allowed & ~scores.isnan(), scores, 0).to(torch.float64).expand(keys.shape)
    ordered = amount.gather(-1, order)
    before = ordered.cumsum(-1) - ordered
    part = share.unsqueeze(-1) if isinstance(share, Tensor) else share
    needed = before < part * amount.sum(-1, keepdim=True)
    chosen = torch.zeros_like(needed).scatter(-1, order, needed)
    return (chosen if forced is None else chosen | forced) & allowed


@torch.no_grad()
def mask_topk(scores: Tensor, count: Tensor, allowed: Tensor, forced: Tensor | None = None) -> Tensor:
    """The members of `choose_topk` as a bool (.., S), for a count (..): nothing is read back.

    By a sort; on CUDA few members are compared with each other.
    """
    if scores.is_cuda:
        from attnc.runtime.cuda.launch_ordering import choose_few, few  # late: it brings triton

        if few(scores):
            return choose_few(scores, count, allowed, forced)
    order = ranking(scores, allowed).sort(dim=-1, descending=True, stable=True).indices
    if forced is not None:
        later = (~(allowed & forced)).expand(scores.shape).gather(-1, order).to(torch.int8)
        order = order.gather(-1, later.sort(dim=-1, stable=True).indices)
    first = torch.arange(scores.shape[-1], device=scores.device) < count.unsqueeze(-1)
    return torch.zeros_like(allowed.expand(scores.shape)).scatter(-1, order, first) & allowed


@torch.no_grad()
def choose_argmax(scores: Tensor, allowed: Tensor) -> Tensor:
    """The best member (..), int64; -1 where there is no candidate."""
    keys = ranking(scores, allowed)
    if keys.shape[-1] == 0:
        return torch.full(keys.shape[:-1], -1, dtype=torch.int64, device=keys.device)
    # Of equal maxima torch names any, so that the lowest is looked for.
    best = (keys == keys.amax(-1, keepdim=True)).to(torch.int8).argmax(-1)
    return torch.where(allowed.expand(keys.shape).any(-1), best, -1)


def ranking(scores: Tensor, allowed: Tensor) -> Tensor:
    """Ints in the order of choice, larger first; the smallest int for what is no candidate.

    The bits of a float are ordered like it once those of negative numbers are turned around; only a NaN would have
    the smallest int.
    """
    if not scores.is_floating_point():
        scores = scores.to(torch.float64)
    elif scores.dtype not in KEYS:
        scores = scores.to(torch.float32)
    whole = KEYS[scores.dtype]
    limit = torch.iinfo(whole)
    numbers = torch.where(scores.isnan(), -torch.inf, scores) + 0.0  # -0.0 is 0.0
    bits = numbers.contiguous().view(whole)
    return torch.where(allowed, torch.where(bits < 0, bits ^ limit.max, bits), limit.min)


def listed(chosen: Tensor, width: int | None = None) -> Tensor:
    """The true places of a bool (.., S): (.., width), int32, ascending, -1 at the end. No width: the most of a row."""
    count = chosen.sum(-1)
    if width is None:
        width = int(count.max()) if count.numel() else 0
    place = chosen.cumsum(-1).sub_(1).masked_fill_(~chosen, width)
    lists = torch.full((*chosen.shape[:-1], width + 1), -1, dtype=torch.int32, device=chosen.device)
    members = torch.arange(chosen.shape[-1], dtype=torch.int32, device=chosen.device)
    return lists.scatter_(-1, place, members.expand(chosen.shape))[..., :width].contiguous()


def marked(members: Tensor, size: int) -> Tensor:
    """The bool (.., size) of a list (.., width): what `listed` was made from."""
    place = torch.where(members < 0, size, members).to(torch.int64)
    mask = torch.zeros(*members.shape[:-1], size + 1, dtype=torch.bool, device=members.device)
    return mask.scatter_(-1, place, torch.ones_like(place, dtype=torch.bool))[..., :size]

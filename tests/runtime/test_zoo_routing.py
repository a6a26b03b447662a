"""Family 4 of the zoo: routing and learned sparsity, each choice made by a loop over the rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import elu

from attnc.runtime.compute.gaussian import orthogonal_gaussian

Agrees = Callable[..., Tensor]
# Chosen keys of a query: (b, h, i) -> positions.
Chosen = Callable[[int, int, int], Iterable[int]]
BATCH, HEADS, D, E = 2, 4, 4, 3


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def qkv(length: int, key_heads: int = HEADS) -> tuple[Tensor, Tensor, Tensor]:
    return (
        tokens(BATCH, HEADS, length, D),
        tokens(BATCH, key_heads, length, D, seed=1),
        tokens(BATCH, key_heads, length, E, seed=2),
    )


def number(x: Tensor) -> float:
    return float(x.detach())


def attend(q: Tensor, k: Tensor, v: Tensor, chosen: Chosen) -> Tensor:
    """Softmax over the chosen keys, a row at a time; none chosen gives 0."""
    rows = []
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(q.shape[2]):
                keys = sorted(set(chosen(b, h, i)))
                weight = (k[b, h, keys] @ q[b, h, i] * D**-0.5).softmax(-1)
                rows.append(weight @ v[b, h, keys])
    return torch.stack(rows).view(*q.shape[:3], -1)


def best(scores: dict[int, float], count: int) -> list[int]:
    """The keys of the largest scores, the lowest first among equals."""
    return sorted(scores, key=lambda member: (-scores[member], member))[:count]


def block(n: int, size: int, length: int) -> range:
    return range(n * size, min((n + 1) * size, length))


@pytest.mark.parametrize(("length", "top"), [(22, 3), (20, 1), (7, 9)])
def test_moba(agrees: Agrees, length: int, top: int) -> None:
    size = 4

    def plain(q: Tensor, k: Tensor, v: Tensor, **settings: int) -> Tensor:
        def chosen(b: int, h: int, i: int) -> Iterable[int]:
            past = range(i // size)
            scores = {s: number(q[b, h, i] @ k[b, h, block(s, size, length)].mean(0)) for s in past}
            for s in [*best(scores, top - 1), i // size]:
                yield from (j for j in block(s, size, length) if j <= i)

        return attend(q, k, v, chosen)

    agrees("moba", plain, *qkv(length), block=size, top=top)


def test_window_plus_blocks(agrees: Agrees) -> None:
    size, top, window, length = 4, 2, 3, 22

    def plain(q: Tensor, k: Tensor, v: Tensor, **settings: int) -> Tensor:
        def chosen(b: int, h: int, i: int) -> Iterable[int]:
            scores = {s: number(q[b, h, i] @ k[b, h, block(s, size, length)].mean(0)) for s in range(i // size)}
            yield from range(max(0, i - window + 1), i + 1)
            for s in best(scores, top):
                yield from block(s, size, length)

        return attend(q, k, v, chosen)

    agrees("window_plus_blocks", plain, *qkv(length), block=size, top=top, window=window)


def test_quest_bounds_the_scores_of_a_page(agrees: Agrees) -> None:
    page, top, length = 3, 2, 17

    def plain(q: Tensor, k: Tensor, v: Tensor, **settings: int) -> Tensor:
        def bound(b: int, h: int, i: int, s: int) -> float:
            keys = k[b, h, block(s, page, length)]
            bound = number(torch.maximum(q[b, h, i] * keys.amin(0), q[b, h, i] * keys.amax(0)).sum())
            assert bound >= number((keys @ q[b, h, i]).max()) - 1e-12
            return bound

        def chosen(b: int, h: int, i: int) -> Iterable[int]:
            for s in [*best({s: bound(b, h, i, s) for s in range(i // page)}, top), i // page]:
                yield from (j for j in block(s, page, length) if j <= i)

        return attend(q, k, v, chosen)

    agrees("quest", plain, *qkv(length), page=page, top=top)


@pytest.mark.parametrize(("length", "key_heads"), [(26, 2), (5, 4)])
def test_nsa(agrees: Agrees, length: int, key_heads: int) -> None:
    size, stride, width, top, window = 4, 2, 6, 3, 5
    group = HEADS // key_heads

    def plain(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, **settings: int) -> Tensor:
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))
        starts = list(range(0, length - size + 1, stride))
        pooled = [torch.stack([x[:, :, at : at + size].mean(2) for at in starts], 2) for x in (k, v)]
        live = torch.tensor([[at + size <= i + 1 for at in starts] for i in range(length)])
        score = (q @ pooled[0].mT / 2).masked_fill(~live & live.any(-1, keepdim=True), -torch.inf)
        p = torch.where(live.any(-1, keepdim=True), score.softmax(-1), 0.0)

        def chosen(b: int, h: int, i: int) -> Iterable[int]:
            first = h // group * group
            total = p[b, first : first + group, i].sum(0)
            scores = {}
            for s in range(i // width + 1):
                over = [c for c, at in enumerate(starts) if at < (s + 1) * width and at + size > s * width]
                forced = s == 0 or i // width - s <= 1
                scores[s] = (1e9 if forced else 0.0) + number(total[over].sum())
            for s in best(scores, top):
                yield from (j for j in block(s, width, length) if j <= i)

        selected = attend(q, k, v, chosen)
        near = attend(q, k, v, lambda b, h, i: range(max(0, i - window + 1), i + 1))
        return gate[..., :1] * (p @ pooled[1]) + gate[..., 1:2] * selected + gate[..., 2:] * near

    gate = tokens(BATCH, HEADS, length, 3, seed=4)
    settings = {"size": size, "stride": stride, "block": width, "top": top, "window": window}
    agrees("nsa", plain, *qkv(length, key_heads), gate=gate, **settings)


def test_seer_keeps_blocks_above_a_threshold(agrees: Agrees) -> None:
    size, length, threshold = 4, 22, 0.3

    def plain(q: Tensor, k: Tensor, v: Tensor, w_q: Tensor, w_k: Tensor, **settings: float) -> Tensor:
        def gates(b: int, h: int, a: int) -> Tensor:
            query = w_q[h] @ q[b, h, block(a, size, length)].mean(0)
            keys = [k[b, h, block(s, size, length)] for s in range(a)]
            pooled = [torch.cat([x.amax(0), x.amin(0), x.mean(0)]) for x in keys]
            return torch.stack([query @ (w_k[h] @ x) * 5**-0.5 for x in pooled]).softmax(0)

        def chosen(b: int, h: int, i: int) -> Iterable[int]:
            own = i // size
            kept = [s for s, gate in enumerate(gates(b, h, own)) if gate >= threshold] if own else []
            for s in [*kept, own]:
                yield from (j for j in block(s, size, length) if j <= i)

        return attend(q, k, v, chosen)

    weights = {"w_q": tokens(HEADS, 5, D, seed=5), "w_k": tokens(HEADS, 5, 3 * D, seed=6)}
    agrees("seer", plain, *qkv(length), block=size, threshold=threshold, **weights)


def test_dsa_picks_tokens_for_all_heads(agrees: Agrees) -> None:
    length, top = 15, 4

    def plain(q: Tensor, k: Tensor, v: Tensor, iq: Tensor, ik: Tensor, iw: Tensor, top: int) -> Tensor:
        def chosen(b: int, h: int, i: int) -> Iterable[int]:
            return best({j: number((iw[b, :, i] * (iq[b, :, i] @ ik[b, j]).relu()).sum()) for j in range(i + 1)}, top)

        return attend(q, k, v, chosen)

    index = {"iq": tokens(BATCH, 3, length, 2, seed=5), "ik": tokens(BATCH, length, 2, seed=6)}
    agrees("dsa", plain, *qkv(length), top=top, iw=tokens(BATCH, 3, length, seed=7), **index)


@pytest.mark.parametrize("mass", [0.0, 0.6, 0.95])
def test_xattention_covers_a_share_of_the_row(agrees: Agrees, mass: float) -> None:
    size, stride, length = 4, 2, 19

    def plain(q: Tensor, k: Tensor, v: Tensor, **settings: float) -> Tensor:
        groups = math.ceil(length / stride)
        padded = [torch.nn.functional.pad(x, (0, 0, 0, groups * stride - length)) for x in (q, k)]
        tile = sum(padded[0][:, :, stride - 1 - t :: stride] @ padded[1][:, :, t::stride].mT for t in range(stride))
        assert isinstance(tile, Tensor)
        causal = torch.ones(groups, groups, dtype=torch.bool).tril()
        p = (tile * D**-0.5 / stride).masked_fill(~causal, -torch.inf).softmax(-1)

        def chosen(b: int, h: int, i: int) -> Iterable[int]:
            own, per = i // size, size // stride
            rows = p[b, h, own * per : (own + 1) * per]
            scores = {s: number(rows[:, s * per : (s + 1) * per].sum()) for s in range(own + 1)}
            kept = {0, own}
            for s in best(scores, len(scores)):
                if sum(scores[x] for x in kept) >= mass * sum(scores.values()):
                    break
                kept.add(s)
            for s in kept:
                yield from (j for j in block(s, size, length) if j <= i)

        return attend(q, k, v, chosen)

    agrees("xattention", plain, *qkv(length), block=size, stride=stride, mass=mass)


def test_routing_and_reformer_meet_in_buckets(agrees: Agrees) -> None:
    length = 13

    def routing(q: Tensor, k: Tensor, v: Tensor, centroids: Tensor, clusters: int) -> Tensor:
        def cluster(x: Tensor) -> Tensor:
            return torch.einsum("hcd,bhtd->bhtc", centroids, x / x.norm(dim=-1, keepdim=True)).argmax(-1)

        a, c = cluster(q), cluster(k)
        return attend(q, k, v, lambda b, h, i: (j for j in range(i + 1) if a[b, h, i] == c[b, h, j]))

    def reformer(q: Tensor, k: Tensor, v: Tensor, buckets: int, seed: int) -> Tensor:
        rotation = orthogonal_gaussian(buckets // 2, D, seed).mT
        a, c = (torch.cat([x @ rotation, -(x @ rotation)], -1).argmax(-1) for x in (q, k))
        return attend(q, k, v, lambda b, h, i: (j for j in range(i + 1) if a[b, h, i] == c[b, h, j]))

    agrees("routing", routing, *qkv(length), centroids=tokens(HEADS, 3, D, seed=5), clusters=3)
    out = agrees("reformer", reformer, *qkv(length), buckets=4, seed=2)
    assert (out == 0).all(-1).any()  # some query meets no key


def test_moh_weighs_the_heads_of_a_token(agrees: Agrees) -> None:
    length = 6

    def plain(q: Tensor, k: Tensor, v: Tensor, router: Tensor, active: int) -> Tensor:
        kept = router >= router.topk(active, -1).values[..., -1:]
        weight = router.masked_fill(~kept, -torch.inf).softmax(-1)
        return weight.mT[..., None] * ((q @ k.mT / 2).softmax(-1) @ v)

    out = agrees("moh", plain, *qkv(length), router=tokens(BATCH, length, HEADS, seed=5), active=2)
    assert ((out != 0).any(-1).sum(1) == 2).all()


def test_mosa_picks_tokens_of_a_head(agrees: Agrees) -> None:
    length, count = 12, 5

    def plain(q: Tensor, k: Tensor, v: Tensor, router: Tensor, tokens: int) -> Tensor:
        out = torch.zeros(BATCH, HEADS, length, E, dtype=torch.float64)
        picked = router.topk(tokens, -1).indices.sort(-1).values
        for b in range(BATCH):
            for h in range(HEADS):
                at = picked[b, h]
                score = (q[b, h, at] @ k[b, h, at].mT / 2).masked_fill(at > at[:, None], -torch.inf)
                out[b, h, at] = score.softmax(-1) @ v[b, h, at] * router[b, h, at, None].sigmoid()
        return out

    agrees("mosa", plain, *qkv(length), router=tokens(BATCH, HEADS, length, seed=5), tokens=count)


def test_mixture_of_attentions_sends_a_token_to_one(agrees: Agrees) -> None:
    length, window = 12, 4

    def plain(q: Tensor, k: Tensor, v: Tensor, router: Tensor, window: int) -> Tensor:
        near = attend(q, k, v, lambda b, h, i: range(max(0, i - window + 1), i + 1))
        weight = ((elu(q) + 1) @ (elu(k) + 1).mT).tril()
        linear = weight @ v / (weight.sum(-1, keepdim=True) + 1e-6)
        every = attend(q, k, v, lambda b, h, i: range(i + 1))
        chosen = torch.nn.functional.one_hot(router.argmax(-1), 3)
        share = (router.softmax(-1) * chosen)[:, None]
        return sum((share[..., n : n + 1] * x for n, x in enumerate((near, linear, every))), torch.zeros(()))

    agrees("mixture_of_attentions", plain, *qkv(length), router=tokens(BATCH, length, 3, seed=5), window=window)

"""Family 2 of the zoo (low rank) and the hybrids, against plain torch."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import elu

Agrees = Callable[..., Tensor]
HEADS, LENGTH, D, E = 2, 11, 4, 3


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def qkv(length: int = LENGTH) -> tuple[Tensor, Tensor, Tensor]:
    return tokens(2, HEADS, length, D), tokens(2, HEADS, length, D, seed=1), tokens(2, HEADS, length, E, seed=2)


def pairs(live: Callable[[int, int], bool], length: int = LENGTH) -> Tensor:
    return torch.tensor([[live(i, j) for j in range(length)] for i in range(length)])


def softmax(score: Tensor, live: Tensor) -> Tensor:
    """Weights over the live keys; rows without any are 0."""
    some = live.any(-1, keepdim=True)
    return torch.where(some, torch.softmax(score.masked_fill(~live & some, -torch.inf), -1), 0.0)


def test_linformer(agrees: Agrees) -> None:
    def plain(q: Tensor, k: Tensor, v: Tensor, E: Tensor, F: Tensor) -> Tensor:
        return torch.softmax(q @ (E @ k).mT / 2, -1) @ (F @ v)

    agrees("linformer", plain, *qkv(), E=tokens(5, LENGTH), F=tokens(5, LENGTH, seed=3))


@pytest.mark.parametrize(("length", "landmarks"), [(11, 4), (12, 3), (6, 5), (3, 5)])
def test_nystrom(agrees: Agrees, length: int, landmarks: int) -> None:
    """Segments of ceil(T / landmarks); those that would be empty are left out altogether."""

    def plain(q: Tensor, k: Tensor, v: Tensor, landmarks: int, steps: int) -> Tensor:
        parts = math.ceil(length / landmarks)
        qm, km = (torch.stack([part.mean(2) for part in x.split(parts, 2)], 2) for x in (q / 2, k))
        first, middle, last = ((x @ y.mT).softmax(-1) for x, y in ((q / 2, km), (qm, km), (qm, k)))
        rows, columns = middle.sum(-1).amax(-1), middle.sum(-2).amax(-1)
        z = middle.mT / (rows * columns)[..., None, None]
        eye = torch.eye(middle.shape[-1], dtype=torch.float64)
        for _ in range(steps):
            az = middle @ z
            z = z @ (13 * eye - az @ (15 * eye - az @ (7 * eye - az))) / 4
        return first @ z @ (last @ v)

    agrees("nystrom", plain, *qkv(length), landmarks=landmarks, steps=4)


def test_nystrom_with_as_many_landmarks_as_tokens_is_full_attention(zoo: Agrees) -> None:
    q, k, v = qkv()
    exact = torch.softmax(q @ k.mT / 2, -1) @ v
    torch.testing.assert_close(zoo("nystrom", q, k, v, landmarks=LENGTH, steps=40), exact)


def test_compressed(agrees: Agrees) -> None:
    def plain(q: Tensor, k: Tensor, v: Tensor, size: int, stride: int) -> Tensor:
        starts = range(0, LENGTH - size + 1, stride)
        kc, vc = (torch.stack([x[:, :, at : at + size].mean(2) for at in starts], 2) for x in (k, v))
        live = torch.tensor([[at + size - 1 <= i for at in starts] for i in range(LENGTH)])
        return softmax(q @ kc.mT / 2, live) @ vc

    out = agrees("compressed", plain, *qkv(), size=4, stride=3)
    assert not out[:, :, :3].any()


def test_agent_and_latent(agrees: Agrees) -> None:
    def agent(q: Tensor, k: Tensor, v: Tensor, agents: Tensor) -> Tensor:
        return torch.softmax(q @ agents.mT / 2, -1) @ (torch.softmax(agents @ k.mT / 2, -1) @ v)

    def latent(q: Tensor, k: Tensor, v: Tensor, latents: Tensor) -> Tensor:
        return torch.softmax(latents @ k.mT / 2, -1) @ v

    agrees("agent", agent, *qkv(), agents=tokens(HEADS, 5, D))
    assert agrees("latent", latent, *qkv(), latents=tokens(HEADS, 5, D)).shape == (2, HEADS, 5, E)


def test_mla_equals_unabsorbed_heads(agrees: Agrees) -> None:
    def plain(q: Tensor, k: Tensor, v: None, w_k: Tensor, w_v: Tensor, q_r: Tensor, k_r: Tensor) -> Tensor:
        keys = torch.cat([k @ w_k.mT, k_r.expand(2, HEADS, LENGTH, 2)], -1)
        query = torch.cat([q, q_r], -1)
        return torch.nn.functional.scaled_dot_product_attention(query, keys, k @ w_v.mT, is_causal=True, scale=0.5)

    q = tokens(2, HEADS, LENGTH, D)
    latent = tokens(2, 1, LENGTH, 6, seed=1)
    rotary = {"q_r": tokens(2, HEADS, LENGTH, 2, seed=3), "k_r": tokens(2, 1, LENGTH, 2, seed=4)}
    agrees("mla", plain, q, latent, None, w_k=tokens(HEADS, D, 6), w_v=tokens(HEADS, E, 6, seed=5), **rotary)


# Hybrids


CAUSAL = pairs(lambda i, j: j <= i)


def test_based_window_and_half_and_half(agrees: Agrees) -> None:
    def based_window(q: Tensor, k: Tensor, v: Tensor, mix: Tensor, window: int) -> Tensor:
        score, share = q @ k.mT / 2, mix[:, None, None]
        weight = (1 + score + score**2 / 2) * CAUSAL
        near = softmax(score, pairs(lambda i, j: 0 <= i - j < window)) @ v
        return share * near + (1 - share) * (weight / weight.sum(-1, keepdim=True)) @ v

    def half_and_half(q: Tensor, k: Tensor, v: Tensor, mix: Tensor, window: int) -> Tensor:
        weight = (q.softmax(-1) @ k.softmax(-1).mT) * pairs(lambda i, j: i - j >= window)
        total = weight.sum(-1, keepdim=True)
        far = weight / torch.where(total == 0, 1.0, total) @ v
        near = softmax(q @ k.mT / 2, pairs(lambda i, j: 0 <= i - j < window)) @ v
        return torch.stack([far[:, 0], mix[1] * near[:, 1] + (1 - mix[1]) * far[:, 1]], 1)

    mix = torch.tensor([0.3, 0.8], dtype=torch.float64)
    agrees("based_window", based_window, *qkv(), mix=mix, window=4)
    agrees("half_and_half", half_and_half, *qkv(), mix=mix.detach(), window=4)


def test_lolcats_has_one_sum_for_both_kinds_of_weight(agrees: Agrees) -> None:
    def plain(q: Tensor, k: Tensor, v: Tensor, w: Tensor, window: int) -> Tensor:
        near = pairs(lambda i, j: 0 <= i - j < window)
        score = q @ k.mT / 2
        top = score.masked_fill(~near, -torch.inf).amax(-1, keepdim=True)
        close = torch.exp((score - top).masked_fill(~near, -torch.inf))
        fq, fk = (torch.cat([(x @ w.mT).softmax(-1), (-(x @ w.mT)).softmax(-1)], -1) for x in (q, k))
        weight = close + (fq @ fk.mT) * pairs(lambda i, j: i - j >= window)
        return weight @ v / weight.sum(-1, keepdim=True)

    agrees("lolcats", plain, *qkv(), w=tokens(HEADS, 5, D), window=3)


def test_infini_reads_the_segments_before(agrees: Agrees) -> None:
    def plain(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, segment: int) -> Tensor:
        share = torch.sigmoid(beta)[:, None, None]
        state = torch.zeros(2, HEADS, D, E, dtype=torch.float64)
        total = torch.zeros(2, HEADS, D, 1, dtype=torch.float64)
        outputs = []
        for at, (queries, keys, values) in enumerate(zip(*(x.split(segment, 2) for x in (q, k, v)), strict=True)):
            fq, fk = elu(queries) + 1, elu(keys) + 1
            memory = fq @ state / (fq @ total) if at else torch.zeros_like(values)
            causal = torch.ones(queries.shape[2], queries.shape[2], dtype=torch.bool).tril()
            local = softmax(queries @ keys.mT / 2, causal) @ values
            outputs.append(share * memory + (1 - share) * local)
            state, total = state + fk.mT @ values, total + fk.sum(2)[..., None]
        return torch.cat(outputs, 2)

    agrees("infini", plain, *qkv(), beta=tokens(HEADS), segment=4)


def test_hymba(agrees: Agrees) -> None:
    def plain(q: Tensor, k: Tensor, v: Tensor, g: Tensor, window: int) -> Tensor:
        score = q @ k.mT / 2
        total = g.cumsum(-1)
        decay = torch.exp((total[..., :, None] - total[..., None, :]).masked_fill(~CAUSAL, -torch.inf))
        branches = (softmax(score, pairs(lambda i, j: 0 <= i - j < window)) @ v, decay * score @ v)
        normed = [x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6) for x in branches]
        return (normed[0] + normed[1]) / 2

    agrees("hymba", plain, *qkv(), g=-tokens(2, HEADS, LENGTH).abs(), window=4)

"""Low-rank attention as a user would write it in torch: what the generated operators have to beat.

q (B, H, N, D), k (B, H, M, D), v (B, H, M, E) of one type, in which everything is computed; softmaxes over few keys are
written out, those over the sequence are torch's scaled_dot_product_attention.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

Formula = Callable[..., Tensor]


def linformer(q: Tensor, k: Tensor, v: Tensor, E: Tensor, F: Tensor) -> Tensor:
    return scaled_dot_product_attention(q, E @ k, F @ v)


def nystrom(q: Tensor, k: Tensor, v: Tensor, landmarks: int = 64, steps: int = 6) -> Tensor:
    """The number of tokens is a multiple of the landmarks."""
    scale = q.shape[-1] ** -0.5
    qm, km = (x.unflatten(2, (landmarks, -1)).mean(3) for x in (q, k))
    middle = torch.softmax(qm @ km.mT * scale, -1)
    identity = torch.eye(landmarks, dtype=q.dtype, device=q.device)
    most = middle.sum(-1).amax(-1) * middle.sum(-2).amax(-1)
    inverse = middle.mT / most[..., None, None]
    for _ in range(steps):
        product = middle @ inverse
        inner = product @ (7 * identity - product)
        inverse = inverse @ (13 * identity - product @ (15 * identity - inner)) / 4
    there = torch.softmax(q @ km.mT * scale, -1)
    return there @ (inverse @ scaled_dot_product_attention(qm, k, v))


def compressed(q: Tensor, k: Tensor, v: Tensor, size: int = 32, stride: int = 16) -> Tensor:
    kc, vc = (x.unfold(2, size, stride).mean(-1) for x in (k, v))
    stop = torch.arange(kc.shape[2], device=q.device) * stride + size
    live = stop <= torch.arange(q.shape[2], device=q.device)[:, None] + 1
    return scaled_dot_product_attention(q, kc, vc, attn_mask=live).nan_to_num(0.0)


def agent(q: Tensor, k: Tensor, v: Tensor, agents: Tensor) -> Tensor:
    agents = agents.expand(q.shape[0], -1, -1, -1)
    return scaled_dot_product_attention(q, agents, scaled_dot_product_attention(agents, k, v))


def latent(q: Tensor, k: Tensor, v: Tensor, latents: Tensor) -> Tensor:
    return scaled_dot_product_attention(latents.expand(q.shape[0], -1, -1, -1), k, v)


def mla(q: Tensor, k: Tensor, v: None, w_k: Tensor, w_v: Tensor, q_r: Tensor, k_r: Tensor) -> Tensor:
    """Keys and values are expanded from the latent; the scale is that of q alone. Causal, the last queries."""
    heads, queries, keys = q.shape[1], q.shape[2], k.shape[2]
    key = torch.cat([k @ w_k.mT, k_r.expand(-1, heads, -1, -1)], -1)
    value = k @ w_v.mT
    query, scale = torch.cat([q, q_r], -1), q.shape[-1] ** -0.5
    if queries == keys:
        return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)
    live = torch.arange(keys, device=q.device) <= torch.arange(keys - queries, keys, device=q.device)[:, None]
    return scaled_dot_product_attention(query, key, value, attn_mask=live, scale=scale)


def mla_absorbed(q: Tensor, k: Tensor, v: None, w_k: Tensor, w_v: Tensor, q_r: Tensor, k_r: Tensor) -> Tensor:
    """The same for few queries, which take the projections over: keys of c + x channels that all heads share."""
    queries, keys = q.shape[2], k.shape[2]
    query = torch.cat([q @ w_k, q_r], -1)
    score = query @ torch.cat([k, k_r], -1).mT * q.shape[-1] ** -0.5
    live = torch.arange(keys, device=q.device) <= torch.arange(keys - queries, keys, device=q.device)[:, None]
    return torch.softmax(score.masked_fill(~live, -torch.inf), -1) @ k @ w_v.mT


FORMULAS: dict[str, Formula] = {
    "linformer": linformer,
    "nystrom": nystrom,
    "compressed": compressed,
    "agent": agent,
    "latent": latent,
    "mla": mla,
}

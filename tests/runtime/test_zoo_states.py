"""Family 3 of the zoo: kernels and states, as recurrences one token at a time and as sums over pairs."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import elu

from attnc.runtime.compute.gaussian import orthogonal_gaussian

Agrees = Callable[..., Tensor]
HEADS, LENGTH, D, E = 2, 9, 4, 3


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def qkv() -> tuple[Tensor, Tensor, Tensor]:
    return (
        tokens(2, HEADS, LENGTH, D),
        tokens(2, HEADS, LENGTH, D, seed=1) / 2,
        tokens(2, HEADS, LENGTH, E, seed=2),
    )


def log_decay(*shape: int) -> Tensor:
    return -torch.rand(*shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def gate(*shape: int, seed: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def causal(weight: Tensor) -> Tensor:
    return torch.where(torch.ones(weight.shape[-2:], dtype=torch.bool).tril(), weight, 0.0)


def normalised(weight: Tensor, v: Tensor, eps: float = 0.0) -> Tensor:
    return weight @ v / (weight.sum(-1, keepdim=True) + eps)


def recurrence(step: Callable[[Tensor, int], tuple[Tensor, Tensor]]) -> Tensor:
    """Outputs of `step(state, t) -> (state, output)`, the state starting at zero."""
    state = torch.zeros(2, HEADS, D, E, dtype=torch.float64)
    outputs = []
    for t in range(LENGTH):
        state, output = step(state, t)
        outputs.append(output)
    return torch.stack(outputs, 2)


def outer(x: Tensor, y: Tensor) -> Tensor:
    return x[..., :, None] * y[..., None, :]


def read(x: Tensor, state: Tensor) -> Tensor:
    return (x[..., :, None] * state).sum(-2)


def test_linear_keeps_a_state_and_a_normaliser(agrees: Agrees) -> None:
    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        fq, fk = elu(q) + 1, elu(k) + 1
        total = torch.cumsum(fk, 2)
        state = torch.cumsum(outer(fk, v), 2)
        return read(fq, state) / ((fq * total).sum(-1, keepdim=True) + 1e-6)

    def full(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return normalised((elu(q) + 1) @ (elu(k) + 1).mT, v, 1e-6)

    agrees("linear", plain, *qkv())
    agrees("linear_full", full, *qkv())


def test_performer(agrees: Agrees) -> None:
    def plain(q: Tensor, k: Tensor, v: Tensor, features: int, seed: int) -> Tensor:
        w = orthogonal_gaussian(features, D, seed)

        def phi(x: Tensor) -> Tensor:
            x = x / D**0.25
            return torch.exp(x @ w.T - (x * x).sum(-1, keepdim=True) / 2) / math.sqrt(features)

        return normalised(causal(phi(q) @ phi(k).mT), v)

    agrees("performer", plain, *qkv(), features=6, seed=4)


def test_performer_approaches_softmax(zoo: Agrees) -> None:
    q, k, v = qkv()
    out = zoo("performer", q, k, v, features=4000)
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert (out - exact).abs().max() < 0.2


def test_cosformer_by_its_two_features(agrees: Agrees) -> None:
    def plain(q: Tensor, k: Tensor, v: Tensor, horizon: int) -> Tensor:
        angle = math.pi / 2 * torch.arange(LENGTH, dtype=torch.float64)[:, None] / horizon
        fq, fk = (torch.cat([x.relu() * angle.sin(), x.relu() * angle.cos()], -1) for x in (q, k))
        return normalised(causal(fq @ fk.mT), v, 1e-6)

    agrees("cosformer", plain, *qkv(), horizon=2 * LENGTH)


def test_hedgehog(agrees: Agrees) -> None:
    def plain(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
        fq, fk = (torch.cat([(x @ w.mT).softmax(-1), (-(x @ w.mT)).softmax(-1)], -1) for x in (q, k))
        return normalised(causal(fq @ fk.mT), v)

    agrees("hedgehog", plain, *qkv(), w=tokens(HEADS, 5, D))


def test_based_by_its_features(agrees: Agrees) -> None:
    def phi(x: Tensor) -> Tensor:
        one = torch.ones_like(x[..., :1])
        return torch.cat([one, x / D**0.25, outer(x, x).flatten(-2) / math.sqrt(2 * D)], -1)

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return normalised(causal(phi(q) @ phi(k).mT), v)

    agrees("based", plain, *qkv())


def test_power(agrees: Agrees) -> None:
    def plain(q: Tensor, k: Tensor, v: Tensor, degree: int) -> Tensor:
        return normalised(causal((q @ k.mT / 2).abs() ** degree), v, 1e-6)

    agrees("power", plain, *qkv(), degree=4)


def test_decays_as_recurrences(agrees: Agrees) -> None:
    def retention(q: Tensor, k: Tensor, v: Tensor, gamma: Tensor) -> Tensor:
        def step(s: Tensor, t: int) -> tuple[Tensor, Tensor]:
            s = gamma[:, None, None] * s + outer(k[:, :, t], v[:, :, t])
            return s, read(q[:, :, t] / 2, s)

        return recurrence(step)

    def gla(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
        decay = g.exp() if g.dim() == 4 else g.exp()[..., None].expand(*g.shape, D)

        def step(s: Tensor, t: int) -> tuple[Tensor, Tensor]:
            s = decay[:, :, t, :, None] * s + outer(k[:, :, t], v[:, :, t])
            return s, read(q[:, :, t] / 2, s)

        return recurrence(step)

    agrees("retention", retention, *qkv(), gamma=torch.tensor([0.9, 0.4], dtype=torch.float64))
    agrees("simple_gla", gla, *qkv(), g=log_decay(2, HEADS, LENGTH))
    agrees("gla", gla, *qkv(), g=log_decay(2, HEADS, LENGTH, D))


def test_rwkv(agrees: Agrees) -> None:
    def rwkv6(q: Tensor, k: Tensor, v: Tensor, g: Tensor, u: Tensor) -> Tensor:
        def step(s: Tensor, t: int) -> tuple[Tensor, Tensor]:
            new = outer(k[:, :, t], v[:, :, t])
            out = read(q[:, :, t], s + u[:, :, None] * new)
            return g[:, :, t].exp()[..., None] * s + new, out

        return recurrence(step)

    def rwkv7(q: Tensor, k: Tensor, v: Tensor, g: Tensor, a: Tensor, b: Tensor) -> Tensor:
        def step(s: Tensor, t: int) -> tuple[Tensor, Tensor]:
            change = torch.diag_embed(g[:, :, t].exp()) + outer(b[:, :, t], a[:, :, t])
            s = change @ s + outer(k[:, :, t], v[:, :, t])
            return s, read(q[:, :, t], s)

        return recurrence(step)

    g = log_decay(2, HEADS, LENGTH, D)
    agrees("rwkv6", rwkv6, *qkv(), g=g, u=tokens(HEADS, D))
    a, b = (tokens(2, HEADS, LENGTH, D, seed=seed) / 4 for seed in (7, 8))
    agrees("rwkv7", rwkv7, *qkv(), g=g.detach(), a=a, b=b)


def test_mlstm_divides_by_at_least_one(agrees: Agrees) -> None:
    """As the paper's recurrence: state C, normaliser n, output C q / max(|n q|, 1)."""

    def plain(q: Tensor, k: Tensor, v: Tensor, f: Tensor, n: Tensor) -> Tensor:
        state = torch.zeros(2, HEADS, D, E + 1, dtype=torch.float64)
        one = torch.ones(2, HEADS, 1, dtype=torch.float64)
        outputs = []
        for t in range(LENGTH):
            written = outer(k[:, :, t], torch.cat([v[:, :, t], one], -1))
            state = f[:, :, t, None, None].exp() * state + n[:, :, t, None, None].exp() * written
            row = read(q[:, :, t] / 2, state)
            outputs.append(row[..., :E] / row[..., E:].abs().clamp(min=1))
        return torch.stack(outputs, 2)

    n = tokens(2, HEADS, LENGTH, seed=6)
    agrees("mlstm", plain, *qkv(), f=log_decay(2, HEADS, LENGTH), n=n)


def test_forgetting_multiplies_the_gates_in_between(agrees: Agrees) -> None:
    def plain(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
        score = q @ k.mT / 2
        rows = []
        for i in range(LENGTH):
            kept = torch.stack([f[:, :, j + 1 : i + 1].sum(-1) for j in range(i + 1)], -1)
            rows.append((score[:, :, i, : i + 1] + kept).softmax(-1)[:, :, None] @ v[:, :, : i + 1])
        return torch.cat(rows, 2)

    agrees("forgetting", plain, *qkv(), f=log_decay(2, HEADS, LENGTH))


@pytest.mark.parametrize("name", ["delta", "gated_delta", "kda"])
def test_delta_rules_project_the_old_value_out(agrees: Agrees, name: str) -> None:
    """S = (I - beta k k^T) diag(exp g) S + beta k v^T, read by q * scale."""

    def plain(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None = None) -> Tensor:
        def step(s: Tensor, t: int) -> tuple[Tensor, Tensor]:
            key, write = k[:, :, t], beta[:, :, t, None, None]
            if g is not None:
                s = (g[:, :, t].exp()[..., None] if g.dim() == 4 else g[:, :, t, None, None].exp()) * s
            s = (torch.eye(D, dtype=torch.float64) - write * outer(key, key)) @ s + write * outer(key, v[:, :, t])
            return s, read(q[:, :, t] / 2, s)

        return recurrence(step)

    settings = {"beta": gate(2, HEADS, LENGTH, seed=3)}
    if name != "delta":
        settings["g"] = log_decay(2, HEADS, LENGTH, *([D] if name == "kda" else []))
    agrees(name, plain, *qkv(), **settings)

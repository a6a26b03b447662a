"""Decays near 0 and near 1: patterns that carry a state, and a float64 recurrence of all of them at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

PATTERNS = ("retention", "simple_gla", "gla", "rwkv6", "gated_delta", "kda", "rwkv7")
STRENGTHS = {"near 0": (6.0, 30.0), "near 1": (0.0, 1e-4), "both": (0.0, 0.0)}  # of minus the log decay
CHANNELS = ("gla", "rwkv6", "kda", "rwkv7")


@dataclass(frozen=True)
class Call:
    """A pattern's tensors (1, heads, tokens, ..), and the same as operands of S = e^g S + x (y^T S) + k v^T, q^T S.

    `early`: rows read the state before their update, plus `bonus`.
    """

    pattern: str
    tensors: dict[str, Tensor]
    operands: dict[str, Tensor]
    early: bool = False


def log_decays(strength: str, shape: tuple[int, ...]) -> Tensor:
    """Between the bounds; `both`: nothing is lost, but for one position in 16, where all but e^-30 is."""
    low, high = STRENGTHS[strength]
    drawn = -(low + (high - low) * torch.rand(shape))
    if strength == "both":
        drawn = torch.where(torch.rand(shape) < 1 / 16, -30.0, -1e-5)
    return drawn


def call(pattern: str, strength: str, tokens: int, heads: int = 2, width: int = 16) -> Call:
    """Seeded by its arguments."""
    torch.manual_seed(1000 * PATTERNS.index(pattern) + 100 * list(STRENGTHS).index(strength) + tokens % 97)
    q, k, v = (torch.randn(1, heads, tokens, width) for _ in range(3))
    k = torch.nn.functional.normalize(k, dim=-1)
    channel = pattern in CHANNELS
    decays = log_decays(strength, (1, heads, tokens, width) if channel else (1, heads, tokens))
    beta, scale = torch.rand(1, heads, tokens), width**-0.5
    tensors, more = {"q": q, "k": k, "v": v}, {"g": decays}
    operands = {"q": q.double() * scale, "k": k.double(), "v": v.double()}
    if pattern == "retention":
        low, high = STRENGTHS[strength]
        gamma = torch.exp(-torch.linspace(low, high or 1e-5, heads))
        decays, more = gamma.double().log().view(1, -1, 1).expand(1, heads, tokens), {"gamma": gamma}
    g = decays.double() if channel else decays.double()[..., None].expand(1, heads, tokens, width)
    none = torch.zeros_like(operands["k"])
    x, y = none, none
    if pattern in ("gated_delta", "kda"):
        more["beta"] = beta
        operands["v"] = operands["v"] * beta.double()[..., None]
        x, y = operands["k"], -beta.double()[..., None] * operands["k"] * g.exp()
    if pattern == "rwkv7":
        away = torch.nn.functional.normalize(torch.randn(1, heads, tokens, width), dim=-1)
        more |= {"a": away, "b": -away * beta[..., None] * decays.exp()}
        x, y = more["b"].double(), away.double()
    if pattern in ("rwkv6", "rwkv7"):
        operands["q"] = q.double()
    if pattern == "rwkv6":
        more["u"] = torch.randn(heads, width)
        own = (q.double() * more["u"].double()[:, None] * k.double()).sum(-1, keepdim=True)
        operands["bonus"] = own * v.double()
    return Call(pattern, tensors | more, operands | {"g": g, "x": x, "y": y}, pattern == "rwkv6")


def recurrences(calls: list[Call], device: str = "cpu") -> list[Tensor]:
    """The results (1, heads, tokens, width) of calls of one length, token by token in float64."""
    stacked = {name: torch.cat([one.operands[name] for one in calls]).to(device) for name in "gxykvq"}
    g, x, y, k, v, q = (stacked[name].unbind(2) for name in "gxykvq")
    state = torch.zeros(*k[0].shape, v[0].shape[-1], dtype=torch.float64, device=device)
    early = torch.tensor([one.early for one in calls], device=device)[:, None, None]
    rows = []
    for t in range(len(k)):
        after = torch.baddbmm(
            (state * g[t].exp()[..., None]).flatten(0, 1),
            torch.stack([x[t], k[t]], -1).flatten(0, 1),
            torch.stack([(y[t][..., None, :] @ state)[..., 0, :], v[t]], -2).flatten(0, 1),
        ).view_as(state)
        before = (q[t][..., None, :] @ state)[..., 0, :]
        rows.append(torch.where(early, before, (q[t][..., None, :] @ after)[..., 0, :]))
        state = after
    out = torch.stack(rows, 2)
    bonus = [one.operands.get("bonus", torch.zeros(1)) for one in calls]
    return [out[at : at + 1] + bonus[at].to(device) for at in range(len(calls))]

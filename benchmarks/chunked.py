"""Times of the chunked kernels on a GPU: `python -m benchmarks.chunked [--peer]`, bfloat16, 128 features and values.

`--peer`: beside the same operators of fla-core, where it is installed. Ours are given the products with beta that fla
makes itself (one pass over the keys and one over the values).
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, normalize

from attnc.runtime.cpu.reaches import Reach
from attnc.runtime.cuda.launch_chunked_carry import carry_backward, carry_forward
from attnc.runtime.cuda.launch_chunked_recur import Recurrence, recur_backward, recur_forward

WIDTH, HEADS = 128, 16
SHAPES = ((2, 8192), (1, 65536))
# name: decay, whether the sum of the weights is wanted too, what changes the state
CASES = {
    "linear": ("none", False, "sum"),
    "linear_full": ("none", False, "sum"),  # every key
    "normalised": ("none", True, "sum"),
    "retention": ("head", False, "sum"),
    "simple_gla": ("scalar", False, "sum"),
    "gla": ("channel", False, "sum"),
    "delta": ("none", False, "delta"),
    "gated_delta": ("scalar", False, "delta"),
    "kda": ("channel", False, "delta"),
    "rwkv7": ("channel", False, "general"),
}
PEERS = {
    "linear": "linear_attn.chunk_linear_attn",
    "normalised": "linear_attn.chunk_linear_attn",
    "retention": "retention.chunk_retention",
    "simple_gla": "simple_gla.chunk_simple_gla",
    "gla": "gla.chunk_gla",
    "delta": "delta_rule.chunk_delta_rule",
    "gated_delta": "gated_delta_rule.chunk_gated_delta_rule",
    "kda": "kda.chunk_kda",
}
Forward = Callable[[bool], Any]
Backward = Callable[[Any], Any]


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def ours(name: str, batch: int, tokens: int) -> tuple[Forward, Backward]:
    """Forward (with or without keeping its states) and backward (from what was kept, or None)."""
    decay, total, rule = CASES[name]
    shape = (batch, HEADS, tokens, WIDTH)
    q, k, v, cotangent = (random(*shape) for _ in range(4))
    g = log_decay(decay, shape)
    if rule == "sum":
        from_total = torch.randn(shape[:3], device="cuda") if total else None
        reach = Reach("all" if name == "linear_full" else "lag")
        return (
            lambda keep: carry_forward(q, k, v, g, reach=reach, total=total, keep=keep),
            lambda kept: carry_backward(
                q, k, v, g, cotangent, reach=reach, total_cotangent=from_total, kept=[*kept.values()]
            ),
        )
    unit, beta = normalize(k.float(), dim=-1), torch.rand(*shape[:3], 1, device="cuda")
    faded = 1.0 if g is None else g.exp() if g.dim() == 4 else g.exp()[..., None]
    right = (-beta * unit * faded).bfloat16()
    left = None if rule == "delta" else unit.bfloat16()
    given = Recurrence(q, unit.bfloat16(), (beta * v).bfloat16(), right, left, g)
    return (
        lambda keep: recur_forward(given, keep=keep),
        lambda kept: recur_backward(given, cotangent, kept=[*kept.values()]),
    )


def log_decay(kind: str, shape: tuple[int, ...]) -> Tensor | None:
    """None, one for a head (RetNet's), for each position of it, or for each feature, too."""
    if kind == "none":
        return None
    if kind == "head":
        return torch.log(1 - 2.0 ** (-5 - torch.arange(shape[1], device="cuda"))).view(1, -1, 1)
    return logsigmoid(torch.randn(shape if kind == "channel" else shape[:3], device="cuda"))


def peer(name: str, batch: int, tokens: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Forward, and forward with backward, of fla-core."""
    module, function = PEERS[name].split(".")
    operator = getattr(importlib.import_module(f"fla.ops.{module}"), function)
    decay, total, rule = CASES[name]
    shape = (batch, tokens, HEADS, WIDTH)
    q, k, v, cotangent = (random(*shape) for _ in range(4))
    operands = [q, k if rule == "sum" else normalize(k.float(), dim=-1).bfloat16(), v]
    if decay not in ("none", "head"):
        operands.append(logsigmoid(torch.randn(shape if decay == "channel" else shape[:3], device="cuda")))
    if rule != "sum":
        operands.append(torch.rand(shape[:3], device="cuda").bfloat16())
    for one in operands:
        one.requires_grad_()
    options = {"normalize": total} if name in ("linear", "normalised") else {}

    def both() -> None:
        for one in operands:
            one.grad = None
        operator(*operands, **options)[0].backward(cotangent)

    return torch.no_grad()(lambda: operator(*operands, **options)[0]), both


def milliseconds(work: Callable[[], Any]) -> float:
    from triton.testing import do_bench

    return float(do_bench(work, warmup=25, rep=100, return_mode="median"))


def measured(forward: Forward, backward: Backward) -> str:
    """Times of one case."""
    alone = milliseconds(lambda: forward(False))
    kept = milliseconds(lambda: backward(forward(True).kept))
    again = milliseconds(lambda: (forward(False), backward({})))
    return f"forward {alone:.3f}, with backward {again:.3f}, states kept {kept:.3f}"


def of_peer(name: str, batch: int, tokens: int) -> str:
    """Its times; what it does not have, or refuses to run here, in words."""
    if name not in PEERS:
        return "has no such operator"
    alone, both = peer(name, batch, tokens)
    forward = f"{milliseconds(alone):.3f}"
    try:
        return f"{forward}, {milliseconds(both):.3f}"
    except RuntimeError as refusal:
        return f"{forward}, backward refused: {str(refusal).splitlines()[0][:100]}"


def main() -> None:
    """One line a case and shape."""
    print(torch.cuda.get_device_name(), "torch", torch.__version__, "milliseconds")
    for batch, tokens in SHAPES:
        for name in CASES:
            line = measured(*ours(name, batch, tokens))
            if "--peer" in sys.argv:
                line += f"; fla-core {of_peer(name, batch, tokens)}"
            print(f"B{batch} N{tokens} {name:12s} {line}", flush=True)
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()

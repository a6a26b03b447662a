"""How far rounding moves a result: the same computation with every operation off by a little, at random.

A bound on the error of a sum follows the size of its terms and not that of the sum (Higham, Accuracy and Stability of
Numerical Algorithms, chapter 4). Where terms cancel deep inside of a computation, neither its inputs nor its result
show their size. Errors put in on purpose do (Monte Carlo arithmetic: Parker, UCLA CSD-970002, 1997).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

UNIT = 2.0**-30  # of float64: its own rounding does not show, and no choice among scores is likely to turn
SAMPLES = 4  # of errors put in
ROUNDED = {"add", "sub", "mul", "div", "addcmul", "addmm", "mm", "bmm", "baddbmm", "dot", "sum", "mean", "cumsum"}
ROUNDED |= {"exp", "log", "log1p", "expm1", "pow", "sqrt", "rsqrt", "reciprocal", "sin", "cos"}
ROUNDED |= {"sigmoid", "sigmoid_backward", "tanh", "tanh_backward"}


class Rounding(TorchDispatchMode):
    """Every real result of an operation that rounds is off by up to `unit` of itself. `seed` decides how far."""

    def __init__(self, seed: int, unit: float = UNIT) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.generator = torch.Generator().manual_seed(seed)
        self.unit = unit

    def __torch_dispatch__(
        self, func: Any, types: Sequence[Any], args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ not in ROUNDED or not isinstance(out, Tensor) or out.dtype != torch.float64:
            return out
        off = torch.rand(out.shape, dtype=out.dtype, generator=self.generator) * 2 - 1
        return torch.where(out.isfinite(), out * (1 + self.unit * off), out)


def moved(run: Callable[[], Sequence[Tensor]], unit: float = UNIT) -> list[float]:
    """By how much each result of `run` (float64, on a CPU) moves at most, in units of an operation's rounding."""
    plain = [one.detach() for one in run()]
    found = [0.0] * len(plain)
    for seed in range(SAMPLES):
        with Rounding(seed, unit):
            other = [one.detach() for one in run()]
        apart = [(x - y).abs().nan_to_num() for x, y in zip(plain, other, strict=True)]
        found = [max(held, float(x.max()) / unit) if x.numel() else 0.0 for held, x in zip(found, apart, strict=True)]
    return found

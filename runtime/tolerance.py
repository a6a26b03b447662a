"""How far a result may be from the float64 reference: one rule for `attnc check` and every test."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def tolerance(dtype: torch.dtype, length: int) -> float:
    """Largest allowed `error` of a result of type `dtype` whose rows sum over at most `length` keys.

    Two sources: operands and results rounded to `dtype` (a few units in the last place, whatever the length), and
    sums accumulated in float32 (float64 for float64), whose rounding grows with the square root of the length.
    """
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    return 4 * torch.finfo(dtype).eps + 16 * torch.finfo(accumulator).eps * math.sqrt(max(length, 1))


def error(result: Tensor, reference: Tensor, magnitude: float | None = None) -> float:
    """Largest difference over `magnitude`, by default the reference's largest; infinite where a value is not finite.

    Raises ValueError where the shapes differ.
    """
    if result.shape != reference.shape:
        raise ValueError(f"the result has shape {tuple(result.shape)}, the reference {tuple(reference.shape)}")
    if result.numel() == 0:
        return 0.0
    expected = reference.detach().double()
    found = result.detach().to(expected.device).double()
    if not bool(torch.isfinite(found).all()):
        return math.inf
    scale = float(expected.abs().max()) if magnitude is None else magnitude
    return float((found - expected).abs().max()) / (scale if scale > 0 else 1.0)

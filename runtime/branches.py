"""The join of a plan's branches by log-sum-exp."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def join(branches: Sequence[tuple[Tensor, Tensor]], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(out, lse) of one softmax over the multiset union of the branches' keys, from (out, lse) of each.

    out (B, H, N, E) of `dtype`, lse (B, H, N). Rows without any key give 0 and -inf.
    """
    if len(branches) == 1:
        out, lse = branches[0]
        return out.to(dtype), lse
    stacked = torch.stack([lse for _, lse in branches])
    total = torch.logsumexp(stacked, 0)
    weights = torch.exp(stacked - torch.where(total.isinf(), 0, total)).unsqueeze(-1)
    result = branches[0][0] * weights[0]
    for (output, _), weight in zip(branches[1:], weights[1:], strict=True):
        result.addcmul_(output, weight)
    return result.to(dtype), total

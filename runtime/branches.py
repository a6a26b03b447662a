"""What follows the branches of a plan: their join by log-sum-exp, or the pointwise epilogue."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attnc.compiler.plan import Plan
from attnc.runtime.call import Call
from attnc.runtime.evaluate import Environment


def join(plan: Plan, call: Call, outputs: Sequence[Tensor], lse: Tensor) -> Tensor:
    """The result (B, H, N, E) from the outputs of the branches and their log-sum-exps (branches, B, H, N)."""
    if plan.merged:
        return merge(outputs, lse).to(call.q.dtype)
    if plan.epilogue.op == "branch":
        return outputs[0]
    batch, heads, rows = lse.shape[1:]
    device = call.q.device
    positions = {
        "b": torch.arange(batch, device=device).view(-1, 1, 1),
        "h": torch.arange(heads, device=device).view(1, -1, 1),
        "i": torch.arange(rows, device=device).view(1, 1, -1) + call.offset,
    }
    real = call.compute_dtype
    branches = [output.to(real) for output in outputs]
    value = Environment(plan, call, positions, real, branches=branches).value(plan.epilogue)
    return value.to(call.q.dtype).expand(batch, heads, rows, -1).contiguous()


def merge(outputs: Sequence[Tensor], lse: Tensor) -> Tensor:
    """One softmax over the multiset union of the branches' keys; rows without any key give 0."""
    peak = lse.amax(0)
    weights = torch.exp(lse - torch.where(torch.isinf(peak), 0, peak))
    total = weights.sum(0)
    weights = weights / torch.where(total > 0, total, 1)
    joined = weights[0].unsqueeze(-1) * outputs[0]
    for weight, output in zip(weights[1:], outputs[1:], strict=True):
        joined = joined + weight.unsqueeze(-1) * output
    return joined

"""What follows the branches of a plan: their join by log-sum-exp, or the pointwise epilogue."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attnc.compiler.plan import Plan
from attnc.runtime.call import Call
from attnc.runtime.evaluate import Environment


def alone(plan: Plan) -> bool:
    """Whether the one branch's output is the result."""
    return len(plan.branches) == 1 and plan.epilogue.op == "branch"


def join(plan: Plan, call: Call, outputs: Sequence[Tensor], lse: Tensor) -> Tensor:
    """The result, in the plan's layout and type of q, from the outputs (B, H, N, E) and lse (branches, B, H, N).

    Outputs are in the type of sums unless the plan is `alone`: rounding before the join would count twice.
    """
    if plan.merged:
        result = merge(outputs, lse)
    else:
        result = outputs[0] if alone(plan) else epilogue(plan, call, outputs)
    order = ("b", "h", "i", *plan.epilogue.type.axes)
    result = result.permute([order.index(axis) for axis in plan.output_axes])
    return result.to(call.q.dtype).contiguous()


def merge(outputs: Sequence[Tensor], lse: Tensor) -> Tensor:
    """One softmax over the multiset union of the branches' keys; rows without any key give 0."""
    total = torch.logsumexp(lse, 0)
    weights = torch.exp(lse - torch.where(total.isinf(), 0, total)).unsqueeze(-1)
    result = outputs[0] * weights[0]
    for output, weight in zip(outputs[1:], weights[1:], strict=True):
        result.addcmul_(output, weight)
    return result


def epilogue(plan: Plan, call: Call, outputs: Sequence[Tensor]) -> Tensor:
    """What the text does with the outputs of the branches."""
    positions = call.positions("b", "h", "i")
    value = Environment(plan, call, positions, call.compute_dtype, branches=outputs).value(plan.epilogue)
    sizes = call.sizes
    return value.expand(sizes["b"], sizes["h"], sizes["i"], *(sizes[axis] for axis in plan.epilogue.type.axes))

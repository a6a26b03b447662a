"""Attention on a CPU where all keys, or all before the query, are live and the score is a scaled product.

That is what torch's own fused kernels compute, tiled as the executor would; forward they leave the log-sum-exp, too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnc.compiler.emit.kernel import split_score
from attnc.compiler.ir import Node, walk
from attnc.compiler.plan import Branch, Plan
from attnc.runtime.backward import BranchGradients
from attnc.runtime.call import Call
from attnc.runtime.evaluate import Environment
from attnc.runtime.scalars import of_node

TYPES = (torch.float32, torch.float64)  # in 16 bits it rounds the weights, which the executor does not


@dataclass(frozen=True)
class Dense:
    """Operands of torch's kernels: heads are rows of the batch where strides allow it, so that results are contiguous.

    q (X, Y, N, D), k and v (X, Y, M, D), X * Y the rows of the batch times the heads.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    causal: bool
    scale: float

    def forward(self, heads: int) -> tuple[Tensor, Tensor]:
        """out (B, H, N, D) and lse (B, H, N)."""
        attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = attend(self.q, self.k, self.v, 0.0, self.causal, scale=self.scale)
        return out.reshape(-1, heads, *out.shape[2:]), lse.reshape(-1, heads, lse.shape[2])

    def backward(self, grad_out: Tensor, out: Tensor, lse: Tensor) -> list[Tensor]:
        """Gradients of q, k and v, (B, H, .., D) each."""
        heads = out.shape[1]
        given = [one.reshape(*self.q.shape[:2], *one.shape[2:]) for one in (grad_out, out, lse)]
        attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        made = attend(given[0], self.q, self.k, self.v, *given[1:], 0.0, self.causal, scale=self.scale)
        return [one.reshape(-1, heads, *one.shape[2:]) for one in made]


def dense_output(plan: Plan, branch: Branch, call: Call) -> tuple[Tensor, Tensor] | None:
    """(out, lse) of a branch; None where it is no such attention."""
    dense = dense_operands(plan, branch, call)
    return None if dense is None else dense.forward(call.q.shape[1])


def dense_gradients(plan: Plan, call: Call, out: Tensor, lse: Tensor, grad_out: Tensor) -> BranchGradients | None:
    """The gradients of a plan of one branch from its results; None where it is no such attention."""
    dense = dense_operands(plan, plan.branches[0], call) if len(plan.branches) == 1 else None
    if dense is None or not out.dtype == grad_out.dtype == call.q.dtype:
        return None
    dq, dk, dv = dense.backward(grad_out, out, lse)
    assert call.v is not None
    dk, dv = (
        one if one.shape[1] == given.shape[1] else one.sum(1, keepdim=True)
        for one, given in ((dk, call.k), (dv, call.v))
    )
    return BranchGradients(dq, dk, dv, ())


def dense_operands(plan: Plan, branch: Branch, call: Call) -> Dense | None:
    """A branch that is such an attention."""
    q, k, v = call.q, call.k, call.v
    causal = _causal(branch.condition)
    if v is None or branch.sink is not None or (causal and q.shape[2] != k.shape[2]):
        return None
    if (
        branch.selected is not None
        or q.dtype not in TYPES
        or not q.dtype == k.dtype == v.dtype
        or q.device.type != "cpu"
    ):
        return None
    if q.shape[3] != v.shape[3] or not {k.shape[1], v.shape[1]} <= {1, q.shape[1]} or 0 in q.shape + k.shape:
        return None
    scale = _scale(branch.score, call)
    if scale is None or not scale > 0:  # torch's kernel masks before it scales
        return None
    if not causal and not _always(plan, branch.condition, call):
        return None
    k, v = (one.expand(-1, q.shape[1], -1, -1) for one in (k, v))
    if all(one.shape[0] == 1 or one.stride(0) == one.stride(1) * one.shape[1] for one in (q, k, v)):
        q, k, v = (one.flatten(0, 1).unsqueeze(1) for one in (q, k, v))
    return Dense(q, k, v, causal, scale)


def _always(plan: Plan, condition: Node, call: Call) -> bool:
    """Whether a condition holds for every key of the call, for all rows alike."""
    if condition.op == "literal":
        return bool(condition.attribute)
    leaves = [node for node in walk(condition) if not node.args]
    if any(leaf.op not in ("literal", "parameter", "size", "index") for leaf in leaves):
        return False
    if condition.type.indices - {"j"}:
        return False
    at = Environment(plan, call, call.positions("j"), call.compute_dtype)
    return bool(at.value(condition).all())


def _causal(condition: Node) -> bool:
    """Whether a condition is `j <= i`."""
    if condition.op not in ("le", "ge") or any(arg.op != "index" for arg in condition.args):
        return False
    names = tuple(arg.attribute for arg in condition.args)
    return names == (("j", "i") if condition.op == "le" else ("i", "j"))


def _scale(score: Node, call: Call) -> float | None:
    """The factor of a score that is a product of q and k times a number."""
    raw, factor = split_score(score)
    if raw.op != "dot" or tuple(arg.attribute for arg in raw.args) not in (("q", "k"), ("k", "q")):
        return None
    value = 1.0 if factor is None else of_node(factor, call.parameters, call.sizes)
    return None if value is None else float(value)

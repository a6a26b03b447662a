"""Attention on a CPU where all keys, or all before the query, are live and the score is a scaled product.

That is what torch's own fused kernel computes, tiled as the executor would; it leaves the log-sum-exp, too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnc.compiler.emit.kernel import split_score
from attnc.compiler.ir import Node, walk
from attnc.compiler.plan import Branch, Plan
from attnc.runtime.call import Call
from attnc.runtime.evaluate import Environment
from attnc.runtime.scalars import of_node

TYPES = (torch.float32, torch.float64)  # in 16 bits it rounds the weights, which the executor does not


def dense_output(plan: Plan, branch: Branch, call: Call) -> tuple[Tensor, Tensor] | None:
    """(out, lse) of a branch; None where it is no such attention."""
    q, k, v = call.q, call.k, call.v
    causal = _causal(branch.condition)
    if v is None or branch.sink is not None or (causal and q.shape[2] != k.shape[2]):
        return None
    if q.dtype not in TYPES or not q.dtype == k.dtype == v.dtype or q.device.type != "cpu":
        return None
    if q.shape[3] != v.shape[3] or not {k.shape[1], v.shape[1]} <= {1, q.shape[1]} or 0 in q.shape + k.shape:
        return None
    scale = _scale(branch.score, call)
    if scale is None or not scale > 0:  # torch's kernel masks before it scales
        return None
    if not causal and not _always(plan, branch.condition, call):
        return None
    k, v = (one.expand(-1, q.shape[1], -1, -1) for one in (k, v))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    return out.contiguous(), lse.contiguous()  # as the operator's fake says: torch's kernel has heads innermost in lse


def _always(plan: Plan, condition: Node, call: Call) -> bool:
    """Whether a condition holds for every key of the call, for all rows alike."""
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

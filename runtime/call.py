"""A call as the back ends see it: tensors, values of parameters, sizes of all axes, tables that a prologue made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from attnc.compiler.ir import walk
from attnc.compiler.plan import Plan
from attnc.runtime.derived import derive


@dataclass(frozen=True)
class Call:
    """One call of a pattern, checked before.

    q (B, H, N, D), k (B, Hk, M, D), v (B, Hk, M, E) of any strides; v may be None where the plan doesn't use it.
    `parameters`: the elements of a tuple are `segments.0`, ..; always with `scale`. `inputs` in their declared
    layout; an axis h may be Hk long. `sizes`: b h i j t d e, and every axis of an input. `derived`: by
    `NAME.PART`, each over the indices of the node that reads it, then its vector axes. `offset`: global
    position of row 0.
    """

    q: Tensor
    k: Tensor
    v: Tensor | None
    parameters: Mapping[str, int | float | bool]
    inputs: Mapping[str, Tensor]
    sizes: Mapping[str, int]
    derived: Mapping[str, Tensor] = field(default_factory=dict)
    offset: int = 0

    @property
    def compute_dtype(self) -> torch.dtype:
        """What sums are kept in: float64 for float64, else float32."""
        return torch.float64 if self.q.dtype == torch.float64 else torch.float32

    def positions(self, *indices: str) -> dict[str, Tensor]:
        """Every position of some of b, h, i (global) and j: tensors of that rank, which broadcast together."""
        found = {}
        for at, index in enumerate(indices):
            position = torch.arange(self.sizes[index], device=self.q.device)
            found[index] = (position + self.offset if index == "i" else position).view(
                [-1 if n == at else 1 for n in range(len(indices))]
            )
        return found


def make_call(
    plan: Plan,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    parameters: Mapping[str, int | float | bool],
    inputs: Mapping[str, Tensor],
) -> Call:
    """A call with its sizes and the plan's derived tables. Raises ValueError where a token input is too short."""
    offset = max(k.shape[2] - q.shape[2], 0)
    sizes = {"b": q.shape[0], "h": q.shape[1], "i": q.shape[2], "d": q.shape[3], "j": k.shape[2], "t": k.shape[2]}
    sizes["offset"] = offset
    if v is not None:
        sizes["e"] = v.shape[3]
    for declared in plan.inputs:
        if declared.name not in inputs:
            continue  # q, k or v with other axes
        for axis, length in zip(declared.axes, inputs[declared.name].shape, strict=True):
            sizes.setdefault(axis, length)
    call = Call(q, k, v, dict(parameters), dict(inputs), sizes, offset=offset)
    if sizes["i"] > sizes["j"]:
        check_token_reads(plan, sizes)
    return with_derived(plan, call)


def with_derived(plan: Plan, call: Call) -> Call:
    """The call with the plan's derived tables."""
    derived: dict[str, Tensor] = {}
    for table in plan.derived:
        derived |= derive(plan, table, call)
    return replace(call, derived=derived)


def check_token_reads(plan: Plan, sizes: Mapping[str, int]) -> None:
    """With more queries than keys, a token input has no value at the last queries."""
    roots = [node for table in plan.derived for node in table.args]
    for branch in plan.branches:
        roots += [branch.score, branch.condition, *([branch.sink] if branch.sink else [])]
    for node in walk(*roots):
        if node.op == "rename" and node.attribute == ("t", "i"):
            name = next((leaf.attribute for leaf in walk(node) if leaf.op == "input"), "an input")
            raise ValueError(
                f"{plan.name}: `{name}` has {sizes['t']} tokens (as many as keys) and is read at i, "
                f"but there are {sizes['i']} queries"
            )

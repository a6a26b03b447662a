"""The CUDA back end, backward: runs the generated gradient kernels of one branch."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from attnc.compiler.differentiate import Leaf, differentiate
from attnc.compiler.emit.backward import backward_kernels
from attnc.compiler.pipeline import transpose
from attnc.compiler.plan import Branch, Plan, Rows
from attnc.compiler.schedule import backward_shape
from attnc.runtime.backward import BranchGradients
from attnc.runtime.call import Call
from attnc.runtime.derived import derive
from attnc.runtime.kernel_call import (
    INTERPRETED,
    KernelCall,
    Kernels,
    device_of,
    interpreting,
    kind_of,
    padded,
    refuse_unfit,
    stride,
)
from attnc.runtime.launch_listed import listed_gradients

PRODUCT_ROWS = 64

_loaded: dict[int, tuple[Plan, Plan, dict[int, Kernels]]] = {}


def turned(plan: Plan) -> tuple[Plan, dict[int, Kernels]]:
    """The plan with its transposed domains, and the kernels made so far; once a process."""
    if id(plan) not in _loaded:
        _loaded[id(plan)] = (plan, transpose(plan), {})
    return _loaded[id(plan)][1:]


def kernels_of(plan: Plan, number: int) -> tuple[Plan, Kernels]:
    """The transposed plan and the gradient kernels of a branch, made at its first backward."""
    full, made = turned(plan)
    if number not in made:
        made[number] = Kernels(full, backward_kernels(full, full.branches[number], number))
    return full, made[number]


def branch_backward(
    plan: Plan, number: int, call: Call, grad_out: Tensor, lse: Tensor, delta: Tensor
) -> BranchGradients:
    """Gradients of q, k, v and the score's leaves from one branch's cotangent (B, H, N, E).

    `lse` and `delta` are (B, H, N), float32.
    """
    refuse_unfit(call)
    plan, kernels = kernels_of(plan, number)
    branch = plan.branches[number]
    if branch.selected is not None:
        return listed_gradients(branch, plan, kernels, call, grad_out, lse, delta)
    derived = dict(call.derived)
    for table in plan.transposed_derived:
        derived |= derive(plan, table, call)
    call = replace(call, derived=derived)
    leaves = differentiate(branch.score).leaves
    v = call.v if call.v is not None else call.k
    passes = kernels.kernels[1:]
    shared = {"q": call.q, "k": call.k, "v": v, "do": grad_out}
    shared |= {"lse": lse.contiguous().float(), "delta": delta.contiguous().float()}
    results = run_rows(branch, kernels, call, shared, leaves)
    sizes = call.sizes
    whole = len(passes) == 1 and complete(passes[0].domain.rows) and sizes["i"] > 0
    dtype = call.k.dtype if whole else torch.float32
    make = torch.empty if whole else torch.zeros
    outputs = {
        "dk": make(call.k.shape, dtype=dtype, device=call.q.device),
        "dv": make(v.shape, dtype=dtype, device=call.q.device),
    }
    for at, leaf in enumerate(leaves):
        if leaf.side == "key":
            by_key = (sizes["b"], sizes["h"], sizes["j"])
            results[at] = outputs[f"leaf_{at}"] = torch.zeros(by_key, dtype=torch.float32, device=call.q.device)
    for kernel in passes:
        shape = INTERPRETED if interpreting() else backward_shape(*widths(call, v), "keys", kind_of(kernel.domain))
        run = KernelCall(call, shared | outputs, shape)
        tiles = run.tiles(kernel.domain, sizes["j"], 0)
        if call.k.numel() == 0 or sizes["i"] == 0 or tiles == 0:
            continue
        listed = kernel.domain.rows.listed is not None  # heads list keys of their own: one launch a member
        for member in range(run.sizes["GROUP"] if listed else 1):
            run.sizes["MEMBER"] = member
            run.run(kernels, kernel, (tiles, sizes["b"] * call.k.shape[1]), ADDING=not whole)
    gradients = tuple(results[at] for at in range(len(leaves)))
    return BranchGradients(results[-1], outputs["dk"].to(call.k.dtype), outputs["dv"].to(v.dtype), gradients)


def widths(call: Call, v: Tensor) -> tuple[int, int]:
    """The widest padded vector and the bytes of an element."""
    return max(padded(call.sizes["d"]), padded(v.shape[3])), call.q.element_size()


def complete(rows: Rows) -> bool:
    """Whether the row tiles of a transposed domain are all keys."""
    return rows.phase is None and rows.listed is None and not rows.packed


def run_rows(
    branch: Branch, kernels: Kernels, call: Call, shared: dict[str, Tensor], leaves: tuple[Leaf, ...]
) -> dict[int, Tensor]:
    """The kernel that keeps queries: {-1: dq, leaf: its gradient}."""
    kernel = kernels.kernels[0]
    sizes, device = call.sizes, call.q.device
    v = shared["v"]
    shape = INTERPRETED if interpreting() else backward_shape(*widths(call, v), "rows", kind_of(branch.domain))
    dq = torch.zeros_like(call.q, memory_format=torch.contiguous_format)
    run = KernelCall(call, shared | {"dq": dq}, shape)
    tiles = run.tiles(branch.domain, sizes["i"], call.offset) if sizes["i"] else 0
    results: dict[int, Tensor] = {-1: dq}
    constants: dict[str, int] = {}
    for at, leaf in enumerate(leaves):
        if leaf.side == "row":
            results[at] = torch.zeros((sizes["b"], sizes["h"], sizes["i"]), dtype=torch.float32, device=device)
        elif leaf.side == "pair":
            width = padded(call.inputs[str(leaf.value.args[0].attribute)].shape[-1])
            constants[f"WIDTH_{at}"] = width
            results[at] = torch.zeros((max(tiles, 1), sizes["b"], sizes["h"], width), device=device)
        else:
            continue
        run.tensors[f"leaf_{at}"] = results[at]
    if dq.numel() and sizes["j"]:
        run.run(kernels, kernel, (tiles, sizes["b"] * sizes["h"]), **constants)
    for at, leaf in enumerate(leaves):
        if leaf.side == "pair":
            length = call.inputs[str(leaf.value.args[0].attribute)].shape[-1]
            results[at] = results[at].sum(0)[..., :length]
    return results


def row_products(plan: Plan, x: Tensor, y: Tensor) -> Tensor:
    """sum over e of x * y: (B, H, N), float32."""
    out = torch.empty(x.shape[:3], dtype=torch.float32, device=x.device)
    if out.numel() == 0:
        return out
    batch, heads, rows, width = x.shape
    with device_of(x):
        kernels_of(plan, 0)[1].module.row_products[(-(-rows // PRODUCT_ROWS), batch * heads)](
            x,
            y,
            out,
            *(stride(tensor, slot) for tensor in (x, y) for slot in range(4)),
            heads,
            rows,
            width,
            BLOCK_M=PRODUCT_ROWS,
            BLOCK_E=padded(width),
        )
    return out

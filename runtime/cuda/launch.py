"""The CUDA back end, forward: runs the generated Triton kernels of a plan (on a CPU under TRITON_INTERPRET=1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attnc.compiler.emit.kernel import Kernel
from attnc.compiler.emit.streamed import forward_kernels
from attnc.compiler.plan import Branch, Plan
from attnc.compiler.schedule import TileShape, tile_shape
from attnc.runtime.binding import WIDEST_ATTENDED
from attnc.runtime.branches import join
from attnc.runtime.call import Call
from attnc.runtime.cuda import launch_single
from attnc.runtime.cuda.kernel_call import (
    INTERPRETED,
    KernelCall,
    Kernels,
    attended_width,
    device_of,
    interpreting,
    join_rows,
    kind_of,
    padded,
    pieces,
    precision,
    processors,
    refuse_unfit,
    refuse_wide,
    stride,
)
from attnc.runtime.cuda.launch_listed import listed_outputs
from attnc.runtime.cuda.work import ProgramList, program_list
from attnc.runtime.tuned import chosen_shape

_loaded: dict[int, tuple[Plan, Kernels]] = {}


def kernels_of(plan: Plan) -> Kernels:
    """The forward kernels of a plan, made once a process."""
    if id(plan) not in _loaded:
        _loaded[id(plan)] = (plan, Kernels(plan, forward_kernels(plan)))
    return _loaded[id(plan)][1]


def execute(plan: Plan, call: Call, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """The result (B, H, N, E), of `dtype` or that of q, and lse (B, H, N), float32: every branch, then their join."""
    refuse_unfit(call)
    refuse_wide(call, WIDEST_ATTENDED)
    dtype = dtype or call.q.dtype
    if launch_single.takes(plan, call):
        return launch_single.execute(plan, call, dtype)
    kernels = kernels_of(plan)
    own = dtype if len(plan.branches) == 1 else torch.float32
    streamed = [number for number, branch in enumerate(plan.branches) if branch.selected is None]
    outputs = [run_branch(plan, plan.branches[n], kernels, kernels.kernels[n], call, own) for n in streamed]
    listed = [number for number in range(len(plan.branches)) if number not in streamed]
    outputs += [listed_outputs(plan, plan.branches[n], kernels, n, call, own, []) for n in listed[:-1]]
    if listed:
        return listed_outputs(plan, plan.branches[listed[-1]], kernels, listed[-1], call, dtype, outputs)
    return join(outputs, dtype)


def run_branch(
    plan: Plan, branch: Branch, kernels: Kernels, kernel: Kernel, call: Call, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """One branch: (out, lse)."""
    q, v = call.q, call.v if call.v is not None else call.k
    batch, heads, rows, width = q.shape
    out = torch.empty((batch, heads, rows, v.shape[-1]), dtype=dtype, device=q.device)
    lse = torch.empty((batch, heads, rows), dtype=torch.float32, device=q.device)
    if out.numel() == 0 or lse.numel() == 0:
        return out, lse
    widest = max(attended_width(plan, width), padded(v.shape[-1]))
    itemsize = torch.float32.itemsize if plan.exact else q.element_size()
    shape = INTERPRETED if interpreting() else rule_shape(branch, call, widest, itemsize)
    if not plan.joined and not pieces(plan, call):  # what a tuner tries is for one block of columns, and its products
        shape = chosen_shape(kernels, kernel, call, "forward", shape, itemsize)
    listed = program_list(plan, branch.domain, call, shape, processors(q))
    tensors = {"q": q, "k": call.k, "v": v, "o": out, "lse": lse, "part_out": lse, "part_lse": lse, "schedule": lse}
    if listed is not None:
        parts = (max(listed.slots, 1), batch * heads, shape.block_m)
        tensors["part_out"] = torch.empty((*parts, padded(v.shape[-1])), dtype=torch.float32, device=q.device)
        tensors["part_lse"] = torch.empty(parts, dtype=torch.float32, device=q.device)
        tensors["schedule"] = listed.entries
    run = KernelCall(call, tensors, shape)
    tiles = len(listed.entries) if listed else run.tiles(branch.domain, rows, call.offset)
    given = precision(plan, call)
    run.run(kernels, kernel, (tiles, batch * heads), SPLIT=listed is not None, **given)
    if listed is not None and len(listed.long_tiles):
        combine(kernels, listed, run)
    return out, lse


def rule_shape(branch: Branch, call: Call, widest: int, itemsize: int) -> TileShape:
    """The tile of a branch's kernel, where no tuner found a better one."""
    return tile_shape(widest, itemsize, kind_of(branch.domain), call.sizes["j"])


def combine(kernels: Kernels, listed: ProgramList, run: KernelCall) -> None:
    """Join the parts of the tiles that were split."""
    out, lse = run.tensors["o"], run.tensors["lse"]
    with device_of(out):
        rows = join_rows(run.shape)
        grid = (len(listed.long_tiles), run.sizes["B"] * run.sizes["H"], run.shape.block_m // rows)
        kernels.module.combine_parts[grid](
            run.tensors["part_out"],
            run.tensors["part_lse"],
            listed.long_tiles,
            listed.rows,
            out,
            lse,
            *(stride(out, slot) for slot in range(4)),
            run.sizes["H"],
            run.sizes["N"],
            run.sizes["E"],
            BLOCK_M=run.shape.block_m,
            ROWS=rows,
            BLOCK_E=run.padded[1],
            num_warps=4,
        )


def kernel_texts(name: str, plans: Sequence[Plan]) -> dict[str, str]:
    """Generated modules by name, for people: one a step that streams keys."""
    texts = [kernels_of(plan).text for plan in plans]
    return dict(zip([name] if len(texts) == 1 else [f"{name}_{n}" for n in range(len(texts))], texts, strict=True))

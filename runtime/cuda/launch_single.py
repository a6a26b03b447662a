"""One query a head, on CUDA: the query heads of a key head are the rows of a tile, so that keys are read once.

That is the kernel of decoding (`compiler.emit.decoding`), with k and v as the call has them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnc.compiler.emit.decoding import decoded_kernels, decoded_module
from attnc.compiler.plan import Plan
from attnc.compiler.schedule_decoding import decoded_shape, parts_of
from attnc.runtime.call import Call
from attnc.runtime.cuda.kernel_call import KernelCall, Kernels, device_of, interpreting, padded, processors, stride
from attnc.runtime.cuda.work import closed_form

_loaded: dict[int, tuple[Plan, Kernels]] = {}


def kernels_of(plan: Plan) -> Kernels:
    """The kernels of a plan, made once a process."""
    if id(plan) not in _loaded:
        kernels = decoded_kernels(plan)
        _loaded[id(plan)] = plan, Kernels(plan, kernels, decoded_module(plan, kernels))
    return _loaded[id(plan)][1]


def takes(plan: Plan, call: Call) -> bool:
    """Whether heads share keys, each with one query, and no tensor steers which."""
    shared = call.v is not None and call.k.shape[1] < call.q.shape[1] and call.sizes["j"] > 0
    if call.sizes["i"] != 1 or not shared or plan.exact or plan.placed is not None:
        return False
    return all(branch.selected is None and closed_form(branch) for branch in plan.branches)


def execute(plan: Plan, call: Call, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The result (B, H, 1, E) of `dtype` and lse (B, H, 1), of all branches."""
    q, v = call.q, call.v
    assert v is not None
    kernels = kernels_of(plan)
    batch, heads, _, width = q.shape
    group, value_width = heads // call.k.shape[1], v.shape[3]
    shape = decoded_shape(max(padded(width), padded(value_width)), group, q.element_size(), interpreting())
    tiles = batch * call.k.shape[1] * -(-group // shape.block_m)
    parts = parts_of(tiles, call.sizes["j"], processors(q), shape)
    slots = parts * len(kernels.kernels)
    out = torch.empty((batch, heads, 1, value_width), dtype=dtype, device=q.device)
    lse = torch.empty((batch, heads, 1), dtype=torch.float32, device=q.device)
    if not out.numel():
        return out, lse
    tensors = {"q": q, "k": call.k, "v": v, "o": out, "lse": lse, "pages": lse, "part_out": lse, "part_lse": lse}
    if slots > 1:
        room = (batch * heads, slots, padded(value_width))
        tensors["part_out"] = torch.empty(room, dtype=torch.float32, device=q.device)
        tensors["part_lse"] = torch.empty(room[:2], dtype=torch.float32, device=q.device)
    for number, kernel in enumerate(kernels.kernels):
        run = KernelCall(call, tensors, shape)
        run.sizes |= {"PAGE": 0, "LINE": 0, "POOL": 0, "SLOT": number * parts, "SLOTS": slots}
        run.run(kernels, kernel, (parts, tiles), SPLIT=slots > 1)
    if slots > 1:
        with device_of(out):
            kernels.module.join_parts[(batch * heads,)](
                tensors["part_out"],
                tensors["part_lse"],
                out,
                lse,
                *(stride(out, slot) for slot in (0, 1, 3)),
                heads,
                value_width,
                slots,
                BLOCK_S=1 << (slots - 1).bit_length(),
                BLOCK_E=padded(value_width),
            )
    return out, lse

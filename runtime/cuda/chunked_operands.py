"""Operands of a chunked step: one element type, one batch, heads that divide one another; and the way back."""

from __future__ import annotations

import torch
from torch import Tensor

from attnc.runtime.cuda.kernel_call import interpreting

NOTHING = -1.0e4  # a log decay that leaves nothing


def element_type(*tensors: Tensor) -> torch.dtype:
    """The type of all products. Raises where the kernels can't run: TypeError for float64, RuntimeError off a GPU."""
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"the CUDA kernels accumulate in float32 and take float32, bfloat16 or float16, not {dtype}")
    if tensors[0].device.type != "cuda" and not interpreting():
        raise RuntimeError("the Triton back end needs CUDA tensors, or TRITON_INTERPRET=1 before triton is imported")
    return dtype


def batch_of(*tensors: Tensor) -> int:
    """The batch of tensors of which some may have 1 for all."""
    return next((one.shape[0] for one in tensors if one.shape[0] != 1), 1)


def spread(tensor: Tensor, batch: int, heads: int) -> Tensor:
    """The tensor with a whole batch, and with `heads` heads, each a copy of the one that it shares."""
    if tensor.shape[0] != batch:
        tensor = tensor.expand(batch, *tensor.shape[1:])
    if tensor.shape[1] == heads:
        return tensor
    if tensor.shape[1] == 1:
        return tensor.expand(tensor.shape[0], heads, *tensor.shape[2:])
    if heads % tensor.shape[1]:
        raise ValueError(f"{heads} heads can't share {tensor.shape[1]}")
    return tensor.repeat_interleave(heads // tensor.shape[1], 1)


def whole_decay(decay: Tensor | None, same: Tensor | None, batch: int, positions: int) -> Tensor | None:
    """The log decay (batch, heads, positions or more[, f]); all is gone at the first token of a run of `same` (b, t).

    Raises ValueError where it has fewer positions.
    """
    if decay is not None:
        decay = decay.float().expand(batch, *decay.shape[1:])
        if decay.shape[2] == 1:
            decay = decay.expand(*decay.shape[:2], positions, *decay.shape[3:])
    if same is not None:
        new = torch.nn.functional.pad(same[:, 1:] != same[:, :-1], (1, 0))
        gone = torch.where(new, NOTHING, 0.0)[:, None].expand(batch, 1, same.shape[1])
        decay = gone if decay is None else decay + (gone[..., None] if decay.dim() == 4 else gone)
    if decay is not None and decay.shape[2] < positions:
        raise ValueError(f"the decay has {decay.shape[2]} positions, fewer than {positions}")
    return decay


def decay_gradient(found: Tensor, decay: Tensor, positions: int) -> Tensor:
    """The gradient of a log decay from that of its `positions`, over all heads."""
    if decay.shape[2] == 1:
        found = found.sum(2, keepdim=True)
    elif decay.shape[2] > positions:
        missing = decay.shape[2] - positions
        found = torch.cat([found, found.new_zeros(*found.shape[:2], missing, *found.shape[3:])], 2)
    return gathered(found, decay)


def gathered(gradient: Tensor, like: Tensor) -> Tensor:
    """The gradient of what was spread: summed over the copies, in float32, then of the type of `like`."""
    batch, heads = like.shape[:2]
    if gradient.shape[1] != heads:
        grouped = gradient.unflatten(1, (heads, gradient.shape[1] // heads))
        gradient = grouped.sum(2, dtype=torch.float32)
    if gradient.shape[0] != batch:
        gradient = gradient.sum(0, keepdim=True, dtype=torch.float32)
    return gradient.to(like.dtype)


def of_first_members(cotangent: Tensor, heads: int) -> Tensor:
    """The cotangent of states that query heads share, as one of the first head of each group alone."""
    shared = heads // cotangent.shape[1]
    return torch.nn.functional.pad(cotangent.unsqueeze(2), (0, 0, 0, 0, 0, shared - 1)).flatten(1, 2)

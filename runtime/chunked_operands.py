"""Operands of a chunked step: one element type, one batch, heads that divide one another; and the way back."""

from __future__ import annotations

import torch
from torch import Tensor

from attnc.runtime.kernel_call import interpreting


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


def gathered(gradient: Tensor, like: Tensor) -> Tensor:
    """The gradient of what was spread: summed over the copies, in float32, then of the type of `like`."""
    batch, heads = like.shape[:2]
    if gradient.shape[1] != heads:
        grouped = gradient.unflatten(1, (heads, gradient.shape[1] // heads))
        gradient = grouped.sum(2, dtype=torch.float32)
    if gradient.shape[0] != batch:
        gradient = gradient.sum(0, keepdim=True, dtype=torch.float32)
    return gradient.to(like.dtype)

"""Tensor descriptors (TMA) for the tiles that a kernel reads in order or by a step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from attnc.compiler.emit.arguments import PLAIN, ROW_VIEW, Argument, view_constant
from attnc.compiler.ir import Node
from attnc.compiler.plan import Domain, Stepped
from attnc.compiler.schedule import TileShape
from attnc.runtime.call import Call
from attnc.runtime.scalars import of_node

ALIGNMENT = 16  # bytes, of the address and of every stride but the last


def copies_tiles(tensor: Tensor) -> bool:
    """Whether the tensor's device has an engine that copies tiles (TMA; Hopper and later)."""
    return tensor.is_cuda and torch.cuda.get_device_capability(tensor.device)[0] >= 9


class Views:
    """The descriptors of one launch. `present` holds the constants that say which there are.

    A view follows the tensor's order, (B, heads, tokens, D), or a step: (B, heads, step, tokens // step, D);
    statistics are the same without D.
    Where a tensor's strides or length don't allow it, the kernel's pointers are used.
    """

    def __init__(
        self, domain: Domain, call: Call, tensors: Mapping[str, Tensor], padded: tuple[int, int], shape: TileShape
    ) -> None:
        self.domain = domain
        self.call = call
        self.tensors = tensors
        self.width = {"q": padded[0], "k": padded[0], "v": padded[1], "do": padded[1]}
        self.shape = shape
        self.present: dict[str, bool] = {}

    def of(self, argument: Argument) -> Any:
        """The descriptor of a `view` argument, or the plain tensor where there can be none."""
        tensor = self.tensors[argument.attribute]
        made = self.describe(argument.attribute, tensor, argument.slot)
        constant = view_constant(argument)
        self.present[constant] = self.present.get(constant, True) and made is not None
        return tensor if made is None else made

    def step(self, slot: int) -> int | None:
        """The step of a view; None: in order."""
        node: Node | None = None
        if slot == ROW_VIEW:
            node = self.domain.rows.step
        elif slot != PLAIN:
            walk = self.domain.key_sets[slot].walk
            assert isinstance(walk, Stepped)
            node = walk.step
        return None if node is None else int(of_node(node, self.call.parameters, self.call.sizes) or 1)

    def describe(self, name: str, tensor: Tensor, slot: int) -> Any:
        """The descriptor of one view; None where the tensor has none."""
        if not copies_tiles(tensor):
            return None
        if tensor.dim() == 3:
            return self.statistics(tensor, slot)
        batch, heads, tokens, width = tensor.shape
        step, length = self.step(slot), self.shape.block_m if slot == ROW_VIEW else self.shape.block_n
        if tensor.stride(3) != 1 or tensor.data_ptr() % ALIGNMENT or (step is not None and tokens % step):
            return None
        unit = ALIGNMENT // tensor.element_size()
        strides = [tensor.stride(at) if tensor.shape[at] > 1 else unit for at in range(3)]
        shape, block = [batch, heads, tokens], [1, 1, length]
        if step is not None:
            shape, block = [batch, heads, step, tokens // step], [1, 1, 1, length]
            strides = [*strides[:2], strides[2], strides[2] * step]
        if any(stride % unit or stride <= 0 for stride in strides):
            return None
        return descriptor(tensor, [*shape, width], [*strides, 1], [*block, self.width[name]])

    def statistics(self, tensor: Tensor, slot: int) -> Any:
        """Of a contiguous (B, H, N): by a step, or where lines are not aligned, of a copy that is laid out for it."""
        step = self.step(slot)
        if step is not None:
            if tensor.shape[2] % step:
                return None
            tensor = tensor.unflatten(2, (-1, step)).transpose(2, 3)
        unit = ALIGNMENT // tensor.element_size()
        shape = list(tensor.shape)
        tensor = pad(tensor, (0, -shape[-1] % unit)).contiguous()
        strides = [tensor.stride(at) for at in range(tensor.dim() - 1)]
        return descriptor(tensor, shape, [*strides, 1], [*[1] * (tensor.dim() - 1), self.shape.block_n])


def descriptor(tensor: Tensor, shape: list[int], strides: list[int], block: list[int]) -> Any:
    """A host-side descriptor; it holds the tensor."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(tensor, shape, strides, block)

"""Tensor descriptors (TMA) for the tiles that a kernel reads in order or by a step."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from attnc.compiler.emit.arguments import PLAIN, ROW_VIEW, TAIL, Argument, view_constant
from attnc.compiler.ir import Node
from attnc.compiler.plan import Domain, Stepped
from attnc.compiler.schedule import TileShape
from attnc.runtime.call import Call
from attnc.runtime.scalars import of_node

ALIGNMENT = 16  # bytes, of the address and of every stride but the last
WIDEST_BOX = 256  # elements of a dimension that one copy takes


def copies_tiles(tensor: Tensor) -> bool:
    """Whether the tensor's device has an engine that copies tiles (TMA; Hopper and later)."""
    return tensor.is_cuda and torch.cuda.get_device_capability(tensor.device)[0] >= 9


@dataclass(frozen=True)
class View:
    """How a descriptor of a tensor is made: everything but the tensor, so that a later call of the same sizes has it.

    `step`: statistics are laid out by it; `gap`: elements that fill up their lines. Both are copies.
    """

    template: Any  # a TensorDescriptor
    step: int | None = None
    gap: int | None = None

    def of(self, tensor: Tensor) -> Any:
        """The descriptor; it holds the tensor, or its copy."""
        made = copy(self.template)
        made.base = tensor if self.gap is None else laid_out(tensor, self.step, self.gap)
        return made


def laid_out(tensor: Tensor, step: int | None, gap: int) -> Tensor:
    """Statistics (B, H, N), or (B, H, step, N // step), with lines that end where a copy may."""
    if step is not None:
        tensor = tensor.unflatten(2, (-1, step)).transpose(2, 3)
    return pad(tensor, (0, gap)).contiguous()


class Views:
    """The descriptors of one launch. `present` holds the constants that say which there are.

    A view follows the tensor's order, (B, heads, tokens, D), or a step: (B, heads, step, tokens // step, D);
    statistics are the same without D. Where a tensor's strides or length don't allow it, the kernel's pointers are
    used.
    """

    def __init__(
        self,
        domain: Domain,
        call: Call,
        tensors: Mapping[str, Tensor],
        padded: tuple[int, int],
        shape: TileShape,
        tail: int = 0,
    ) -> None:
        self.domain = domain
        self.call = call
        self.tensors = tensors
        self.width = dict.fromkeys(("q", "k", "k_low"), padded[0]) | dict.fromkeys(("v", "do"), padded[1])
        self.tail = tail
        self.shape = shape
        self.present: dict[str, bool] = {}

    def of(self, argument: Argument) -> View | None:
        """The view that a `view` argument stands for; None: the plain tensor stands in its place."""
        name, block = argument.attribute, 0
        if name.endswith(TAIL):
            if not self.tail:
                return None
            name = name.removesuffix(TAIL)
            block = self.width[name]
        made = self.describe(name, self.tensors[name], argument.slot, block)
        constant = view_constant(argument)
        self.present[constant] = self.present.get(constant, True) and made is not None
        return made

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

    def describe(self, name: str, tensor: Tensor, slot: int, begin: int) -> View | None:
        """One view, of the columns from `begin`; None where the tensor has none."""
        if not tensor.numel() or not copies_tiles(tensor):
            return None
        if tensor.dim() == 3:
            return self.statistics(tensor, slot)
        columns = self.tail if begin else self.width[name]
        if columns > WIDEST_BOX:
            return None
        tensor = tensor[..., begin:] if begin else tensor
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
        return View(descriptor(tensor, [*shape, width], [*strides, 1], [*block, columns]))

    def statistics(self, tensor: Tensor, slot: int) -> View | None:
        """Of a contiguous (B, H, N): by a step, or where lines are not aligned, of a copy that is laid out for it."""
        step = self.step(slot)
        if self.call.offset if step is None else tensor.shape[2] % step:
            return None  # a copy begins at a multiple of ALIGNMENT; tiles are counted from position 0, not from row 0
        shape = [*tensor.shape] if step is None else [*tensor.shape[:2], step, tensor.shape[2] // step]
        gap = -shape[-1] % (ALIGNMENT // tensor.element_size())
        copied = laid_out(tensor, step, gap)
        strides = [copied.stride(at) for at in range(copied.dim() - 1)]
        made = descriptor(copied, shape, [*strides, 1], [*[1] * (len(shape) - 1), self.shape.block_n])
        return View(made, step, None if step is None and not gap else gap)


def descriptor(tensor: Tensor, shape: list[int], strides: list[int], block: list[int]) -> Any:
    """A host-side descriptor; it holds the tensor."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(tensor, shape, strides, block)

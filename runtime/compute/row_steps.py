"""`Compute` steps: what lives on single rows by generated kernels (see `compiler.fuse`), the rest with torch.

Kernels take float32, bfloat16 and float16, on CUDA or in Triton's interpreter; torch everything else.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attnc.compiler.composition import Composition, Compute
from attnc.compiler.fuse import Group, Operand, groups
from attnc.compiler.ir import Node
from attnc.dsl.types import Base
from attnc.runtime.backward import Engine, recording
from attnc.runtime.compute.arrays import Arrays, Frame
from attnc.runtime.compute.computing import arrays_of, computed
from attnc.runtime.compute.consumers import consumers_of

if TYPE_CHECKING:
    from attnc.runtime.cuda.launch_pointwise import Rows

Add = Callable[[str, Tensor], None]


def compute(composition: Composition, step: Compute, frame: Frame, engine: Engine | None) -> Tensor:
    """The step's array."""
    arrays = arrays_of(step, frame)
    if engine is not None:
        for group in fused(step.node, frame, engine):
            rows = rows_of(group, frame, arrays)
            made = rows.value(dtype_of(composition, step, rows))
            if made is not None:
                arrays.known[group.root] = made
    return computed(step, frame, arrays)


def fused(root: Node, frame: Frame, engine: Engine) -> tuple[Group, ...]:
    """The groups that kernels make of a node in a call."""
    return groups(root) if engine.chunked and frame.real == torch.float32 else ()


def rows_of(group: Group, frame: Frame, arrays: Arrays) -> Rows:
    """A group with its operands, those made by torch without history."""
    from attnc.runtime.cuda.launch_pointwise import Rows  # late: it brings triton

    return Rows(group, frame, tuple(operand_of(one, frame, arrays).detach() for one in group.operands))


def operand_of(operand: Operand, frame: Frame, arrays: Arrays) -> Tensor:
    """An operand's tensor: an input as the call has it, or what torch makes."""
    if operand.node.op == "input":
        return frame.tensors[str(operand.node.attribute)]
    return arrays.held(operand.node)


def dtype_of(composition: Composition, step: Compute, rows: Rows) -> torch.dtype:
    """What a group's value is kept in."""
    shape = rows.shape() if rows.group.root is step.node else None
    if shape is None:
        return rows.frame.real
    return consumers_of(composition).dtype(step.name, rows.frame, shape[-1])


@dataclass
class Replay:
    """A step made again for its gradients: kernels without a history, torch's parts with one.

    `leaves`: the arrays that gradients are wanted of and torch reads, as autograd's leaves. `made`: the array, where
    the forward kept it.
    """

    composition: Composition
    step: Compute
    frame: Frame
    engine: Engine
    wanted: Collection[str]
    made: Tensor | None = None
    leaves: dict[str, Tensor] = field(default_factory=dict)
    done: list[tuple[Group, Rows]] = field(default_factory=list)

    def run(self, needed: bool) -> Tensor:
        """The step's array; where it is not `needed`, perhaps a stand-in of its shape and type."""
        parts = fused(self.step.node, self.frame, self.engine)
        whole = self.is_whole(parts)
        if not whole:
            self.leaves = {name: self.frame.tensors[name].detach().requires_grad_() for name in self.wanted}
        with nullcontext() if whole else recording():
            frame = replace(self.frame, tensors={**self.frame.tensors, **self.leaves})
            self.arrays = arrays_of(self.step, frame)
            if self.made is not None:
                self.arrays.products[self.step.node] = self.made
            for group in parts:
                self.group(group, needed)
            self.out = computed(self.step, frame, self.arrays)
        return self.out.detach()

    def is_whole(self, parts: Sequence[Group]) -> bool:
        """Whether kernels do all of the step, so that torch needs no history."""
        arrays = Arrays(self.frame)
        return bool(parts) and all(
            all(operand.node.op == "input" for operand in group.operands)
            and rows_of(group, self.frame, arrays).layout is not None
            and group.root is self.step.node
            for group in parts
        )

    def group(self, group: Group, needed: bool) -> None:
        """One kernel; what it leaves is a leaf to torch."""
        rows = rows_of(group, self.frame, self.arrays)
        last = group.root is self.step.node
        dtype = dtype_of(self.composition, self.step, rows)
        shape = None if needed or not last else rows.shape()
        made = rows.value(dtype) if shape is None else rows.tensors[0].new_zeros((), dtype=dtype).expand(shape)
        if made is None:
            return
        self.arrays.known[group.root] = made if last else made.requires_grad_()
        self.done.append((group, rows))

    def back(self, cotangent: Tensor, sofar: dict[str, Tensor], add: Add) -> None:
        """Gives `add` the gradients of the wanted arrays, by name, in their shapes.

        `sofar`: what they have already; kernels take it from there and give the sum.
        """
        pending = {self.step.node: cotangent}
        if not any(group.root is self.step.node for group, _ in self.done):
            self.torch(self.out, pending.pop(self.step.node), pending, add)
        for group, rows in reversed(self.done):
            given = pending.pop(group.root, None)
            if given is None:
                continue
            types = {one.name: kind for one in group.operands if (kind := self.kind(one)) is not None}
            held = self.held(group, types, sofar)
            found = rows.gradients(given, types, held) if types else {}
            for operand in group.operands:
                gradient = found.get(operand.name)
                if gradient is None:
                    continue
                if operand.node.op == "input":
                    name = str(operand.node.attribute)
                    add(name, declared(gradient, operand, self.frame))
                else:
                    self.torch(self.arrays.held(operand.node), gradient, pending, add)

    def held(self, group: Group, types: Collection[str], sofar: dict[str, Tensor]) -> dict[str, Tensor]:
        """Takes from `sofar` what is there of a group's operands, laid out by type."""
        found: dict[str, Tensor] = {}
        for operand in group.operands:
            node = operand.node
            if node.op == "input" and operand.name in types and node.attribute in sofar:
                layout = list(self.frame.layouts[str(node.attribute)])
                names = [*node.type.ordered_indices(), *node.type.axes]
                if sorted(layout) == sorted(names):
                    gradient = sofar.pop(str(node.attribute))
                    found[operand.name] = gradient.permute([layout.index(name) for name in names])
        return found

    def kind(self, operand: Operand) -> torch.dtype | None:
        """What an operand's gradient is worth in; None where none is wanted."""
        if operand.node.type.base is not Base.REAL:
            return None
        if operand.node.op != "input":
            made = self.arrays.held(operand.node)
            return made.dtype if made.requires_grad else None
        name = str(operand.node.attribute)
        if name not in self.wanted:
            return None
        return consumers_of(self.composition).cotangent(name, self.frame)

    def torch(self, value: Tensor, cotangent: Tensor, pending: dict[Node, Tensor], add: Add) -> None:
        """Through what torch made of inputs and of groups before."""
        if not value.requires_grad:
            return
        roots = [group.root for group, _ in self.done if self.arrays.known[group.root].requires_grad]
        leaves = [*self.leaves.values(), *(self.arrays.known[root] for root in roots)]
        more = bool(self.done)
        made = torch.autograd.grad(value, leaves, cotangent.to(value.dtype), allow_unused=True, retain_graph=more)
        for name, gradient in zip(self.leaves, made, strict=False):
            if gradient is not None:
                add(name, gradient)
        for root, gradient in zip(roots, made[len(self.leaves) :], strict=True):
            if gradient is not None:
                pending[root] = pending[root] + gradient if root in pending else gradient


def declared(gradient: Tensor, operand: Operand, frame: Frame) -> Tensor:
    """A gradient in its node's layout, in the layout of the call's tensor."""
    node = operand.node
    names = [*node.type.ordered_indices(), *node.type.axes]
    layout = list(frame.layouts[str(node.attribute)])
    present = [name for name in layout if name in names]
    gradient = gradient.permute([names.index(name) for name in present])
    for place, name in enumerate(layout):
        if name not in names:
            gradient = gradient.unsqueeze(place)
    return gradient


@lru_cache(maxsize=1024)
def smooth_inputs(root: Node) -> frozenset[str]:
    """The real arrays that a value follows smoothly; those that only steer a condition or an int are not among them."""
    found: set[str] = set()
    seen: set[Node] = set()
    stack = [root]
    while stack:
        node = stack.pop()
        if node in seen or node.type.base is not Base.REAL or node.type.selects is not None or node.op == "detach":
            continue
        seen.add(node)
        if node.op == "input":
            found.add(str(node.attribute))
        stack += node.args
    return frozenset(found)

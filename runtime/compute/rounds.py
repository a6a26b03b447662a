"""Runs the rounds of a `repeat` on small matrices in one generated kernel, with gradients."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from attnc.compiler.emit.matrices import MatrixKernels, matrix_kernels
from attnc.compiler.ir import Node, walk
from attnc.runtime.cache import cached_module
from attnc.runtime.compute.arrays import Arrays, layout
from attnc.runtime.cuda.launcher import Launchers

LARGEST = 64  # rows and columns of a matrix that registers hold beside the others of a round


@lru_cache(maxsize=256)
def kernels_of(node: Node) -> tuple[MatrixKernels, Launchers] | None:
    """The kernels of a `repeat` and their module; None where no kernel takes it."""
    made = matrix_kernels(node)
    return None if made is None else (made, Launchers(cached_module(made.text, lambda: made.text)))


def runs(at: Arrays, node: Node) -> bool:
    """Whether `rounds` takes a `repeat`: one of small matrices."""
    return kernels_of(node) is not None


def by_kernel(at: Arrays, kernels: MatrixKernels) -> bool:
    """Whether a kernel runs them in this call."""
    from attnc.runtime.cuda.kernel_call import interpreting  # late: it brings what only kernels need

    frame = at.frame
    if frame.tracing or frame.real != torch.float32 or not (frame.device.type == "cuda" or interpreting()):
        return False
    return all(0 < frame.length(axis) <= LARGEST for axis in kernels.axes)


def rounds(at: Arrays, node: Node) -> Tensor:
    """The result of a `repeat` that `runs`, in its layout."""
    found = kernels_of(node)
    assert found is not None
    kernels, module = found
    indices = layout(name for arg in node.args[1:] for name in arg.type.indices)
    given = at.same_heads(indices, [at.over(node.args[place], indices) for place in kernels.reads])
    for name in ("h", "b"):
        if name not in indices:
            given = [
                one.unsqueeze(0 if name == "b" else indices.index("b") + 1 if "b" in indices else 0) for one in given
            ]
    count = at.integer(node.args[0])
    if by_kernel(at, kernels):
        launch = Launch(module, kernels, count, tuple(at.frame.length(axis) for axis in kernels.axes))
        out: Tensor = Rounds.apply(launch, *given)  # type: ignore[no-untyped-call]
    else:
        out = by_torch(at, node, count, dict(zip(kernels.reads, given, strict=True)))
    for place, name in ((1, "h"), (0, "b")):
        if name not in indices:
            out = out.squeeze(place)
    return out


OPERATORS: dict[str, Callable[..., Any]] = {
    "neg": operator.neg,
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": operator.truediv,
    "dot": operator.matmul,
    "matmul": operator.matmul,
    "transpose": lambda x: x.mT,
}


def by_torch(at: Arrays, node: Node, count: int, given: Mapping[int, Tensor]) -> Tensor:
    """The same by torch, without a look at types in each round. `given`: operands by place, (B, H) or matrices."""
    block = node.block
    assert block is not None
    names: dict[object, Tensor] = {}
    for place, name in enumerate((*block.states, *block.captured), 1):
        operand = given.get(place)
        if operand is None:
            names[name] = _value(at, _order(node.args[place]), {})
        else:
            names[name] = operand[..., None, None] if operand.dim() == 2 else operand
    steps = [(name, _order(step)) for name, step in block.steps]
    for _ in range(count):
        for name, order in steps:
            names[name] = _value(at, order, names)
    return names[block.result]


@lru_cache(maxsize=256)
def _order(root: Node) -> tuple[Node, ...]:
    return tuple(walk(root))


def _value(at: Arrays, order: Sequence[Node], names: Mapping[object, Tensor]) -> Tensor:
    """The last of some nodes in order: (B, H, rows, columns), or 1 long where it is a number."""
    found: dict[Node, Any] = {}
    for node in order:
        if node.op in ("state", "local"):
            found[node] = names[node.attribute]
        elif node.op == "literal":
            found[node] = node.attribute
        elif node.op == "identity":
            length = at.frame.length(str(node.attribute))
            found[node] = torch.eye(length, dtype=at.frame.real, device=at.frame.device)
        else:
            found[node] = OPERATORS[node.op](*(found[arg] for arg in node.args))
    last: Tensor = found[order[-1]]
    return last


class Launch:
    """The kernels of one call. Operands (B, H) or (B, H, rows, columns), float32; B and H may be 1."""

    def __init__(self, module: Any, kernels: MatrixKernels, count: int, lengths: Sequence[int]) -> None:
        self.module = module
        self.kernels = kernels
        self.count = count
        self.lengths = lengths

    def forward(self, given: Sequence[Tensor], keep: bool) -> tuple[Tensor, list[Tensor]]:
        """The result, and the states at the start of each round (B * H, rounds, rows, columns)."""
        batch, heads = torch.broadcast_shapes(*(one.shape[:2] for one in given))
        start = given[0]
        out = start.new_empty(batch, heads, *start.shape[2:])
        states = given[: len(self.kernels.states)]
        rounds = self.count if keep else 0
        kept = [one.new_empty(batch * heads, rounds, *one.shape[2:]) for one in states]
        self.run(self.module.rounds, given, [*kept, out], batch * heads, heads, KEEP=keep)
        return out, kept

    def backward(self, given: Sequence[Tensor], kept: Sequence[Tensor], cotangent: Tensor) -> list[Tensor]:
        """Gradients of what was given, for each batch row and head."""
        batch, heads = cotangent.shape[:2]
        grads = [one.new_empty(batch, heads, *one.shape[2:]) for one in given]
        tensors = [*kept, cotangent.contiguous(), *grads]
        self.run(self.module.rounds_back, given, tensors, batch * heads, heads)
        return grads

    def run(
        self, kernel: Any, given: Sequence[Tensor], tensors: Sequence[Tensor], programs: int, heads: int, **flags: bool
    ) -> None:
        from attnc.runtime.cuda.kernel_call import device_of, interpreting, padded, stride

        if programs == 0:
            return
        strided = [part for one in given for part in (one, *(stride(one, slot) for slot in range(one.dim())))]
        blocks = [padded(length) for length in self.lengths]
        constants: dict[str, Any] = {f"BLOCK_{at}": block for at, block in enumerate(blocks)}
        constants |= {"PADDED": tuple(blocks) != tuple(self.lengths), **flags}
        constants["PRECISION"] = "ieee" if interpreting() else "tf32x3"
        with device_of(given[0]):
            kernel[(programs,)](*strided, *tensors, self.count, heads, *self.lengths, **constants, num_warps=4)


class Rounds(torch.autograd.Function):
    """The rounds under autograd."""

    @staticmethod
    def forward(ctx: Any, launch: Launch, *given: Tensor) -> Tensor:
        keep = any(ctx.needs_input_grad)
        out, kept = launch.forward(given, keep)
        ctx.launch = launch
        ctx.count = len(given)
        ctx.save_for_backward(*given, *kept)
        return out

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        saved = ctx.saved_tensors
        given, kept = saved[: ctx.count], saved[ctx.count :]
        grads = ctx.launch.backward(given, kept, cotangents[0])
        return None, *(grad.sum_to_size(one.shape) for grad, one in zip(grads, given, strict=True))

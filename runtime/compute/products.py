"""Products of two arrays over named dimensions, in the type that they are held in, with sums in float32.

An einsum of two operands of one 16-bit type runs on the tensor cores: no operand is widened. One that is sequence long
is not copied either where its strides allow a batch of matrices. Gradients are such products too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

SHORT_TYPES = (torch.bfloat16, torch.float16)
DEEP = 4096  # terms of a sum from which on its partial sums are kept in float32, whatever the result is rounded to

Labels = tuple[str, ...]


@dataclass(frozen=True)
class Spelling:
    """`x,y->out` in names of dimensions; every one of `out` is one of an operand."""

    x: Labels
    y: Labels
    out: Labels


def taken_as_held(x: Tensor, y: Tensor, real: torch.dtype) -> bool:
    """Whether a product of these is taken in their own type; else both are widened to that of sums, `real`."""
    return x.dtype == y.dtype and (x.dtype == real or (x.is_cuda and x.dtype in SHORT_TYPES))


def product(x: Tensor, y: Tensor, spelling: Spelling, dtype: torch.dtype, made: Tensor | None = None) -> Tensor:
    """The einsum of two tensors of one type, as `dtype`: theirs or float32. Differentiable, once.

    `made`: the result, where it is at hand and only its gradients are wanted.
    """
    if made is not None and made.dtype != dtype:
        made = None
    result: Tensor = Product.apply(x, y, spelling, dtype, made)  # type: ignore[no-untyped-call]
    return result


class Product(torch.autograd.Function):
    """See `product`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, spelling: Spelling, dtype: torch.dtype, made: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, y)
        ctx.spelling = spelling
        return contracted(x, y, spelling, dtype) if made is None else made.detach()

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        (cotangent,) = cotangents
        x, y = ctx.saved_tensors
        own: Spelling = ctx.spelling
        grad_x = grad_y = None
        if ctx.needs_input_grad[0]:
            grad_x = gradient(cotangent, own.out, y, own.y, x, own.x)
        if ctx.needs_input_grad[1]:
            grad_y = gradient(cotangent, own.out, x, own.x, y, own.y)
        return grad_x, grad_y, None, None, None


def gradient(cotangent: Tensor, out: Labels, other: Tensor, names: Labels, target: Tensor, wanted: Labels) -> Tensor:
    """Of one operand, in its shape and type. A float32 cotangent is the sum of two of the operands' type, and a rest
    that is less than what their products round to."""
    spelling = Spelling(out, names, wanted)
    shape = tuple(target.shape)
    if cotangent.dtype == other.dtype:
        return contracted(cotangent, other, spelling, target.dtype, shape)
    high = cotangent.to(other.dtype)
    low = (cotangent - high).to(other.dtype)
    made = contracted(high, other, spelling, torch.float32, shape)
    return (made + contracted(low, other, spelling, torch.float32, shape)).to(target.dtype)


def contracted(
    x: Tensor, y: Tensor, spelling: Spelling, dtype: torch.dtype, shape: tuple[int, ...] | None = None
) -> Tensor:
    """The einsum by a batch of matrix products. `shape`: of the result, where that is not the operands': dimensions
    1 long are summed over, those that no operand has are repeated."""
    out = spelling.out
    kept = [name for at, name in enumerate(out) if shape is None or shape[at] != 1]
    left, right = _Side.of(x, spelling.x), _Side.of(y, spelling.y)
    lengths = left.lengths | {name: n for name, n in right.lengths.items() if n != 1 or name not in left.names}
    for side, other in ((left, right), (right, left)):
        side.drop_single(other.lengths, kept)
    shared = [name for name in left.names if name in right.names]
    batch = [name for name in shared if name in kept]
    summed = [name for name in dict.fromkeys([*left.names, *right.names]) if name not in kept]
    for side in (left, right):
        batch += side.apart(batch, summed)
    if out and out[-1] in left.free(batch, summed):  # what is last in the result is last in memory
        left, right = right, left
    rows, columns = (side.free(batch, summed) for side in (left, right))
    one = left.matrix(batch, rows, summed, lengths)
    two = right.matrix(batch, summed, columns, lengths)
    depth = prod(lengths[name] for name in summed)
    made = batched(one, two, dtype, depth)
    order = [*batch, *rows, *columns]
    made = made.reshape([lengths[name] for name in order])
    made = made.permute([order.index(name) for name in out if name in order])
    for at, name in enumerate(out):
        if name not in order:
            made = made.unsqueeze(at)
    return made if shape is None else made.expand(shape)


def batched(x: Tensor, y: Tensor, dtype: torch.dtype, depth: int) -> Tensor:
    """(B, m, k) @ (B, k, n) with sums in float32."""
    if x.dtype == dtype and (depth < DEEP or dtype not in SHORT_TYPES):
        return torch.bmm(x, y)
    if x.is_cuda:
        return torch.bmm(x, y, out_dtype=torch.float32).to(dtype)
    return torch.bmm(x.float(), y.float()).to(dtype)


@dataclass
class _Side:
    """An operand with the names of its dimensions."""

    tensor: Tensor
    names: list[str]

    @classmethod
    def of(cls, tensor: Tensor, names: Labels) -> _Side:
        return cls(tensor, list(names))

    @property
    def lengths(self) -> dict[str, int]:
        return dict(zip(self.names, self.tensor.shape, strict=True))

    def drop_single(self, others: dict[str, int], kept: Sequence[str]) -> None:
        """Leaves out dimensions 1 long over which the other operand varies, or that are in no result."""
        for name, length in self.lengths.items():
            if length == 1 and (others.get(name, 1) != 1 or name not in kept):
                self.tensor = self.tensor.squeeze(self.names.index(name))
                self.names.remove(name)

    def free(self, batch: Sequence[str], summed: Sequence[str]) -> list[str]:
        return [name for name in self.names if name not in batch and name not in summed]

    def apart(self, batch: Sequence[str], summed: Sequence[str]) -> list[str]:
        """The free dimensions that are none of a matrix's as the operand lies: each of their places has its own."""
        free = self.free(batch, summed)
        strides = dict(zip(self.names, self.tensor.stride(), strict=True))
        lengths = self.lengths
        for at in range(len(free) - 1, 0, -1):
            outer, inner = free[at - 1], free[at]
            if lengths[outer] != 1 and strides[outer] != strides[inner] * lengths[inner]:
                return free[:at]
        return []

    def matrix(
        self, batch: Sequence[str], rows: Sequence[str], columns: Sequence[str], lengths: dict[str, int]
    ) -> Tensor:
        """(batch, rows, columns); along what the operand lacks it is repeated, by a stride of 0 where it is a batch."""
        inner = self.names[-1] if self.names else ""
        if inner in rows and self.tensor.stride(-1) == 1:  # should it be copied, then in the order that it has
            return self.matrix(batch, columns, rows, lengths).mT
        own = [name for name in (*batch, *rows, *columns) if name in self.names]
        tensor = self.tensor.permute([self.names.index(name) for name in own])
        for at, name in enumerate((*batch, *rows, *columns)):
            if name not in self.names:
                tensor = tensor.unsqueeze(at)
        tensor = tensor.expand([lengths[name] for name in (*batch, *rows, *columns)])
        return tensor.reshape([prod(lengths[name] for name in part) for part in (batch, rows, columns)])

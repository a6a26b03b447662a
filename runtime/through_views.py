"""Gradients of arrays from those of a step's operands, which are views or casts of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from attnc.runtime.arrays import Frame
from attnc.runtime.backward import recording

Operands = list[Tensor | None]


def through_views(
    frame: Frame,
    wanted: Sequence[str],
    operands: Callable[[Frame], Operands],
    backward: Callable[[Operands], Sequence[Tensor | None]],
) -> Mapping[str, Tensor]:
    """The gradients of the arrays `wanted`, carried through what made the frame's arrays operands.

    `backward`: from the operands, without history, to a gradient of each or None.
    """
    leaves = {name: frame.tensors[name].detach().requires_grad_() for name in wanted}
    with recording():
        viewed = operands(replace(frame, tensors={**frame.tensors, **leaves}))
    found = backward([None if one is None else one.detach() for one in viewed])
    pairs = [
        (one, gradient.to(one.dtype))
        for one, gradient in zip(viewed, found, strict=True)
        if one is not None and gradient is not None and one.requires_grad
    ]
    if not pairs:
        return {}
    results, given = zip(*pairs, strict=True)
    made = torch.autograd.grad(results, list(leaves.values()), given, allow_unused=True, materialize_grads=True)
    return dict(zip(leaves, made, strict=True))

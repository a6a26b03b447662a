"""Gradients of arrays from those of a step's operands, which are views or casts of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from attnc.runtime.backward import recording
from attnc.runtime.compute.arrays import Frame

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
    plain = operands(frame)
    names = [name_of(one, frame) for one in plain]
    if all(one is None or name is not None for one, name in zip(plain, names, strict=True)):
        return directly(names, backward([None if one is None else one.detach() for one in plain]), wanted)
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


def name_of(operand: Tensor | None, frame: Frame) -> str | None:
    """The array that an operand is, as it is; None where that is not plain."""
    if operand is None:
        return None
    place = operand.data_ptr()
    found = [name for name, one in frame.tensors.items() if one.data_ptr() == place]
    if len(found) != 1:
        return None
    (name,) = found
    own = frame.tensors[name]
    return (
        name if own.dtype == operand.dtype and own.shape == operand.shape and own.stride() == operand.stride() else None
    )


def directly(
    names: Sequence[str | None], found: Sequence[Tensor | None], wanted: Sequence[str]
) -> Mapping[str, Tensor]:
    """Gradients of arrays that are operands themselves."""
    made: dict[str, Tensor] = {}
    for name, gradient in zip(names, found, strict=True):
        if name in wanted and name is not None and gradient is not None:
            made[name] = made[name] + gradient if name in made else gradient
    return made

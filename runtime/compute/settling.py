"""Conditions that sizes alone decide: whether one holds for all members of declared axes in a call."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace

import torch

from attnc.compiler.ir import Node, walk
from attnc.runtime.compute.arrays import Arrays, Frame

REMEMBERED = 256
_MEMBERS = ("index", "start", "stop")
_READS = (*_MEMBERS, "literal", "parameter", "size")
_found: OrderedDict[tuple[object, ...], bool] = OrderedDict()


def settled(at: Arrays, condition: Node) -> bool:
    """Whether a condition is true everywhere, as far as sizes and parameters tell; it needs no mask then.

    `c.start < M` of segments is, where no segment is empty. Worked out on the CPU, once for the sizes of a call.
    """
    if condition.op == "literal":
        return condition.attribute is True
    frame = at.frame
    axes = _axes(condition, frame)
    if axes is None or type(at) is not Arrays or frame.tracing or condition in at.known:
        return False
    members = tuple(frame.axis(name) for name in axes)
    key = (condition, members, *frame.sizes.items(), *frame.parameters.items(), *frame.totals.items())
    if key not in _found:
        here = replace(frame, device=torch.device("cpu"))
        _found[key] = bool(Arrays(here).value(condition).all())
        if len(_found) > REMEMBERED:
            _found.popitem(last=False)
    return _found[key]


def _axes(condition: Node, frame: Frame) -> list[str] | None:
    """The declared axes that a condition reads members of; None where it reads anything else that varies."""
    axes: dict[str, None] = {}
    for node in walk(condition):
        if node.args:
            continue
        if node.op not in _READS or (node.op in _MEMBERS and node.attribute not in frame.axes):
            return None
        if node.op in _MEMBERS:
            axes[str(node.attribute)] = None
    return list(axes)

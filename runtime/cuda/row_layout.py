"""The operands of a group of rows in a call: their strides and lengths along what a kernel counts by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from attnc.compiler.fuse import Group, Operand, segments
from attnc.compiler.ir import Node, walk
from attnc.runtime.compute.arrays import Frame, Span, is_index

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
WIDEST = 2048  # elements of a row, which a program holds


@dataclass(frozen=True)
class Given:
    """An operand's strides and lengths along those of b, h, n (the sequence) and f that it has.

    `span`: the heads that it has alone, of those that its length tells.
    """

    strides: Mapping[str, int]
    lengths: Mapping[str, int]
    span: Span | None = None


@dataclass(frozen=True)
class Layout:
    """The lengths of a call that all operands fit."""

    group: Group
    given: Mapping[str, Given]
    batch: int
    heads: int
    rows: int
    offset: int
    widths: Mapping[str, int]

    @staticmethod
    def of(group: Group, frame: Frame, tensors: Sequence[Tensor]) -> Layout | None:
        """None where an operand does not fit, or there is nothing to do."""
        given = {
            operand.name: given_of(operand, tensor, frame)
            for operand, tensor in zip(group.operands, tensors, strict=True)
        }
        lengths = {dim: [one.lengths[dim] for one in given.values() if dim in one.lengths] for dim in "bh"}
        if reads_index(group, "h"):
            lengths["h"].append(frame.sizes["h"])
        if reads_index(group, "b"):
            lengths["b"].append(frame.sizes["b"])
        batch, heads = (max(lengths[dim], default=1) for dim in "bh")
        rows, offset = frame.length(group.along), frame.offset if group.along == "i" else 0
        fits = all(one in (1, batch) for one in lengths["b"]) and all(heads % max(one, 1) == 0 for one in lengths["h"])
        for operand, tensor in zip(group.operands, tensors, strict=True):
            one = given[operand.name]
            needed = rows + (offset if operand.moved else 0)
            fits = fits and one.lengths.get("n", 1) in (1, needed)
            fits = fits and (tensor.dtype in FLOATS or not tensor.is_floating_point())
            fits = fits and tensor.device == frame.device
        if group.along in frame.axes:
            fits = fits and frame.axis(group.along).first == 0
        widths = widths_of(group, given, frame)
        if not fits or widths is None or not batch * heads * rows or 0 in widths.values():
            return None
        if sum(widths.values()) > WIDEST:
            return None
        return Layout(group, given, batch, heads, rows, offset, widths)

    def shape(self) -> list[int]:
        """Shape of the group's value."""
        dims = {"b": self.batch, "h": self.heads}
        axes = self.group.root.type.axes
        lead = [dims.get(name, self.rows) for name in self.group.indices]
        return [*lead, *([sum(self.widths[one] for one in segments(axes[0]))] if axes else [])]

    def is_whole(self, name: str) -> bool:
        """Whether an operand has an element for every row of the call, and no others."""
        lengths = self.given[name].lengths
        if self.given[name].span is not None:
            return False
        return lengths.get("b", 1) == self.batch and lengths.get("h", 1) == self.heads and lengths.get("n") == self.rows


@lru_cache(maxsize=1024)
def reads_index(group: Group, name: str) -> bool:
    """Whether a group's value counts by an index."""
    return any(node.op == "index" and node.attribute == name for node in walk(group.value))


def given_of(operand: Operand, tensor: Tensor, frame: Frame) -> Given:
    """An operand's tensor as a kernel reads it. Inputs come as the call has them, others as their type lays out."""
    node = operand.node
    names = [*node.type.ordered_indices(), *node.type.axes]
    if node.op == "input":
        declared = list(frame.layouts[str(node.attribute)])
        for place in reversed(range(len(declared))):
            if declared[place] == "1" and any(is_index(axis, frame) for axis in declared[place:]):
                tensor = tensor.select(place, 0)
                del declared[place]
        tensor = tensor.permute([declared.index(name) for name in names])
    found, span = strided(tensor, node), span_of(operand, frame)
    return found if span is None else Given(found.strides, {**found.lengths, "h": frame.sizes["h"]}, span)


def span_of(operand: Operand, frame: Frame) -> Span | None:
    """The heads that an operand has alone."""
    return frame.spans.get(str(operand.node.attribute)) if operand.node.op == "input" else None


def strided(tensor: Tensor, node: Node) -> Given:
    """A tensor that is laid out by the type of a node."""
    dims = dims_of(node)
    strides = {dim: 0 if n == 1 else step for dim, n, step in zip(dims, tensor.shape, tensor.stride(), strict=True)}
    return Given(strides, dict(zip(dims, tensor.shape, strict=True)))


def dims_of(node: Node) -> list[str]:
    """The dimensions of a value in the layout of its type: b, h, n for the sequence, f for a vector axis."""
    names = [name if name in ("b", "h") else "n" for name in node.type.ordered_indices()]
    return [*names, *("f" for _ in node.type.axes)]


def widths_of(group: Group, given: Mapping[str, Given], frame: Frame) -> dict[str, int] | None:
    """Length of every segment; None where an operand has another."""
    found: dict[str, int] = {"1": 1}
    for operand in group.operands:
        if operand.node.type.axes:
            parts = segments(operand.node.type.axes[0])
            if len(parts) == 1:
                length = given[operand.name].lengths["f"]
                if found.setdefault(parts[0], length) != length:
                    return None
    for axis in axes_of(group):
        for part in segments(axis):
            if part not in found:
                if any(sign in part for sign in "(*^"):
                    return None
                found[part] = frame.length(part)
    for operand in group.operands:
        if operand.node.type.axes:
            whole = sum(found[part] for part in segments(operand.node.type.axes[0]))
            if whole != given[operand.name].lengths["f"]:
                return None
    return found


@lru_cache(maxsize=1024)
def axes_of(group: Group) -> tuple[str, ...]:
    """The vector axes of a group."""
    nodes = list(walk(group.value))
    axes = [axis for node in nodes for axis in node.type.axes]
    axes += [str(node.attribute) for node in nodes if node.op == "size"]
    return tuple(dict.fromkeys(axes))


def contiguous_strides(shape: Sequence[int]) -> list[int]:
    """Strides of a new tensor."""
    strides, step = [], 1
    for length in reversed(shape):
        strides.append(step)
        step *= max(length, 1)
    return strides[::-1]

"""A `Choose` step at run time: by its kernel on CUDA, else scores of a chunk of rows against all members by torch, then
the choice; no gradient.

Torch's memory is a chunk's: the rows are as many as keep the largest value of the score within ELEMENTS numbers, or one
row (one member of the rows' axis) where already that has more. The kernel's is that of its programs (see
`schedule_selecting`).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from attnc.compiler.composition import Choose
from attnc.compiler.ir import Node, walk
from attnc.runtime.backward import Engine
from attnc.runtime.compute.arrays import Arrays, Frame, Members, layout
from attnc.runtime.steps.carrying import NoKernelWarning
from attnc.runtime.steps.choices import choose_mass, choose_threshold, choose_topk

ELEMENTS = {"cpu": 2**22, "cuda": 2**26}  # of the largest value of a chunk
_warned: set[str] = set()


class Choosing:
    """The kind of step: see `steps.Kind`."""

    def names(self, step: Choose) -> list[str]:
        return [step.name]

    def reads(self, step: Choose) -> list[str]:
        return []

    def shapes(self, step: Choose, frame: Frame) -> list[tuple[list[int], torch.dtype]]:
        heads = {"one": 1, "group": frame.sizes["key_heads"], "each": frame.sizes["h"]}[step.heads]
        batch = frame.sizes["b"] if any(part.depends_on("b") for part in parts_of(step)) else 1
        width = frame.length(step.axis)
        if not ragged(step) and step.amount is not None:
            width = min(max(Arrays(frame).integer(step.amount), 0), width)
        return [([batch, heads, lines(step, frame), width], torch.int32)]

    def forward(self, step: Choose, frame: Frame, engine: Engine) -> list[Tensor]:
        with torch.no_grad():
            lists = selected(step, frame) if engine.chunked else None
            return [choose(step, frame) if lists is None else lists]

    def backward(
        self,
        step: Choose,
        frame: Frame,
        engine: Engine,
        outputs: Sequence[Tensor],
        cotangents: Sequence[Tensor | None],
        wanted: Sequence[str],
    ) -> Mapping[str, Tensor]:
        return {}


def ragged(step: Choose) -> bool:
    """Whether the tensors decide how many members the longest line has, so that lists are made again and not saved."""
    return step.form != "topk" or bool(step.amount is not None and step.amount.type.indices)


def selected(step: Choose, frame: Frame) -> Tensor | None:
    """The lists of a step by its kernel; None where it has none that fits."""
    if step.scores is None:
        return None
    from attnc.runtime.cuda.launch_selecting import select

    ((shape, _),) = CHOOSE.shapes(step, frame)
    lists = select(step, frame, shape[0], shape[3])
    if lists is None and frame.device.type == "cuda" and step.name not in _warned:
        _warned.add(step.name)
        message = (
            f"{step.name} is chosen by torch, by chunks of rows: no kernel holds lists or vectors of these lengths"
        )
        warnings.warn(message, NoKernelWarning, stacklevel=2)
    return None if lists is None else lists[:, :, lists.shape[2] - shape[2] :].contiguous()


def choose(step: Choose, frame: Frame) -> Tensor:
    """The lists of a step: (B or 1, heads, lines, entries), int32."""
    made = [choose_some(step, rows_of(frame, start, stop)) for start, stop in chunks(step, frame)]
    if not made:
        ((shape, dtype),) = CHOOSE.shapes(step, frame)
        return torch.full([*shape[:2], lines(step, frame), 0], -1, dtype=dtype, device=frame.device)
    most = max(one.shape[-1] for one in made)
    padded = [torch.nn.functional.pad(one, [0, most - one.shape[-1]], value=-1) for one in made]
    return padded[0] if len(padded) == 1 else torch.cat(padded, 2)


def parts_of(step: Choose) -> list[Node]:
    """The nodes of a step."""
    return [part for part in (step.score, step.amount, step.condition, step.force) if part is not None]


def lines(step: Choose, frame: Frame) -> int:
    """How many lines there are: of the rows, or of the members of their axis that hold a query."""
    if step.rows in ("i", ""):
        return frame.sizes["i"] if step.rows else 1
    members = frame.axis(step.rows)
    return members.count - frame.offset // members.stride if frame.sizes["i"] else 0


def chunks(step: Choose, frame: Frame) -> Iterator[tuple[int, int]]:
    """Ranges of rows, which begin at members of every axis of the queries."""
    rows = frame.sizes["i"]
    if not step.rows:
        yield 0, rows
        return
    nodes = list(walk(*parts_of(step)))
    over = {name for node in nodes for name in node.type.indices if name in frame.axes and frame.axis(name).over == "i"}
    axes = [frame.axes[name] for name in sorted(over)]
    unit = math.lcm(*(frame.axis(axis.name).stride for axis in axes))
    if any(axis.kind != "blocks" or axis.stride is not None for axis in axes):
        unit = max(rows + frame.offset, 1)  # members that overlap, or whose width is that of all rows
    largest = max(numbers(node, frame) for node in nodes if node.depends_on("i") or over & node.type.indices)
    step_rows = max(ELEMENTS[frame.device.type] * rows // max(largest, 1) // unit, 1) * unit
    start = 0
    while start < rows:
        stop = min((start + frame.offset) // unit * unit + step_rows - frame.offset, rows)
        yield start, stop
        start = stop


def numbers(node: Node, frame: Frame) -> int:
    """How many numbers a value has."""
    lengths = (*node.type.indices, *node.type.axes)
    folded = node.op == "fold"
    return math.prod(frame.length(name) for name in lengths if name != "folded") * (
        1 if not folded else fold(node, frame)
    )


def fold(node: Node, frame: Frame) -> int:
    """The length of folded vectors."""
    (arg,) = node.args
    assert isinstance(node.attribute, tuple)
    return frame.axis(str(node.attribute[1])).width * frame.length(arg.type.axes[0])


def rows_of(frame: Frame, start: int, stop: int) -> Frame:
    """The frame with rows start .. stop only, still at their own positions; sizes that the text asks for stay."""
    if (start, stop) == (0, frame.sizes["i"]):
        return frame
    tensors = {
        name: tensor.narrow(frame.layouts[name].index("i"), start, stop - start)
        if "i" in frame.layouts.get(name, ()) and tensor.shape[frame.layouts[name].index("i")] != 1
        else tensor
        for name, tensor in frame.tensors.items()
    }
    first, last = frame.offset + start, frame.offset + stop
    members = {name: some_members(frame.axis(name), first, last) for name in frame.axes}
    totals = {name: frame.length(name) for name in (*frame.sizes, *frame.axes)}
    sizes = {**frame.sizes, "i": stop - start}
    return replace(frame, tensors=tensors, sizes=sizes, offset=first, members=members, totals=totals)


def some_members(members: Members, first: int, last: int) -> Members:
    """The members of an axis that hold positions first .. last; all of an axis of keys."""
    if members.over != "i":
        return members
    place = first // members.stride
    return replace(members, first=place, count=-(-last // members.stride) - place, length=last)


def choose_some(step: Choose, frame: Frame) -> Tensor:
    """The lists of a frame's rows."""
    at = Arrays(frame)
    names = ("b", "h", *([step.rows] if step.rows else []), step.axis)
    first = 0
    if step.rows not in ("i", ""):  # members before the first query
        members = frame.axis(step.rows)
        first = frame.offset // members.stride - members.first
    score, condition, *force = (
        full(at, part, names, step.heads)[:, :, first:] if step.rows else full(at, part, names, step.heads).unsqueeze(2)
        for part in (step.score, step.condition, step.force)
        if part
    )
    shape = torch.broadcast_shapes(score.shape, condition.shape, *(one.shape for one in force))
    score, condition = score.expand(shape), condition.expand(shape)
    forced = force[0].expand(shape) if force else None
    amount = amount_of(step, at, names[:-1], first, shape[:3])
    if step.form == "topk":
        count = amount if isinstance(amount, Tensor) else int(amount)
        return choose_topk(score, count, condition, forced)
    rule = choose_threshold if step.form == "threshold" else choose_mass
    return rule(score, amount, condition, forced)


def full(at: Arrays, node: Node, names: tuple[str, ...], heads: str) -> Tensor:
    """A value laid out as `names`, with every row and member; b is 1 long where the value does not vary over it."""
    order = layout(names)
    tensor = at.over(node, order).permute([order.index(name) for name in names])
    for place, name in enumerate(names[2:], 2):
        tensor = at.full(tensor, place, name)
    if heads == "one":
        return tensor
    tensor = at.full(tensor, 1, "h")
    return tensor if heads == "each" else tensor[:, :: at.frame.sizes["h"] // at.frame.sizes["key_heads"]]


def amount_of(step: Choose, at: Arrays, names: tuple[str, ...], first: int, shape: Sequence[int]) -> float | Tensor:
    """The count, bound or share: one number, or one for each row (.., rows)."""
    assert step.amount is not None
    if not step.amount.type.indices:
        return at.value(step.amount).item()
    amount = full(at, step.amount, names, step.heads)
    return (amount[:, :, first:] if step.rows else amount.unsqueeze(2)).expand(tuple(shape))


CHOOSE = Choosing()

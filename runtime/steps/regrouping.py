"""A `Regroup` step at run time: rows where they lie, keys in their order, and an attention over slots.

Nothing is read back from the device: a line has a slot for every row, and for as many keys as may take part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attnc.compiler.composition import Moved, Order, Regroup
from attnc.compiler.ir import Node
from attnc.dsl.types import Base
from attnc.runtime.backward import Engine, recording
from attnc.runtime.compute.arrays import Arrays, Frame
from attnc.runtime.steps.arrangement import (
    NOWHERE,
    Arrangement,
    Placement,
    arrange,
    at_places,
    gathered,
    interval,
    placed,
)
from attnc.runtime.steps.attending import ATTEND, four, result_type


@dataclass(frozen=True)
class Slots:
    """The orders of one call (None: a side that stays as it is) and the arrays of ints that the attention reads."""

    rows: Placement | None
    keys: Arrangement | None
    made: Mapping[str, Tensor]

    def of(self, side: str) -> Placement | Arrangement:
        order = self.rows if side == "i" else self.keys
        assert order is not None
        return order


class Regrouping:
    """The kind of step: see `steps.Kind`."""

    def names(self, step: Regroup) -> list[str]:
        return [step.name, step.lse]

    def reads(self, step: Regroup) -> list[str]:
        sources = {moved.name: moved.source for moved in step.moved}
        return [sources.get(name, name) for name in ATTEND.reads(step.attend)]

    def shapes(self, step: Regroup, frame: Frame) -> list[tuple[list[int], torch.dtype]]:
        sources = {moved.name: moved.source for moved in step.moved}
        value = frame.tensors[sources.get(step.attend.value, step.attend.value)]
        rows = [frame.sizes["b"], frame.sizes["h"], frame.length(step.row)]
        return [([*rows, value.shape[-1]], result_type(step.attend, frame)), (rows, frame.real)]

    def forward(self, step: Regroup, frame: Frame, engine: Engine) -> list[Tensor]:
        slots = slots_of(step, frame)
        inner = inside(step, frame, slots, move_all(step, frame, slots))
        return ATTEND.forward(step.attend, inner, engine)

    def backward(
        self,
        step: Regroup,
        frame: Frame,
        engine: Engine,
        outputs: Sequence[Tensor],
        cotangents: Sequence[Tensor | None],
        wanted: Sequence[str],
    ) -> Mapping[str, Tensor]:
        """The attention's gradients over slots, carried back to the positions."""
        slots = slots_of(step, frame)
        leaves = {name: frame.tensors[name].detach().requires_grad_() for name in wanted}
        with recording():
            moved = move_all(step, replace(frame, tensors={**frame.tensors, **leaves}), slots)
        inner = inside(step, frame, slots, {name: tensor.detach() for name, tensor in moved.items()})
        asked = [name for name in dict.fromkeys(ATTEND.reads(step.attend)) if followed(name, moved, leaves)]
        made = ATTEND.backward(step.attend, inner, engine, outputs, cotangents, asked)
        found = {name: made[name] for name in asked if name in leaves and name in made}
        carried = [name for name in asked if name in moved and name in made]
        if carried:
            parts = torch.autograd.grad(
                [moved[name] for name in carried],
                list(leaves.values()),
                [made[name].to(moved[name].dtype) for name in carried],
                allow_unused=True,
            )
            for name, part in zip(leaves, parts, strict=True):
                if part is not None:
                    found[name] = found[name] + part if name in found else part
        return found


def followed(name: str, moved: Mapping[str, Tensor], leaves: Mapping[str, Tensor]) -> bool:
    """Whether an array of the attention leads to one whose gradient is wanted."""
    return moved[name].requires_grad if name in moved else name in leaves


def slots_of(step: Regroup, frame: Frame) -> Slots:
    """The orders of both sides, positions and ranges."""
    at = Arrays(frame)
    rows = None if step.rows is None else placed(*parts(at, step.rows, step.row))
    keys = None
    if step.keys is not None:
        most = None if step.keys.most is None else at.integer(step.keys.most)
        keys = arrange(*parts(at, step.keys, step.key), most)
    made: dict[str, Tensor] = {}
    if rows is not None:
        where = step.attend.plan.placed
        assert where is not None
        made |= {where.places: rows.places, where.count: rows.count}
    for side, name in step.positions.items():
        order = rows if side == "i" else keys
        assert order is not None
        first = frame.offset if side == "i" else 0
        made[name] = torch.where(order.positions == NOWHERE, NOWHERE, order.positions + first)
    for one in step.ranges:
        assert keys is not None
        group = step.rows.group if step.rows is not None else None
        own = torch.zeros(1, 1, frame.length(step.row), dtype=torch.int64, device=frame.device)
        own = own if group is None else of_side(at, group, step.row)
        low, high = (None if end is None else of_side(at, end, step.row) for end in (one.low, one.high))
        ends = interval(own, keys, low, high)
        for name, end in zip((one.first, one.last), ends, strict=True):
            made[name] = end
            if rows is not None:  # one that takes no part sees none
                made[name] = at_places(end, rows.places).masked_fill(~rows.filled, keys.places.shape[-1])
    return Slots(rows, keys, {name: laid_out(step, name, tensor) for name, tensor in made.items()})


def parts(at: Arrays, order: Order, index: str) -> tuple[Tensor | None, Tensor | None]:
    """The groups of one side's positions, and which take part."""
    group, live = (None if node is None else of_side(at, node, index) for node in (order.group, order.live))
    return group, live


def of_side(at: Arrays, node: Node, index: str) -> Tensor:
    """A value over (b, h, index), the first two 1 long where it does not vary over them."""
    return at.full(at.over(node, ("b", "h", index)), 2, index)


def laid_out(step: Regroup, name: str, tensor: Tensor) -> Tensor:
    """(b, h, slots, ..) in the layout that the plan declares."""
    (declared,) = (entry.axes for entry in step.attend.plan.inputs if entry.name == name)
    for at in (1, 0):
        if "bh"[at] not in declared:
            tensor = tensor.squeeze(at)
    return tensor


def move_all(step: Regroup, frame: Frame, slots: Slots) -> dict[str, Tensor]:
    """The moved arrays. Differentiable."""
    at = Arrays(frame)
    return {moved.name: move(step, moved, at, slots.of(moved.side)) for moved in step.moved}


def move(step: Regroup, moved: Moved, at: Arrays, order: Arrangement | Placement) -> Tensor:
    """One array over positions as one over slots."""
    index = step.row if moved.side == "i" else step.key
    if moved.operand:
        return gathered(four(at.frame, moved.source, index), order)
    (declared,) = (entry for entry in step.attend.plan.inputs if entry.name == moved.name)
    layout = at.frame.layouts[moved.source]
    tensor = at.frame.tensors[moved.source]
    for place in reversed(range(len(layout))):
        if layout[place] == "1":
            tensor = tensor.select(place, 0)
    names = [name for name in layout if name != "1"]
    rest = [name for name in names if name not in ("b", "h", index)]
    tensor = tensor.permute([names.index(name) for name in ("b", "h", index, *rest) if name in names])
    for place, name in enumerate(("b", "h")):
        if name not in names:
            tensor = tensor.unsqueeze(place)
    if tensor.shape[2] == 1:
        tensor = tensor.expand(-1, -1, at.length(index), *tensor.shape[3:])
    tensor = tensor.to(at.frame.real) if declared.base is Base.REAL else tensor
    return laid_out(step, moved.name, gathered(tensor, order))


def inside(step: Regroup, frame: Frame, slots: Slots, moved: Mapping[str, Tensor]) -> Frame:
    """The frame of the attention: its own lengths, and the pattern's under `outer_` names."""
    members = {name: frame.axis(name) for name in frame.axes}
    sizes = {**frame.sizes, **{f"outer_{name}": frame.length(name) for name in (*frame.sizes, *frame.axes)}}
    for order, index in ((slots.rows, step.row), (slots.keys, step.key)):
        if order is not None:
            sizes["i" if index == step.row else "j"] = order.places.shape[-1]
    layouts = {entry.name: entry.axes for entry in step.attend.plan.inputs}
    layouts |= {one.name: ("b", "h", one.side, "width") for one in step.moved if one.operand}
    return replace(
        frame,
        tensors={**frame.tensors, **slots.made, **moved},
        layouts={**frame.layouts, **layouts},
        sizes=sizes,
        offset=frame.offset if slots.rows is None else 0,
        members=members,
    )


REGROUP = Regrouping()

"""Attention of new queries over what a cache keeps.

Where everything is kept and all rows of a batch are as long as each other, the step's own plan runs with N < M, and
visits the keys that its closed forms say. Else it runs relocated (`compiler.relocate`): queries begin at another
position in every row, or keys lie in the places of a ring, a table of pages, or a list of the live ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attnc.compiler.cache_plan import side_inputs
from attnc.compiler.composition import Attend
from attnc.compiler.plan import Plan
from attnc.compiler.relocate import PLACE, START, at_rows, relocated
from attnc.runtime.backward import Engine
from attnc.runtime.call import Call
from attnc.runtime.compute.arrays import Frame
from attnc.runtime.cpu.rows import numbers
from attnc.runtime.cpu.tiles import Tiling
from attnc.runtime.decoding.kv_cache import Held
from attnc.runtime.decoding.new_tokens import Stretch
from attnc.runtime.steps.attending import call_of, operands

_PLANS: dict[tuple[int, bool, bool], tuple[Plan, Plan]] = {}


def plan_at(plan: Plan, *, start: bool, places: bool) -> Plan:
    """The relocated plan, made once a plan."""
    key = (id(plan), start, places)
    if key not in _PLANS:
        _PLANS[key] = plan, relocated(plan, start=start, places=places)  # the plan is held, so its id stays its own
    return _PLANS[key][1]


class Reader:
    """The kept arrays during one call: new values enter, steps read.

    `counts` and `starts` (b,), int64, where rows of the batch differ: how many of a row's new tokens there are, the
    others being padding, and how many tokens it had.
    """

    def __init__(
        self, held: Mapping[str, Held], stretch: Stretch, counts: Tensor | None, starts: Tensor | None
    ) -> None:
        self.held = held
        self.stretch = stretch
        self.counts = counts
        self.starts = starts
        self.new: dict[str, Tensor] = {}  # rows (b, n, ..) at the new positions

    # Entering

    def span(self, held: Held) -> tuple[int, int]:
        """The first new position along an index, and how many there are."""
        if held.kept.index == "j":
            return self.stretch.start, self.stretch.count
        return self.stretch.first[held.kept.index], self.stretch.new(held.kept.index)

    def enter(self, name: str, tensor: Tensor) -> None:
        """A value at the new positions; it is written at once where no key that a new query sees lies in its place."""
        for held in self.held.values():
            if name in held.kept.arrays:
                self.new[name] = held.rows(name, tensor, self.span(held)[1])
                if self.at_once(held):
                    self.write(held, name)

    def at_once(self, held: Held) -> bool:
        return held.slots.everything or self.span(held)[1] <= 1

    def finish(self) -> None:
        """Writes what could not be written at once."""
        for held in self.held.values():
            if not self.at_once(held):
                for name in held.kept.arrays:
                    self.write(held, name)

    def write(self, held: Held, name: str) -> None:
        """Stores the new values, as many at a time as have a place each."""
        start, count = self.span(held)
        size = max(count, 1) if held.slots.everything else held.slots.window
        for first in range(0, max(count, 1), size):
            rows = self.new[name][:, first : first + size]
            if self.starts is None or self.counts is None or held.kept.index != "j":
                position = torch.arange(start + first, start + first + rows.shape[1], device=rows.device)
                held.write(name, rows, held.slots.place(position).unsqueeze(0))
            else:
                self.write_ragged(held, name, rows, self.starts + first, (self.counts - first).clamp(min=0))

    @staticmethod
    def write_ragged(held: Held, name: str, rows: Tensor, starts: Tensor, counts: Tensor) -> None:
        """Padding writes once more what the last token of its row does; where there is none, what is there already."""
        number = torch.arange(rows.shape[1], device=rows.device)
        number = torch.minimum(number, counts.unsqueeze(-1) - 1)
        place = held.slots.place((starts.unsqueeze(-1) + number).clamp(min=0))
        tail = (1,) * (rows.dim() - 2)
        index = number.clamp(min=0).view(*number.shape, *tail).expand(-1, -1, *rows.shape[2:])
        values = rows.gather(1, index)
        if name in held.buffers:  # else nothing is there yet
            values = torch.where((counts > 0).view(-1, 1, *tail), values, held.gather(name, place))
        held.write(name, values, place)

    # Attending

    def attend(self, step: Attend, frame: Frame, engine: Engine) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp of the new rows. `frame`: of the new tokens."""
        held = self.held.get(step.keys)
        if held is None or self.stretch.start == 0:
            return engine.execute(step.plan, call_of(step, frame, operands(step, frame)), frame.real)
        if not held.slots.everything:
            return self.in_ring(step, frame, engine, held)
        if held.pages is not None and frame.device.type == "cpu":
            return self.live(step, frame, engine, held)
        if self.starts is not None:
            return self.ragged(step, frame, engine, held)
        return self.whole(step, frame, engine, held)

    def whole(self, step: Attend, frame: Frame, engine: Engine, held: Held) -> tuple[Tensor, Tensor]:
        """Everything is kept: the step's own plan, with N < M."""
        start, count = self.span(held)
        rows = {name: held.view(name, start + count) for name in held.kept.arrays}
        given = self.with_kept(frame, held, rows, self.stretch.start + self.stretch.count)
        given = replace(given, offset=self.stretch.start, members=dict(self.stretch.members))
        apart = any(name not in held.kept.arrays for name in rows_read(step, frame))
        plan = plan_at(step.plan, start=False, places=False) if apart else step.plan
        return execute(step, plan, given, frame, engine, {})

    def all_kept(self, frame: Frame) -> Frame:
        """The frame of a step that runs over everything: N new rows of M tokens, and members that are not whole yet.

        The values of these are 0: no query may depend on them.
        """
        tokens = self.stretch.start + self.stretch.count
        given = replace(frame, sizes={**frame.sizes, "j": tokens, "t": tokens}, offset=self.stretch.start, members={})
        tensors = {}
        for held in self.held.values():
            if not held.slots.everything:
                continue
            start, count = self.span(held)
            missing = given.length(held.kept.index) - start - count
            for name in held.kept.arrays:
                rows = held.view(name, start + count)
                if missing:
                    rows = torch.cat([rows, rows.new_zeros(rows.shape[0], missing, *rows.shape[2:])], 1)
                tensors[name] = held.array(name, rows)
        return with_arrays(given, tensors)

    def ragged(self, step: Attend, frame: Frame, engine: Engine, held: Held) -> tuple[Tensor, Tensor]:
        """Everything is kept, and rows begin anywhere: no later key of its row is live for a query."""
        assert self.starts is not None
        rows = {name: held.view(name, held.slots.count) for name in held.kept.arrays}
        given = self.with_kept(frame, held, rows, held.slots.count)
        plan = plan_at(step.plan, start=True, places=False)
        return execute(step, plan, given, frame, engine, {START: self.starts})

    def in_ring(self, step: Attend, frame: Frame, engine: Engine, held: Held) -> tuple[Tensor, Tensor]:
        """Some keys are kept: a lone new key is among them already, several stand behind them."""
        count, uniform = self.stretch.count, self.starts is None
        begin = self.begins(frame)
        before = self.stretch.start + (1 if count == 1 else 0)
        used = held.slots.used(before) if uniform else held.slots.count
        rows = {name: held.view(name, used) for name in held.kept.arrays}
        if count == 1:
            after = begin + (1 if self.counts is None else self.counts)
            position = held.slots.positions(after, used)
        else:
            own = begin.unsqueeze(-1) + torch.arange(count, device=frame.device)
            position = torch.cat([held.slots.positions(begin, used), own], 1)
            rows = {name: torch.cat([old, self.new[name]], 1) for name, old in rows.items()}
        return self.in_places(step, frame, engine, held, rows, position)

    def live(self, step: Attend, frame: Frame, engine: Engine, held: Held) -> tuple[Tensor, Tensor]:
        """Everything is kept, in pages: the live keys of each row of the batch are gathered, and no others."""
        length = held.slots.count
        one = {name: self.new[name][:, :1] for name in (step.key, step.value)}  # any: only their shapes are looked at
        rows = {name: row.expand(-1, length, *row.shape[2:]) for name, row in one.items()}
        rows |= {name: held.view(name, length) for name in held.kept.arrays if name not in one}
        plan = plan_at(step.plan, start=True, places=False)
        call = call_at(step, plan, self.with_kept(frame, held, rows, length), frame, {START: self.begins(frame)})
        position = live_positions(plan, call)
        rows = {name: held.gather(name, position.clamp(min=0)) for name in held.kept.arrays}
        return self.in_places(step, frame, engine, held, rows, position)

    def in_places(
        self, step: Attend, frame: Frame, engine: Engine, held: Held, rows: Mapping[str, Tensor], position: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Keys (b, n, ..) with their positions (b, n), negative for none."""
        given = self.with_kept(frame, held, rows, position.shape[1])
        plan = plan_at(step.plan, start=True, places=True)
        batch = frame.sizes["b"]
        return execute(step, plan, given, frame, engine, {START: self.begins(frame), PLACE: position.expand(batch, -1)})

    def begins(self, frame: Frame) -> Tensor:
        """Tokens of each row before this call (b,)."""
        if self.starts is not None:
            return self.starts
        return torch.full((frame.sizes["b"],), self.stretch.start, device=frame.device)

    @staticmethod
    def with_kept(frame: Frame, held: Held, rows: Mapping[str, Tensor], tokens: int) -> Frame:
        """The frame with kept arrays (b, places, ..) in the place of the new ones, and so many tokens."""
        tensors = {name: held.array(name, one) for name, one in rows.items()}
        return with_arrays(replace(frame, sizes={**frame.sizes, "j": tokens, "t": tokens}), tensors)


def with_arrays(frame: Frame, tensors: Mapping[str, Tensor]) -> Frame:
    """The frame with some arrays replaced."""
    return replace(frame, tensors={**frame.tensors, **tensors})


def rows_read(step: Attend, frame: Frame) -> list[str]:
    """The arrays over tokens that a step reads at its rows."""
    return [name for name in side_inputs(step, "i") if "t" in frame.layouts[name]]


def execute(
    step: Attend, plan: Plan, given: Frame, frame: Frame, engine: Engine, extra: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """The plan over the kept arrays of `given`; `frame` has the new tokens, `extra` what relocation adds."""
    return engine.execute(plan, call_at(step, plan, given, frame, extra), frame.real)


def call_at(step: Attend, plan: Plan, given: Frame, frame: Frame, extra: Mapping[str, Tensor]) -> Call:
    """The call of a plan for a step. A kept array that rows read has its new values under a name of its own."""
    new = {at_rows(name): frame.tensors[name] for name in frame.layouts if name in frame.tensors}
    given = with_arrays(given, {**new, **extra})
    return call_of(replace(step, plan=plan), given, operands(step, given))


def live_positions(plan: Plan, call: Call) -> Tensor:
    """The keys that the tiles of each row of the batch visit, in any of its heads: (b, most), ascending, -1: none."""
    batch = call.sizes["b"]
    found: list[list[NDArray[np.int64]]] = [[] for _ in range(batch)]
    for branch in plan.branches:
        tiling = Tiling(plan, branch.domain, call)
        for group in tiling.groups():
            keys = [numbers(piece.keys).ravel() for tile in tiling.tiles(group) for piece in tile.pieces]
            for row in range(batch)[group.batch]:
                found[row] += keys
    lists = [np.unique(np.concatenate([np.zeros(0, np.int64), *keys])) for keys in found]
    lists = [row[row >= 0] for row in lists]
    made = np.full((batch, max(*map(len, lists), 1)), -1, np.int64)
    for row, positions in enumerate(lists):
        made[row, : len(positions)] = positions
    return torch.from_numpy(made)

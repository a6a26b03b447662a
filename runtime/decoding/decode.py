"""Decoding: a pattern called token by token, or chunk by chunk, with a cache in the place of the past.

`Compute` steps run at the new tokens (`decoding.new_tokens`); a step that attends reads the arrays of its keys from the
cache (`decoding.decoded_attention`); states advance (`decoding.decoded_states`). What is kept is
`compiler.cache_plan`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from attnc.compiler.cache_plan import TOKENS, CachePlan, every_node
from attnc.compiler.composition import Attend, Carry, Choose, Composition, Compute, Extreme, Recur, Regroup
from attnc.compiler.plan import Plan
from attnc.compiler.relocate import obstacle
from attnc.runtime.backward import Engine
from attnc.runtime.call import Call
from attnc.runtime.compute.arrays import Frame
from attnc.runtime.decoding.decoded_attention import Reader
from attnc.runtime.decoding.decoded_states import States
from attnc.runtime.decoding.kv_cache import Held, Pages
from attnc.runtime.decoding.new_tokens import NewTokens, Stretch, Trail, framed, whole
from attnc.runtime.decoding.slots import Slots
from attnc.runtime.decoding.turn import Counter, Turn, refusal
from attnc.runtime.steps.composition import KINDS, arranged, with_arrays
from attnc.runtime.steps.extremes import extremes

ROWS = 256  # of a chunk at a time: each sees the kept keys and those of its part of the chunk


@dataclass
class Memory:
    """What is kept of one sequence, or of the rows of a batch. Memory is taken at the first call.

    `tokens`: how many there are. `lengths` (b,), int64: how many in each row, where rows differ (then `tokens` is a
    bound of them).
    """

    composition: Composition
    plan: CachePlan
    parameters: Mapping[str, int | float | bool]
    max_length: int
    pages: Pages | None = None
    tokens: int = 0
    lengths: Tensor | None = None
    held: dict[str, Held] = field(default_factory=dict)
    trail: Trail = field(default_factory=Trail)
    states: States = field(default_factory=States)
    counter: Counter | None = None  # once a turn has run
    turn: Turn | None = None
    no_turn: str | None = None  # why there is none

    def recount(self) -> None:
        """The host's count of tokens where turns went on: a captured graph counts on the device alone."""
        if self.counter is not None:
            self.tokens = int(self.counter.tokens.max())

    def counted(self, frame: Frame) -> Tensor:
        """Tokens of every row (b,), int64, on the device."""
        if self.counter is not None:
            return self.counter.tokens
        return torch.full((frame.sizes["b"],), self.tokens, device=frame.device)

    @property
    def nbytes(self) -> int:
        """Bytes of all that is kept."""
        return sum(one.nbytes for one in self.held.values()) + self.trail.nbytes + self.states.nbytes

    def describe(self) -> list[str]:
        """What is kept, in bytes, for all rows of the batch."""
        lines = [held.describe() for held in self.held.values()]
        lines += [f"{name}: {size:,} bytes, however many tokens" for name, size in self.states.sizes().items()]
        bound = self.trail_bytes
        return [*lines, f"sums, shifts and open members: at most {bound:,} bytes"] if bound else lines

    @property
    def trail_bytes(self) -> int:
        """The most that trailing values take."""
        return sum(self.trail.most.values())

    def part(self, count: int) -> int:
        """How many of `count` new tokens are worked on together: behind a ring, as many as have a place there each."""
        rings = [one.slots.window for one in self.held.values() if not one.slots.everything]
        return max(min(count, ROWS, *rings), 1) if rings and self.tokens else max(count, 1)

    def prepare(self, frame: Frame) -> None:
        """The places of every index, once the first call is known."""
        layouts = {name: entry.axes for name, entry in self.composition.arrays.items()}
        for kept in self.plan.kept:
            length = self.max_length
            if kept.index != "j":
                sizes = {**frame.sizes, frame.axes[kept.index].over: length}
                members = replace(frame, sizes=sizes, offset=0, members={}).axis(kept.index)
                length = whole(members, length)
            slots = Slots.of(kept.retention, self.parameters, max(length, 1))
            pages = self.pages if kept.index == "j" else None
            self.held[kept.index] = Held(kept, slots, layouts, pages, frame.tensors["q"].dtype, frame.sizes["b"])


def run(memory: Memory, frame: Frame, engine: Engine, counts: Tensor | None = None) -> Tensor:
    """The result at the new tokens (frame: of them alone), which enter the memory.

    `counts` (b,), int64: only so many of each row are tokens, the rest is padding, whose result is 0.
    """
    if not memory.held:
        memory.prepare(frame)
    if engine.chunked and frame.sizes["i"] == 1 and memory.tokens:
        turn = turn_of(memory, frame)
        if turn is not None:
            return taken(memory, turn, frame, counts)
    memory.recount()
    if counts is not None and memory.lengths is None:
        memory.lengths = memory.counted(frame)
    count = frame.sizes["i"]
    along = memory.composition.output_axes.index("i")
    size = memory.part(count)
    outs = []
    for first in range(0, count, size):
        part = tokens_of(frame, first, min(size, count - first))
        own = None if counts is None else (counts - first).clamp(0, part.sizes["i"])
        outs.append(_part(memory, part, engine, own))
    if memory.counter is not None and memory.lengths is None:
        memory.counter.tokens.fill_(memory.tokens)
    out = outs[0] if len(outs) == 1 else torch.cat(outs, along)
    if counts is not None:
        padding = torch.arange(count, device=frame.device) >= counts.unsqueeze(-1)
        shape = [1] * out.dim()
        shape[0], shape[along] = padding.shape
        out = out.masked_fill(padding.view(shape), 0)
    return out


def turn_of(memory: Memory, frame: Frame) -> Turn | None:
    """The turn of a memory, made at its first lone token; None where its composition has none."""
    if memory.turn is None and memory.no_turn is None:
        memory.no_turn = refusal(memory, frame)
        if memory.no_turn is None:
            tokens = memory.counted(frame) if memory.lengths is None else memory.lengths
            memory.counter = Counter(tokens, torch.zeros_like(tokens))
            memory.states.stay = True
            memory.turn = Turn(memory, frame, memory.counter)
    return memory.turn


def taken(memory: Memory, turn: Turn, frame: Frame, counts: Tensor | None) -> Tensor:
    """One token by a turn; 0 where a row has none."""
    if counts is not None:
        memory.lengths = turn.counter.tokens
    out = turn.run(frame, counts)
    memory.tokens += 1
    if counts is None:
        return out
    shape = [1] * out.dim()
    shape[0] = len(counts)
    return out.masked_fill((counts < 1).view(shape), 0)


def tokens_of(frame: Frame, first: int, count: int) -> Frame:
    """The frame of some of the new tokens."""
    if count == frame.sizes["i"] == frame.sizes["j"]:
        return frame
    tensors = {}
    for name, tensor in frame.tensors.items():
        for at, axis in enumerate(frame.layouts[name]):
            tensor = tensor.narrow(at, first, count) if axis in TOKENS else tensor
        tensors[name] = tensor
    return replace(frame, tensors=tensors, sizes={**frame.sizes, **dict.fromkeys("ijt", count)}, members={})


def _part(memory: Memory, frame: Frame, engine: Engine, counts: Tensor | None) -> Tensor:
    """The result at some tokens that enter the memory together."""
    count = frame.sizes["i"]
    stretch = Stretch.of(frame, memory.tokens, count)
    starts = memory.lengths
    if starts is not None and counts is None:
        counts = torch.full_like(starts, count)
    reader = Reader(memory.held, stretch, counts, starts)
    out = _steps(memory, framed(frame, stretch), engine, stretch, reader)
    memory.tokens += count
    if starts is not None and counts is not None:
        starts += counts  # in place, so that a captured graph goes on
    return out


def _steps(memory: Memory, frame: Frame, engine: Engine, stretch: Stretch, reader: Reader) -> Tensor:
    """All steps, in order."""
    trailing = {one.node: one for one in memory.plan.trailing}
    for name, tensor in frame.tensors.items():
        reader.enter(name, tensor)
    out: Tensor | None = None
    for step in memory.composition.steps:
        if isinstance(step, Compute):
            left = [NewTokens(frame, stretch, trailing, memory.trail).value(step.node)]
        elif isinstance(step, Attend):
            left = list(reader.attend(step, frame, engine))
        elif isinstance(step, Extreme):
            left = [reader.attend(step.attend, frame, scoring(engine, step))[0]]
        elif isinstance(step, Choose | Regroup):
            left = KINDS[type(step)].forward(step, reader.all_kept(frame), engine)
        else:
            assert isinstance(step, Carry | Recur)
            left = memory.states.advance(step, frame, reader, engine)
        names = [step.name] if isinstance(step, Compute) else KINDS[type(step)].names(step)
        made = dict(zip(names, left, strict=True))
        for name, tensor in made.items():
            reader.enter(name, tensor)
        frame = with_arrays(frame, made)
        out = left[0]
    reader.finish()
    assert out is not None
    return arranged(memory.composition, frame, out)


def scoring(engine: Engine, step: Extreme) -> Engine:
    """An engine that gives the largest scores in the place of a softmax."""

    def execute(plan: Plan, call: Call, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
        largest = extremes(replace(step, attend=replace(step.attend, plan=plan)), call)
        return largest, largest

    return replace(engine, execute=execute)


def ragged_refusal(composition: Composition, plan: CachePlan, *, paged: bool, ragged: bool) -> str | None:
    """Why a pattern can't have rows of unequal lengths, or pages; None where it can: it keeps arrays of keys alone."""
    what = "rows of unequal lengths" if ragged else "pages"
    if plan.states or plan.trailing or any(kept.index != "j" for kept in plan.kept):
        return f"{what} are for patterns that keep nothing but keys: this one carries states, sums or blocks along"
    for step in composition.steps:
        if not isinstance(step, Compute | Attend | Extreme):
            return f"{what} are for patterns that keep nothing but keys: this one chooses among them"
        attend = step.attend if isinstance(step, Extreme) else step
        fixed = obstacle(attend.plan, places=paged) if isinstance(attend, Attend) else None
        if fixed is not None:
            return f"{what} are not possible here: {fixed}"
        for node in every_node(step.node) if isinstance(step, Compute) and ragged else ():
            if node.op == "index" and node.attribute in TOKENS:
                return f"a value at every token counts positions (`{node.attribute}`), which differ by row"
    for name in (name for kept in plan.kept for name in kept.arrays):
        if "b" not in composition.arrays[name].axes:
            return f"`{name}` is the same for every row of the batch, and cannot be kept at places of each"
    return None

"""One new token for every row of a batch on generated kernels: planned once a cache, then a few launches a token.

How many tokens there are is counted on the device, and nothing is read back, so that a captured graph of a turn goes on
from token to token. `refusal` says which compositions have turns; the others run as `runtime.decoding.decode` has it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attnc.compiler.cache_plan import Trailing
from attnc.compiler.composition import Attend, Carry, Composition, Compute, Extreme, Recur
from attnc.compiler.ir import Node, walk
from attnc.compiler.plan import Diagonals, Domain, Listed, Plan
from attnc.compiler.relocate import CLASS, FIRST, START, WINDOW, at_rows, obstacle, relocated, ringed, scattered
from attnc.runtime.compute.arrays import Frame
from attnc.runtime.cpu.reaches import Reach
from attnc.runtime.decoding.decoding_launch import Advancing, Attending, Entering
from attnc.runtime.decoding.kv_cache import Held
from attnc.runtime.decoding.new_tokens import NewTokens, Stretch
from attnc.runtime.decoding.turned_states import behind, by_periods
from attnc.runtime.steps.attending import call_of, four, spread
from attnc.runtime.steps.carrying import CARRY, reach_of
from attnc.runtime.steps.composition import arranged, with_arrays
from attnc.runtime.steps.recurring import RECUR

if TYPE_CHECKING:
    from attnc.runtime.decoding.decode import Memory


CONSTANT = frozenset({"literal", "parameter", "size"})


def refusal(memory: Memory, frame: Frame) -> str | None:
    """Why there are no turns for what is kept and such a token; None where there are."""
    if frame.real != torch.float32 or frame.axes:
        return "members of blocks become whole at some tokens only" if frame.axes else "sums are in float64"
    if any(one.kind == "pool" for one in memory.plan.trailing):
        return "members of blocks become whole at some tokens only"
    for held in memory.held.values():
        if any(len(held.places(name).shape) > 4 for name in held.buffers):
            return "what is kept has more axes than a copy knows"
    for step in memory.composition.steps:
        if isinstance(step, Attend | Extreme):
            reason = refused_attention(softmax_of(step), memory, frame)
        elif isinstance(step, Carry):
            reason = None if step.extent.kind in ("lag", "period") else "a state is of all keys"
        else:
            reason = None if isinstance(step, Recur | Compute) else "a step chooses, or runs in an order of its own"
        if reason is not None:
            return reason
    return None


def softmax_of(step: Attend | Extreme) -> Attend:
    """The step itself, or the one whose scores are asked for, without its value."""
    return step if isinstance(step, Attend) else replace(step.attend, value=step.attend.key)


def refused_attention(step: Attend, memory: Memory, frame: Frame) -> str | None:
    """Why a softmax has no turns."""
    held = memory.held.get(step.keys)
    if step.rows != "i" or held is None:
        return "its keys are not tokens"
    if obstacle(step.plan, places=not held.slots.everything) is not None:
        return "positions are looked up by number"
    plan = moved(step.plan, held)
    roots = [node for branch in plan.branches for node in (branch.score, branch.condition)]
    if plan.derived or any(node.op == "member" for node in walk(*roots)):
        return "it looks tables up that are made at each call"
    kept = kept_arrays(memory)
    if not {step.key, step.value} <= set(kept):
        return "its keys or values are the same at all tokens"
    k, v = (four(memory_frame(frame, held, kept), name, step.keys) for name in (step.key, step.value))
    if k.shape[1] != v.shape[1] and 1 not in (k.shape[1], v.shape[1]):
        return "keys and values have different heads"
    if max(frame.sizes["d"], k.shape[3], v.shape[3]) > 1024:
        return "vectors are wider than a tile"
    return None


def kept_arrays(memory: Memory) -> dict[str, Tensor]:
    """The memory of kept arrays in their layouts; in pages, b counts pages and the positions are those of one."""
    found = {}
    for held in memory.held.values():
        for name in held.kept.arrays:
            whole = held.kept.parts.get(name)
            rows = held.places(name) if whole is None else held.part(name, held.places(whole))
            found[name] = held.array(name, rows)
    return found


def memory_frame(frame: Frame, held: Held, kept: Mapping[str, Tensor]) -> Frame:
    """The frame with the memory in the place of the token's keys."""
    places = held.slots.count if held.pages is None else held.pages.size
    return with_arrays(replace(frame, sizes={**frame.sizes, "j": places, "t": places}), kept)


def moved(plan: Plan, held: Held) -> Plan:
    """The plan for one query a row that stands anywhere, over what is kept; made once a plan."""
    slots = held.slots
    key = (id(plan), slots.everything, len(slots.classes))
    if key not in _MOVED:
        if not slots.everything:
            found = ringed(plan, len(slots.classes))
        else:
            found = relocated(plan, start=True, places=False)
            if found.derived or any(listed(branch.domain) for branch in found.branches):
                found = scattered(plan)
        _MOVED[key] = plan, found  # the plan is held, so its id stays its own
    return _MOVED[key][1]


_MOVED: dict[tuple[int, bool, int], tuple[Plan, Plan]] = {}


def listed(domain: Domain) -> bool:
    """Whether tables say which keys are visited."""
    return any(isinstance(one.walk, Listed | Diagonals) for one in domain.key_sets)


@dataclass
class Counter:
    """How many tokens each row has (b,), int64 on the device; `now`: before the current one."""

    tokens: Tensor
    now: Tensor


class Turn:
    """The stages of one token. `frame`: of such a token, for sizes and layouts."""

    def __init__(self, memory: Memory, frame: Frame, counter: Counter) -> None:
        # Not the memory itself: it holds the turn, and what it keeps would stay until cycles are collected.
        self.held, self.trail, self.states, self.counter = memory.held, memory.trail, memory.states, counter
        self.composition: Composition = memory.composition
        self.trailing: dict[Node, Trailing] = {one.node: one for one in memory.plan.trailing}
        self.stretch = Stretch(0, 1, {}, {})
        self.kept = kept_arrays(memory)
        made = {step.name for step in self.composition.steps if isinstance(step, Compute)}
        self.entering: list[Entering] = []  # of what the caller gives, the first one counts the token
        self.entering_made: dict[str, Entering] = {}
        self.plan_entering(made)
        self.constants: dict[Node, Tensor] = {}
        self.tables: dict[tuple[int, int], list[Tensor]] = {}
        self.attending: dict[str, Attending] = {}
        self.advancing: dict[str, Advancing] = {}

    # Planning

    def plan_entering(self, made: set[str]) -> None:
        tokens, now = self.counter.tokens, self.counter.now
        held = self.held.get("j")
        names = [] if held is None else [name for name in held.buffers if name not in made]
        if held is None:
            self.count_alone = True
            return
        self.count_alone = False
        self.entering.append(Entering(held, names, tokens, now, advance=True))
        for name in held.buffers:
            if name in made:
                self.entering_made[name] = Entering(held, [name], tokens, now, advance=False)

    def attending_of(self, step: Attend, frame: Frame, q: Tensor) -> Attending:
        """Planned at the first token, when all shapes are known."""
        held = self.held[step.keys]
        plan = moved(step.plan, held)
        length = held.slots.count
        memory = memory_frame(frame, held, self.kept)
        k, v = (four(memory, name, step.keys) for name in (step.key, step.value))
        heads = max(k.shape[1], v.shape[1])
        k, v = spread(k, heads), spread(v, heads)
        inputs = {**frame.tensors, **self.kept, START: self.counter.now}
        inputs |= {at_rows(name): frame.tensors[name] for name in frame.layouts if name in frame.tensors}
        given = replace(memory, tensors=inputs, offset=0)
        slots = held.slots
        numbers: dict[str, int] = {FIRST: slots.first, WINDOW: slots.window}
        at = slots.constant
        for number, one in enumerate(slots.classes):
            values = (one.period, one.low, one.width, at)
            numbers |= {name.format(number): value for name, value in zip(CLASS, values, strict=True)}
            at += one.below(slots.length)
        call = call_of(replace(step, plan=plan), given, {"q": q, "k": k, "v": v})
        sizes = {**call.sizes, "j": length, "t": length}
        call = replace(call, sizes=sizes, parameters={**call.parameters, **numbers})
        paged = frozenset({"k", "v", *held.kept.arrays}) if held.pages is not None else frozenset()
        vary = [one.name for one in plan.inputs if one.name not in self.kept and one.name != START]
        return Attending(plan, call, held.pages, paged, vary, length)

    # Running

    def run(self, frame: Frame, counts: Tensor | None = None) -> Tensor:
        """The result at the token of `frame`, which enters the memory. `counts` (b,): 0 where a row has none; there
        the result means nothing."""
        for one in self.entering:
            one.run(frame.tensors, counts)
        if self.count_alone:
            self.counter.now.copy_(self.counter.tokens)
            self.counter.tokens.add_(1)
        out: Tensor | None = None
        *_, last = self.composition.steps
        for step in self.composition.steps:
            dtype = frame.tensors["q"].dtype if step is last else frame.real
            made = self.stage(step, frame, dtype)
            for name, tensor in made.items():
                if name in self.entering_made:
                    self.entering_made[name].run({name: tensor}, counts)
            frame = with_arrays(frame, made)
            out = next(iter(made.values()))
        assert out is not None
        return arranged(self.composition, frame, out)

    def stage(self, step: object, frame: Frame, dtype: torch.dtype) -> Mapping[str, Tensor]:
        """What a step leaves, by name."""
        if isinstance(step, Compute):
            tokens = NewTokens(frame, self.stretch, self.trailing, self.trail, self.counter.now)
            tokens.known |= self.constants
            tokens.tables = self.tables  # copied from the host once: a captured token can't
            value = tokens.value(step.node)
            self.constants |= {node: one for node, one in tokens.known.items() if node.op in CONSTANT}
            return {step.name: value}
        if isinstance(step, Attend | Extreme):
            return self.attend(step, frame, dtype)
        assert isinstance(step, Carry | Recur)
        return self.advance(step, frame)

    def attend(self, whole: Attend | Extreme, frame: Frame, dtype: torch.dtype) -> Mapping[str, Tensor]:
        step = softmax_of(whole)
        q = spread(four(frame, step.query, step.rows), frame.sizes["h"])
        element = frame.tensors["q"].dtype
        q = q if q.dtype == element else q.to(element)
        q = q if q.shape[0] == frame.sizes["b"] else q.expand(frame.sizes["b"], -1, -1, -1)
        planned = self.attending.get(whole.name)
        if planned is None:
            planned = self.attending_of(step, frame, q)
            if isinstance(whole, Extreme):
                planned = replace(planned, largest=whole.largest)
            self.attending[whole.name] = planned
        given = {}
        for name in planned.vary:
            source = name if name in frame.tensors else next(one for one in frame.layouts if at_rows(one) == name)
            given[name] = frame.tensors[source]
        if isinstance(whole, Extreme):
            return {whole.name: planned.extremes(q, given)}
        out, lse = planned.run(q, given, dtype)
        return {step.name: out, step.lse: lse}

    def advance(self, step: Carry | Recur, frame: Frame) -> Mapping[str, Tensor]:
        states = self.states.last
        reach = reach_of(step, frame) if isinstance(step, Carry) else Reach()
        if isinstance(step, Carry) and reach.kind == "period":
            return by_periods(step, frame, self.states, self.counter.now, reach.amount)
        planned = self.advancing.get(step.name)
        if planned is None:
            states[step.name] = states[step.name].contiguous()
            total = isinstance(step, Carry) and step.total is not None
            planned = self.advancing[step.name] = Advancing(states[step.name], total)
        if isinstance(step, Carry):
            left = right = None
            query, key, value, decay = CARRY.operands(step, frame)
            if reach.amount:
                held = self.held["j"]
                query, key, value, decay = behind(step, frame, held, self.counter.now, reach.amount)
        else:
            query, key, value, decay, left, right = RECUR.operands(step, frame)
        given = {"query": query, "key": key, "value": value, "decay": decay, "left": left, "right": right}
        out, sums = planned.run(given)
        if isinstance(step, Carry) and step.total:
            return {step.name: out, step.total: sums}
        return {step.name: out}

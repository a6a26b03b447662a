"""The cache that a user holds between calls of `decode`."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attnc.compiler.cache_plan import TOKENS, CachePlan, cache_of, describe_cache
from attnc.compiler.composition import Composition
from attnc.dsl.diagnostics import AttnError
from attnc.dsl.terms import Pattern
from attnc.runtime.binding import bind, flat, parameter_values
from attnc.runtime.compute.arrays import Frame
from attnc.runtime.cuda.kernel_call import device_of
from attnc.runtime.decoding.decode import Memory, ragged_refusal, run, tokens_of
from attnc.runtime.decoding.kv_cache import Pages
from attnc.runtime.decoding.replay import WARM, Replay
from attnc.runtime.decoding.turn import Turn, refusal
from attnc.runtime.operator import Prepared, choose_engine, require, sizes_of
from attnc.runtime.program import Program
from attnc.runtime.refusal import refuse
from attnc.runtime.steps.composition import frame_of


class NoGraphWarning(UserWarning):
    """A token could not be captured as a CUDA graph, so that each is launched by the host."""


@dataclass
class Planned:
    """A lone token that was checked: what it was like, its frame, and its graph once it has one.

    `seen`: how many ran by themselves; `captures`: how many graphs may be made, where what is read in place moves.
    """

    form: tuple[object, ...]
    frame: Frame
    replay: Replay | None = None
    seen: int = 0
    captures: int = 3


def form_of(
    pattern: Pattern, q: Tensor, k: Tensor, v: Tensor | None, inputs: Mapping[str, Any]
) -> tuple[object, ...] | None:
    """All that checks look at; None where something is no tensor."""
    named = [("q", q), ("k", k), ("v", v), *inputs.items()]
    if any(not isinstance(one, Tensor) for name, one in named if name != "v" or one is not None):
        return None
    return (id(pattern), *[name if one is None else (name, one.shape, one.dtype, one.device) for name, one in named])


class DecodingCache:
    """What a pattern keeps of the tokens that it has seen. Made by `pattern.cache(..)`, filled by `pattern.decode(..)`.

    Parameters are fixed with the cache. Batch, heads, widths, element type and device are those of the first call,
    which takes the memory: what `compiler.cache_plan` derives, and no more. Calls change the cache in place.
    """

    def __init__(self, program: Program, max_length: int, pages: Pages | None, parameters: Mapping[str, Any]) -> None:
        pattern = program.pattern
        if max_length < 1:
            refuse(pattern, "decoding", f"a cache for {max_length} tokens: at least one is needed")
        self.given = dict(parameters)
        values = parameter_values(pattern, program.parameters, parameters)
        lengths = {name: len(value) for name, value in values.items() if isinstance(value, tuple)}
        self.program = program.with_lengths(lengths).with_numbers(values)
        self.max_length = max_length
        self.pages = pages
        ints = {name: value for name, value in flat(values).items() if isinstance(value, int)}
        require_positive(self.program, ints)
        self.plan: CachePlan = cache_of(self.program.pattern, self.composition, ints)
        self.memory: Memory | None = None
        self.backend = "auto"  # as for `CompiledPattern.outputs`
        self._form: tuple[object, ...] | None = None
        self._planned: Planned | None = None
        self.graphs = True  # whether lone tokens on a GPU are replayed as a CUDA graph, once they repeat

    @property
    def composition(self) -> Composition:
        """The steps: queries take projections of the keys over, so that what all heads share is kept, once."""
        return self.program.absorbed if self.program.composition.projections else self.program.composition

    @property
    def tokens(self) -> int:
        """Tokens seen; where rows differ, at most so many. On a GPU it waits for what runs."""
        if self.memory is None:
            return 0
        self.memory.recount()
        return self.memory.tokens

    @property
    def lengths(self) -> Tensor | None:
        """Tokens of every row (B,), int64, on the device; None while no call gave `counts`: all have `tokens`."""
        return None if self.memory is None else self.memory.lengths

    @property
    def longest(self) -> int:
        """Tokens of the longest row; on a GPU, where reading it would wait, a bound: padding counts."""
        if self.memory is None:
            return 0
        lengths = self.lengths
        return self.memory.tokens if lengths is None or lengths.device.type != "cpu" else int(lengths.max())

    @property
    def nbytes(self) -> int:
        """Bytes of memory held; 0 before the first call."""
        return 0 if self.memory is None else self.memory.nbytes

    def describe(self) -> list[str]:
        """What is kept, in words, derived from the text; after the first call in bytes, too."""
        return [*describe_cache(self.plan), *([] if self.memory is None else self.memory.describe())]

    def decode(
        self, pattern: Pattern, q: Tensor, k: Tensor, v: Tensor | None, counts: Tensor | None, inputs: Mapping[str, Any]
    ) -> Tensor:
        """See `CompiledPattern.decode`."""
        form = form_of(pattern, q, k, v, inputs) if counts is None else None
        planned = self._planned
        if planned is not None and form == planned.form:
            out = self._again(planned, q, k, v, inputs)
            if out is not None:
                return out
        program = self.program
        if pattern.span != program.pattern.span:
            refuse(pattern, "decoding", f"the cache is one of {program.pattern.name}")
        for name in inputs:
            if any(name == parameter.name for parameter in program.parameters):
                help = "give it to `cache(..)`"
                refuse(pattern, "decoding", f"parameter `{name}` is fixed with the cache", about=name, help=help)
        bound = bind(program.pattern, program.parameters, q, k, v, {**self.given, **inputs})
        parameters = flat(bound.parameters)
        sizes = sizes_of(program, q, k, v, list(bound.inputs.values()), parameters)
        require(program, parameters, sizes)
        self._check(pattern, bound.tensors, counts)
        frame = frame_of(self.composition, {"v": None, **bound.tensors}, parameters, sizes)
        if self.memory is None:
            self.memory = Memory(self.composition, self.plan, parameters, self.max_length, self.pages)
        if counts is not None:
            counts = counts.to(device=q.device, dtype=torch.int64)
        with torch.no_grad(), device_of(q):
            out = run(self.memory, frame, choose_engine(self.backend, q.device), counts)
        if self.memory.turn is not None and form is not None and sizes["i"] == 1:
            self._planned = Planned(form, frame)
        return out.to(q.dtype)

    def _again(
        self, planned: Planned, q: Tensor, k: Tensor, v: Tensor | None, inputs: Mapping[str, Tensor]
    ) -> Tensor | None:
        """One more token of the form that was checked before, by a turn; None where the cache is full."""
        memory, given = self.memory, {"q": q, "k": k, **inputs}
        if memory is None or memory.turn is None or memory.tokens >= self.max_length:
            return None
        if v is not None:
            given["v"] = v
        tensors = {**planned.frame.tensors, **given}
        with torch.no_grad(), device_of(q):
            replay = self._replay(planned, memory.turn, tensors)
            out = memory.turn.run(replace(planned.frame, tensors=tensors)) if replay is None else replay.run(tensors)
            memory.tokens += 1
        return out.to(q.dtype)

    def _replay(self, planned: Planned, turn: Turn, tensors: Mapping[str, Tensor]) -> Replay | None:
        """The graph of a token, captured once some have run; None where it runs by itself, or in the caller's graph."""
        q = tensors["q"]
        if not (self.graphs and q.is_cuda and planned.captures) or torch.cuda.is_current_stream_capturing():
            return None
        if planned.replay is not None and planned.replay.fits(tensors):
            return planned.replay
        planned.replay = None
        planned.seen += 1
        if planned.seen <= WARM:
            return None
        planned.seen, planned.captures = 0, planned.captures - 1
        frame, layouts = planned.frame, planned.frame.layouts
        fresh = [name for name in tensors if set(layouts[name]) & TOKENS]
        try:
            planned.replay = Replay.of(lambda given: turn.run(replace(frame, tensors=given)), tensors, fresh)
        except RuntimeError as failure:
            planned.captures = 0
            message = f"tokens of {self.program.pattern.name} run without a graph: {failure}"
            warnings.warn(message, NoGraphWarning, stacklevel=5)
        return planned.replay

    def _check(self, pattern: Pattern, tensors: Mapping[str, Tensor], counts: Tensor | None) -> None:
        """The call fits what is kept."""
        q, k = tensors["q"], tensors["k"]
        batch, _, count, _ = q.shape
        if count != k.shape[2]:
            refuse(pattern, "decoding", "there is a query for every new key", given={"q": q, "k": k})
        held, new = self.longest, count
        if counts is not None and counts.device.type == "cpu":
            new = int(counts.max())
        if held + new > self.max_length:
            message = f"the cache holds {held} of at most {self.max_length} tokens, and {new} are new"
            refuse(pattern, "decoding", message)
        form = (*((x.shape[0], x.shape[1], x.shape[3]) for x in (q, k)), q.dtype, q.device)
        if self._form is not None and form != self._form:
            message = "batch, heads, widths, element type and device are those of the first call"
            refuse(pattern, "decoding", message, given={"q": q, "k": k})
        self._form = form
        ragged = counts is not None or self.lengths is not None
        if counts is not None and (counts.shape != (batch,) or counts.is_floating_point()):
            refuse(pattern, "decoding", f"`counts` has one int for each of the {batch} rows of the batch")
        if ragged or self.pages is not None:
            reason = ragged_refusal(self.composition, self.plan, paged=self.pages is not None, ragged=ragged)
            if reason is not None:
                refuse(pattern, "decoding", reason)


def require_positive(program: Program, parameters: Mapping[str, int]) -> None:
    """What divides or sizes something in the text is positive, as far as parameters decide it."""
    sizes = dict.fromkeys("bhijtde", 1) | {"offset": 0}
    require(program, dict(parameters), sizes)


def describe_decoding(prepared: Prepared) -> list[str]:
    """Lines for people: what decoding keeps of a call's pattern, in words and in bytes, or why it is not decoded."""
    program = prepared.program
    ints = {name: value for name, value in prepared.parameters.items() if isinstance(value, int)}
    composition = program.absorbed if program.composition.projections else program.composition
    try:
        plan = cache_of(program.pattern, composition, ints)
    except AttnError as error:
        return [f"decoding: no, {error.diagnostics[0].message.partition(': ')[2]}"]
    memory = Memory(composition, plan, prepared.parameters, prepared.sizes["j"])
    tensors = {**prepared.tensors, **prepared.inputs}
    frame = frame_of(composition, tensors, prepared.parameters, {**prepared.sizes, "offset": 0})
    token = tokens_of(frame, 0, 1)
    with torch.no_grad():
        run(memory, token, choose_engine("auto", frame.device))  # one token: it takes the memory
    lines = [*describe_cache(plan), *memory.describe(), describe_turns(memory, token)]
    return ["decoding keeps", *(f"    {line}" for line in lines)]


def describe_turns(memory: Memory, token: Frame) -> str:
    """How a lone token of each row runs on CUDA."""
    reason = refusal(memory, token)
    if reason is not None:
        return f"on CUDA a token runs step by step, by many launches: {reason}"
    return "on CUDA a token is a few launches, replayed as a graph"

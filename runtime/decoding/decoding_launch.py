"""Launches of the kernels of a decoding step: what stays the same from token to token is worked out once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from attnc.compiler.emit.advancing import VECTORS, advancing_module
from attnc.compiler.emit.arguments import Argument
from attnc.compiler.emit.decoding import decoded_kernels, decoded_module, entering_module
from attnc.compiler.emit.kernel import Kernel
from attnc.compiler.plan import Plan
from attnc.compiler.schedule_decoding import advance_shape, decoded_shape, parts_of
from attnc.runtime.cache import cached_module
from attnc.runtime.call import Call
from attnc.runtime.cuda.kernel_call import block_constants, interpreting, padded, processors, stride
from attnc.runtime.decoding.kv_cache import Held, Pages
from attnc.runtime.scalars import of_node

NONE = 9.0e37  # where a score is so large there was none
WIDEST_COPY = 1024  # elements that `enter` copies at a time


class Launch:
    """A kernel with its constants. `tensors` of a call are told apart by type, strides and alignment alone."""

    def __init__(self, function: Any, constants: Mapping[str, Any], warps: int = 4, stages: int = 3) -> None:
        self.function = function
        self.constants = dict(constants)
        self.options = {"num_warps": warps, "num_stages": stages}
        self.known: dict[tuple[object, ...], tuple[Any, list[Any], tuple[Any, ...]]] = {}

    def run(
        self,
        grid: tuple[int, int],
        tensors: Sequence[Tensor],
        places: Sequence[int],
        values: Callable[[], list[Any]],
    ) -> None:
        """`tensors` are the arguments at `places`; `values()` gives all arguments, where they are not known."""
        key = tuple([(one.dtype, one.stride(), one.data_ptr() & 15) for one in tensors])
        known = self.known.get(key)
        if known is not None:
            compiled, template, constants = known
            arguments = template.copy()
            for place, tensor in zip(places, tensors, strict=True):
                arguments[place] = tensor
            compiled[(*grid, 1)](*arguments, *constants)
            return
        arguments = values()
        compiled = self.function[grid](*arguments, **self.constants, **self.options)
        if compiled is not None:  # the interpreter has none
            names = self.function.arg_names[len(arguments) :]
            self.known[key] = compiled, arguments, tuple(self.constants[name] for name in names)


# Entering


class Entering:
    """Copies the new token's values of some arrays (`names`) to their places, and counts it."""

    def __init__(self, held: Held, names: Sequence[str], tokens: Tensor, now: Tensor, *, advance: bool) -> None:
        classes = [] if held.slots.everything else held.slots.classes
        text = entering_module(len(names), len(classes))
        module = cached_module(text, lambda: text)
        slots, pages = held.slots, held.pages
        self.held, self.names = held, list(names)
        self.tokens, self.now = tokens if advance else now, now
        at, numbers = slots.constant, []
        for one in classes:
            numbers += [one.period, one.low, one.width, at]
            at += one.below(slots.length)
        paged = [0, 0, 0] if pages is None else [pages.size, pages.table.shape[1], pages.count]
        self.numbers = [slots.length, slots.first, slots.window, *paged, *numbers]
        self.pages = now if pages is None else pages.table
        constants: dict[str, int] = {
            "EVERYTHING": slots.everything,
            "PAGED": pages is not None,
            "ADVANCE": advance,
        }
        self.targets = [three(held.places(name)) for name in names]
        most = max([one.shape[2] * one.shape[3] for one in self.targets], default=1)
        block = min(WIDEST_COPY, 1 << (max(most, 1) - 1).bit_length())
        constants = {**constants, "BLOCK": block}
        self.launches = [Launch(module.enter, {**constants, "COUNTS": counts}) for counts in (False, True)]
        self.places = [2, *(4 + 11 * number for number in range(len(self.names)))]

    def run(self, tensors: Mapping[str, Tensor], counts: Tensor | None = None) -> None:
        """`tensors`: the arrays at the new token, in their layouts; `counts` (b,): only rows above 0 have one."""
        own = self.now if counts is None else counts
        rows = [three(self.held.rows(name, tensors[name], 1)) for name in self.names]

        def values() -> list[Any]:
            made: list[Any] = [self.tokens, self.now, own, self.pages]
            for x, y in zip(rows, self.targets, strict=True):
                made += [x, y, *(stride(x, at) for at in (0, 2, 3)), *(stride(y, at) for at in range(4))]
                made += [y.shape[2], y.shape[3]]
            return [*made, *self.numbers]

        launch = self.launches[counts is not None]
        launch.run((self.now.shape[0], 1), [own, *rows], self.places, values)


def three(rows: Tensor) -> Tensor:
    """(rows, places, ..) as (rows, places, A, W), a view."""
    while rows.dim() < 4:
        rows = rows.unsqueeze(2)
    return rows


# Attending


Loaded = tuple[Plan, list[Kernel], ModuleType]
_loaded: dict[tuple[int, frozenset[str], bool | None], Loaded] = {}


def module_of(plan: Plan, paged: frozenset[str], largest: bool | None) -> tuple[list[Kernel], ModuleType]:
    """The kernels of a relocated plan, and their module."""
    key = (id(plan), paged, largest)
    if key not in _loaded:
        kernels = decoded_kernels(plan, paged, largest)
        text = decoded_module(plan, kernels)
        _loaded[key] = plan, kernels, cached_module(text, lambda: text)  # the plan is held, so its id stays its own
    return _loaded[key][1:]


@dataclass
class Attending:
    """One softmax for the new token. `call`: of the relocated plan, its k and v being the memory itself.

    `vary`: inputs of the plan that each call gives anew; START and kept arrays stay. `paged`: arrays in pages.
    """

    plan: Plan
    call: Call
    pages: Pages | None
    paged: frozenset[str]
    vary: Sequence[str]
    most: int  # keys of a row at most
    largest: bool | None = None  # its largest or smallest scores are asked for instead

    def __post_init__(self) -> None:
        self.kernels, self.module = module_of(self.plan, self.paged, self.largest)
        call, q = self.call, self.call.q
        assert call.v is not None
        batch, self.heads, _, width = q.shape
        self.key_heads, self.value_width = call.k.shape[1], call.v.shape[3]
        group = self.heads // self.key_heads
        self.padded = padded(width), padded(self.value_width)
        self.shape = decoded_shape(max(self.padded), group, call.k.element_size(), interpreting())
        self.tiles = batch * self.key_heads * -(-group // self.shape.block_m)
        self.parts = parts_of(self.tiles, self.most, processors(q), self.shape)
        slots = self.parts * len(self.kernels)
        lines = batch * self.heads
        self.split = slots > 1 and self.largest is None
        room = (lines, slots, self.padded[1]) if self.split else (1,)
        self.part_out = torch.empty(room, dtype=torch.float32, device=q.device)
        self.part_lse = torch.empty((lines, slots), dtype=torch.float32, device=q.device)
        self.sizes = {
            **call.sizes,
            "B": batch,
            "H": self.heads,
            "N": 1,
            "M": call.sizes["j"],
            "D": width,
            "E": self.value_width,
            "OFFSET": 0,
            "GROUP": group,
            "SLOTS": slots,
            "PAGE": 0,
            "LINE": 0,
            "POOL": 0,
        }
        if self.pages is not None:
            self.sizes |= {"PAGE": self.pages.size, "LINE": self.pages.table.shape[1], "POOL": self.pages.count}
        self.launches = [self.launch_of(kernel) for kernel in self.kernels]
        constants = {"BLOCK_S": 1 << (slots - 1).bit_length(), "BLOCK_E": self.padded[1]}
        self.joined = Launch(self.module.join_parts, constants)

    def launch_of(self, kernel: Kernel) -> tuple[Launch, list[int]]:
        """A branch's launch, and which of its arguments each call gives."""
        factor = None if kernel.factor is None else of_node(kernel.factor, self.call.parameters, self.call.sizes)
        constants = {
            **block_constants(self.shape, self.padded, self.sizes, self.call.q.dtype),
            "RAISING": factor is not None and factor > 0,
            "SPLIT": self.split,
        }
        function = getattr(self.module, kernel.name)
        named = {one.name: place for place, one in enumerate(kernel.arguments)}
        places = [named[name] for name in ("q", "o", "lse")]
        arrays = {one.attribute: place for place, one in enumerate(kernel.arguments) if one.role == "array"}
        places += [arrays[name] for name in self.vary if name in arrays]
        return Launch(function, constants, self.shape.warps, self.shape.stages), places

    def run(self, q: Tensor, given: Mapping[str, Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Output (B, H, 1, E) and lse (B, H, 1)."""
        batch = q.shape[0]
        out = q.new_empty((batch, self.heads, 1, self.value_width), dtype=dtype)
        lse = q.new_empty((batch, self.heads, 1), dtype=torch.float32)
        self.start(q, out, lse, given)
        if self.split:
            sizes = [self.heads, self.value_width, self.sizes["SLOTS"]]

            def values() -> list[Any]:
                return [self.part_out, self.part_lse, out, lse, *(stride(out, at) for at in (0, 1, 3)), *sizes]

            self.joined.run((batch * self.heads, 1), [out, lse], (2, 3), values)
        return out, lse

    def extremes(self, q: Tensor, given: Mapping[str, Tensor]) -> Tensor:
        """The largest or smallest score (B, H, 1); 0 where no key is live."""
        self.start(q, q, self.part_lse, given)
        found = self.part_lse.amax(-1) if self.largest else self.part_lse.amin(-1)
        return found.masked_fill(found.abs() >= NONE, 0).view(q.shape[0], self.heads, 1)

    def start(self, q: Tensor, out: Tensor, lse: Tensor, given: Mapping[str, Tensor]) -> None:
        """Launches every branch."""
        for number, kernel in enumerate(self.kernels):
            launch, places = self.launches[number]
            arrays = {one.attribute for one in kernel.arguments if one.role == "array"}
            varying = [given[name] for name in self.vary if name in arrays]
            tensors = {"q": q, "o": out, "lse": lse, **given}
            launch.run(
                (self.parts, self.tiles),
                [q, out, lse, *varying],
                places,
                lambda kernel=kernel, number=number, tensors=tensors: self.values(kernel, number, tensors),  # type: ignore[misc]
            )

    def values(self, kernel: Kernel, number: int, given: Mapping[str, Tensor]) -> list[Any]:
        """Every argument of a branch's kernel."""
        none = self.part_lse
        tensors = {"k": self.call.k, "v": self.call.v, "part_out": self.part_out, "part_lse": self.part_lse}
        tensors |= {"pages": none if self.pages is None else self.pages.table}
        arrays = {**self.call.inputs, **given}
        sizes = {**self.sizes, "SLOT": number * self.parts}
        return [self.value(argument, {**tensors, **given}, arrays, sizes) for argument in kernel.arguments]

    def value(
        self,
        argument: Argument,
        tensors: Mapping[str, Tensor | None],
        arrays: Mapping[str, Tensor],
        sizes: Mapping[str, int],
    ) -> Any:
        """What an argument stands for."""
        attribute, slot = argument.attribute, argument.slot
        match argument.role:
            case "tensor":
                return tensors[attribute]
            case "stride":
                tensor = tensors[attribute]
                assert tensor is not None
                return stride(tensor, slot)
            case "size":
                return sizes[attribute]
            case "parameter":
                value = self.call.parameters[attribute]
                return int(value) if isinstance(value, bool) else value
            case "array":
                return arrays[attribute]
            case "array_stride":
                return stride(arrays[attribute], slot)
            case "array_length":
                return arrays[attribute].shape[slot]
            case "array_group":
                return max(1, self.heads // arrays[attribute].shape[slot])
        raise AssertionError(argument.role)


# Advancing


@cache
def advancing() -> ModuleType:
    """The loaded module of states."""
    text = advancing_module()
    return cached_module(text, lambda: text)


class Advancing:
    """One state (b, h, f, e), changed in place: see `compiler.emit.advancing`."""

    def __init__(self, state: Tensor, total: bool) -> None:
        self.state, self.total = state, total
        self.launches: dict[tuple[int, bool], Launch] = {}
        self.batch, self.heads, self.features, columns = state.shape
        self.width = columns - total
        self.block_f, self.block_e = advance_shape(self.features, columns)
        self.grid = (-(-columns // self.block_e), self.batch * self.heads)

    def run(self, vectors: Mapping[str, Tensor | None]) -> tuple[Tensor, Tensor]:
        """out (b, h, 1, e) and the total (b, h, 1), float32. `vectors`: (b, h, 1, width), a decay perhaps without the
        last; b may be 1, h may divide the state's."""
        state = self.state
        out = state.new_empty((self.batch, self.heads, 1, self.width))
        sums = state.new_empty((self.batch, self.heads, 1))
        decay, left = vectors["decay"], vectors["left"]
        kind = 0 if decay is None else 1 if decay.dim() == 3 else 2
        launch = self.launches.get((kind, left is not None))
        if launch is None:
            constants = {"DECAY": kind, "CHANGES": left is not None, "TOTAL": self.total}
            constants |= {"WHOLE": self.features <= self.block_f, "BLOCK_F": self.block_f, "BLOCK_E": self.block_e}
            launch = self.launches[kind, left is not None] = Launch(advancing().advance, constants, 4, 2)
        given = [sums if (one := vectors[name]) is None else one for name in VECTORS]

        def values() -> list[Any]:
            strides, groups = [], []
            for name, one in zip(VECTORS, given, strict=True):
                there = vectors[name] is not None
                strides += self.strides(one) if there else [0, 0, 0]
                groups.append(max(1, self.heads // one.shape[1]) if there else 1)
            return [*given, state, out, sums, *strides, *groups, self.heads, self.features, self.width]

        launch.run(self.grid, [*given, state, out, sums], range(9), values)
        return out, sums

    @staticmethod
    def strides(tensor: Tensor) -> list[int]:
        return [stride(tensor, 0), stride(tensor, 1), stride(tensor, 3) if tensor.dim() == 4 else 0]

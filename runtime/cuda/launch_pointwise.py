"""Runs the generated kernels of values of rows (on a CPU under TRITON_INTERPRET=1)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from attnc.compiler.composition import Composition, Compute
from attnc.compiler.emit.pointwise import Place, RowKernel, emit_row_gradients, emit_rows
from attnc.compiler.emit.pointwise_module import module
from attnc.compiler.fuse import Group, Operand, groups, segments
from attnc.compiler.row_gradients import COTANGENT, HELD
from attnc.dsl.types import Base
from attnc.runtime.cache import cached_module
from attnc.runtime.compute.arrays import Frame, Span
from attnc.runtime.cuda.kernel_call import device_of, interpreting
from attnc.runtime.cuda.row_layout import Given, Layout, contiguous_strides, dims_of, span_of, strided
from attnc.runtime.cuda.views import ALIGNMENT
from attnc.runtime.scalars import of_node

ELEMENTS = 4096  # of a tile
MOST_ROWS = 128
MOST_SCALARS = 1024  # rows of a tile where no value is a vector
WARPS = 4
INTERPRETED_ROWS = 16
REMEMBERED = 256  # launches of a kernel


class Loaded:
    """A kernel with its module and the launches that were prepared."""

    def __init__(self, kernel: RowKernel) -> None:
        self.kernel = kernel
        text = module(kernel.text)
        self.function = getattr(cached_module(text, lambda: text), kernel.name)
        self.prepared: OrderedDict[tuple[object, ...], Launch] = OrderedDict()


@lru_cache(maxsize=512)
def forward_kernel(group: Group, parts: tuple[str, ...]) -> Loaded:
    """The kernel of a group's value, some of whose operands have a part of the heads."""
    return Loaded(emit_rows(group, parts))


@lru_cache(maxsize=512)
def backward_kernel(group: Group, wanted: tuple[str, ...], held: tuple[str, ...], parts: tuple[str, ...]) -> Loaded:
    """The kernel of the gradients of some of its operands."""
    return Loaded(emit_row_gradients(group, wanted, held, parts))


@dataclass
class Launch:
    """A launch with all worked out but its tensors' addresses. `outs`: shape, dtype and whether to clear it first."""

    function: Any
    values: list[Any]
    slots: list[int]
    outs: list[tuple[list[int], torch.dtype, bool]]
    grid: tuple[int, int, int]
    constants: dict[str, Any]
    compiled: Any = None
    ordered: Sequence[str] = ()

    def __call__(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """What the kernel writes."""
        like = tensors[0]
        made = [
            torch.zeros(shape, dtype=dtype, device=like.device)
            if clear
            else torch.empty(shape, dtype=dtype, device=like.device)
            for shape, dtype, clear in self.outs
        ]
        values = self.values.copy()
        for slot, tensor in zip(self.slots, (*tensors, *made), strict=True):
            values[slot] = tensor
        with device_of(like):
            if self.compiled is not None:
                self.compiled[self.grid](*values, *(self.constants[name] for name in self.ordered))
                return made
            self.compiled = self.function[self.grid](*values, **self.constants, num_warps=WARPS)
            if self.compiled is not None:  # the interpreter has none
                self.ordered = self.function.arg_names[len(values) :]
        return made


@dataclass(frozen=True)
class Rows:
    """A group in one call: its operands' tensors, and the lengths that all share."""

    group: Group
    frame: Frame
    tensors: tuple[Tensor, ...]

    @cached_property
    def known(self) -> tuple[object, ...]:
        """What the layout depends on."""
        return self.key(self.tensors)

    @cached_property
    def layout(self) -> Layout | None:
        """How a kernel reads the operands; None where none takes the call."""
        found = layouts(self.group)
        if self.known not in found:
            numbers = self.numbers([name for name, _ in self.group.numbers])
            fits = None if numbers is None else Layout.of(self.group, self.frame, self.tensors)
            remember(found, self.known, fits)
        return found[self.known]

    @cached_property
    def parts(self) -> tuple[str, ...]:
        """The operands that have some heads alone."""
        return tuple(one.name for one in self.group.operands if span_of(one, self.frame) is not None)

    def value(self, dtype: torch.dtype) -> Tensor | None:
        """The group's value, laid out by its type; None where no kernel takes the call."""
        if self.layout is None:
            return None
        loaded = forward_kernel(self.group, self.parts)
        key = (dtype, *self.known)
        if key not in loaded.prepared:
            remember(loaded.prepared, key, self.prepared(loaded, self.layout, dtype))
        launch: Launch = loaded.prepared[key]
        made: Tensor = launch(self.reads(loaded.kernel, {}))[0]
        return made

    def shape(self) -> list[int] | None:
        """Shape of the value; None where no kernel takes the call."""
        return None if self.layout is None else self.layout.shape()

    def gradients(
        self, cotangent: Tensor, wanted: Mapping[str, torch.dtype], held: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Gradients of operands by name, laid out by type, in the given types; what is in `held` is added to them.

        `held`, laid out so too: operands that have a part of their gradient already.
        """
        layout = self.layout
        assert layout is not None
        joined = {name: one for name, one in held.items() if layout.is_whole(name)}
        loaded = backward_kernel(self.group, tuple(wanted), tuple(joined), self.parts)
        if not loaded.kernel.writes:
            return dict(held)
        key = (*wanted.values(), *self.known, *map(kind_of, (cotangent, *joined.values())))
        if key not in loaded.prepared:
            made_ready = self.prepared(loaded, layout, torch.float32, wanted, cotangent, joined)
            remember(loaded.prepared, key, made_ready)
        launch: Launch = loaded.prepared[key]
        made = launch(
            self.reads(loaded.kernel, {COTANGENT: cotangent, **{HELD + name: joined[name] for name in joined}})
        )
        found = {name: one for name, one in held.items() if name not in joined}
        for place, tensor in zip(loaded.kernel.writes, made, strict=True):
            name = place.name[2:]
            operand = next(one for one in self.group.operands if one.name == name)
            gradient = gathered(tensor, place, operand, layout.given[name], wanted[name])
            found[name] = gradient + found[name] if name in found else gradient
        return found

    def key(self, tensors: Sequence[Tensor]) -> tuple[object, ...]:
        """What a launch depends on."""
        frame = self.frame
        return (frame.device, *frame.sizes.values(), *frame.parameters.values(), *map(kind_of, tensors))

    def reads(self, kernel: RowKernel, more: Mapping[str, Tensor]) -> list[Tensor]:
        """The tensors that a kernel reads, in order."""
        by_name = {operand.name: tensor for operand, tensor in zip(self.group.operands, self.tensors, strict=True)}
        by_name |= more
        return [by_name[place.name] for place in kernel.reads]

    def prepared(
        self,
        loaded: Loaded,
        layout: Layout,
        dtype: torch.dtype,
        wanted: Mapping[str, torch.dtype] | None = None,
        cotangent: Tensor | None = None,
        held: Mapping[str, Tensor] | None = None,
    ) -> Launch:
        """A launch of a kernel."""
        kernel = loaded.kernel
        given = dict(layout.given)
        if cotangent is not None:
            given[COTANGENT] = strided(cotangent, layout.group.root)
        for operand in self.group.operands:
            if held and operand.name in held:
                given[HELD + operand.name] = strided(held[operand.name], operand.node)
        widths = [layout.widths.get(segment, 1) for segment in kernel.segments]
        blocks = [1 << (width - 1).bit_length() for width in widths]
        numbers = self.numbers(kernel.numbers)
        assert numbers is not None
        rows = INTERPRETED_ROWS if interpreting() else rows_of_tile(blocks)
        tiles = -(-layout.rows // rows)
        values: list[Any] = []
        slots: list[int] = []
        for place in kernel.reads:
            slots.append(len(values))
            values += [None, *(given[place.name].strides[dim] for dim in place.dims), *heads_of(place, given)]
        outs = []
        for place in kernel.writes:
            shape, out_dtype, clear = self.out(place, layout, tiles, dtype, wanted)
            outs.append((shape, out_dtype, clear))
            slots.append(len(values))
            values += [None, *contiguous_strides(shape), *heads_of(place, given)]
        values += [
            max(1, layout.heads // given[place.name].lengths["h"]) for place in kernel.reads if "h" in place.dims
        ]
        values += [*numbers, *widths, layout.rows, layout.offset, layout.heads, tiles]
        constants: dict[str, Any] = {"BLOCK_R": rows}
        for at, (block, width) in enumerate(zip(blocks, widths, strict=True)):
            constants |= {f"BLOCK_{at}": block, f"EVEN_{at}": block == width}
        grid = (tiles * layout.heads * layout.batch, 1, 1)
        return Launch(loaded.function, values, slots, outs, grid, constants)

    def out(
        self, place: Place, layout: Layout, tiles: int, dtype: torch.dtype, wanted: Mapping[str, torch.dtype] | None
    ) -> tuple[list[int], torch.dtype, bool]:
        """Shape and type of a result, and whether the kernel leaves a part of it as it is."""
        width = [sum(layout.widths[one] for one in segments(place.axis))] if place.axis else []
        lead = [layout.batch] * ("b" in place.dims) + [layout.heads] * ("h" in place.dims)
        if wanted is None:
            return [*lead, layout.rows, *width], dtype, False
        name = place.name[2:]
        operand = next(one for one in self.group.operands if one.name == name)
        lengths, span = layout.given[name].lengths, layout.given[name].span
        if span is not None:
            lead[-1] = span[1] - span[0]
        if operand.along is None:
            return [*lead, tiles, *width], torch.float32, False
        direct = all(lengths.get(dim, 1) == full for dim, full in (("b", layout.batch), ("h", layout.heads)))
        long = lengths["n"] if lengths["n"] != 1 else layout.rows + (layout.offset if operand.moved else 0)
        whole = lengths["n"] != 1 or long == 1
        return [*lead, long, *width], wanted[name] if direct and whole else torch.float32, long != layout.rows

    def numbers(self, names: Sequence[str]) -> list[Any] | None:
        """What the host works out; None where it can't."""
        frame = self.frame
        nodes = dict(self.group.numbers)
        sizes = {**frame.sizes, **{name: frame.length(name) for name in frame.axes}, **frame.totals}
        found = [of_node(nodes[name], frame.parameters, sizes) for name in names]
        if any(one is None or (isinstance(one, int) and abs(one) >= 2**31) for one in found):
            return None
        return [int(one) if isinstance(one, bool) else one for one in found]


def heads_of(place: Place, given: Mapping[str, Given]) -> Span | tuple[()]:
    """The heads that a tensor argument has, where these are not all."""
    span = given[place.name.removeprefix("d_")].span if place.part else None
    return () if span is None else span


def rows_of_tile(blocks: Sequence[int]) -> int:
    """How many rows a program takes, a power of two."""
    most = max(1, min(MOST_ROWS if blocks else MOST_SCALARS, ELEMENTS // max(sum(blocks), 1)))
    return 1 << (most.bit_length() - 1)


def kind_of(tensor: Tensor) -> tuple[object, ...]:
    """What a launch depends on, of a tensor."""
    return tensor.dtype, tensor.shape, tensor.stride(), tensor.data_ptr() % ALIGNMENT == 0


@lru_cache(maxsize=512)
def layouts(group: Group) -> OrderedDict[tuple[object, ...], Layout | None]:
    """The layouts of a group's calls so far."""
    del group
    return OrderedDict()


def remember(held: OrderedDict[tuple[object, ...], Any], key: tuple[object, ...], value: object) -> None:
    """Keeps something for calls to come."""
    held[key] = value
    if len(held) > REMEMBERED:
        held.popitem(last=False)


def gathered(found: Tensor, place: Place, operand: Operand, given: Given, dtype: torch.dtype) -> Tensor:
    """What a kernel wrote as the gradient of an operand: summed over what it is one for, in its own layout.

    `found` has the dimensions `place.dims`; the result those of the operand's type.
    """
    dims, lengths = list(place.dims), given.lengths
    for dim in "bhn":
        if dim not in dims:
            continue
        at = dims.index(dim)
        if dim not in lengths:
            found = found.sum(at)
            dims.pop(at)
        elif lengths[dim] != found.shape[at] and (dim != "h" or given.span is None):
            groups = found.unflatten(at, (lengths[dim], -1))
            found = groups.sum(at + 1)
    assert dims == dims_of(operand.node)
    return found.to(dtype)


def row_texts(composition: Composition) -> dict[str, str]:
    """Generated modules by the step's name, for people: every value's kernel and that of all its gradients."""
    texts = {}
    for step in (one for one in composition.steps if isinstance(one, Compute)):
        for at, group in enumerate(groups(step.node)):
            wanted = [operand.name for operand in group.operands if operand.node.type.base is Base.REAL]
            names = [f"# {operand.name}: {described(operand)}" for operand in group.operands]
            kernels = [emit_rows(group), emit_row_gradients(group, wanted)]
            name = step.name if group.root is step.node else f"{step.name}_{at}"
            texts[name] = "\n".join([f"# {name}", *names, "", module(*(kernel.text for kernel in kernels))])
    return texts


def described(operand: Operand) -> str:
    """What an operand is: an array by name, or what torch makes by its op."""
    node = operand.node
    return str(node.attribute) if node.op == "input" else f"{node.op}, by torch"

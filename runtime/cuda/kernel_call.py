"""Loads a plan's generated kernels and calls them: every argument's value by its role."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from attnc.compiler.emit.arguments import TAIL, Argument
from attnc.compiler.emit.kernel import Kernel
from attnc.compiler.emit.module import emit_module
from attnc.compiler.emit.rows import row_nodes, row_tiles
from attnc.compiler.ir import Node
from attnc.compiler.plan import Domain, Listed, Plan
from attnc.compiler.schedule import TileShape
from attnc.runtime.cache import cached_module
from attnc.runtime.call import Call
from attnc.runtime.cuda.views import ALIGNMENT, View, Views
from attnc.runtime.scalars import of_node

INTERPRETED = TileShape(32, 32, 1, 1)  # small, so that small tests have several tiles
INTERPRETED_PROCESSORS = 2
REMEMBERED = 256  # launches of a module
CUT_FROM, LEAST_TAIL = 128, 64  # columns of a first block that may have a second, and of that
PIECES_WIDTH = 64  # of vectors whose products may be of pairs in bfloat16
JOIN_ROWS = 16  # that a program joins: parts are many where tiles are few
LEAST = 16  # the smallest side of a matrix product in Triton


def interpreting() -> bool:
    """Whether Triton runs kernels in its interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


class Kernels:
    """A generated module, loaded. `prepared`: launches by all that they depend on but the tensors' contents."""

    def __init__(self, plan: Plan, kernels: Sequence[Kernel], text: str | None = None) -> None:
        self.plan = plan
        self.text = text or emit_module(plan, kernels)
        self.kernels = tuple(kernels)
        self.module = cached_module(self.text, lambda: self.text)
        self.prepared: OrderedDict[tuple[object, ...], Prepared] = OrderedDict()


class Prepared:
    """A launch with all that stays the same from call to call worked out: some ten microseconds instead of hundreds.

    `values`: the arguments in order; those that `slots` name (place, argument, its view) are filled in.
    """

    def __init__(
        self,
        function: Any,
        values: list[Any],
        slots: list[tuple[int, Argument, View | None]],
        constants: dict[str, Any],
    ) -> None:
        self.function = function
        self.values = values
        self.slots = slots
        self.constants = constants
        self.compiled: Any = None
        self.ordered: Sequence[str] = ()

    def launch(self, call: KernelCall, grid: tuple[int, int]) -> None:
        """By Triton's own dispatch at first; then by the kernel that it chose: types and alignments are the same."""
        values = self.values.copy()
        for place, argument, view in self.slots:
            tensor = call.value(argument)
            values[place] = tensor if view is None else view.of(tensor)
        with device_of(call.call.q):
            if self.compiled is not None:
                self.compiled[(*grid, 1)](*values, *(self.constants[name] for name in self.ordered))
                return
            shape = call.shape
            options = {"num_warps": shape.warps, "num_stages": shape.stages}
            self.compiled = self.function[grid](*values, **self.constants, **options)
            if self.compiled is not None:  # the interpreter has none
                self.ordered = self.function.arg_names[len(values) :]


class KernelCall:
    """One call of a plan's kernels: its tensors by name, its padded widths, its tile shape."""

    def __init__(self, call: Call, tensors: Mapping[str, Tensor], shape: TileShape) -> None:
        self.call = call
        self.tensors = dict(tensors)
        self.shape = shape
        sizes = call.sizes
        value_width = self.tensors["v"].shape[3]
        self.padded = padded(sizes["d"]), padded(value_width)
        self.sizes = {
            "B": sizes["b"],
            "H": sizes["h"],
            "N": sizes["i"],
            "M": sizes["j"],
            "D": sizes["d"],
            "E": value_width,
            "OFFSET": call.offset,
            "GROUP": sizes["h"] // call.k.shape[1],
        }

    def run(self, kernels: Kernels, kernel: Kernel, grid: tuple[int, int], **constants: Any) -> None:
        """Launch one kernel; `constants` are those that only some kernels have, or that differ from the usual."""
        key = self.key(kernel, constants)
        prepared = kernels.prepared.get(key)
        if prepared is None:
            prepared = kernels.prepared[key] = self.prepare(kernels, kernel, constants)
            if len(kernels.prepared) > REMEMBERED:
                kernels.prepared.popitem(last=False)
        prepared.launch(self, grid)

    def key(self, kernel: Kernel, constants: Mapping[str, Any]) -> tuple[object, ...]:
        """What the arguments of a launch depend on, and which compiled kernel takes them."""
        call = self.call
        given = [
            (name, tensor.dtype, tensor.shape, tensor.stride(), tensor.data_ptr() % ALIGNMENT == 0)
            for tensors in (self.tensors, call.inputs, call.derived)
            for name, tensor in tensors.items()
        ]
        numbers = (*self.sizes.values(), *call.sizes.values(), *constants.values())
        return (kernel.name, self.shape, call.q.device, numbers, *call.parameters.items(), *given)

    def prepare(self, kernels: Kernels, kernel: Kernel, constants: Mapping[str, Any]) -> Prepared:
        """The arguments' values; those of tensors are left to each launch."""
        block, tail = column_blocks(self.sizes["D"]) if kernel.tails else (self.padded[0], 0)
        views = Views(kernel.domain, self.call, self.tensors, (block, self.padded[1]), self.shape, tail)
        values: list[Any] = []
        slots: list[tuple[int, Argument, View | None]] = []
        for place, argument in enumerate(kernel.arguments):
            if argument.role in ("tensor", "array", "view"):
                slots.append((place, argument, views.of(argument) if argument.role == "view" else None))
                values.append(None)
            else:
                values.append(self.value(argument))
        given = {
            **block_constants(self.shape, (block, self.padded[1]), self.sizes, self.call.q.dtype, tail),
            **({"TAIL": tail} if kernel.tails else {}),
            "RAISING": self.raising(kernel.factor),
            **views.present,
            **constants,
        }
        return Prepared(getattr(kernels.module, kernel.name), values, slots, given)

    def value(self, argument: Argument) -> Any:
        """What an argument stands for."""
        attribute, slot = argument.attribute, argument.slot
        match argument.role:
            case "tensor":
                return self.tensors[attribute]
            case "view":
                return self.viewed(attribute)
            case "stride":
                return stride(self.tensors[attribute], slot)
            case "size":
                return self.sizes[attribute] if attribute in self.sizes else self.call.sizes[attribute]
            case "parameter":
                value = self.call.parameters[attribute]
                return int(value) if isinstance(value, bool) else value
            case "array":
                return self.array(attribute)
            case "array_stride":
                return stride(self.array(attribute), slot)
            case "array_length":
                return self.array(attribute).shape[slot]
            case "array_group":
                return max(1, self.sizes["H"] // self.array(attribute).shape[slot])
        raise AssertionError(argument.role)

    def viewed(self, attribute: str) -> Tensor:
        """A tensor, or its second block of columns."""
        if not attribute.endswith(TAIL):
            return self.tensors[attribute]
        tensor = self.tensors[attribute.removesuffix(TAIL)]
        block, tail = column_blocks(tensor.shape[3])
        return tensor[..., block:] if tail else tensor

    def array(self, attribute: str) -> Tensor:
        """An input, or a derived table (its name has a dot)."""
        return self.call.derived[attribute] if "." in attribute else self.call.inputs[attribute]

    def raising(self, factor: Node | None) -> bool:
        """Whether the scores' factor is positive, so that a maximum may be taken before it is applied."""
        if factor is None:
            return False
        value = of_node(factor, self.call.parameters, self.call.sizes)
        return value is not None and value > 0

    def tiles(self, domain: Domain, rows: int, offset: int) -> int:
        """Number of row tiles of a domain."""
        values = {}
        for name, node in row_nodes(domain.rows).items():
            value = of_node(node, self.call.parameters, self.call.sizes)
            if value is not None:
                values[name] = int(value)
        if domain.rows.listed is not None:
            values["entries"] = self.array(domain.rows.listed.table).shape[-1]
        return row_tiles(domain.rows, values, rows, offset, self.shape.block_m)


def block_constants(
    shape: TileShape, widths: tuple[int, int], sizes: Mapping[str, int], dtype: torch.dtype, tail: int = 0
) -> dict[str, Any]:
    """The constants of every streamed kernel, as most launches have them."""
    width, value_width = widths
    return {
        "BLOCK_M": shape.block_m,
        "BLOCK_N": shape.block_n,
        "BLOCK_D": width,
        "BLOCK_E": value_width,
        "EVEN_D": sizes["D"] == width + tail,
        "EVEN_E": sizes["E"] == value_width,
        "PRECISION": "tf32x3" if dtype == torch.float32 else "ieee",
        "PIECES": False,
        "SPLIT": False,
        "ADDING": False,
        "OVERLAP": shape.overlap,
        "APART": shape.apart,
    }


def pieces(plan: Plan, call: Call) -> bool:
    """Whether an exact plan multiplies twice as fine as bfloat16, not to float32: where queries have 16 bits.

    Forward, queries in float32 as such pairs gave wrong products (Triton 3.6, Hopper), and wider vectors are not
    tried. Triton's interpreter does not multiply bfloat16.
    """
    narrow = max(call.q.shape[3], 0 if call.v is None else call.v.shape[3]) <= PIECES_WIDTH
    return plan.exact and call.q.element_size() == 2 and narrow and not interpreting()


def precision(plan: Plan, call: Call) -> dict[str, Any]:
    """How an exact plan multiplies."""
    if not plan.exact:
        return {}
    return {"PRECISION": "ieee", "PIECES": True} if pieces(plan, call) else {"PRECISION": "tf32x3"}


def join_rows(shape: TileShape) -> int:
    """Rows of a tile whose parts one program joins."""
    return min(JOIN_ROWS, shape.block_m)


def padded(width: int) -> int:
    """The power of two that holds a width, at least what a matrix product needs."""
    return max(LEAST, 1 << (max(width, 1) - 1).bit_length())


def column_blocks(width: int) -> tuple[int, int]:
    """The widths of one block of columns that holds vectors, or of two where they take less; 0 for no second one."""
    whole = padded(width)
    block = whole // 2
    tail = max(padded(width - block), LEAST_TAIL)
    return (block, tail) if block >= CUT_FROM and tail < block else (whole, 0)


def attended_width(plan: Plan, width: int) -> int:
    """Columns that a streamed kernel of the plan keeps of q and k."""
    return sum(column_blocks(width)) if plan.joined else padded(width)


def stride(tensor: Tensor, slot: int) -> int:
    """A stride; 0 along an axis of length 1, which is read at any index."""
    return 0 if tensor.shape[slot] == 1 else tensor.stride(slot)


def device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Makes the tensor's device current; nothing on a CPU."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


@lru_cache(maxsize=8)
def _processors(device: int) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def processors(tensor: Tensor) -> int:
    """Number of streaming multiprocessors of a tensor's device."""
    return _processors(tensor.device.index or 0) if tensor.is_cuda else INTERPRETED_PROCESSORS


def kind_of(domain: Domain) -> str:
    """How a row's keys lie, for the choice of a tile shape."""
    walks = [key_set.walk for key_set in domain.key_sets if key_set.walk is not None]
    if walks:
        return "blocks" if all(isinstance(walk, Listed) and walk.row_block for walk in walks) else "sparse"
    from_start = (run.outer.lo.op == "literal" for key_set in domain.key_sets for run in key_set.runs)
    return "long" if all(from_start) else "local"


def refuse_unfit(call: Call) -> None:
    """Raises where these kernels can't run."""
    if call.q.device.type != "cuda" and not interpreting():
        raise RuntimeError("the Triton back end needs CUDA tensors, or TRITON_INTERPRET=1 before triton is imported")
    if call.q.dtype == torch.float64:
        raise TypeError("the CUDA kernels accumulate in float32 and take float32, bfloat16 or float16, not float64")


def refuse_wide(call: Call, widest: int) -> None:
    """Raises where vectors are longer than a kernel's registers hold."""
    width = max(call.q.shape[3], call.k.shape[3] if call.v is None else call.v.shape[3])
    if width > widest:
        raise ValueError(f"the CUDA kernels hold vectors of at most {widest} here, and a step attends with {width}")

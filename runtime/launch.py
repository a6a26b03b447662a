"""The CUDA back end: runs the generated Triton kernels of a plan (on a CPU under TRITON_INTERPRET=1)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from attnc.compiler.emit.arguments import Argument
from attnc.compiler.emit.module import emit_module
from attnc.compiler.emit.rows import row_tiles
from attnc.compiler.emit.kernel import Kernel
from attnc.compiler.ir import Node
from attnc.compiler.plan import Branch, Plan
from attnc.compiler.schedule import TileShape, tile_shape
from attnc.runtime.branches import join
from attnc.runtime.cache import cached_module
from attnc.runtime.call import Call
from attnc.runtime.scalars import of_node
from attnc.runtime.views import Views
from attnc.runtime.work import ProgramList, program_list

INTERPRETED = TileShape(32, 32, 1, 1)  # small, so that small tests have several tiles
INTERPRETED_PROCESSORS = 2


def interpreting() -> bool:
    """Whether Triton runs kernels in its interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


class Kernels:
    """The generated module of a plan, loaded."""

    def __init__(self, plan: Plan) -> None:
        self.text, self.kernels = emit_module(plan)
        self.module = cached_module(self.text, lambda: self.text)

    def function(self, name: str) -> Any:
        return getattr(self.module, name)


_loaded: dict[int, tuple[Plan, Kernels]] = {}


def kernels_of(plan: Plan) -> Kernels:
    """The kernels of a plan, made once a process."""
    if id(plan) not in _loaded:
        _loaded[id(plan)] = (plan, Kernels(plan))
    return _loaded[id(plan)][1]


def execute(plan: Plan, call: Call) -> tuple[Tensor, Tensor]:
    """Run every branch, then join them. Returns the result and the branches' log-sum-exps."""
    if call.q.device.type != "cuda" and not interpreting():
        raise RuntimeError("the Triton back end needs CUDA tensors, or TRITON_INTERPRET=1 before triton is imported")
    if call.q.dtype == torch.float64:
        raise TypeError("the CUDA kernels accumulate in float32 and take float32, bfloat16 or float16, not float64")
    kernels = kernels_of(plan)
    outputs = [
        run_branch(plan, branch, kernels, kernel, call)
        for branch, kernel in zip(plan.branches, kernels.kernels, strict=True)
    ]
    lse = outputs[0][1].unsqueeze(0) if len(outputs) == 1 else torch.stack([lse for _, lse in outputs])
    return join(plan, call, [out for out, _ in outputs], lse), lse


def run_branch(plan: Plan, branch: Branch, kernels: Kernels, kernel: Kernel, call: Call) -> tuple[Tensor, Tensor]:
    """One branch: (out, lse)."""
    q, v = call.q, call.v if call.v is not None else call.k
    batch, heads, rows, width = q.shape
    value_width = v.shape[-1]
    out = torch.empty((batch, heads, rows, value_width), dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, rows), dtype=torch.float32, device=q.device)
    if out.numel() == 0 or lse.numel() == 0:
        return out, lse
    padded = max(16, triton_power(max(width, 1))), max(16, triton_power(max(value_width, 1)))
    shape = INTERPRETED if interpreting() else tile_shape(max(padded), q.element_size(), kind_of(branch))
    count = processors(q.device.index or 0) if q.is_cuda else INTERPRETED_PROCESSORS
    listed = program_list(plan, branch, call, shape, count)
    values = Values(call, q, call.k, v, out, lse, listed, padded[1], shape.block_m)
    views = Views(branch, call, values.tensors, padded, shape)
    arguments = [
        views.of(argument) if argument.role == "view" else values.of(argument) for argument in kernel.arguments
    ]
    constants: dict[str, Any] = {
        "BLOCK_M": shape.block_m,
        "BLOCK_N": shape.block_n,
        "BLOCK_D": padded[0],
        "BLOCK_E": padded[1],
        "EVEN_D": width == padded[0],
        "EVEN_E": value_width == padded[1],
        "PRECISION": "tf32x3" if q.dtype == torch.float32 else "ieee",
        "RAISING": raising(kernel.factor, call),
        "SPLIT": listed is not None,
        "ADDING": False,
        **views.present,
    }
    tiles = len(listed.entries) if listed else count_tiles(branch, call, shape)
    with device_of(q):
        kernels.function(kernel.name)[(tiles, batch * heads)](
            *arguments, **constants, num_warps=shape.warps, num_stages=shape.stages
        )
        if listed is not None and len(listed.long_tiles):
            combine(kernels, listed, values, shape)
    return out, lse


def device_of(tensor: Tensor) -> Any:
    """Makes the tensor's device current; nothing on a CPU."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else torch.device("cpu")


def triton_power(size: int) -> int:
    """The power of two that holds `size`."""
    return 1 << (size - 1).bit_length()


def kind_of(branch: Branch) -> str:
    """How a row's keys lie, for the choice of a tile shape."""
    key_sets = branch.domain.key_sets
    if any(key_set.walk is not None for key_set in key_sets):
        return "sparse"
    from_start = (run.outer.lo.op == "literal" for key_set in key_sets for run in key_set.runs)
    return "long" if all(from_start) else "local"


def raising(factor: Node | None, call: Call) -> bool:
    """Whether the scores' factor is positive, so that a maximum may be taken before it is applied."""
    if factor is None:
        return False
    value = of_node(factor, call.parameters, call.sizes)
    return value is not None and value > 0


def count_tiles(branch: Branch, call: Call, shape: TileShape) -> int:
    """Number of row tiles."""
    rows = branch.domain.rows
    steps = {name: getattr(rows, name) for name in ("period", "step", "high_step", "low_step")}
    values = {
        name: int(of_node(node, call.parameters, call.sizes) or 1) for name, node in steps.items() if node is not None
    }
    return row_tiles(rows, values, call.sizes["i"], call.offset, shape.block_m)


class Values:
    """The value of every kernel argument, by its role."""

    def __init__(
        self,
        call: Call,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        listed: ProgramList | None,
        block_e: int,
        block_m: int,
    ) -> None:
        self.call = call
        self.tensors = {"q": q, "k": k, "v": v, "o": out, "lse": lse, "part_out": lse, "part_lse": lse, "schedule": lse}
        if listed is not None:
            parts = (max(listed.slots, 1), q.shape[0] * q.shape[1], block_m)
            self.tensors["part_out"] = torch.empty((*parts, block_e), dtype=torch.float32, device=q.device)
            self.tensors["part_lse"] = torch.empty(parts, dtype=torch.float32, device=q.device)
            self.tensors["schedule"] = listed.entries
        self.sizes = {
            "B": q.shape[0],
            "H": q.shape[1],
            "N": q.shape[2],
            "M": k.shape[2],
            "D": q.shape[3],
            "E": v.shape[3],
            "OFFSET": call.offset,
            "GROUP": q.shape[1] // k.shape[1],
        }

    def of(self, argument: Argument) -> Any:
        attribute, slot = argument.attribute, argument.slot
        match argument.role:
            case "tensor":
                return self.tensors[attribute]
            case "stride":
                return stride(self.tensors[attribute], slot)
            case "size":
                return self.sizes[attribute] if attribute in self.sizes else self.call.sizes[attribute]
            case "parameter":
                return self.call.parameters[attribute]
            case "array":
                return self.array(attribute)
            case "array_stride":
                return stride(self.array(attribute), slot)
            case "array_length":
                return self.array(attribute).shape[slot]
            case "array_group":
                return max(1, self.sizes["H"] // self.array(attribute).shape[slot])
        raise AssertionError(argument.role)

    def array(self, attribute: str) -> Tensor:
        return self.call.derived[attribute] if "." in attribute else self.call.inputs[attribute]


def stride(tensor: Tensor, slot: int) -> int:
    """A stride; 0 along an axis of length 1, which is read at any index."""
    return 0 if tensor.shape[slot] == 1 else tensor.stride(slot)


def combine(kernels: Kernels, listed: ProgramList, values: Values, shape: TileShape) -> None:
    """Join the parts of the tiles that were split."""
    out, lse = values.tensors["o"], values.tensors["lse"]
    block_e = values.tensors["part_out"].shape[-1]
    kernels.function("combine_parts")[(len(listed.long_tiles), values.sizes["B"] * values.sizes["H"])](
        values.tensors["part_out"],
        values.tensors["part_lse"],
        listed.long_tiles,
        listed.rows,
        out,
        lse,
        *(stride(out, slot) for slot in range(4)),
        values.sizes["H"],
        values.sizes["N"],
        values.sizes["E"],
        BLOCK_M=shape.block_m,
        BLOCK_E=block_e,
        num_warps=4,
    )


def kernel_texts(plan: Plan) -> dict[str, str]:
    """Generated modules by name, for people."""
    return {plan.name: kernels_of(plan).text}


@lru_cache(maxsize=8)
def processors(device: int) -> int:
    """Number of streaming multiprocessors."""
    return torch.cuda.get_device_properties(device).multi_processor_count


__all__: Sequence[str] = ("execute", "kernel_texts")

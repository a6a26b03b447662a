"""The CUDA back end, backward: runs the generated gradient kernels of one branch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attnc.compiler.differentiate import Leaf
from attnc.compiler.emit.backward import backward_kernels
from attnc.compiler.emit.kernel import Kernel
from attnc.compiler.pipeline import transpose
from attnc.compiler.plan import Branch, Plan, Rows
from attnc.compiler.schedule import TileShape, backward_shape, fused_shape
from attnc.runtime.backward import BranchGradients, score_gradient
from attnc.runtime.binding import WIDEST
from attnc.runtime.call import Call
from attnc.runtime.cuda.kernel_call import (
    INTERPRETED,
    KernelCall,
    Kernels,
    attended_width,
    device_of,
    interpreting,
    join_rows,
    kind_of,
    padded,
    pieces,
    precision,
    processors,
    refuse_unfit,
    refuse_wide,
    stride,
)
from attnc.runtime.cuda.launch_listed_backward import listed_gradients
from attnc.runtime.cuda.work import ProgramList, program_list, reaches_all
from attnc.runtime.derived import derive
from attnc.runtime.steps.placing import RowPlaces
from attnc.runtime.tuned import chosen_shape

PRODUCT_ROWS = 64
DIRECT_PASSES = 2  # up to so many passes write dk and dv in their own dtype

_loaded: dict[int, tuple[Plan, Plan, dict[int, Kernels]]] = {}


def turned(plan: Plan) -> tuple[Plan, dict[int, Kernels]]:
    """The plan with its transposed domains, and the kernels made so far; once a process."""
    if id(plan) not in _loaded:
        _loaded[id(plan)] = (plan, transpose(plan), {})
    return _loaded[id(plan)][1:]


def kernels_of(plan: Plan, number: int) -> tuple[Plan, Kernels]:
    """The transposed plan and the gradient kernels of a branch, made at its first backward."""
    full, made = turned(plan)
    if number not in made:
        made[number] = Kernels(full, backward_kernels(full, full.branches[number], number))
    return full, made[number]


def branch_backward(
    plan: Plan, number: int, call: Call, grad_out: Tensor, lse: Tensor, delta: Tensor
) -> BranchGradients:
    """Gradients of q, k, v and the score's leaves from one branch's cotangent (B, H, N, E).

    `lse` and `delta` are (B, H, N), float32.
    """
    refuse_unfit(call)
    refuse_wide(call, WIDEST)
    if not plan.exact:  # an epilogue's is wider, and products have operands of one type
        grad_out = grad_out.to(call.q.dtype)
    plan, kernels = kernels_of(plan, number)
    branch = plan.branches[number]
    if branch.selected is not None:
        return listed_gradients(branch, plan, kernels, call, grad_out, lse, delta)
    derived = dict(call.derived)
    for table in plan.transposed_derived:
        derived |= derive(plan, table, call)
    call = replace(call, derived=derived)
    leaves = score_gradient(branch.score).leaves
    v = call.v if call.v is not None else call.k
    passes = kernels.kernels[1:]
    shared = {"q": call.q, "k": call.k, "v": v, "do": grad_out}
    shared |= {"lse": lse.contiguous().float(), "delta": delta.contiguous().float()}
    side, shape = fused_side(plan, kernels, call, v)
    if plan.exact and not side:  # two kernels have operands of one type
        call, v = replace(call, q=call.q.float(), k=call.k.float(), v=v.float()), v.float()
        shared |= {"q": call.q, "k": call.k, "v": v, "do": grad_out.float()}
    outputs, whole = key_outputs(call, v, passes, leaves)
    if side == "rows":
        if not reaches_all(plan, branch.domain, call, "i"):
            outputs = {name: one.zero_() for name, one in outputs.items()}
        results = run_rows(plan, branch, kernels, call, shared | outputs, leaves, shape)
        return BranchGradients(results[-1], outputs["dk"].to(call.k.dtype), outputs["dv"].to(v.dtype), ())
    if side == "keys":
        make = torch.empty_like if reaches_all(plan, passes[0].domain, call, "j") else torch.zeros_like
        dq = make(call.q, memory_format=torch.contiguous_format)
        run_pass(plan, kernels, passes[0], call, shared | outputs | {"dq": dq}, adding=not whole, fused=shape)
        return BranchGradients(dq, outputs["dk"].to(call.k.dtype), outputs["dv"].to(v.dtype), ())
    results = run_rows(plan, branch, kernels, call, shared, leaves)
    results |= {at: outputs[f"leaf_{at}"] for at, leaf in enumerate(leaves) if leaf.side == "key"}
    rows = RowPlaces.of(plan, call)
    if rows is not None:  # they stream by in their order
        shared |= rows.copied(shared)
    for at, kernel in enumerate(passes):
        run_pass(plan, kernels, kernel, call, shared | outputs, adding=at > 0 or not whole)
    gradients = tuple(results[at] for at in range(len(leaves)))
    return BranchGradients(results[-1], outputs["dk"].to(call.k.dtype), outputs["dv"].to(v.dtype), gradients)


def fused_side(plan: Plan, kernels: Kernels, call: Call, v: Tensor) -> tuple[str, TileShape | None]:
    """The side that one tile holds whole, so that its kernel gives all gradients, and the tile; (``, None) for none.

    Where queries stay, a key's gradients are one head's, so each needs a key head of its own.
    """
    rows, *passes = kernels.kernels
    if plan.placed is not None or not call.q.numel() or not call.k.numel() or not v.numel():
        return "", None  # rows in places are read by the kernel that keeps rows alone
    for side, kernel, count in (
        ("keys", passes[0] if passes else None, call.sizes["j"]),
        ("rows", rows, call.sizes["i"]),
    ):
        if kernel is None or not kernel.fuses or (side == "rows" and call.k.shape[1] != call.q.shape[1]):
            continue
        if interpreting():
            shape = INTERPRETED if count <= INTERPRETED.block_m else None
        else:
            shape = fused_shape(*widths(plan, call, v), side, count, pieces=pieces(plan, call))
        if shape is not None:
            return side, shape
    return "", None


def key_outputs(
    call: Call, v: Tensor, passes: Sequence[Kernel], leaves: Sequence[Leaf]
) -> tuple[dict[str, Tensor], bool]:
    """What the passes over the keys fill: dk, dv and the leaves' sums; whether the first pass writes all of dk and dv.

    Where it does and one other adds to some of them, they are of the keys' dtype at once; else sums are kept in
    float32, which takes far more traffic than it is worth for a single addition.
    """
    sizes, device = call.sizes, call.q.device
    whole = bool(passes) and complete(passes[0].domain.rows) and sizes["i"] > 0 and call.k.numel() > 0
    direct = whole and len(passes) <= DIRECT_PASSES
    make = torch.empty if whole else torch.zeros
    outputs = {
        name: make(one.shape, dtype=one.dtype if direct else torch.float32, device=device)
        for name, one in (("dk", call.k), ("dv", v))
    }
    for at, leaf in enumerate(leaves):
        if leaf.side == "key":
            by_key = (sizes["b"], sizes["h"], sizes["j"])
            outputs[f"leaf_{at}"] = torch.zeros(by_key, dtype=torch.float32, device=device)
    return outputs, whole


def run_pass(
    plan: Plan,
    kernels: Kernels,
    kernel: Kernel,
    call: Call,
    tensors: dict[str, Tensor],
    *,
    adding: bool,
    fused: TileShape | None = None,
) -> None:
    """One kernel that keeps keys: it writes dk and dv, or adds to them; `fused`, and its tile: it writes dq, too."""
    sizes, key_heads = call.sizes, call.k.shape[1]
    if call.k.numel() == 0 or sizes["i"] == 0:
        return
    shape = fused or staying_shape(plan, kernels, call, tensors["v"], "keys", kernel)
    run = KernelCall(call, tensors if fused else tensors | {"dq": call.q}, shape)
    tiles = run.tiles(kernel.domain, sizes["j"], 0)
    if tiles == 0:
        return
    parts = Parts.of(plan, kernel, run, {"part_k": "dk", "part_v": "dv"}, "j")
    constants = {"MEMBERS": run.sizes["GROUP"], "ADDING": adding, "SPLIT": parts.split}
    constants |= fused_constants(kernel, fused) | precision(plan, call)
    listed = kernel.domain.rows.listed is not None  # heads list keys of their own: one launch a member
    for member in range(run.sizes["GROUP"] if listed else 1):
        run.sizes["MEMBER"] = member
        run.run(kernels, kernel, (parts.programs(tiles), sizes["b"] * key_heads), **constants)
    parts.add(kernels, run, adding=adding)


class Parts:
    """The parts of rows that see too much for one program: where their sums lie until they are added up in order."""

    def __init__(self, listed: ProgramList | None, targets: Mapping[str, str]) -> None:
        self.listed = listed
        self.targets = targets
        self.split = listed is not None

    @classmethod
    def of(cls, plan: Plan, kernel: Kernel, run: KernelCall, targets: Mapping[str, str], at: str) -> Parts:
        """Makes the buffers among the tensors of `run`: `targets` names the tensor of each. Leaves are not split."""
        listed = None
        if kernel.splits:
            listed = program_list(plan, kernel.domain, run.call, run.shape, processors(run.call.q), at)
        for buffer, target in targets.items():
            run.tensors[buffer] = run.tensors["lse"]  # in its place where nothing is split
            if listed is not None:
                out = run.tensors[target]
                lines = (max(listed.slots, 1), out.shape[0] * out.shape[1], run.shape.block_m, padded(out.shape[3]))
                run.tensors[buffer] = torch.empty(lines, dtype=torch.float32, device=out.device)
        run.tensors["schedule"] = run.tensors["lse"] if listed is None else listed.entries
        return cls(listed, targets)

    def programs(self, tiles: int) -> int:
        """Programs a head, where `tiles` are the row tiles."""
        return tiles if self.listed is None else len(self.listed.entries)

    def add(self, kernels: Kernels, run: KernelCall, *, adding: bool) -> None:
        """Sums the parts, to what is there where `adding`."""
        if self.listed is None or not len(self.listed.long_tiles):
            return
        for buffer, target in self.targets.items():
            out = run.tensors[target]
            with device_of(out):
                rows = join_rows(run.shape)
                grid = (len(self.listed.long_tiles), out.shape[0] * out.shape[1], run.shape.block_m // rows)
                kernels.module.add_parts[grid](
                    run.tensors[buffer],
                    self.listed.long_tiles,
                    self.listed.rows,
                    out,
                    *(stride(out, slot) for slot in range(4)),
                    out.shape[1],
                    out.shape[3],
                    BLOCK_M=run.shape.block_m,
                    ROWS=rows,
                    BLOCK_D=padded(out.shape[3]),
                    ADDING=adding,
                )


def widths(plan: Plan, call: Call, v: Tensor) -> tuple[int, int]:
    """The widest padded vector and the bytes of an element of products."""
    itemsize = torch.float32.itemsize if plan.exact else call.q.element_size()
    return max(attended_width(plan, call.sizes["d"]), padded(v.shape[3])), itemsize


def staying_shape(plan: Plan, kernels: Kernels, call: Call, v: Tensor, side: str, kernel: Kernel) -> TileShape:
    """The tile of a kernel that keeps one side of many tiles."""
    if interpreting():
        rule = INTERPRETED
    else:
        rule = backward_shape(*widths(plan, call, v), side, kind_of(kernel.domain))
    return rule if plan.joined else chosen_shape(kernels, kernel, call, side, rule)


def fused_constants(kernel: Kernel, fused: TileShape | None) -> dict[str, int]:
    """Whether a kernel that can gives the other side's gradients, too."""
    return {"FUSED": fused is not None} if kernel.fuses else {}


def complete(rows: Rows) -> bool:
    """Whether the row tiles of a domain are all of its rows."""
    return rows.phase is None and rows.listed is None and not rows.packed


def run_rows(
    plan: Plan,
    branch: Branch,
    kernels: Kernels,
    call: Call,
    shared: dict[str, Tensor],
    leaves: tuple[Leaf, ...],
    fused: TileShape | None = None,
) -> dict[int, Tensor]:
    """The kernel that keeps queries: {-1: dq, leaf: its gradient}; `fused`, and its tile: it writes dk and dv, too."""
    kernel = kernels.kernels[0]
    sizes, device = call.sizes, call.q.device
    shape = fused or staying_shape(plan, kernels, call, shared["v"], "rows", kernel)
    make = torch.empty_like if complete(branch.domain.rows) and sizes["j"] else torch.zeros_like
    dq = make(call.q, memory_format=torch.contiguous_format)
    others = {} if fused else {"dk": call.k, "dv": shared["v"]}
    run = KernelCall(call, shared | others | {"dq": dq}, shape)
    tiles = run.tiles(branch.domain, sizes["i"], call.offset) if sizes["i"] else 0
    results: dict[int, Tensor] = {-1: dq}
    constants: dict[str, Any] = fused_constants(kernel, fused) | precision(plan, call)
    for at, leaf in enumerate(leaves):
        if leaf.side == "row":
            results[at] = torch.zeros((sizes["b"], sizes["h"], sizes["i"]), dtype=torch.float32, device=device)
        elif leaf.side == "pair":
            width = padded(call.inputs[str(leaf.value.args[0].attribute)].shape[-1])
            constants[f"WIDTH_{at}"] = width
            results[at] = torch.zeros((max(tiles, 1), sizes["b"], sizes["h"], width), device=device)
        else:
            continue
        run.tensors[f"leaf_{at}"] = results[at]
    if dq.numel() and sizes["j"]:
        parts = Parts.of(plan, kernel, run, {"part_q": "dq"}, "i")
        constants["SPLIT"] = parts.split
        run.run(kernels, kernel, (parts.programs(tiles), sizes["b"] * sizes["h"]), **constants)
        parts.add(kernels, run, adding=False)
    for at, leaf in enumerate(leaves):
        if leaf.side == "pair":
            length = call.inputs[str(leaf.value.args[0].attribute)].shape[-1]
            results[at] = results[at].sum(0)[..., :length]
    return results


def row_products(plan: Plan, x: Tensor, y: Tensor) -> Tensor:
    """sum over e of x * y: (B, H, N), float32."""
    out = torch.empty(x.shape[:3], dtype=torch.float32, device=x.device)
    if out.numel() == 0:
        return out
    batch, heads, rows, width = x.shape
    with device_of(x):
        kernels_of(plan, 0)[1].module.row_products[(-(-rows // PRODUCT_ROWS), batch * heads)](
            x,
            y,
            out,
            *(stride(tensor, slot) for tensor in (x, y) for slot in range(4)),
            heads,
            rows,
            width,
            BLOCK_M=PRODUCT_ROWS,
            BLOCK_E=padded(width),
        )
    return out

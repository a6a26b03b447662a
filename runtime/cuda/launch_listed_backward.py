"""Listed branches on CUDA, backward: runs the kernels of `compiler.emit.listed_backward`."""

from __future__ import annotations

import torch
from torch import Tensor

from attnc.compiler.build import unlowered
from attnc.compiler.differentiate import Leaf, differentiate
from attnc.compiler.plan import Branch, Plan
from attnc.compiler.schedule_listed import piece_rows
from attnc.runtime.backward import BranchGradients, table_shape
from attnc.runtime.call import Call
from attnc.runtime.cuda.kernel_call import KernelCall, Kernels, device_of, padded, processors, stride
from attnc.runtime.cuda.launch_listed import JOINED_ROWS, Launch
from attnc.runtime.cuda.listed_work import cut
from attnc.runtime.tuned import chosen_shape

JOINED_KEYS = 32
TOGETHER = False  # whether blocks of one tile give all gradients at once; the tiles of an H100 are too large for it


def listed_gradients(
    branch: Branch, plan: Plan, kernels: Kernels, call: Call, grad_out: Tensor, lse: Tensor, delta: Tensor
) -> BranchGradients:
    """The gradients of a listed branch; see `backward.Engine`."""
    launch = Launch.of(plan, branch, call)
    leaves = differentiate(branch.score).leaves
    for leaf in leaves:
        if leaf.side == "pair" and {"i", "j"} & leaf.value.args[0].type.indices:
            raise unlowered(leaf.value, "the gradient of a table over positions that listed pairs read, on a GPU,")
    v = call.v if call.v is not None else call.k
    shared = {"q": call.q, "k": call.k, "v": v, "do": grad_out.to(call.q.dtype)}
    shared |= {"lse": lse.contiguous().float(), "delta": delta.contiguous().float()}
    together = fused(launch, leaves, v)
    results = {} if together else row_gradients(launch, kernels, shared, leaves)
    dk, dv, by_key = key_gradients(launch, kernels, shared, leaves, together)
    results |= by_key
    return BranchGradients(results[-1], dk, dv, tuple(results[number] for number in range(len(leaves))))


def fused(launch: Launch, leaves: tuple[Leaf, ...], v: Tensor) -> bool:
    """Whether one kernel makes all gradients: of parts that are held together, from blocks that are one tile each."""
    if not TOGETHER or leaves or launch.rows_stay or launch.empty():
        return False
    chunks = list(launch.chunks(launch.call.q.shape[-1]))
    return len(chunks) == 1 and launch.width <= launch.shape("keys", v).block_m


def row_gradients(
    launch: Launch, kernels: Kernels, shared: dict[str, Tensor], leaves: tuple[Leaf, ...]
) -> dict[int, Tensor]:
    """The kernel that keeps rows: {-1: dq, leaf: its gradient}. Sums of a table want a program to have one head."""
    call = launch.call
    q, device = call.q, call.q.device
    make = torch.zeros_like if launch.empty() else torch.empty_like  # every row is in a line
    results = {-1: make(q, memory_format=torch.contiguous_format)}
    tables: dict[str, Tensor] = {}
    for number, leaf in enumerate(leaves):
        if leaf.side == "row":
            results[number] = torch.zeros(q.shape[:3], dtype=torch.float32, device=device)
        elif leaf.side == "pair":
            results[number] = torch.zeros(table_shape(leaf, call), dtype=torch.float32, device=device)
            tables[f"leaf_{number}"] = results[number]
    if launch.empty():
        return results
    launch = launch.by_head() if tables else launch
    shape = chosen_shape(kernels, kernels.kernels[0], call, "listed", launch.shape("rows", shared["v"]))
    run = KernelCall(call, shared | {"dq": results[-1]}, shape)
    together = launch.together("rows", shared["v"])
    by_row = [number for number, leaf in enumerate(leaves) if leaf.side == "row"]
    for number in (number for number, leaf in enumerate(leaves) if leaf.side != "key"):
        run.tensors |= {f"leaf_{number}": results[number], f"part_leaf_{number}": results[number]}
    run.tensors["part_dq"] = results[-1]
    for first, last in launch.chunks(q.shape[-1]):
        if not launch.rows_stay:
            run.tensors["part_dq"] = launch.slots(first, last, padded(q.shape[-1]))
            run.tensors |= {f"part_leaf_{number}": launch.slots(first, last, 1) for number in by_row}
        launch.run_rows(run, kernels, 0, together, first, last, tables)
        for name, table in tables.items():
            add_programs(launch, run, run.tensors[name], table)
        if not launch.rows_stay:
            add_entries(launch, run, kernels, run.tensors["part_dq"], results[-1], first, last)
            for number in by_row:
                parts, target = run.tensors[f"part_leaf_{number}"], results[number].unsqueeze(-1)
                add_entries(launch, run, kernels, parts, target, first, last)
    return results


def add_entries(
    launch: Launch, run: KernelCall, kernels: Kernels, parts: Tensor, out: Tensor, first: int, last: int
) -> None:
    """The sums of the parts of a chunk's rows; out: (B, H, N, X)."""
    told = launch.told(first, last)
    with device_of(out):
        kernels.module.add_entries[(-(-told[0] // JOINED_ROWS),)](
            parts,
            run.tensors["members"],
            out,
            *(stride(out, slot) for slot in range(4)),
            *told,
            run.sizes["N"],
            out.shape[3],
            LISTS=launch.members.shape[1],
            SHARED=launch.shared,
            ROW_BLOCK=launch.block,
            BLOCK_M=JOINED_ROWS,
            BLOCK_D=parts.shape[-1],
            num_warps=4,
        )


def add_programs(launch: Launch, run: KernelCall, sums: Tensor, table: Tensor) -> None:
    """Adds the sums (programs, cells) of a table to it, (B, heads, .., cells) of one head a lane."""
    lanes = launch.members.shape[0]
    if launch.rows_stay:
        by_lane = sums.view(lanes, -1, sums.shape[-1]).sum(1)
    else:  # programs lie in the order of their lanes; those past the end have none, and zeros
        lane = (run.tensors["piece_group"] // launch.blocks).long()
        of_lane = torch.arange(lanes, device=sums.device).unsqueeze(1) == lane
        by_lane = of_lane.to(sums.dtype) @ sums
    table += by_lane[:, : table.shape[-1]].view(table.shape)


def key_gradients(
    launch: Launch, kernels: Kernels, shared: dict[str, Tensor], leaves: tuple[Leaf, ...], together: bool
) -> tuple[Tensor, Tensor, dict[int, Tensor]]:
    """The kernel that keeps keys: dk, dv and {leaf: its gradient}, with -1: dq where it makes them `together`.

    Such leaves want a lane to have one head.
    """
    call, v = launch.call, shared["v"]
    by_key = [number for number, leaf in enumerate(leaves) if leaf.side == "key"]
    sizes, device = call.sizes, call.q.device
    shape = (sizes["b"], sizes["h"], sizes["j"])
    results = {number: torch.zeros(shape, dtype=torch.float32, device=device) for number in by_key}
    if launch.empty():
        return torch.zeros_like(call.k), torch.zeros_like(v), results
    launch = launch.by_head() if by_key else launch
    whole = launch.lane_heads == call.k.shape[1]
    made = {}
    for name, one in (("dk", call.k), ("dv", v)):
        of_lanes = (one.shape[0], launch.lane_heads, *one.shape[2:])
        made[name] = torch.empty(of_lanes, dtype=one.dtype if whole else torch.float32, device=device)
    outputs = made | {f"leaf_{number}": results[number] for number in by_key}
    tile = chosen_shape(kernels, kernels.kernels[1], call, "listed", launch.shape("keys", v))
    run = KernelCall(call, shared | outputs, tile)
    if together:
        results[-1] = torch.empty_like(call.q, memory_format=torch.contiguous_format)
        run.tensors["part_dq"] = launch.slots(0, launch.members.shape[2], padded(call.q.shape[-1]))
    run_keys(launch, run, kernels, outputs)
    if together:
        run.tensors["members"] = launch.members.flatten(1, 2).contiguous()
        add_entries(launch, run, kernels, run.tensors["part_dq"], results[-1], 0, launch.members.shape[2])
    if whole:
        return made["dk"], made["dv"], results
    dk, dv = (
        made[name].unflatten(1, (call.k.shape[1], -1)).sum(2).to(one.dtype) for name, one in (("dk", call.k), ("dv", v))
    )
    return dk, dv, results


def run_keys(launch: Launch, run: KernelCall, kernels: Kernels, outputs: dict[str, Tensor]) -> None:
    """Every block of keys with the rows whose lines name it, in pieces; then the sums of the blocks that were cut."""
    count = launch.members.shape[2]
    turned = launch.sorted(0, count)
    run.sizes |= launch.sizes(0, count)
    rows = launch.members.numel() * launch.line_rows
    tiles = -(-launch.width // run.shape.block_m)
    piece = piece_rows(rows, tiles, processors(run.call.q), run.shape.block_n)
    groups = len(turned.starts) - 1
    programs = rows // piece + groups
    pieces = cut(turned.starts, launch.line_rows, piece, programs, least=1)
    # A group that is cut has no more than twice as many pieces as its rows fill.
    slots = max(min(2 * rows // piece, programs), 1)
    held = torch.where(pieces.number > 1, pieces.number, 0).to(torch.int32)
    before = held.cumsum(0, dtype=torch.int32) - held
    slot = torch.where(held[pieces.group] > 0, before[pieces.group] + pieces.first // piece, -1).to(torch.int32)
    run.sizes["PIECE"] = piece
    run.tensors |= {"order": turned.order, "order_line": turned.lines, "piece_slot": slot, **pieces.tensors()}
    together = "part_dq" in run.tensors
    run.tensors.setdefault("part_dq", slot)
    widths = {"dk": padded(run.sizes["D"]), "dv": padded(run.sizes["E"])}
    for name in outputs:
        shape = (slots, launch.width, widths.get(name, 1))
        run.tensors[f"part_{name}"] = torch.empty(shape, dtype=torch.float32, device=slot.device)
    grid = (tiles * programs, 1)
    run.run(kernels, kernels.kernels[1], grid, PARTS=True, TOGETHER=1, FUSED=together, **launch.constants(run.tensors))
    if rows <= piece:
        return
    for name, out in outputs.items():
        add_pieces(
            launch, kernels, run.tensors[f"part_{name}"], before, held, out if out.dim() == 4 else out[..., None]
        )


def add_pieces(launch: Launch, kernels: Kernels, parts: Tensor, first: Tensor, number: Tensor, out: Tensor) -> None:
    """Adds the slots of each group that has some: `first` and `number` of them; out: (B, heads, M, X)."""
    block = min(JOINED_KEYS, padded(launch.width))
    with device_of(out):
        kernels.module.add_pieces[(len(first) * -(-launch.width // block),)](
            parts,
            first,
            number,
            out,
            *(stride(out, slot) for slot in range(4)),
            launch.blocks,
            launch.lane_heads,
            out.shape[2],
            out.shape[3],
            WIDTH=launch.width,
            BLOCK_M=block,
            BLOCK_D=parts.shape[-1],
            num_warps=4,
        )

"""Listed branches on CUDA: turns the lists around and runs the kernels of `compiler.emit.listed`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attnc.compiler.build import unlowered
from attnc.compiler.differentiate import Leaf, differentiate
from attnc.compiler.plan import Branch, Plan
from attnc.compiler.schedule import TileShape, backward_shape, tile_shape
from attnc.runtime.backward import BranchGradients, table_shape
from attnc.runtime.call import Call
from attnc.runtime.kernel_call import INTERPRETED, KernelCall, Kernels, interpreting, padded
from attnc.runtime.listed_tiles import Lines, lines_of, turned

PARTS = 2**27  # numbers of the parts that are held at a time


@dataclass
class Launch:
    """One listed branch of one call."""

    branch: Branch
    call: Call
    lines: Lines

    @classmethod
    def of(cls, plan: Plan, branch: Branch, call: Call) -> Launch:
        assert branch.selected is not None
        return cls(branch, call, lines_of(plan, call, branch.selected))

    @property
    def blocks(self) -> int:
        return max(-(-self.call.sizes["j"] // self.lines.width), 1)

    def by_head(self) -> Launch:
        """The same with a tile's rows all of one head, as sums of tables want it; rows stay."""
        lines = self.lines
        members = lines.members * lines.shared
        return replace(self, lines=replace(lines, members=members, shared=1, rows_stay=True))

    def fitted(self, shape: TileShape) -> TileShape:
        """The shape with no more rows than share a line, where rows stay."""
        rows = padded(self.lines.shared * self.lines.block)
        return replace(shape, block_m=min(shape.block_m, rows)) if self.lines.rows_stay else shape

    def empty(self) -> bool:
        call = self.call
        return not (self.lines.members[0].numel() and call.q.numel() and call.k.numel())

    def shape(self, *width: int, first: int, last: int) -> tuple[int, ...]:
        """(lanes, heads, lines, rows of a line, entries, ..): the slots of a chunk's rows."""
        lanes, _, entries = self.lines.members[0].shape
        return (lanes, self.lines.shared, last - first, self.lines.block, entries, *width)

    def set_sizes(self, run: KernelCall, member: int, first: int, last: int) -> None:
        """What the kernels are told of the lists."""
        lines = self.lines
        run.sizes |= {
            "ENTRIES": lines.members[0].shape[-1],
            "LINES": last - first,
            "FIRST_LINE": first,
            "BLOCKS": self.blocks,
            "WIDTH": lines.width,
            "ROW_BLOCK": lines.block,
            "SKIPPED": lines.skipped,
            "SHARED": lines.shared,
            "MEMBER": member,
            "KEY_HEADS": self.call.k.shape[1],
        }

    def row_grid(self, run: KernelCall, member: int, first: int, last: int, *, parts: bool) -> int:
        """Fills in the lists of the kernels that keep rows; the number of programs."""
        self.set_sizes(run, member, first, last)
        members = self.lines.members[member][:, first:last].contiguous()
        rows = self.lines.shared * self.lines.block
        run.tensors |= {"members": members, "counts": (members >= 0).sum(-1, dtype=torch.int32)}
        for name in ("order", "starts", "tile_group", "tile_first"):
            run.tensors[name] = members
        if not parts:
            return members.shape[0] * (last - first) * -(-rows // run.shape.block_m)
        order, starts = listed_order(members, self.blocks)
        tiles = -(-starts.diff() * rows // run.shape.block_m)
        # How many tiles there are is known on the device only: as many programs as there may be, some with nothing.
        programs = -(-members.numel() * rows // run.shape.block_m) + members.shape[0] * self.blocks
        ends = tiles.cumsum(0)
        program = torch.arange(programs, device=members.device)
        group = torch.searchsorted(ends, program, right=True).clamp(max=len(tiles) - 1)
        before = ends[group] - tiles[group]
        run.tensors |= {"order": order, "starts": starts, "tile_group": group.to(torch.int32)}
        run.tensors["tile_first"] = ((program - before) * run.shape.block_m).to(torch.int32)
        return programs

    def key_lists(self, run: KernelCall) -> None:
        """Fills in the lists of the kernel that keeps keys: of every set of heads."""
        count = self.lines.members[0].shape[1]
        self.set_sizes(run, 0, 0, count)
        made = [listed_order(members.contiguous(), self.blocks) for members in self.lines.members]
        length = len(made[0][0])
        run.tensors["order"] = torch.cat([order for order, _ in made])
        run.tensors["starts"] = torch.cat([starts + number * length for number, (_, starts) in enumerate(made)])
        for name in ("members", "counts", "tile_group", "tile_first"):
            run.tensors[name] = run.tensors["order"]

    def chunks(self, width: int) -> Iterator[tuple[int, int, int]]:
        yield from self.lines.chunks(width, PARTS)

    def rows_of(self, first: int, last: int) -> tuple[slice, slice]:
        """The rows of a chunk: among all places of its lines, and among the N rows."""
        block, skipped = self.lines.block, self.lines.skipped
        before = max(skipped - first * block, 0)
        after = min(last * block, self.call.sizes["i"] + skipped) - first * block
        start = first * block - skipped + before
        return slice(before, after), slice(start, start + after - before)

    def store(self, target: Tensor, member: int, first: int, last: int, value: Tensor) -> None:
        """Writes joined rows (lanes, heads, lines, rows of a line, ..) to (B, H, N, ..)."""
        lanes, shared, *_ = value.shape
        inside, rows = self.rows_of(first, last)
        held = value.flatten(2, 3)[:, :, inside]
        whole = target.view(lanes, -1, *target.shape[2:])
        whole[:, member : member + shared, rows] = held.to(target.dtype)


def listed_order(members: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
    """`turned` as the kernels read it: entries as places of their lane, and a last group that is empty."""
    order, starts = turned(members, blocks)
    _, lines, entries = members.shape
    return (order % max(lines * entries, 1)).to(torch.int32), torch.cat([starts, starts[-1:]])


def listed_outputs(
    plan: Plan, branch: Branch, kernels: Kernels, number: int, call: Call, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(out in `dtype`, lse) of a listed branch."""
    q, v = call.q, call.v if call.v is not None else call.k
    launch = Launch.of(plan, branch, call)
    out = torch.zeros((*q.shape[:3], v.shape[-1]), dtype=dtype, device=q.device)
    lse = torch.full(q.shape[:3], -math.inf, dtype=torch.float32, device=q.device)
    if launch.empty():
        return out, lse
    widest = max(padded(q.shape[-1]), padded(v.shape[-1]))
    parts = not launch.lines.rows_stay
    shape = launch.fitted(INTERPRETED if interpreting() else tile_shape(widest, q.element_size(), "sparse"))
    run = KernelCall(call, {"q": q, "k": call.k, "v": v, "o": out, "lse": lse, "part_out": lse, "part_lse": lse}, shape)
    for member, first, last in launch.chunks(v.shape[-1]):
        programs = launch.row_grid(run, member, first, last, parts=parts)
        if parts:
            slots = launch.shape(first=first, last=last)
            run.tensors["part_out"] = torch.zeros((*slots, v.shape[-1]), dtype=torch.float32, device=q.device)
            run.tensors["part_lse"] = torch.full(slots, -math.inf, dtype=torch.float32, device=q.device)
        run.run(kernels, kernels.kernels[number], (programs, 1), PARTS=parts)
        if parts:
            joined, total = join_parts(run.tensors["part_out"], run.tensors["part_lse"])
            launch.store(out, member, first, last, joined)
            launch.store(lse, member, first, last, total)
    return out, lse


def join_parts(parts: Tensor, statistics: Tensor) -> tuple[Tensor, Tensor]:
    """The softmax of parts (.., S, E) with their log-sum-exps (.., S): (.., E) and (..)."""
    total = statistics.logsumexp(-1)
    weights = torch.exp(statistics - total.masked_fill(total == -math.inf, 0).unsqueeze(-1))
    return (weights.unsqueeze(-2) @ parts).squeeze(-2), total


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
    results = row_gradients(launch, kernels, shared, leaves)
    dk = torch.zeros(call.k.shape, dtype=call.k.dtype, device=call.q.device)
    dv = torch.zeros(v.shape, dtype=v.dtype, device=call.q.device)
    keyed = {"dk": dk, "dv": dv}
    for number, leaf in enumerate(leaves):
        if leaf.side == "key":
            by_key = (call.sizes["b"], call.sizes["h"], call.sizes["j"])
            results[number] = keyed[f"leaf_{number}"] = torch.zeros(by_key, dtype=torch.float32, device=call.q.device)
    if not launch.empty():
        shape = gradient_shape(call, v, "keys")
        shape = replace(shape, block_m=min(shape.block_m, padded(launch.lines.width)))
        run = KernelCall(call, shared | keyed, shape)
        launch.key_lists(run)
        tiles = -(-launch.lines.width // run.shape.block_m)
        groups = call.sizes["b"] * call.k.shape[1] * launch.blocks
        run.run(kernels, kernels.kernels[1], (tiles * groups, 1), PARTS=True)
    return BranchGradients(results[-1], dk, dv, tuple(results[number] for number in range(len(leaves))))


def gradient_shape(call: Call, v: Tensor, side: str) -> TileShape:
    """Tile shape of a gradient kernel."""
    widest = max(padded(call.sizes["d"]), padded(v.shape[3]))
    return INTERPRETED if interpreting() else backward_shape(widest, call.q.element_size(), side, "sparse")


def row_gradients(
    launch: Launch, kernels: Kernels, shared: dict[str, Tensor], leaves: tuple[Leaf, ...]
) -> dict[int, Tensor]:
    """The kernel that keeps rows: {-1: dq, leaf: its gradient}."""
    call = launch.call
    q, device = call.q, call.q.device
    tables = {number: leaf for number, leaf in enumerate(leaves) if leaf.side == "pair"}
    launch = launch.by_head() if tables else launch
    results = {-1: torch.zeros_like(q, memory_format=torch.contiguous_format)}
    for number, leaf in enumerate(leaves):
        if leaf.side == "row":
            results[number] = torch.zeros(q.shape[:3], dtype=torch.float32, device=device)
    for number, leaf in tables.items():
        results[number] = torch.zeros(table_shape(leaf, call), dtype=torch.float32, device=device)
    run = KernelCall(call, shared | {"dq": results[-1]}, launch.fitted(gradient_shape(call, shared["v"], "rows")))
    if launch.empty():
        return results
    parts = not launch.lines.rows_stay
    for member, first, last in launch.chunks(q.shape[-1]):
        programs = launch.row_grid(run, member, first, last, parts=parts)
        slots = launch.shape(first=first, last=last)
        held = {-1: run.tensors["dq"]}
        if parts:
            held[-1] = torch.zeros((*slots, q.shape[-1]), dtype=torch.float32, device=device)
        run.tensors["part_dq"] = held[-1]
        for number in (number for number, leaf in enumerate(leaves) if leaf.side == "row"):
            held[number] = torch.zeros(slots, dtype=torch.float32, device=device) if parts else results[number]
            run.tensors |= {f"leaf_{number}": results[number], f"part_leaf_{number}": held[number]}
        widths = {}
        for number, result in ((number, results[number]) for number in tables):
            widths[f"WIDTH_{number}"] = width = padded(result.shape[-1])
            sums = torch.zeros(programs, width, dtype=torch.float32, device=device)
            run.tensors |= {f"leaf_{number}": sums, f"part_leaf_{number}": sums}
        run.run(kernels, kernels.kernels[0], (programs, 1), PARTS=parts, **widths)
        for number in tables:
            sums = run.tensors[f"leaf_{number}"].unflatten(0, (launch.lines.members[0].shape[0], -1)).sum(1)
            by_member = results[number].view(len(sums), -1, results[number].shape[-1])
            by_member[:, member] = sums[:, : results[number].shape[-1]]
        if parts:
            for number, part in held.items():
                launch.store(results[number], member, first, last, part.sum(4))
    return results

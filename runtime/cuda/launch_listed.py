"""Listed branches on CUDA, forward: turns the lists around and runs the kernels of `compiler.emit.listed`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from attnc.compiler.emit.listed import LISTS
from attnc.compiler.plan import Branch, Plan
from attnc.compiler.schedule import TileShape
from attnc.compiler.schedule_listed import lines_together, listed_shape
from attnc.compiler.schedule_selecting import power
from attnc.runtime.branches import join
from attnc.runtime.call import Call
from attnc.runtime.cpu.listed_tiles import lines_of
from attnc.runtime.cuda.kernel_call import INTERPRETED, KernelCall, Kernels, device_of, interpreting, padded, stride
from attnc.runtime.cuda.listed_work import Sorted, cut, sorted_entries
from attnc.runtime.tuned import chosen_shape

PARTS = 2**27  # numbers of the parts that are held at a time
JOINED_ROWS = 16


@dataclass
class Launch:
    """One listed branch of one call.

    A lane is a batch row and `per_lane` query heads of one key head. members: (lanes, lists, lines, entries), int32;
    `shared` heads have one list. `block`: rows of a line; `skipped`: rows before row 0 in the first line.
    """

    call: Call
    members: Tensor
    shared: int
    width: int
    block: int
    skipped: int
    rows_stay: bool
    order: dict[tuple[int, int], Sorted] = field(default_factory=dict)

    @classmethod
    def of(cls, plan: Plan, branch: Branch, call: Call) -> Launch:
        assert branch.selected is not None
        lines = lines_of(plan, call, branch.selected)
        members = torch.stack(lines.members, 1)
        return cls(call, members, lines.shared, lines.width, lines.block, lines.skipped, lines.rows_stay)

    def by_head(self) -> Launch:
        """The same with lanes of one query head."""
        if self.per_lane == 1:
            return self
        members = self.members.repeat_interleave(self.shared, 1).flatten(0, 1).unsqueeze(1)
        return replace(self, members=members, shared=1, order={})

    @property
    def per_lane(self) -> int:
        return self.shared * self.members.shape[1]

    @property
    def lane_heads(self) -> int:
        return self.call.sizes["h"] // self.per_lane

    @property
    def blocks(self) -> int:
        return max(-(-self.call.sizes["j"] // self.width), 1)

    @property
    def line_rows(self) -> int:
        """Rows that share a line, of all heads."""
        return self.shared * self.block

    def empty(self) -> bool:
        return not (self.members.numel() and self.call.q.numel() and self.call.k.numel())

    def shape(self, kernel: str, v: Tensor) -> TileShape:
        """Tile shape of a kernel."""
        return self.shape_of(kernel, v, self.line_rows * self.together(kernel, v) if self.rows_stay else 0)

    def shape_of(self, kernel: str, v: Tensor, rows: int) -> TileShape:
        """Tile shape of a kernel, of `rows` rows at most; 0: of any number."""
        if interpreting():
            shape, most = INTERPRETED, self.width if kernel == "keys" else rows or INTERPRETED.block_m
            return replace(shape, block_m=min(shape.block_m, padded(most)))
        widest = max(padded(self.call.sizes["d"]), padded(v.shape[3]))
        return listed_shape(kernel, widest, self.call.q.element_size(), rows, self.width)

    def together(self, kernel: str, v: Tensor) -> int:
        """Lines of a tile."""
        if not self.rows_stay:
            return 1
        return lines_together(self.line_rows, self.members.shape[-1], self.width, self.shape_of(kernel, v, 0))

    def chunks(self, width: int) -> Iterator[tuple[int, int]]:
        """Ranges of lines: those whose parts, of `width` numbers each, are PARTS together at most.

        Where rows stay there are no parts, and one chunk is all lines.
        """
        lanes, lists, count, entries = self.members.shape
        line = lanes * lists * entries * self.line_rows * padded(width)
        step = max(count, 1) if self.rows_stay else max(1, PARTS // max(line, 1))
        for first in range(0, count, step):
            yield first, min(first + step, count)

    def sorted(self, first: int, last: int) -> Sorted:
        """The lists of a chunk, turned around; a later kernel of the call finds them made."""
        if (first, last) not in self.order:
            self.order[first, last] = sorted_entries(self.members[:, :, first:last].flatten(1, 2), self.blocks)
        return self.order[first, last]

    def constants(self, tensors: Mapping[str, Tensor]) -> dict[str, int]:
        """What kernels are compiled for."""
        lists = self.members.shape[1]
        rows = [tensors[name] for name in ("q", "do", "o", "dq") if name in tensors]
        told = {"WIDTH": self.width, "ROW_BLOCK": self.block, "SHARED": self.shared, "LISTS": lists}
        told["NARROW"] = all(extent(one) < 2**31 for one in rows)
        told["SAME"] = "do" in tensors and tensors["do"].stride() == tensors["q"].stride()
        return told

    def sizes(self, first: int, last: int) -> dict[str, int]:
        """What kernels are told of the lists of a chunk."""
        return {
            "ENTRIES": self.members.shape[-1],
            "LINES": last - first,
            "FIRST_LINE": first,
            "BLOCKS": self.blocks,
            "SKIPPED": self.skipped,
            "LANE_HEADS": self.lane_heads,
            "PER_LANE": self.per_lane,
        }

    def run_rows(
        self,
        run: KernelCall,
        kernels: Kernels,
        number: int,
        together: int,
        first: int,
        last: int,
        tables: dict[str, Tensor],
    ) -> None:
        """A kernel that keeps rows, of `together` lines, over a chunk.

        `tables`: leaves summed by program, made as wide as WIDTH_n says.
        """
        run.sizes |= self.sizes(first, last)
        members = self.members[:, :, first:last].flatten(1, 2).contiguous()
        run.tensors |= dict.fromkeys(("members", *LISTS), members)
        if self.rows_stay:
            run.tensors |= self.united(members, last - first, together, kernels)
            programs = run.tensors["counts"].numel() * -(-self.line_rows * together // run.shape.block_m)
        else:
            turned = self.sorted(first, last)
            run.tensors["counts"] = members
            programs = -(-members.numel() * self.line_rows // run.shape.block_m) + len(turned.starts) - 1
            pieces = cut(turned.starts, self.line_rows, run.shape.block_m, programs, least=0)
            run.tensors |= {"order": turned.order, **pieces.tensors()}
        widths: dict[str, int] = {}
        for name, table in tables.items():
            width = padded(table.shape[-1])
            widths[f"WIDTH_{name.removeprefix('leaf_')}"] = width
            run.tensors[name] = torch.zeros(programs, width, dtype=torch.float32, device=members.device)
        run.run(
            kernels,
            kernels.kernels[number],
            (programs, 1),
            PARTS=not self.rows_stay,
            TOGETHER=together,
            **self.constants(run.tensors),
            **widths,
        )

    def united(self, members: Tensor, lines: int, together: int, kernels: Kernels) -> dict[str, Tensor]:
        """What kernels that keep rows read of lists (lanes, lists * lines, entries), so many lines of a list together:
        see `listed_joins.unite_lines`."""
        if together == 1:
            return {"counts": (members >= 0).sum(-1, dtype=torch.int32)}
        lists, entries = members.shape[0] * members.shape[1] // lines, members.shape[2]
        groups = lists * -(-lines // together)
        united, named_by = (members.new_empty(groups, together * entries) for _ in range(2))
        counts = members.new_empty(groups)
        powers = {"ENTRY": power(entries), "LINE": power(together)}
        with device_of(members):
            kernels.module.unite_lines[(groups,)](
                members, united, named_by, counts, lines, entries, TOGETHER=together, **powers, num_warps=2
            )
        return {"members": united, "named_by": named_by, "counts": counts}

    def slots(self, first: int, last: int, *width: int) -> Tensor:
        """A place for the part of every row and entry of a chunk, float32; only those of entries are filled."""
        lanes, lists, _, entries = self.members.shape
        shape = (lanes, lists * (last - first), entries, self.line_rows, *width)
        return torch.empty(shape, dtype=torch.float32, device=self.members.device)

    def told(self, first: int, last: int) -> list[int]:
        """What the kernels that join parts are told of a chunk: its rows first."""
        units = self.members.shape[0] * self.members.shape[1] * (last - first) * self.line_rows
        sizes = self.sizes(first, last)
        names = ("ENTRIES", "LINES", "FIRST_LINE", "SKIPPED", "LANE_HEADS", "PER_LANE")
        return [units, *(sizes[name] for name in names)]

    def join_entries(
        self, run: KernelCall, kernels: Kernels, other: tuple[Tensor, Tensor] | None, first: int, last: int
    ) -> None:
        """The softmax of a chunk's rows from its parts, and from those of another branch."""
        tensors, out = run.tensors, run.tensors["o"]
        told = self.told(first, last)
        with device_of(out):
            kernels.module.join_entries[(-(-told[0] // JOINED_ROWS),)](
                tensors["part_out"],
                tensors["part_lse"],
                *(other or (out, out)),
                tensors["members"],
                out,
                tensors["lse"],
                *(stride(out, slot) for slot in range(4)),
                *told,
                run.sizes["H"],
                run.sizes["N"],
                run.sizes["E"],
                LISTS=self.members.shape[1],
                SHARED=self.shared,
                ROW_BLOCK=self.block,
                OTHER=other is not None,
                BLOCK_M=JOINED_ROWS,
                BLOCK_E=run.padded[1],
                num_warps=4,
            )


def extent(tensor: Tensor) -> int:
    """How far the elements of a batch row lie apart at most."""
    return sum((size - 1) * abs(step) for size, step in zip(tensor.shape[1:], tensor.stride()[1:], strict=True))


def listed_outputs(
    plan: Plan,
    branch: Branch,
    kernels: Kernels,
    number: int,
    call: Call,
    dtype: torch.dtype,
    others: Sequence[tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor]:
    """(out in `dtype`, lse) of a listed branch, joined with those of `others`, float32."""
    q, v = call.q, call.v if call.v is not None else call.k
    launch = Launch.of(plan, branch, call)
    sizes = (*q.shape[:3], v.shape[-1])
    if launch.empty():
        out = torch.zeros(sizes, dtype=torch.float32 if others else dtype, device=q.device)
        return join([*others, (out, torch.full(sizes[:3], -math.inf, dtype=torch.float32, device=q.device))], dtype)
    out = torch.empty(sizes, dtype=torch.float32 if others and launch.rows_stay else dtype, device=q.device)
    lse = torch.empty(sizes[:3], dtype=torch.float32, device=q.device)
    tensors = {"q": q, "k": call.k, "v": v, "o": out, "lse": lse, "part_out": lse, "part_lse": lse}
    shape = chosen_shape(kernels, kernels.kernels[number], call, "listed", launch.shape("forward", v))
    run = KernelCall(call, tensors, shape)
    if launch.rows_stay:
        launch.run_rows(run, kernels, number, launch.together("forward", v), 0, launch.members.shape[2], {})
        return join([*others, (out, lse)], dtype)
    other = join(others, torch.float32) if others else None
    for first, last in launch.chunks(v.shape[-1]):
        run.tensors["part_out"] = launch.slots(first, last, run.padded[1])
        run.tensors["part_lse"] = launch.slots(first, last)
        launch.run_rows(run, kernels, number, 1, first, last, {})
        launch.join_entries(run, kernels, other, first, last)
    return out, lse

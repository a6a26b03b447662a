"""The tables that a prologue makes before attention runs: each linear in the sequence (see `plan.Derived`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attnc.compiler.ir import Node
from attnc.compiler.plan import Derived, Plan
from attnc.runtime.evaluate import Environment

if TYPE_CHECKING:
    from attnc.runtime.call import Call

PADDING = 2**31 - 1  # of lists: past every position
CHUNK = 2**22  # elements of (row block, key block) evaluated at a time


def derive(plan: Plan, table: Derived, call: Call) -> dict[str, Tensor]:
    """The parts of one table, by `NAME.PART`: int32, over the indices of its nodes (b, h, i), then its axes."""
    made = KINDS[table.kind](plan, table, call)
    return {f"{table.name}.{part}": made[part].to(torch.int32).contiguous() for part in table.parts}


def whole(plan: Plan, call: Call, node: Node, *indices: str) -> Tensor:
    """A node at every position of b, h and the given indices: a tensor of that rank, 1 long where it is constant."""
    names = ("b", "h", *indices)
    positions = {}
    for at, name in enumerate(names):
        position = torch.arange(call.sizes[name], device=call.q.device) + (call.offset if name == "i" else 0)
        positions[name] = position.view([-1 if n == at else 1 for n in range(len(names))])
    value = Environment(plan, call, positions, torch.float64).value(node).to(call.q.device)
    return value if value.dim() else value.expand((1,) * len(names))


def without(tensor: Tensor, kept: frozenset[str]) -> Tensor:
    """The leading axes b and h only where they are among the indices kept."""
    if "h" not in kept:
        tensor = tensor.select(1, 0)
    return tensor if "b" in kept else tensor.select(0, 0)


def equal_bounds(plan: Plan, table: Derived, call: Call) -> dict[str, Tensor]:
    """Bounds of the keys whose y equals a row's x.

    The running maximum of y from the left and its running minimum from the right both rise, so each bound is
    one binary search: before `lo` all are below x, from `hi` on all are above, and between the inner bounds
    both agree with x. Exact for a sorted y, safe for any.
    """
    x, y = sides(plan, table, call)
    highest, lowest = running(y)
    bounds = {
        "lo": torch.searchsorted(highest, x, out_int32=True),
        "hi": torch.searchsorted(lowest, x, right=True, out_int32=True),
        "inner_lo": torch.searchsorted(lowest, x, out_int32=True),
        "inner_hi": torch.searchsorted(highest, x, right=True, out_int32=True),
    }
    return by_row(table, call, bounds)


def ordered_bounds(plan: Plan, table: Derived, call: Call) -> dict[str, Tensor]:
    """Bounds of the keys whose y is at most a row's x: from the first one to the last one.

    Inside are the keys before the first whose y is larger, or those after the last, whichever are more: exact for a y
    that ascends or descends.
    """
    x, y = sides(plan, table, call)
    highest, lowest = running(y)
    highest_back, lowest_back = running(y.flip(-1))  # the same from the other end
    count = y.shape[-1]
    lo = count - torch.searchsorted(lowest_back, x, right=True)
    hi = torch.searchsorted(lowest, x, right=True)
    before = torch.searchsorted(highest, x, right=True)
    after = count - torch.searchsorted(highest_back, x, right=True)
    ahead = before >= count - after
    inner = torch.where(ahead, 0, after), torch.where(ahead, before, count)
    return by_row(table, call, {"lo": lo, "hi": hi, "inner_lo": inner[0], "inner_hi": inner[1]})


def sides(plan: Plan, table: Derived, call: Call) -> tuple[Tensor, Tensor]:
    """The ints of the rows and of the keys, (b, h, rows or 1) and (b, h, keys)."""
    row, key = ("j", "i") if table.attribute == "i" else ("i", "j")
    x, y = (whole(plan, call, arg, index) for arg, index in zip(table.args, (row, key), strict=True))
    batch = torch.broadcast_shapes(x.shape[:2], y.shape[:2])
    x = x.expand(*batch, call.sizes[row] if table.args[0].depends_on(row) else 1).contiguous()
    return x, y.expand(*batch, call.sizes[key])


def running(y: Tensor) -> tuple[Tensor, Tensor]:
    """The largest of the ints up to each place, and the smallest from each place on: both ascend."""
    if not y.shape[-1]:
        return y, y
    return y.cummax(-1).values.contiguous(), y.flip(-1).cummin(-1).values.flip(-1).contiguous()


def by_row(table: Derived, call: Call, bounds: dict[str, Tensor]) -> dict[str, Tensor]:
    """Bounds (b, h, rows or 1), counted from the first key, over the indices that they vary over, as positions."""
    row, key = ("j", "i") if table.attribute == "i" else ("i", "j")
    kept = frozenset((table.args[0].type.indices | table.args[1].type.indices) - {key})
    first = call.offset if key == "i" else 0
    found = {part: without(bound if row in kept else bound.squeeze(-1), kept) for part, bound in bounds.items()}
    return {part: bound + first for part, bound in found.items()} if first else found


def listing(plan: Plan, table: Derived, call: Call) -> dict[str, Tensor]:
    """Sorted distinct entries of a vector and ranks of positions 0 .. last + 1, last = attribute * max(N, M).

    Entries outside of 0 .. last are dropped, the end is padded with a number past every position.
    """
    (vector,) = table.args
    last = int(table.attribute or 1) * max(call.offset + call.sizes["i"], call.sizes["j"])
    entries = without(whole(plan, call, vector), vector.type.indices).contiguous()
    entries = torch.where((entries < 0) | (entries > last), PADDING, entries).sort(-1).values
    repeated = torch.zeros_like(entries, dtype=torch.bool)
    repeated[..., 1:] = entries[..., 1:] == entries[..., :-1]
    entries = entries.masked_fill(repeated, PADDING).sort(-1).values.contiguous()
    positions = torch.arange(last + 2, device=entries.device).expand(*entries.shape[:-1], last + 2).contiguous()
    return {"list": entries, "rank": torch.searchsorted(entries, positions)}


def tabulated(plan: Plan, table: Derived, call: Call) -> dict[str, Tensor]:
    """An int of i - j, in float64, for -M <= i - j <= max(M, N); place 0 is -M.

    Made on the CPU: where a logarithm is a whole number, another device's last bit would be another integer.
    """
    (node,) = table.args
    keys = call.sizes["j"]
    distance = torch.arange(-keys, max(keys, call.offset + call.sizes["i"]) + 1)
    value = Environment(plan, call, {"i": distance, "j": torch.zeros_like(distance)}, torch.float64).value(node)
    return {"table": value.to(torch.int64).expand(distance.shape).to(call.q.device)}


def block_list(plan: Plan, table: Derived, call: Call) -> dict[str, Tensor]:
    """The key blocks that each block of rows picks: forced ones, then the best scores; ascending, padded with -1."""
    assert table.attribute is not None
    axis = table.attribute
    score, count, condition, force, size = table.args
    width = int(scalar(plan, call, size))
    members = -(-call.sizes["j"] // width)
    wanted = min(max(int(scalar(plan, call, count)), 0), members)
    blocks = -(-(call.offset + call.sizes["i"]) // width)
    chosen = torch.full((blocks, max(wanted, 1)), -1, device=call.q.device)
    member = torch.arange(members, device=call.q.device).view(1, -1)
    sized = {**call.sizes, axis: members}
    for start in range(0, blocks, step := max(1, CHUNK // max(members, 1))):
        row = torch.arange(start, min(start + step, blocks), device=call.q.device).view(-1, 1) * width
        at = BlockEnvironment(plan, call, {"i": row, axis: member}, torch.float64, blocks={axis: width})
        at.sizes = sized
        shape = (row.shape[0], members)
        worth, allowed, forced = (at.value(node).to(call.q.device).expand(shape) for node in (score, condition, force))
        chosen[start : start + row.shape[0], :wanted] = best(worth, allowed, forced, wanted)
    return {"list": chosen}


class BlockEnvironment(Environment):
    """An environment in which a declared axis has a length."""

    sizes: dict[str, int]

    def length(self, index: str) -> int:
        return self.sizes[index]


def best(worth: Tensor, allowed: Tensor, forced: Tensor, wanted: int) -> Tensor:
    """Per row the members taken, ascending, -1 at the end: forced first, then by worth, ties to the lowest."""
    order = worth.sort(dim=-1, descending=True, stable=True).indices
    group = torch.where(allowed, torch.where(forced, 0, 1), 2).gather(-1, order)
    order = order.gather(-1, group.sort(dim=-1, stable=True).indices)[..., :wanted]
    members = worth.shape[-1]
    taken = torch.where(allowed.gather(-1, order), order, members).sort(-1).values
    return torch.where(taken == members, -1, taken)


def scalar(plan: Plan, call: Call, node: Node) -> int | float:
    """The value of a node of parameters and sizes."""
    return Environment(plan, call, {"i": torch.zeros(1, dtype=torch.int64)}, torch.float64).value(node).item()


def block_rows(plan: Plan, table: Derived, call: Call) -> dict[str, Tensor]:
    """The lists of `block_list` turned around: the row blocks that chose each key block, ascending."""
    chosen = block_list(plan, table, call)["list"]
    members = -(-call.sizes["j"] // int(scalar(plan, call, table.args[-1])))
    row, entry = (chosen >= 0).nonzero(as_tuple=True)
    member, order = chosen[row, entry].sort(stable=True)
    starts = torch.searchsorted(member.contiguous(), torch.arange(members + 1, device=chosen.device))
    return {"starts": starts, "rows": row[order]}


KINDS: dict[str, Callable[[Plan, Derived, Call], dict[str, Tensor]]] = {
    "equal_bounds": equal_bounds,
    "ordered_bounds": ordered_bounds,
    "listing": listing,
    "tabulated": tabulated,
    "block_list": block_list,
    "block_rows": block_rows,
}

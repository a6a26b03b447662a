"""How much each row tile has to do, and the list of programs that shares it out."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from attnc.compiler.emit.arguments import walk_nodes
from attnc.compiler.ir import Node, walk
from attnc.compiler.plan import Branch, Diagonals, Grid, KeySet, Listed, Plan, Stepped
from attnc.compiler.schedule import Split, TileShape, split_rows
from attnc.runtime.call import Call
from attnc.runtime.evaluate import Environment

REMEMBERED = 64
FIXED_OPS = frozenset({"input", "derived"})


@dataclass(frozen=True)
class ProgramList:
    """Tensors of a `Split`: entries (programs, 4), long tiles (tiles, 2), their rows (tiles, block_m), -1 for none."""

    entries: Tensor
    long_tiles: Tensor
    rows: Tensor
    slots: int


_remembered: OrderedDict[tuple[object, ...], tuple[Branch, ProgramList | None]] = OrderedDict()


def program_list(plan: Plan, branch: Branch, call: Call, shape: TileShape, processors: int) -> ProgramList | None:
    """The list for one branch, or None where every program takes one whole row tile.

    Only closed forms are looked at (no tensor is read back from the device): where a table steers the bounds,
    tiles are not split.
    """
    if not splits(branch):
        return None
    parameters = tuple(sorted(call.parameters.items()))
    heads = call.sizes["b"] * call.sizes["h"]
    sizes = (call.sizes["i"], call.sizes["j"], heads)
    key = (id(branch), parameters, sizes, shape, processors, str(call.q.device))
    if key not in _remembered:
        split = split_rows(work_of(plan, branch, call, shape), heads, processors)
        made = tensors(split, call, shape) if split else None
        _remembered[key] = branch, made  # the branch is held, so that its id stays its own
        if len(_remembered) > REMEMBERED:
            _remembered.popitem(last=False)
    return _remembered[key][1]


@lru_cache(maxsize=1024)
def splits(branch: Branch) -> bool:
    """Whether the work of consecutive row tiles follows from sizes and parameters alone."""
    rows = branch.domain.rows
    return not steered(bounds_of(branch)) and rows.period is None and rows.step is None and bool(branch.domain.key_sets)


@lru_cache(maxsize=1024)
def closed_form(branch: Branch) -> bool:
    """Whether no tensor, batch row or head steers which keys a row visits, nor in which order."""
    listed = any(isinstance(key_set.walk, Listed | Diagonals) for key_set in branch.domain.key_sets)
    return not listed and not steered([*bounds_of(branch), *walk_nodes(branch.domain)])


def steered(nodes: Sequence[Node]) -> bool:
    """Whether a tensor, a batch row or a head is among what nodes depend on."""
    return any(node.op in FIXED_OPS or (node.op == "index" and node.attribute in ("b", "h")) for node in walk(*nodes))


def bounds_of(branch: Branch) -> list[Node]:
    """What decides how many keys a row tile visits."""
    nodes: list[Node] = []
    for key_set in branch.domain.key_sets:
        for run in key_set.runs:
            nodes += [run.outer.lo, run.outer.hi]
        if isinstance(key_set.walk, Grid):
            nodes += [key_set.walk.low.lo, key_set.walk.low.hi]
    return nodes


def work_of(plan: Plan, branch: Branch, call: Call, shape: TileShape) -> list[int]:
    """Key tiles that every row tile visits, at most."""
    rows = call.sizes["i"]
    tiles = -(-rows // shape.block_m)
    position = torch.arange(tiles * shape.block_m).clamp(max=rows - 1)
    environment = Environment(plan, call, {"i": position + call.offset}, torch.float64)
    work = torch.zeros(tiles, dtype=torch.int64)
    for key_set in branch.domain.key_sets:
        work += key_set_work(environment, key_set, shape, tiles, call)
    return [int(count) for count in work.tolist()]


def key_set_work(environment: Environment, key_set: KeySet, shape: TileShape, tiles: int, call: Call) -> Tensor:
    """Key tiles of one key set, a row tile each."""

    def of(node: Node) -> Tensor:
        return environment.value(node).expand(tiles * shape.block_m).view(tiles, shape.block_m)

    walk = key_set.walk
    if isinstance(walk, Diagonals):
        return torch.full((tiles,), call.derived[walk.table].shape[-1])
    if isinstance(walk, Listed):
        listed = call.derived[walk.table].shape[-1] * int(environment.value(walk.width))
        return torch.full((tiles,), -(-listed // shape.block_n))
    work = torch.zeros(tiles, dtype=torch.int64)
    for run in key_set.runs:
        lo, hi = of(run.outer.lo), of(run.outer.hi)
        live = lo < hi
        first = torch.where(live, lo, call.sizes["j"]).amin(1)
        last = torch.where(live, hi, 0).amax(1)
        keys = (last - first).clamp(min=0)
        if isinstance(walk, Stepped):
            keys = keys // environment.value(walk.step) + 1
        if isinstance(walk, Grid):
            width = (of(walk.low.hi) - of(walk.low.lo)).amax(1).clamp(min=0)
            keys = (keys // environment.value(walk.period) + 1) * width
        work += (keys + 2 * shape.block_n - 2) // shape.block_n
    return work


def tensors(split: Split, call: Call, shape: TileShape) -> ProgramList:
    """The split on the call's device."""
    lane = torch.arange(shape.block_m)
    tile = torch.tensor([tile for tile, _, _ in split.long_tiles])
    rows = tile[:, None] * shape.block_m + lane
    rows = torch.where(rows < call.sizes["i"], rows, -1)
    device = call.q.device
    return ProgramList(
        torch.tensor(split.entries, dtype=torch.int32, device=device),
        torch.tensor([(slot, parts) for _, slot, parts in split.long_tiles], dtype=torch.int32, device=device),
        rows.to(device=device, dtype=torch.int32),
        split.slots,
    )

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
from attnc.compiler.plan import Branch, Diagonals, Domain, Grid, KeySet, Listed, Plan, Stepped
from attnc.compiler.schedule import Split, TileShape, split_rows
from attnc.runtime.call import Call
from attnc.runtime.evaluate import Environment
from attnc.runtime.recording.tape import lasting

REMEMBERED = 64
FIXED_OPS = frozenset({"input", "derived"})


@dataclass(frozen=True)
class ProgramList:
    """Tensors of a `Split`: entries (programs, 4), long tiles (tiles, 2), their rows (tiles, block_m), -1 for none."""

    entries: Tensor
    long_tiles: Tensor
    rows: Tensor
    slots: int


_reached: OrderedDict[tuple[object, ...], tuple[Domain, bool]] = OrderedDict()
_remembered: OrderedDict[tuple[object, ...], tuple[Domain, ProgramList | None]] = OrderedDict()


def program_list(
    plan: Plan, domain: Domain, call: Call, shape: TileShape, processors: int, at: str = "i"
) -> ProgramList | None:
    """The list for one domain, or None where every program takes one whole row tile.

    `at`: what the domain's rows are, i or, in a transposed one, j. Only closed forms are looked at (no tensor is read
    back from the device): where a table steers the bounds, tiles are not split.
    """
    parameters = tuple(call.parameters.items())
    heads = call.sizes["b"] * (call.sizes["h"] if at == "i" else call.k.shape[1])
    sizes = (call.sizes["i"], call.sizes["j"], heads)
    key = (id(domain), parameters, sizes, shape, processors, str(call.q.device))
    if key not in _remembered:
        made = None
        if splits(domain):
            rows = RowTiles.of(plan, domain, call, shape, at)
            split = split_rows(work_of(plan, domain, call, shape, rows), heads, processors)
            made = tensors(split, rows, call) if split else None
        _remembered[key] = domain, made  # the domain is held, so that its id stays its own
        if len(_remembered) > REMEMBERED:
            _remembered.popitem(last=False)
    return _remembered[key][1]


@dataclass(frozen=True)
class RowTiles:
    """The rows of every tile in the order of `emit_rows`, (tiles, block_m); clamped where there is none."""

    at: str  # i or j
    rows: Tensor
    exists: Tensor
    offset: int  # of a row's position

    @classmethod
    def of(cls, plan: Plan, domain: Domain, call: Call, shape: TileShape, at: str) -> RowTiles:
        count, offset = call.sizes[at], call.offset if at == "i" else 0
        rows = domain.rows
        environment = Environment(plan, call, {at: torch.zeros(1, dtype=torch.int64)}, torch.float64)
        if rows.period is not None:  # parts of a line of the grid, line by line
            period = int(environment.value(rows.period))
            first = offset // period
            lines = (offset + count - 1) // period - first + 1
            low = torch.arange(-(-period // shape.block_m) * shape.block_m)
            place = (first + torch.arange(lines))[:, None] * period + low - offset
            exists = (low < period) & (place >= 0) & (place < count)
            place, exists = place.view(-1, shape.block_m), exists.view(-1, shape.block_m)
            return cls(at, place.clamp(0, count - 1), exists, offset)
        step, first = 1, 0
        if rows.step is not None and rows.phase is not None:
            step = int(environment.value(rows.step))
            first = (int(environment.value(rows.phase)) - offset) % step
        in_class = -(-count // step)
        tiles = -(-in_class // shape.block_m)
        place = first + step * torch.arange(tiles * shape.block_m).view(tiles, shape.block_m)
        last = first + step * max((count - 1 - first) // step, 0)
        return cls(at, place.clamp(max=last), place < count, offset)


def splits(domain: Domain) -> bool:
    """Whether the work of row tiles that follow each other is the same for all heads, from sizes and parameters."""
    rows = domain.rows
    grid = rows.period is not None and (rows.square or rows.packed or rows.high_step or rows.low_step)
    known = not grid and rows.listed is None and (rows.step is None or rows.phase is not None)
    lines = any(isinstance(key_set.walk, Listed) and key_set.walk.starts for key_set in domain.key_sets)
    phases = [node for node in (rows.phase, rows.step, rows.period) if node is not None]
    return known and bool(domain.key_sets) and not lines and not steered([*bounds_of(domain), *phases])


@lru_cache(maxsize=1024)
def closed_form(branch: Branch) -> bool:
    """Whether no tensor, batch row or head steers which keys a row visits, nor in which order."""
    listed = any(isinstance(key_set.walk, Listed | Diagonals) for key_set in branch.domain.key_sets)
    return not listed and not steered([*bounds_of(branch.domain), *walk_nodes(branch.domain)])


def steered(nodes: Sequence[Node]) -> bool:
    """Whether a tensor, a batch row or a head is among what nodes depend on."""
    return any(node.op in FIXED_OPS or (node.op == "index" and node.attribute in ("b", "h")) for node in walk(*nodes))


def bounds_of(domain: Domain) -> list[Node]:
    """What decides how many keys a row tile visits."""
    nodes: list[Node] = []
    for key_set in domain.key_sets:
        for run in key_set.runs:
            nodes += [run.outer.lo, run.outer.hi]
        if isinstance(key_set.walk, Grid):
            nodes += [key_set.walk.low.lo, key_set.walk.low.hi]
    return nodes


def work_of(plan: Plan, domain: Domain, call: Call, shape: TileShape, rows: RowTiles) -> list[int]:
    """Tiles of the streamed side that every row tile visits, at most."""
    environment = Environment(plan, call, {rows.at: rows.rows.flatten() + rows.offset}, torch.float64)
    work = torch.zeros(len(rows.rows), dtype=torch.int64)
    for key_set in domain.key_sets:
        work += key_set_work(environment, key_set, shape, rows, call)
    return [int(count) for count in work.tolist()]


def key_set_work(environment: Environment, key_set: KeySet, shape: TileShape, rows: RowTiles, call: Call) -> Tensor:
    """Tiles of one key set, a row tile each."""
    tiles = len(rows.rows)
    end = call.sizes["j"] if rows.at == "i" else call.offset + call.sizes["i"]

    def of(node: Node) -> Tensor:
        return environment.value(node).expand(rows.rows.numel()).view(rows.rows.shape)

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
        first = torch.where(live, lo, end).amin(1)
        last = torch.where(live, hi, 0).amax(1)
        keys = (last - first).clamp(min=0)
        if isinstance(walk, Stepped):
            keys = keys // environment.value(walk.step) + 1
        if isinstance(walk, Grid):
            width = (of(walk.low.hi) - of(walk.low.lo)).amax(1).clamp(min=0)
            keys = (keys // environment.value(walk.period) + 1) * width
        work += (keys + 2 * shape.block_n - 2) // shape.block_n
    return work


def reaches_all(plan: Plan, domain: Domain, call: Call, at: str) -> bool:
    """Whether the rows of a domain of one consecutive key set visit the whole other side, from sizes and parameters."""
    key = (id(domain), tuple(call.parameters.items()), tuple(call.sizes.items()), call.offset)
    if key not in _reached:
        _reached[key] = domain, len(domain.key_sets[0].runs) == 1 and reached(plan, domain, call, at)
        if len(_reached) > REMEMBERED:
            _reached.popitem(last=False)
    return _reached[key][1]


def reached(plan: Plan, domain: Domain, call: Call, at: str) -> bool:
    """The same, worked out."""
    runs = domain.key_sets[0].runs
    if steered(bounds_of(domain)):
        return False
    first = call.offset if at == "i" else 0
    environment = Environment(plan, call, {at: first + torch.arange(call.sizes[at])}, torch.float64)
    lo, hi = torch.broadcast_tensors(*(environment.value(node) for node in (runs[0].outer.lo, runs[0].outer.hi)))
    some = lo < hi
    begin, end = (0, call.sizes["j"]) if at == "i" else (call.offset, call.offset + call.sizes["i"])
    return bool(some.any() and lo[some].min() <= begin and hi[some].max() >= end)


def tensors(split: Split, rows: RowTiles, call: Call) -> ProgramList:
    """The split on the call's device."""
    tile = torch.tensor([tile for tile, _, _ in split.long_tiles])
    device = call.q.device
    return ProgramList(
        lasting(torch.tensor(split.entries, dtype=torch.int32, device=device)),
        lasting(torch.tensor([(slot, parts) for _, slot, parts in split.long_tiles], dtype=torch.int32, device=device)),
        lasting(torch.where(rows.exists, rows.rows, -1)[tile].to(device=device, dtype=torch.int32)),
        split.slots,
    )

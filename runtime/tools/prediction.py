"""What a call takes by the cost model, step by step, beside the floor and what is measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from attnc.compiler.composition import Attend, Carry, Choose, Compute, Recur, Regroup, Scores
from attnc.compiler.fuse import groups
from attnc.compiler.ir import walk
from attnc.compiler.loads import (
    CHUNK,
    Amount,
    Load,
    Rates,
    Tiles,
    choice_load,
    forward_loads,
    gradient_loads,
    state_load,
)
from attnc.compiler.plan import Branch, Domain, Plan
from attnc.compiler.schedule import TileShape, backward_shape, tile_shape
from attnc.compiler.totals import total_keys, value_of
from attnc.runtime.call import Call
from attnc.runtime.compute.arrays import Frame
from attnc.runtime.cpu.executor import live_pairs
from attnc.runtime.cuda.kernel_call import kind_of, padded
from attnc.runtime.cuda.work import splits
from attnc.runtime.tools.tile_costs import tile_pairs

if TYPE_CHECKING:
    from attnc.runtime.operator import Prepared
    from attnc.runtime.tools.measured import Measured


@dataclass(frozen=True)
class Line:
    """Some launches of one step. `load`: the kernel, or `forward`.

    `itemsize`: bytes of an operand's element. `tiles`: None where there are none, or tensors steer them.
    """

    step: str
    load: str
    amount: Amount
    itemsize: int
    tiles: Tiles | None = None


def lines(prepared: Prepared) -> Iterator[Line]:
    """Every step of a call, forward, and the gradients of its attentions. Runs the steps."""
    step = prepared.composition.attention
    if step is not None:
        yield from attention(step.name, step.plan, prepared.call(step.plan))
        return
    from attnc.runtime.operator import choose_engine
    from attnc.runtime.steps.composition import attended, each

    frame = prepared.frame()
    with torch.no_grad():
        for one, found, left in each(prepared.composition, frame, choose_engine("auto", frame.device)):
            if isinstance(one, Attend | Regroup):
                yield from attention(one.name, *attended(one, found))
            elif isinstance(one, Choose) and one.scores is not None:
                amount = choice_load(one).at(choice_sizes(one, one.scores, found, left))
                yield Line(one.name, "forward", amount, found.tensors["q"].element_size())
            elif isinstance(one, Carry | Recur):
                yield Line(one.name, "forward", state_load(one).at(sizes := state_sizes(one, found)), sizes["itemsize"])
            elif isinstance(one, Compute):
                yield Line(one.name, "forward", rows_amount(one, found, left), left.element_size())


def attention(name: str, plan: Plan, call: Call) -> Iterator[Line]:
    """Forward, then gradients."""
    live = [branch_live(plan, branch, call) for branch in plan.branches]
    from attnc.runtime.cuda.launch_backward import turned

    full, _ = turned(plan)
    for load in (*forward_loads(plan), *gradient_loads(full)):
        amount = load.at(call_sizes(call) | {"live": live[load.branch]})
        yield Line(name, load.name, amount, call.q.element_size(), tiles_of(full, load, call, live[load.branch]))


def call_sizes(call: Call) -> dict[str, int]:
    """Sizes of a plan's call by the names of formulas."""
    sizes = call.sizes
    names = {"B": "b", "H": "h", "N": "i", "M": "j", "D": "d"}
    value = call.k if call.v is None else call.v
    found = {name: sizes[index] for name, index in names.items()}
    return found | {"Hk": call.k.shape[1], "E": value.shape[3], "itemsize": call.q.element_size()}


def branch_live(plan: Plan, branch: Branch, call: Call) -> int:
    """Live pairs of a branch: by their closed form where there is one, else counted."""
    total = total_keys(branch.domain) if branch.selected is None and call.sizes["i"] <= call.sizes["j"] else None
    if total is None:
        return live_pairs(replace(plan, branches=(branch,)), call)
    values = {name: int(value) for name, value in call.parameters.items() if isinstance(value, int)}
    values |= {"N": call.sizes["i"], "offset": call.offset}
    return call.sizes["b"] * call.sizes["h"] * int(value_of(total, values))


def tiles_of(plan: Plan, load: Load, call: Call, live: int) -> Tiles | None:
    """The tiles that the kernels of a load visit at most; None where tensors steer them, or there are none."""
    branch = plan.branches[load.branch]
    domains = (branch.domain,) if load.side == "i" else branch.transposed
    if not load.side or branch.selected is not None or not live or not all(map(splits, domains)):
        return None
    pairs = turns = 0.0
    for domain in domains:
        shape = rule(load, domain, call)
        visited = tile_pairs(plan, domain, call, shape, load.side)
        pairs, turns = pairs + visited, turns + visited / (shape.block_m * shape.block_n)
    return Tiles(pairs / live, turns)


def rule(load: Load, domain: Domain, call: Call) -> TileShape:
    """The tile shape that `schedule` picks."""
    value = call.k if call.v is None else call.v
    width, itemsize = max(padded(call.sizes["d"]), padded(value.shape[3])), call.q.element_size()
    if load.name.startswith("forward"):
        return tile_shape(width, itemsize, kind_of(domain))
    return backward_shape(width, itemsize, "rows" if load.side == "i" else "keys", kind_of(domain))


def state_sizes(step: Carry | Recur, frame: Frame) -> dict[str, int]:
    """Sizes of a carried state by the names of formulas."""
    query, key, value = (frame.tensors[name] for name in (step.query, step.key, step.value))
    named = {"B": frame.sizes["b"], "H": frame.sizes["h"], "N": frame.sizes["i"], "M": frame.sizes["j"]}
    named |= {"Hk": frame.sizes["key_heads"], "F": query.shape[-1], "E": value.shape[-1], "C": CHUNK}
    return named | {"itemsize": key.element_size()}


def choice_sizes(step: Choose, scores: Scores, frame: Frame, lists: torch.Tensor) -> dict[str, int]:
    """Sizes of a selection by the names of formulas."""
    places = scores.places or step.axis
    axes = scores.query.type.axes[-1].split("+") if scores.query is not None else ()
    named = {"B": frame.sizes["b"], "H": frame.sizes["h"], "Hk": frame.sizes["key_heads"]}
    named |= {"N": frame.length(step.rows) if step.rows else 1, "P": frame.length(places), "L": lists.numel()}
    return named | {"D": sum(map(frame.length, axes)), "itemsize": frame.tensors["q"].element_size()}


def rows_amount(step: Compute, frame: Frame, left: torch.Tensor) -> Amount:
    """A value over one sequence: what it reads and what it leaves, once; launches of generated kernels."""
    names = {str(node.attribute) for node in walk(step.node) if node.op == "input"}
    read = sum(frame.tensors[name].nbytes for name in names if name in frame.tensors)
    return Amount(0, 0, read + left.nbytes, max(len(groups(step.node)), 1))


def table(found: Sequence[Line], rates: Rates | None, measured: Measured | None) -> list[list[str]]:
    """Cells of a table, its heads first. Times in milliseconds; without rates, what has to be done alone."""
    rows = [["step", "launches", "GFLOP", "MB", *(["floor", "predicted"] if rates else [])]]
    for line in found:
        amount = line.amount
        cells = [f"{line.step} {line.load}".removesuffix(" forward"), str(amount.launches)]
        cells += [f"{amount.operations / 1e9:,.2f}", f"{amount.moved / 1e6:,.1f}"]
        if rates:
            floor, predicted = rates.floor(amount, line.itemsize), rates.predicted(amount, line.itemsize, line.tiles)
            cells += [f"{floor * 1e3:.4f}", f"{predicted * 1e3:.4f}"]
        rows.append(cells)
    if measured is None:
        return rows
    taken = [measured.of(line.step, line.load) for line in found]
    rows = [[*row, text] for row, text in zip(rows, ["measured", *map(milliseconds, taken)], strict=True)]
    blank = [""] * (len(rows[0]) - 3)
    return rows + [[name, str(count), *blank, f"{ms:.4f}"] for name, count, ms in measured.others()]


def milliseconds(time: float | None) -> str:
    """A time, if there is one."""
    return "" if time is None else f"{time:.4f}"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines: names to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, *others in rows:
        cells = [name.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return lines

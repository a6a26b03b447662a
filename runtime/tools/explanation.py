"""What the compiler did with a pattern, for people: the text behind `attnc explain` and `.explain(..)`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from attnc.compiler.causality import describe_causality
from attnc.compiler.composition import (
    Attend,
    Carry,
    Composition,
    Compute,
    Extreme,
    Recur,
    Regroup,
    Sequential,
)
from attnc.compiler.cost import state_formula, step_costs
from attnc.compiler.emit.chunked import kept_numbers, plain_variant
from attnc.compiler.fuse import groups
from attnc.compiler.loads import KNOWN
from attnc.compiler.pipeline import trace
from attnc.runtime.cpu.executor import visited_pairs
from attnc.runtime.decoding.decoding_cache import describe_decoding
from attnc.runtime.steps.arrangement import share
from attnc.runtime.steps.composition import attended_steps, regrouped_orders
from attnc.runtime.tools.comparison import defaults, filled
from attnc.runtime.tools.inputs import Shape, made_inputs
from attnc.runtime.tools.launches import Streamed, describe_launches
from attnc.runtime.tools.prediction import aligned, branch_live, lines, table
from attnc.runtime.tools.settings import Setting

if TYPE_CHECKING:
    from attnc.compiler.plan import Plan
    from attnc.runtime.call import Call
    from attnc.runtime.operator import Prepared
    from attnc.runtime.pattern import CompiledPattern
    from attnc.runtime.tools.measured import Measured

# Stages whose text is the answer to a user's question; the others' is shown on demand.
SHOWN = ("steps", "domains")


def explain(prepared: Prepared, *, verbose: bool = False, measured: Measured | None = None) -> str:
    """The text, every stage with its notes, and the cost of one call. `verbose`: also the graph after each stage.

    `measured`: times to put beside those of the cost model.
    """
    pattern = prepared.program.pattern
    lines = [pattern.span.text.rstrip(), ""]
    for stage in trace(pattern):
        lines.append(stage.name)
        if verbose or stage.name in SHOWN:
            lines += [f"    {line}" for line in stage.text.splitlines()]
        lines += [f"    - {note}" for note in stage.notes]
    lines += ["", *describe_causality(pattern), *describe_decoding(prepared)]
    for costs in step_costs(prepared.composition.steps):
        lines += ["", *costs]
    states = [step for step in prepared.composition.steps if isinstance(step, Carry | Recur)]
    if states:
        lines += ["", *(state_formula(step, prepared.composition.arrays) for step in states)]
        lines += [kept_formula(step, prepared.composition) for step in states]
    lines += row_kernels(prepared.composition)
    calls = list(attended(prepared))
    launches = describe_launches(prepared.composition, streamed_steps(prepared.composition, calls))
    lines += ["", *launches] if launches else []
    torch_only = [step.name for step in prepared.composition.steps if isinstance(step, Extreme | Sequential)]
    if torch_only:
        lines += ["", f"by torch operators on a GPU too, without a kernel: {', '.join(torch_only)}"]
    lines += ["", *cost(prepared, calls), *participation(prepared), "", *prediction(prepared, measured)]
    return "\n".join(lines)


def kept_formula(step: Carry | Recur, composition: Composition) -> str:
    """What a forward on a GPU keeps of a state for its gradient."""
    again = "backward makes its states again"
    if isinstance(step, Carry) and (step.near is not None or step.extent.kind == "period"):
        return f"{step.name}: {again}"
    numbers = kept_numbers(plain_variant(step, composition.arrays))
    return f"{step.name} keeps for gradients, on a GPU: B*H*N*({numbers}) numbers; with ATTNC_KEEP=0 none, {again}"


def row_kernels(composition: Composition) -> list[str]:
    """Which values one generated kernel makes, on a GPU; those of steps by name, parts of steps by what they are."""
    made = []
    for step in composition.steps:
        if isinstance(step, Compute):
            for group in groups(step.node):
                own = group.root is step.node
                made.append(step.name if own else f"{group.root.op} in {step.name}")
    return ["", f"by one kernel each on a GPU: {', '.join(made)}"] if made else []


def explain_at(
    pattern: CompiledPattern,
    shape: Shape,
    setting: Setting,
    dtype: torch.dtype | None,
    *,
    device: str = "cpu",
    verbose: bool = False,
    measure: bool = False,
) -> str:
    """`explain` of a call with made tensors. `measure`: with measured times, on a CUDA device."""
    parameters = filled(pattern) | setting.parameters
    made = made_inputs(
        pattern.pattern,
        shape,
        defaults(pattern) | parameters,
        dtype=dtype or torch.float32,
        device=device,
        ranges=setting.ranges,
    )
    settings: dict[str, Any] = {**parameters, **made.inputs}
    prepared = pattern.prepared(made.q, made.k, made.v, settings)
    if not measure:
        return explain(prepared, verbose=verbose)
    from attnc.runtime.tools.measured import measured

    step = prepared.composition.attention
    times = measured(pattern, made.q, made.k, made.v, settings, step.name if step else None)
    return explain(prepared, verbose=verbose, measured=times)


def prediction(prepared: Prepared, measured: Measured | None) -> list[str]:
    """The cost model's table, for the call's device, or without one for a device that is known."""
    from attnc.runtime.tools.measured import rates_of

    q = prepared.tensors["q"]
    assert q is not None
    rates = rates_of(q.device, measure=measured is not None) if q.is_cuda else next(iter(KNOWN.values()))
    said = None if q.is_cuda else "the CPU's executor is not predicted"
    if q.dtype == torch.float64:
        rates, title = None, "not predicted: kernels take no float64"
    elif rates is None:
        title = f"not predicted: what {torch.cuda.get_device_name(q.device)} does at most is measured by --measure"
    else:
        title = f"milliseconds of {str(q.dtype).removeprefix('torch.')} on {rates.name} ({said or rates.source})"
    found = list(lines(prepared))
    shown = {line.step for line in found}
    others = [step.name for step in prepared.composition.steps if step.name not in shown]
    rest = [f"not in the model: {', '.join(others)}"] if others else []
    return [title, *aligned(table(found, rates, measured)), *rest]


@dataclass(frozen=True)
class Pairs:
    """What the steps that stream keys do in one call: (row, key) pairs, and their work and traffic."""

    live: int
    visited: int
    flops: int
    moved: int


def streamed_pairs(prepared: Prepared) -> Pairs:
    """The sums over all steps that stream keys. Runs the steps before them."""
    return pairs_of(list(attended(prepared)))


def pairs_of(calls: Sequence[tuple[Plan, Call]]) -> Pairs:
    """The sums over plans with their calls."""
    live = visited = flops = moved = 0
    for plan, call in calls:
        sizes, element = call.sizes, call.q.element_size()
        rows, keys = call.q.shape[:3].numel(), call.k.shape[:3].numel()
        width, value_width = sizes["d"], sizes.get("e", sizes["d"])
        own = sum(branch_live(plan, branch, call) for branch in plan.branches)
        live, visited = live + own, visited + visited_pairs(plan, call)
        flops += 2 * (width + value_width) * own
        branches = len(plan.branches)
        moved += (
            element * (rows * (width + branches * value_width) + keys * (width + value_width)) + 4 * branches * rows
        )
    return Pairs(live, visited, flops, moved)


def streamed_steps(composition: Composition, calls: Sequence[tuple[Plan, Call]]) -> dict[str, Streamed]:
    """The softmaxes of a call by their steps' names."""
    steps = [step for step in composition.steps if isinstance(step, Attend | Regroup)]
    found = {}
    for step, (plan, call) in zip(steps, calls, strict=True):
        if isinstance(step, Attend):
            width = call.sizes["d"] + call.sizes.get("e", call.sizes["d"])
            value = call.k if call.v is None else call.v
            elements = (call.q.numel(), call.k.numel(), value.numel())
            live = sum(branch_live(plan, branch, call) for branch in plan.branches)
            found[step.name] = Streamed(2 * width * live, elements)
    return found


def attended(prepared: Prepared) -> Iterator[tuple[Plan, Call]]:
    """Every plan of a call with its own call. Runs the steps before them."""
    step = prepared.composition.attention
    if step is not None:
        yield step.plan, prepared.call(step.plan)
        return
    from attnc.runtime.operator import choose_engine

    frame = prepared.frame()
    with torch.no_grad():
        yield from attended_steps(prepared.composition, frame, choose_engine("auto", frame.device))


def participation(prepared: Prepared) -> list[str]:
    """How many rows and keys take part in every attention that is in an order of its own, in this call."""
    steps = prepared.composition.steps
    if not any(isinstance(step, Regroup) for step in steps):
        return []
    from attnc.runtime.operator import choose_engine

    frame = prepared.frame()
    with torch.no_grad():
        orders = list(regrouped_orders(prepared.composition, frame, choose_engine("auto", frame.device)))
    lines = []
    for step, slots in orders:
        sides = (("rows", slots.rows), ("keys", slots.keys))
        shares = [f"{share(order):.1%} of the {name}" for name, order in sides if order is not None]
        lines.append(f"{step.name}: {' and '.join(shares)} take part, in an order of their own")
    return lines


def cost(prepared: Prepared, calls: Sequence[tuple[Plan, Call]]) -> list[str]:
    """Live pairs, floating point operations and bytes of a call; `compiler.cost` says where they come from."""
    sizes = prepared.sizes
    batch, heads, rows, keys = sizes["b"], sizes["h"], sizes["i"], sizes["j"]
    k = prepared.tensors["k"]
    assert k is not None
    found = pairs_of(calls)
    pairs = batch * heads * rows * keys
    widths = f"D={sizes['d']} E={sizes.get('e', sizes['d'])}"
    table = [("call", f"B={batch} H={heads} Hk={k.shape[1]} N={rows} M={keys} {widths}")]
    if not prepared.program.plans:
        table.append(("pairs", f"no pair of the {pairs:,} is formed but within chunks"))
        return [f"{name:<14}{value}" for name, value in table]
    table += [
        ("live pairs", f"{found.live:,} of B*H*N*M = {pairs:,}: {found.live / pairs:.4%}"),
        (
            "visited pairs",
            f"{found.visited:,}: {found.visited / max(found.live, 1):.2f} for each live one in the CPU's tiles",
        ),
        ("FLOPs", f"{found.flops:,}"),
        ("bytes", f"{found.moved:,}: q, k, v, results and row statistics once"),
        ("FLOPs a byte", f"{found.flops / max(found.moved, 1):.1f}"),
    ]
    return [f"{name:<14}{value}" for name, value in table]

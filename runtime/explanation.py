"""What the compiler did with a pattern, for people: the text behind `attnc explain` and `.explain(..)`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from attnc.compiler.cost import cost_formulas
from attnc.compiler.pipeline import trace
from attnc.runtime.comparison import defaults, filled
from attnc.runtime.executor import live_pairs, visited_pairs
from attnc.runtime.inputs import Shape, made_inputs
from attnc.runtime.program import Program
from attnc.runtime.settings import Setting

if TYPE_CHECKING:
    from attnc.runtime.call import Call
    from attnc.runtime.pattern import CompiledPattern

# Stages whose text is the answer to a user's question; the others' is shown on demand.
SHOWN = ("domains",)


def explain(program: Program, call: Call, *, verbose: bool = False) -> str:
    """The text, every stage with its notes, and the cost of one call. `verbose`: also the graph after each stage."""
    lines = [program.pattern.span.text.rstrip(), ""]
    for stage in trace(program.pattern):
        lines.append(stage.name)
        if verbose or stage.name in SHOWN:
            lines += [f"    {line}" for line in stage.text.splitlines()]
        lines += [f"    - {note}" for note in stage.notes]
    lines += ["", *cost_formulas(program.plan), "", *cost(program, call)]
    return "\n".join(lines)


def explain_at(
    pattern: CompiledPattern, shape: Shape, setting: Setting, dtype: torch.dtype | None, *, verbose: bool = False
) -> str:
    """`explain` of a call with made tensors."""
    parameters = filled(pattern) | setting.parameters
    all_parameters = defaults(pattern) | parameters
    made = made_inputs(pattern.pattern, shape, all_parameters, dtype=dtype or torch.float32, ranges=setting.ranges)
    settings: dict[str, Any] = {**parameters, **made.inputs}
    found, call = pattern.prepared(made.q, made.k, made.v, settings)
    return explain(found, call, verbose=verbose)


def cost(program: Program, call: Call) -> list[str]:
    """Live pairs, floating point operations and bytes of a call; `cost_formulas` says where they come from."""
    sizes = call.sizes
    batch, heads, rows, keys = sizes["b"], sizes["h"], sizes["i"], sizes["j"]
    width, value_width = sizes["d"], sizes.get("e", sizes["d"])
    key_heads, element = call.k.shape[1], call.q.element_size()
    branches = len(program.plan.branches)
    live, visited = live_pairs(program.plan, call), visited_pairs(program.plan, call)
    pairs = batch * heads * rows * keys
    flops = 2 * (width + value_width) * live
    rows_moved = batch * heads * rows * (width + branches * value_width)
    moved = element * (rows_moved + batch * key_heads * keys * (width + value_width))
    moved += 4 * branches * batch * heads * rows
    table = [
        ("call", f"B={batch} H={heads} Hk={key_heads} N={rows} M={keys} D={width} E={value_width}"),
        ("live pairs", f"{live:,} of B*H*N*M = {pairs:,}: {live / pairs:.4%}"),
        ("visited pairs", f"{visited:,}: {visited / max(live, 1):.2f} for each live one, in the CPU back end's tiles"),
        ("FLOPs", f"{flops:,}"),
        ("bytes", f"{moved:,}: q, k, v, results and row statistics once"),
        ("FLOPs a byte", f"{flops / moved:.1f}"),
    ]
    return [f"{name:<14}{value}" for name, value in table]

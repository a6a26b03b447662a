"""The cost of a plan as formulas: live pairs a row, operations and bytes of a call."""

from __future__ import annotations

from attnc.compiler.describe import formula
from attnc.compiler.plan import Diagonals, Domain, Grid, KeySet, Listed, Plan, Stepped

BYTES = "(B*H*N*(D + E) + B*Hk*M*(D + E)) * itemsize + 4*B*H*N"


def keys_of_row(key_set: KeySet) -> str:
    """How many keys of a set a row visits; an upper bound where runs overlap or a mask thins them."""
    runs = [f"[{formula(run.outer.hi)} - ({formula(run.outer.lo)})]" for run in key_set.runs]
    spans = " + ".join(runs)
    walk = key_set.walk
    if isinstance(walk, Stepped):
        return f"{spans} / {formula(walk.step, 7)}"
    if isinstance(walk, Grid):
        share = f"[{formula(walk.low.hi)} - ({formula(walk.low.lo)})] / {formula(walk.period, 7)}"
        steps = [step for step in (walk.high_step, walk.low_step) if step is not None]
        return f"{spans} * {share}" + "".join(f" / {formula(step, 7)}" for step in steps)
    if isinstance(walk, Listed):
        return f"entries of {walk.table} * {formula(walk.width)}"
    if isinstance(walk, Diagonals):
        return f"entries of {walk.table}"
    return spans


def live_formula(domain: Domain) -> str:
    """Pairs of one head; a bracket [x] counts as max(x, 0)."""
    sets = " + ".join(keys_of_row(key_set) for key_set in domain.key_sets) or "0"
    return f"sum over i of {sets}"


def cost_formulas(plan: Plan) -> list[str]:
    """Lines for people: live pairs of every branch, operations, bytes."""
    branches = len(plan.branches)
    lines = []
    for number, branch in enumerate(plan.branches):
        name = f"live_{number}" if branches > 1 else "live"
        lines.append(f"{name} <= B*H * {live_formula(branch.domain)}")
    total = " + ".join(f"live_{number}" for number in range(branches)) if branches > 1 else "live"
    lines.append(f"FLOPs = 2*(D + E) * {f'({total})' if branches > 1 else total}")
    lines.append(f"bytes = {f'{branches} * (' if branches > 1 else ''}{BYTES}{')' if branches > 1 else ''}")
    return lines

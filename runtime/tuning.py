"""Measures tile shapes for the kernels of a pattern at one call's sizes, and settles on the fastest that is right."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnc.compiler.schedule import TileShape
from attnc.runtime import repeated, tuned
from attnc.runtime.clock import clock, medians
from attnc.runtime.comparison import defaults, filled
from attnc.runtime.inputs import Shape, made_inputs
from attnc.runtime.pattern import CompiledPattern
from attnc.runtime.settings import Setting
from attnc.runtime.tolerance import error, tolerance
from attnc.runtime.tuned import Session, Site

MOST = 6  # shapes of a kernel that are measured, that of the rule among them
RUNS = 10
GAIN = 1.02  # times faster than the rule's that a winner has to be: less is noise

Tell = Callable[[str], None]
Run = Callable[[], Sequence[Tensor]]


@dataclass(frozen=True)
class Trial:
    """A shape, and the milliseconds of all generated kernels of the pass with it; None and why where it is no good."""

    shape: TileShape
    milliseconds: float | None
    reason: str = ""


@dataclass(frozen=True)
class Outcome:
    """What came out for one kernel; the first trial is the rule's shape."""

    site: Site
    trials: tuple[Trial, ...]
    winner: Trial

    @property
    def gain(self) -> float:
        """The rule's time over the winner's."""
        before, after = self.trials[0].milliseconds, self.winner.milliseconds
        return 1.0 if before is None or after is None else before / after


def tune(
    pattern: CompiledPattern,
    shape: Shape,
    setting: Setting,
    device: str,
    dtype: torch.dtype,
    *,
    most: int = MOST,
    tell: Tell = lambda text: None,
) -> list[Outcome]:
    """Tries shapes for every kernel of a call on made tensors, forward and backward, and keeps the winners.

    Raises AttnError where the pattern cannot be compiled. `tell` hears what is being measured.
    """
    parameters = filled(pattern) | setting.parameters
    made = made_inputs(
        pattern.pattern, shape, defaults(pattern) | parameters, dtype=dtype, device=device, ranges=setting.ranges
    )
    settings: dict[str, Any] = {**parameters, **made.inputs}
    leaves = [one.requires_grad_() for one in (made.q, made.k, made.v) if one is not None]
    backend = "triton"

    def forward() -> Sequence[Tensor]:
        with torch.no_grad():
            return [pattern.outputs(made.q, made.k, made.v, settings, backend)[0]]

    with tuned.session() as session, clock():
        outcomes = tune_pass(session, forward, dtype, shape.keys, most, tell)
        out, _ = pattern.outputs(made.q, made.k, made.v, settings, backend)
        cotangent = torch.randn_like(out)

        def backward() -> Sequence[Tensor]:
            found = torch.autograd.grad(out, leaves, cotangent, retain_graph=True, allow_unused=True)
            return [one for one in found if one is not None]

        if out.requires_grad:
            outcomes += tune_pass(session, backward, dtype, shape.keys, most, tell)
    for outcome in outcomes:
        tuned.settle(outcome.site, outcome.winner.shape)
    repeated.forget()  # recordings hold the shapes of before
    return outcomes


def tune_pass(
    session: Session, run: Run, dtype: torch.dtype, keys: int, most: int, tell: Tell
) -> list[Outcome]:
    """The kernels that a pass launches, one after the other, each with the winners of those before."""
    known = set(session.sites)
    expected = [result.clone() for result in run()]
    allowed = 2 * tolerance(dtype, keys)  # both are rounded
    outcomes = []
    for site, options in [(site, options) for site, options in session.sites.items() if site not in known]:
        trials = []
        for shape in options[:most]:
            tell(f"{site.kernel}: {label(shape)}")
            session.chosen[site] = shape
            trials.append(attempt(shape, run, expected, allowed))
        winner = best(trials)
        session.chosen[site] = winner.shape
        outcomes.append(Outcome(site, tuple(trials), winner))
    return outcomes


def attempt(shape: TileShape, run: Run, expected: Sequence[Tensor], allowed: float) -> Trial:
    """One shape: its results first, then its time."""
    try:
        results = run()
    except Exception as failure:  # out of registers or shared memory, or what a compiler does not take
        return Trial(shape, None, f"{type(failure).__name__}: {failure}".splitlines()[0][:80])
    off = max((error(one, other) for one, other in zip(results, expected, strict=True)), default=0.0)
    if not off <= allowed:  # NaN is not
        return Trial(shape, None, f"wrong: off by {off:.1e}")
    return Trial(shape, milliseconds(run))


def milliseconds(run: Run) -> float:
    """Of all generated kernels of a pass."""
    return math.fsum(ms for _, ms in launch_times(run))


def launch_times(run: Run, runs: int = RUNS) -> list[tuple[str, float]]:
    """(Kernel, median milliseconds) of every launch of a pass, in order. A clock of its own measures."""
    with clock() as own:
        run()  # what is compiled or allocated at a first time
        own.taken()
        found = []
        for _ in range(runs):
            run()
            found.append(own.taken())
    return medians(found)


def best(trials: Sequence[Trial]) -> Trial:
    """The fastest, where it is clearly faster than the first."""
    first = trials[0]
    right = [trial for trial in trials if trial.milliseconds is not None]
    if not right:
        return first
    fastest = min(right, key=lambda trial: trial.milliseconds or math.inf)
    assert fastest.milliseconds is not None
    if first.milliseconds is not None and first.milliseconds < GAIN * fastest.milliseconds:
        return first
    return fastest


def label(shape: TileShape) -> str:
    """A shape in words."""
    flags = [name for name in ("apart", "overlap") if getattr(shape, name)]
    return " ".join([f"{shape.block_m}x{shape.block_n}", f"{shape.warps} warps", f"{shape.stages} stages", *flags])

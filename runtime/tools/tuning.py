"""Measures tile shapes for the kernels of a pattern at one call's sizes, and settles on the fastest that is right."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnc.compiler.schedule import TileShape
from attnc.runtime import tuned
from attnc.runtime.clock import Launched, clock, medians
from attnc.runtime.pattern import CompiledPattern
from attnc.runtime.recording import repeated
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
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    settings: dict[str, Any],
    *,
    most: int = MOST,
    tell: Tell = lambda text: None,
) -> list[Outcome]:
    """Tries tile shapes for every kernel of a call, forward and backward, and keeps the winners for calls like it.

    `most`: shapes of a kernel that are measured. `tell` hears what is tried. Raises AttnError as a call does.
    """
    outcomes: list[Outcome] = []
    allowed = 2 * tolerance(q.dtype, k.shape[2])  # both results are rounded
    with tuned.session() as session, clock():
        for run in passes(pattern, q, k, v, settings):
            found = tune_pass(session, run, allowed, most, tell)
            for outcome in found:
                tuned.settle(outcome.site, outcome.winner.shape)
            outcomes += found
    repeated.forget()  # recordings hold the shapes of before
    return outcomes


def passes(pattern: CompiledPattern, q: Tensor, k: Tensor, v: Tensor | None, settings: dict[str, Any]) -> Iterator[Run]:
    """A call's forward, then the gradients of q, k and v."""
    leaves = [one.detach().requires_grad_() for one in (q, k, v) if one is not None]

    def forward() -> Sequence[Tensor]:
        with torch.no_grad():
            return [pattern.outputs(q, k, v, settings, "triton")[0]]

    yield forward
    out, _ = pattern.outputs(leaves[0], leaves[1], None if v is None else leaves[2], settings, "triton")
    if out.requires_grad:
        cotangent = torch.randn_like(out)

        def backward() -> Sequence[Tensor]:
            found = torch.autograd.grad(out, leaves, cotangent, retain_graph=True, allow_unused=True)
            return [one for one in found if one is not None]

        yield backward


def tune_pass(session: Session, run: Run, allowed: float, most: int, tell: Tell) -> list[Outcome]:
    """The kernels that a pass launches, one after the other, each with the winners of those before."""
    known = set(session.sites)
    expected = [result.clone() for result in run()]
    outcomes = []
    for site, choice in [(site, choice) for site, choice in session.sites.items() if site not in known]:
        trials = []
        for shape in choice.likely(most):
            tell(f"{site.kernel}: {label(shape)}")
            session.chosen[site] = shape
            trials.append(attempt(shape, run, expected, allowed))
        winner = best(trials)
        session.chosen[site] = winner.shape
        outcomes.append(Outcome(site, tuple(trials), winner))
    return outcomes


def attempt(shape: TileShape, run: Run, expected: Sequence[Tensor], allowed: float) -> Trial:
    """One shape: its results first, then its time. A failure that the device does not survive is raised."""
    try:
        off = max((error(one, other) for one, other in zip(run(), expected, strict=True)), default=0.0)
    except Exception as failure:  # too many registers, too much shared memory, or what Triton does not take
        if expected[0].is_cuda:
            torch.cuda.synchronize()
        return Trial(shape, None, f"{type(failure).__name__}: {failure}".splitlines()[0][:80])
    if not off <= allowed:  # NaN is not
        return Trial(shape, None, f"wrong: off by {off:.1e}")
    return Trial(shape, milliseconds(run))


def milliseconds(run: Run) -> float:
    """Of all generated kernels of a pass."""
    return math.fsum(one.milliseconds for one in launch_times(run))


def launch_times(run: Run, runs: int | None = None) -> list[Launched]:
    """Every launch of a pass, in order, with its median time of some runs. A clock of its own measures."""
    with clock() as own:
        run()  # what is compiled or allocated at a first time
        own.taken()
        found = []
        for _ in range(runs or RUNS):
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

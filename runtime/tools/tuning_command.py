"""What `attnc tune` does around the tuner: tensors, and the table of what came out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich import box
from rich.table import Table

from attnc.runtime.pattern import CompiledPattern
from attnc.runtime.tools.comparison import defaults, filled
from attnc.runtime.tools.inputs import Shape, made_inputs
from attnc.runtime.tools.options import UsageError
from attnc.runtime.tools.settings import Setting
from attnc.runtime.tools.tuning import Outcome, Trial, label, tune


def tuned_on(device: str | None) -> str:
    """The device that is meant. Raises UsageError where kernels don't run."""
    if device == "cpu" or not torch.cuda.is_available():
        raise UsageError("tile shapes are those of kernels on a CUDA device, and there is none here")
    return device or "cuda"


def tune_at(
    pattern: CompiledPattern,
    shape: Shape,
    setting: Setting,
    device: str,
    dtype: torch.dtype | None,
    most: int,
    tell: Callable[[str], None],
) -> list[Outcome]:
    """`tune` of a call with made tensors."""
    parameters = filled(pattern) | setting.parameters
    made = made_inputs(
        pattern.pattern,
        shape,
        defaults(pattern) | parameters,
        dtype=dtype or torch.bfloat16,
        device=device,
        ranges=setting.ranges,
    )
    settings: dict[str, Any] = {**parameters, **made.inputs}
    return tune(pattern, made.q, made.k, made.v, settings, most=most, tell=tell)


def tuning_table(name: str, outcomes: Sequence[Outcome]) -> Table:
    """Every shape that was tried, the rule's first, with the winner marked."""
    title = f"{name}: milliseconds of all kernels of the pass, with one kernel's tile shape changed"
    table = Table("kernel", "rows x keys", "ms", "", title=title, box=box.SIMPLE)
    for outcome in outcomes:
        for at, trial in enumerate(outcome.trials):
            cells = [outcome.site.kernel if at == 0 else "", label(trial.shape), time_of(trial)]
            table.add_row(*cells, remark(outcome, trial, at), end_section=at == len(outcome.trials) - 1)
    return table


def time_of(trial: Trial) -> str:
    """The time of a trial, or that there is none."""
    return "-" if trial.milliseconds is None else f"{trial.milliseconds:.4f}"


def remark(outcome: Outcome, trial: Trial, at: int) -> str:
    """What there is to say of a trial."""
    kept = f"[green]kept, {outcome.gain:.2f} times faster[/]" if at else "[green]kept[/]"
    said = ["rule"] if at == 0 else []
    said += [kept] if trial.shape == outcome.winner.shape else []
    return ", ".join([*said, *([f"[red]{trial.reason}[/]"] if trial.reason else [])])

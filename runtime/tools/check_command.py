"""What `attnc check` says of a pattern: its row of the table, and lines on what was off."""

from __future__ import annotations

from collections.abc import Sequence

from attnc.compiler.causality import causality
from attnc.dsl.diagnostics import AttnError
from attnc.runtime.pattern import CompiledPattern
from attnc.runtime.tools.comparison import Outcome, Target, cases, compare_all
from attnc.runtime.tools.options import short
from attnc.runtime.tools.settings import Setting, settings


def checked(
    pattern: CompiledPattern,
    chosen: Setting,
    targets: Sequence[Target],
    draws: int,
    failures: list[str],
    remarks: list[str],
) -> list[str]:
    """The row of a pattern; what went wrong is added to `failures`, what was passed over to `remarks`."""
    name = str(pattern.__name__)
    causal = causality(pattern.pattern)
    passed_over: list[Outcome] = []
    try:
        tried = list(cases(pattern, chosen, settings(pattern.pattern, "check", pattern.known)))
        outcomes = [compare_all(tried, target, draws, passed_over=passed_over) for target in targets]
    except AttnError as error:
        failures.append(str(error))
        return [name, causal, "", *("" for _ in targets), "[red]not compiled[/]"]
    short_ones = [outcome for column in outcomes for outcome in column if not outcome.agrees]
    failures += [shortfall(outcome) for outcome in short_ones]
    remarks += [jump(outcome) for outcome in passed_over]
    return [
        name,
        causal,
        str(len(tried)),
        *(cell(column) for column in outcomes),
        "[red]falls short[/]" if short_ones else "[green]ok[/]",
    ]


def cell(outcomes: list[Outcome]) -> str:
    """The largest error of results, and that of gradients; red where one falls short."""
    texts = []
    for gradients in (False, True):
        some = [outcome for outcome in outcomes if outcome.is_gradient == gradients]
        colour = "" if all(outcome.agrees for outcome in some) else "[red]"
        texts.append(f"{colour}{max(outcome.error for outcome in some):.1e}{'[/]' if colour else ''}")
    return " ".join(texts)


def shortfall(outcome: Outcome) -> str:
    """One line that says how to see a failure again."""
    return f"falls short: {place(outcome)}: error {outcome.error:.2e}, allowed {outcome.allowed:.2e}"


def jump(outcome: Outcome) -> str:
    """One line on tensors that others were drawn in the place of."""
    reason = f"the reference itself moves by {outcome.moves:.2e} where its operations round as float32's"
    return f"drawn again: {place(outcome)}: error {outcome.error:.2e}, allowed {outcome.allowed:.2e}; {reason}"


def place(outcome: Outcome) -> str:
    """What was compared."""
    case, target = outcome.case, outcome.target
    values = "".join(f" {name}={value}" for name, value in case.setting.parameters.items())
    return f"{case.pattern.__name__} on {target.label} in {short(target.dtype)}, {case.shape}{values}: {outcome.of}"

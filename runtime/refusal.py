"""Refused calls: every mistake in the arguments of a pattern, said with its name, declared axes and given shapes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NoReturn

from torch import Tensor

from attnc.dsl.diagnostics import AttnError, Diagnostic
from attnc.dsl.source import Span
from attnc.dsl.terms import Input, Pattern

BUILT_IN_LAYOUTS = {"q": ("b", "h", "i", "d"), "k": ("b", "h", "j", "d"), "v": ("b", "h", "j", "e")}


def extra_inputs(pattern: Pattern) -> tuple[Input, ...]:
    """The declared inputs but q, k, v, which a file may declare again to give them other axes (a latent as k)."""
    return tuple(declared for declared in pattern.inputs if declared.name not in BUILT_IN_LAYOUTS)


def layouts(pattern: Pattern) -> dict[str, tuple[str, ...]]:
    """Declared axes of every tensor that a pattern takes."""
    return {**BUILT_IN_LAYOUTS, **{declared.name: declared.axes for declared in pattern.inputs}}


def spans(pattern: Pattern) -> dict[str, Span]:
    """Where an argument was declared; q, k, v: the pattern's own line."""
    declared = {p.name: p.span for p in pattern.parameters} | {entry.name: entry.span for entry in pattern.inputs}
    return dict.fromkeys(BUILT_IN_LAYOUTS, heading(pattern)) | declared


def heading(pattern: Pattern) -> Span:
    """`pattern NAME`."""
    start = pattern.span.start
    return Span(source=pattern.source, start=start, stop=start + re.match(r"\w+\s+\w+", pattern.span.text).end())  # type: ignore[union-attr]


def refuse(
    pattern: Pattern,
    code: str,
    message: str,
    *,
    about: str | None = None,
    given: Mapping[str, object] | None = None,
    help: str | None = None,
    span: Span | None = None,
) -> NoReturn:
    """Raises the AttnError of a call of `pattern`.

    about: the argument at fault, whose declaration is shown. given: the tensors of the call, listed with their
    declared axes and shapes.
    """
    lines = [help] if help else []
    if given:
        lines += describe(pattern, given)
    place = span or spans(pattern).get(about or "", heading(pattern))
    raise AttnError([Diagnostic(code, f"{pattern.name}: {message}", place, help="\n".join(lines) or None)])


def describe(pattern: Pattern, given: Mapping[str, object]) -> list[str]:
    """One line a tensor: name, declared axes, shape, dtype."""
    axes = layouts(pattern)
    rows = [
        (f"{name}: [{', '.join(axes[name])}]", f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}")
        for name, value in given.items()
        if isinstance(value, Tensor) and name in axes
    ]
    width = max((len(left) for left, _ in rows), default=0)
    return [f"{left:<{width}} = {right}" for left, right in rows]


def listed(names: Iterable[str]) -> str:
    """`a`, `b` and `c`."""
    quoted = [f"`{name}`" for name in names]
    return " and ".join([", ".join(quoted[:-1]), quoted[-1]] if len(quoted) > 1 else quoted)

"""Everything that there is to say about a text before it is called: mistakes, and what has no kernel yet."""

from __future__ import annotations

from pathlib import Path

from attnc.dsl.check import check
from attnc.dsl.diagnostics import AttnError, Diagnostic
from attnc.dsl.source import Source
from attnc.dsl.terms import Pattern
from attnc.runtime.tools.settings import KINDS, settings


def mistakes(source: Source, folder: Path | None) -> list[Diagnostic]:
    """What is wrong with a text, its lines for the commands included; quick enough for every key stroke."""
    try:
        patterns = check(source, root=folder)
    except AttnError as error:
        return list(error.diagnostics)
    known = frozenset(name for pattern in patterns.values() for name in _names(pattern))
    found: dict[tuple[int, int], Diagnostic] = {}
    for pattern in patterns.values():
        for kind in KINDS:
            try:
                settings(pattern, kind, known)
            except AttnError as error:
                for diagnostic in error.diagnostics:
                    found.setdefault((diagnostic.span.start, diagnostic.span.stop), diagnostic)
    return list(found.values())


def _names(pattern: Pattern) -> list[str]:
    """What a call of a pattern can be given by name."""
    return [declared.name for declared in pattern.parameters] + [declared.name for declared in pattern.inputs]


def refusals(source: Source, folder: Path | None) -> list[Diagnostic]:
    """Where the compiler has no lowering for a right text; none for a wrong one. Takes the time of a compilation."""
    try:
        patterns = check(source, root=folder)
    except AttnError:
        return []
    return [diagnostic for pattern in patterns.values() for diagnostic in _refusals(pattern)]


def _refusals(pattern: Pattern) -> tuple[Diagnostic, ...]:
    from attnc.compiler.pipeline import compose  # imports sympy, which an editor's first answer does not wait for

    try:
        compose(pattern)
    except AttnError as error:
        return error.diagnostics
    return ()

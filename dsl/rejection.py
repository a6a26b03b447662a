"""How a rule of the language says no: the diagnostic travels as an exception to the statement being checked."""

from __future__ import annotations

from typing import NoReturn

from attnc.dsl.diagnostics import Diagnostic
from attnc.dsl.source import Span


class Rejected(Exception):
    """A statement breaks a rule; `diagnostic` says which and where."""

    def __init__(self, diagnostic: Diagnostic) -> None:
        super().__init__(diagnostic.message)
        self.diagnostic = diagnostic


class Poisoned(Exception):
    """A statement uses a name whose own statement was rejected: there is nothing new to report."""


def reject(code: str, message: str, span: Span, *labels: tuple[Span, str], help: str | None = None) -> NoReturn:
    """Raise `Rejected` with a diagnostic at `span`."""
    raise Rejected(Diagnostic(code, message, span, labels, help))


def listed(names: tuple[str, ...] | list[str], *, none: str = "none") -> str:
    """`a`, `b` and `c`, for use in messages."""
    quoted = [f"`{name}`" for name in names]
    if not quoted:
        return none
    return quoted[0] if len(quoted) == 1 else ", ".join(quoted[:-1]) + " and " + quoted[-1]

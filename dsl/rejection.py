"""How a rule of the language says no: the diagnostic travels as an exception to the statement being checked."""

from __future__ import annotations

from collections.abc import Sequence

from attnc.dsl.diagnostics import Diagnostic
from attnc.dsl.source import Span


class RejectionError(Exception):
    """A statement breaks a rule; `diagnostic` says which and where."""

    def __init__(self, diagnostic: Diagnostic) -> None:
        super().__init__(diagnostic.message)
        self.diagnostic = diagnostic


class PoisonedError(Exception):
    """A statement uses a name whose own statement was rejected: there is nothing new to report."""


def rejection(
    code: str, message: str, span: Span, *labels: tuple[Span, str], help: str | None = None
) -> RejectionError:
    """The error to raise for a mistake at `span`."""
    return RejectionError(Diagnostic(code, message, span, labels, help))


def listed(names: Sequence[str], *, none: str = "none") -> str:
    """`a`, `b` and `c`, for use in messages."""
    quoted = [f"`{name}`" for name in names]
    if not quoted:
        return none
    return quoted[0] if len(quoted) == 1 else ", ".join(quoted[:-1]) + " and " + quoted[-1]

"""A contender about to be timed, and why one cannot take part."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.timing import Call


class UnavailableError(Exception):
    """A contender cannot take part; the message says why."""


@dataclass(frozen=True)
class Ready:
    """A contender about to be timed.

    `first_seconds`: from nothing to the first result, compilation included. `exact`: it computes what the pattern
    means. `build` makes what the timed call is given (a block mask); `built_bytes` is its size, `note` how it is made.
    """

    call: Call
    first_seconds: float
    exact: bool = True
    build: Callable[[], object] | None = None
    built_bytes: int = 0
    note: str = ""


def first_line(error: BaseException) -> str:
    """Type and start of a message, for a table."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:200]}" if text else type(error).__name__

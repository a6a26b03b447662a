"""A contender about to be timed, and why one cannot take part."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
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


PREPARING = 60.0  # seconds that a contender may take to its first result: some try kernels out for minutes


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Leaves what takes longer with UnavailableError. Only in the main thread, and not inside of one call into C."""

    def over(signal_number: int, frame: object) -> None:
        raise UnavailableError(f"not ready within {seconds:g} s")

    if seconds <= 0 or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def first_line(error: BaseException) -> str:
    """Type and start of a message, for a table."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:200]}" if text else type(error).__name__

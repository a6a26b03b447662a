"""Times of generated kernels, launch by launch: by CUDA events, or by the host's clock in Triton's interpreter."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

import torch

FLUSHED = 2**28  # bytes written before a launch, twice: more than a second-level cache holds
FLUSHES = 2  # the device is busy with them while the host prepares the launch, so that its time is not counted


@dataclass(frozen=True)
class Launched:
    """A launch: of which step (as far as a composition runs), of which kernel, and how long it took."""

    step: str
    kernel: str
    milliseconds: float


@dataclass
class Clock:
    """Launches as they come while the clock runs, each with the marks around it. `step`: whose they are."""

    step: str = ""
    marks: list[tuple[str, str, Any, Any]] = field(default_factory=list)
    flushed: torch.Tensor | None = None

    @contextmanager
    def timing(self, name: str, on_device: bool) -> Iterator[None]:
        """Around one launch."""
        before = self.mark(on_device, flush=True)
        yield
        self.marks.append((self.step, name, before, self.mark(on_device)))

    def mark(self, on_device: bool, *, flush: bool = False) -> Any:
        if not on_device:
            return time.perf_counter()
        if flush:
            if self.flushed is None:
                self.flushed = torch.empty(FLUSHED, dtype=torch.int8, device="cuda")
            for _ in range(FLUSHES):
                self.flushed.zero_()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def taken(self) -> list[Launched]:
        """Every launch since the last time; waits for the device."""
        if self.flushed is not None:
            torch.cuda.synchronize()
        found = [Launched(step, name, elapsed(before, after)) for step, name, before, after in self.marks]
        self.marks.clear()
        return found


def elapsed(before: Any, after: Any) -> float:
    """Milliseconds between two marks."""
    return (after - before) * 1e3 if isinstance(before, float) else float(before.elapsed_time(after))


def medians(runs: list[list[Launched]]) -> list[Launched]:
    """The median times of launches that come in the same order in all runs."""
    return [
        replace(launches[0], milliseconds=median(one.milliseconds for one in launches))
        for launches in zip(*runs, strict=True)
    ]


_running: Clock | None = None


def running() -> Clock | None:
    """The clock that launches go by; calls are not recorded meanwhile, nor done as recorded."""
    return _running


def at_step(name: str) -> None:
    """Tells a running clock whose launches follow."""
    if _running is not None:
        _running.step = name


@contextmanager
def clock() -> Iterator[Clock]:
    """Lets a clock run."""
    global _running
    before, _running = _running, Clock()
    try:
        yield _running
    finally:
        _running = before

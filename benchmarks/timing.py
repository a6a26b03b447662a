"""Times of several calls side by side, and the memory of one."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median, quantiles

import torch
from torch import Tensor

Call = Callable[[], Tensor]
FLUSHED = 256 * 2**20  # bytes written before a timed call, more than any second-level cache holds
MOST = 100  # samples


@dataclass(frozen=True)
class Times:
    """Milliseconds of one contender, in the order in which they were taken."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return median(self.samples)

    @property
    def least(self) -> float:
        return min(self.samples)

    @property
    def quartiles(self) -> tuple[float, float]:
        if len(self.samples) < 2:
            return self.samples[0], self.samples[0]
        low, _, high = quantiles(self.samples, n=4, method="inclusive")
        return low, high


def order(count: int, turn: int) -> list[int]:
    """Places of `count` contenders in round `turn`.

    Over 2 * count rounds everyone stands in every place equally often and right behind every other one about equally
    often (a Williams design), since clocks and temperature carry over from one call to the next.
    """
    zigzag = [-(place // 2) if place % 2 == 0 else place // 2 + 1 for place in range(count)]
    line = [(step + turn) % count for step in zigzag]
    return line if turn // count % 2 == 0 else line[::-1]


def side_by_side(calls: Mapping[str, Call], device: str, least: int, seconds: float) -> dict[str, Times]:
    """At least `least` samples of every call, more where `seconds` allow, interleaved."""
    names = list(calls)
    started = time.perf_counter()
    for name in names:  # every call ran before: this warms caches and says how long a round is
        calls[name]()
    synchronize(device)
    round_seconds = max(time.perf_counter() - started, 1e-6)
    rounds = max(least, min(MOST, int(seconds / round_seconds)))
    turns = [order(len(names), turn) for turn in range(-(-rounds // len(names)) * len(names))]
    take = cuda_samples if device.startswith("cuda") else cpu_samples
    taken = take([calls[name] for name in names], turns, device)
    return {name: Times(tuple(samples)) for name, samples in zip(names, taken, strict=True)}


def cuda_samples(calls: list[Call], turns: list[list[int]], device: str) -> list[list[float]]:
    """By events around a call, the second-level cache flushed before; queued ahead of the device."""
    flushed = torch.empty(FLUSHED, dtype=torch.int8, device=device)
    events: list[list[tuple[torch.cuda.Event, torch.cuda.Event]]] = [[] for _ in calls]
    for turn in turns:
        for at in turn:
            before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            flushed.zero_()
            before.record()
            calls[at]()
            after.record()
            events[at].append((before, after))
    torch.cuda.synchronize()
    return [[before.elapsed_time(after) for before, after in pairs] for pairs in events]


def cpu_samples(calls: list[Call], turns: list[list[int]], device: str) -> list[list[float]]:
    samples: list[list[float]] = [[] for _ in calls]
    for turn in turns:
        for at in turn:
            begun = time.perf_counter()
            calls[at]()
            samples[at].append((time.perf_counter() - begun) * 1e3)
    return samples


def seconds_of(action: Callable[[], object], device: str) -> float:
    """Wall-clock time of one call, the device's work included."""
    synchronize(device)
    begun = time.perf_counter()
    action()
    synchronize(device)
    return time.perf_counter() - begun


def median_seconds(action: Callable[[], object], device: str, count: int) -> float:
    """Median of `seconds_of`."""
    return median(seconds_of(action, device) for _ in range(count))


def peak_bytes(call: Call, device: str) -> int | None:
    """Most memory that one call holds beyond what was allocated before it, its result included. None on a CPU."""
    if not device.startswith("cuda"):
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del result
    return peak


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()

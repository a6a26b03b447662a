"""What the launches of a call take, step by step; and what a device does at most, where that is not known."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attnc.compiler.loads import KNOWN, Rates
from attnc.runtime.cache import keep, kept
from attnc.runtime.clock import Launched
from attnc.runtime.tools.measure import median_time
from attnc.runtime.tools.tuning import launch_times, passes

if TYPE_CHECKING:
    from attnc.runtime.pattern import CompiledPattern

COPIED = 2**30  # bytes, far more than a cache holds
SIDE = 8192  # of matrices
LAUNCH, TURN = 7e-6, 0.5e-9  # seconds, as of an H100


@dataclass
class Measured:
    """Launches of a call's forward and gradients. `sole`: the name of the step that is all of the pattern.

    `call` and `gradients`: milliseconds of repeated calls, whatever they launch.
    """

    forward: list[Launched]
    backward: list[Launched]
    call: float
    gradients: float | None
    sole: str | None
    told: set[int] = field(default_factory=set)

    def of(self, step: str, load: str) -> float | None:
        """Milliseconds of the launches that a line of the model stands for; None where it had none."""
        pool = self.forward if load.startswith("forward") else self.backward
        found = [
            one
            for one in pool
            if (one.step or self.sole) == step and (load == "forward" or one.kernel.startswith(load))
        ]
        self.told.update(map(id, found))
        return sum(one.milliseconds for one in found) if found else None

    def others(self) -> list[tuple[str, int, float]]:
        """(Name, launches, milliseconds) of what no line stands for, then of the whole calls."""
        groups: dict[str, list[float]] = {}
        for name, pool in (("", self.forward), ("gradients of ", self.backward)):
            for one in pool:
                if id(one) not in self.told:
                    groups.setdefault(f"{name}{one.step or self.sole} {one.kernel}", []).append(one.milliseconds)
        rows = [(name, len(times), sum(times)) for name, times in groups.items()]
        rows.append(("a call, repeated", len(self.forward), self.call))
        if self.gradients is not None:
            rows.append(("its gradients, repeated", len(self.backward), self.gradients))
        return rows


def measured(
    pattern: CompiledPattern, q: Tensor, k: Tensor, v: Tensor | None, settings: dict[str, Any], sole: str | None
) -> Measured:
    """Runs a call and its gradients some ten times under a clock, and again as they repeat."""
    pools: list[list[Launched]] = []
    times: list[float] = []
    for run in passes(pattern, q, k, v, settings):
        pools.append(launch_times(run))
        times.append(device_time(run))
    pools, whole = [*pools, []], [*times, None]
    return Measured(pools[0], pools[1], times[0], whole[1], sole)


def device_time(run: Callable[[], Sequence[Tensor]]) -> float:
    """Median milliseconds of a call that repeats."""
    for _ in range(3):  # the third is done as recorded
        run()
    return median_time(run, "cuda" if torch.cuda.is_available() else "cpu")[0]


def rates_of(device: torch.device, *, measure: bool) -> Rates | None:
    """What a CUDA device does at most: from the table, else as measured once and kept; None where neither is."""
    name = torch.cuda.get_device_name(device)
    if name in KNOWN:
        return KNOWN[name]
    text = kept(f"rates of {name}")
    if text is not None:
        return read_rates(text)
    if not measure:
        return None
    found = measured_rates(device, name)
    keep(f"rates of {name}", json.dumps(asdict(found)))
    return found


def read_rates(text: str) -> Rates:
    """Rates as they are kept."""
    given = json.loads(text)
    return Rates(**{**given, "operations": {int(size): rate for size, rate in given["operations"].items()}})


def measured_rates(device: torch.device, name: str) -> Rates:
    """A copy, and products of random matrices (zeros are faster)."""
    source = torch.randint(0, 127, (COPIED,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    copied, _ = median_time(lambda: target.copy_(source), "cuda")
    operations = {}
    for dtype, passes_ in ((torch.bfloat16, 1), (torch.float32, 3)):
        a, b = (torch.randn(SIDE, SIDE, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        before, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, True
        taken, _ = median_time(lambda: torch.mm(a, b, out=out), "cuda")  # noqa: B023
        torch.backends.cuda.matmul.allow_tf32 = before
        operations[dtype.itemsize] = 2 * SIDE**3 / taken * 1e3 / passes_
    return Rates(name, 2 * COPIED / copied * 1e3, operations, 0.0, LAUNCH, TURN, "a copy and products, measured here")

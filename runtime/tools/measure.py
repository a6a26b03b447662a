"""One run of a pattern: time, live fraction, error. What `attnc run` does."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnc.runtime.pattern import CompiledPattern
from attnc.runtime.program import terms
from attnc.runtime.tolerance import error, tolerance
from attnc.runtime.tools.comparison import defaults, filled
from attnc.runtime.tools.inputs import Made, Shape, made_inputs
from attnc.runtime.tools.settings import Setting

REFERENCE_PAIRS = 2**24  # numbers over (batch, head, row, key) that the float64 reference is asked for
BUDGET = 1.0  # seconds of repeated runs
MOST_RUNS = 50


@dataclass(frozen=True)
class Measurement:
    """`milliseconds`: median of `runs` after two more. `error`, `allowed`: None where no reference fits."""

    shape: Shape
    milliseconds: float
    runs: int
    live_fraction: float
    error: float | None
    allowed: float
    rows_compared: int


def measure(
    pattern: CompiledPattern, shape: Shape, setting: Setting, device: str, dtype: torch.dtype, backend: str = "auto"
) -> Measurement:
    """Runs a pattern on made tensors. Raises AttnError where it cannot be compiled."""
    parameters = filled(pattern) | setting.parameters
    made = made_inputs(
        pattern.pattern,
        shape,
        defaults(pattern) | parameters,
        dtype=dtype,
        device=device,
        ranges=setting.ranges,
    )
    settings: dict[str, Any] = {**parameters, **made.inputs}
    with torch.no_grad():
        out, _ = pattern.outputs(made.q, made.k, made.v, settings, backend)
        milliseconds, runs = median_time(lambda: pattern.outputs(made.q, made.k, made.v, settings, backend), device)
        found, rows = compare_last_rows(pattern, made, settings, out)
    fraction = pattern.live_fraction(made.q, made.k, made.v, **settings)
    return Measurement(shape, milliseconds, runs, fraction, found, tolerance(dtype, shape.keys), rows)


def median_time(run: Callable[[], object], device: str) -> tuple[float, int]:
    """(Median milliseconds, number of runs) of `run`, about `BUDGET` seconds of them."""

    def wait() -> None:
        if device.startswith("cuda"):
            torch.cuda.synchronize()

    run()
    wait()
    times: list[float] = []
    started = time.perf_counter()
    while len(times) < MOST_RUNS and (not times or time.perf_counter() - started < BUDGET):
        begun = time.perf_counter()
        run()
        wait()
        times.append(time.perf_counter() - begun)
    return sorted(times)[len(times) // 2] * 1e3, len(times)


def compare_last_rows(
    pattern: CompiledPattern, made: Made, settings: dict[str, Any], out: Tensor
) -> tuple[float | None, int]:
    """(Error, rows) against the reference of as many last rows as it can hold.

    The reference of the last rows alone is the whole one's, since fewer queries than keys are the last positions;
    unless the text looks at the number of queries, or at other rows. Then all rows are compared or none.
    """
    batch, heads, queries, _ = made.q.shape
    keys = made.k.shape[2]
    pairs = REFERENCE_PAIRS // elements_of_a_pair(pattern, max(made.k.shape[3], made.v.shape[3]))
    rows = max(1, min(queries, pairs // (batch * heads * keys)))
    if rows < queries and (queries > keys or not rows_stand_alone(pattern)):
        return None, 0
    sliced = dict(settings)
    for declared in pattern.pattern.inputs:
        if "i" in declared.axes and declared.name in settings:
            axis = declared.axes.index("i")
            sliced[declared.name] = settings[declared.name].narrow(axis, queries - rows, rows)
    if batch * heads * rows * keys > 2 * pairs:
        return None, 0
    expected = pattern.reference(made.q[:, :, queries - rows :], made.k, made.v, **sliced)
    at = pattern.pattern.output_axes.index("i") if "i" in pattern.pattern.output_axes else None
    shown = out if at is None else out.narrow(at, queries - rows, rows)
    return error(shown, expected), rows


def elements_of_a_pair(pattern: CompiledPattern, width: int) -> int:
    """How many numbers the reference holds for a query and key at most: vectors of `width` where the text has such."""
    vectors = any({"i", "j"} <= term.type.indices and term.type.axes for term in terms(pattern.pattern))
    return width if vectors else 1


def rows_stand_alone(pattern: CompiledPattern) -> bool:
    """Whether a row of the result depends on its own query only."""
    checked = pattern.pattern
    if "i" not in checked.output_axes or any(axis.over == "i" for axis in checked.axes):
        return False
    for term in terms(checked):
        along = term.attribute[0] if isinstance(term.attribute, tuple) and term.attribute else term.attribute
        reads_rows = term.form in (
            "sum",
            "mean",
            "max",
            "min",
            "cumsum",
            "softmax",
            "normalize",
            "dot",
            "shift",
            "topk",
        )
        if (term.form == "size" and along == "i") or (reads_rows and along == "i") or term.block is not None:
            return False
    return True

"""One row: compared with the float64 reference, then with the others at the timed size, then timed beside them."""

from __future__ import annotations

import gc
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from attnc.runtime.tolerance import error, tolerance
from attnc.runtime.tools.measure import elements_of_a_pair, rows_stand_alone
from benchmarks.contenders import CONTENDERS
from benchmarks.ready import PREPARING, Ready, UnavailableError, first_line, within
from benchmarks.timing import Times, median_seconds, peak_bytes, side_by_side
from benchmarks.work import Problem, Work

BAND = 128  # rows that are compared together
BUILDS = 5  # times that a block mask is built again
CHECKED_PAIRS = 2**24  # numbers over (batch, head, row, key) that the float64 reference gets at the timed size


@dataclass(frozen=True)
class Check:
    """`error_in_bands` against something, and how large it may be."""

    against: str
    size: str
    error: float
    allowed: float

    @property
    def agrees(self) -> bool:
        return self.error <= self.allowed


@dataclass(frozen=True)
class Entry:
    """One contender's numbers. `extra_bytes`: the most that a call holds beyond its result."""

    times: Times
    first_seconds: float
    extra_bytes: int | None
    build_seconds: float | None
    built_bytes: int
    note: str
    compiled_beside_others: bool = False


@dataclass
class Row:
    """What came out for one row. `absent`: contenders that did not take part, and why. `failure`: why there is
    nothing more."""

    work: Work
    dtype: torch.dtype
    checks: list[Check] = field(default_factory=list)
    entries: dict[str, Entry] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    live_pairs: int | None = 0  # None: not a set of pairs
    statistics_bytes: int = 0
    failure: str | None = None

    @property
    def right(self) -> bool:
        """Whether it ran and agrees with everything it was compared with."""
        return self.failure is None and all(check.agrees for check in self.checks)

    def times_faster(self, peer: str) -> float | None:
        """The peer's median time over attnc's."""
        if peer not in self.entries or "attnc" not in self.entries:
            return None
        return self.entries[peer].times.median / self.entries["attnc"].times.median

    @property
    def operations(self) -> int | None:
        """Of floating point: the two products of live pairs, or what the row says."""
        if self.work.operations is not None:
            return self.work.operations(self.work.timed)
        shape = self.work.timed.shape
        return None if self.live_pairs is None else 2 * (shape.width + shape.value_width) * self.live_pairs

    @property
    def teraflops(self) -> float | None:
        """attnc's rate."""
        operations = self.operations
        return None if operations is None else operations / self.entries["attnc"].times.median / 1e9

    @property
    def least_bytes(self) -> int:
        """Each of q, k, v read once and the result written once, in the row's dtype."""
        shape = self.work.timed.shape
        queries = shape.heads * shape.queries * (shape.width + shape.value_width)
        keys = shape.key_heads * shape.keys * (shape.width + shape.value_width)
        return shape.batch * (queries + keys) * self.dtype.itemsize

    @property
    def excess_bytes(self) -> int | None:
        """What attnc's call holds beyond its result and the rows' statistics."""
        extra = self.entries["attnc"].extra_bytes if "attnc" in self.entries else None
        return None if extra is None else extra - self.statistics_bytes


@dataclass(frozen=True)
class Effort:
    """Samples of each contender at least, and seconds that a row's samples may take beyond those.

    `preparing`: seconds that a peer may take to its first result; 0: as long as it takes.
    """

    samples: int = 20
    seconds: float = 1.5
    preparing: float = PREPARING


def measure(
    work: Work, device: str, dtype: torch.dtype, effort: Effort, compiled: Mapping[str, float] | None = None
) -> Row:
    """Runs one row. `compiled`: seconds to a contender's first result where it was compiled by another process."""
    row = Row(work, dtype)
    try:
        with torch.no_grad():
            small_seconds = compare_small(row, device)
            if row.right:
                compare_timed(row, device, effort, small_seconds, compiled or {})
    except Exception as failure:  # one row's failure, whatever it is, must not lose the others
        row.failure = first_line(failure)
    finally:
        gc.collect()
        if device.startswith("cuda"):
            torch.cuda.empty_cache()
    return row


def compare_small(row: Row, device: str) -> float:
    """Against the float64 reference, all of it. Returns the seconds from loading the file to the first result."""
    problem = Problem(row.work, row.work.small, device, row.dtype)
    ready = CONTENDERS["attnc"](problem)
    expected = problem.pattern.reference(problem.q, problem.k, problem.v, **problem.settings)
    compare(row, problem, ready.call(), expected, "reference", tolerance(row.dtype, problem.k.shape[2]))
    return ready.first_seconds


def compare(row: Row, problem: Problem, result: Tensor, expected: Tensor, against: str, allowed: float) -> None:
    """Adds a check of `result`, all rows of the problem or its last ones."""
    size = str(problem.size.shape)
    if result.shape[2] < problem.q.shape[2]:
        size += f", last {result.shape[2]} rows"
    row.checks.append(Check(against, size, error_in_bands(result, expected), allowed))


def error_in_bands(result: Tensor, expected: Tensor) -> float:
    """The largest `error` of any `BAND` rows, each band by its own magnitude.

    The first rows of a causal pattern average few keys and are many times larger than the last: by the largest of all,
    a mistake further down would go unseen.
    """
    overall = error(result, expected)
    if not math.isfinite(overall):
        return overall
    pad = (0, -result.shape[2] % BAND)
    apart = torch.nn.functional.pad((result.double() - expected.double()).abs().amax((0, 1, 3)), pad)
    magnitude = torch.nn.functional.pad(expected.double().abs().amax((0, 1, 3)), pad)
    apart, magnitude = apart.view(-1, BAND).amax(1), magnitude.view(-1, BAND).amax(1)
    return float((apart / torch.where(magnitude > 0, magnitude, 1.0)).max())


def compare_timed(row: Row, device: str, effort: Effort, small_seconds: float, compiled: Mapping[str, float]) -> None:
    """Prepares all contenders, compares their results, then times them."""
    problem = Problem(row.work, row.work.timed, device, row.dtype)
    row.live_pairs = problem.live_pairs()
    ready: dict[str, Ready] = {}
    for name in ("attnc", *row.work.peers):
        try:
            with within(0.0 if name == "attnc" else effort.preparing):
                ready[name] = CONTENDERS[name](problem)
        except UnavailableError as reason:
            row.absent[name] = str(reason)
    allowed = tolerance(row.dtype, problem.k.shape[2])
    result, statistics = problem.pattern.outputs(problem.q, problem.k, problem.v, problem.settings)
    row.statistics_bytes = statistics.nbytes
    compare_last_rows(row, problem, result, allowed)
    for name, peer in ready.items():
        if name != "attnc" and peer.exact:  # two rounded results: each may be off by `allowed`
            compare(row, problem, result, peer.call(), name, 2 * allowed)
    result_bytes = result.nbytes
    del result, statistics
    if not row.right:
        return
    calls = {name: contender.call for name, contender in ready.items()}
    times = side_by_side(calls, device, effort.samples, effort.seconds)
    for name, contender in ready.items():
        first = contender.first_seconds + (small_seconds if name == "attnc" else 0.0)
        peak = peak_bytes(contender.call, device)
        row.entries[name] = Entry(
            times=times[name],
            first_seconds=compiled.get(name, first),
            extra_bytes=None if peak is None else peak - result_bytes,
            build_seconds=None if contender.build is None else median_seconds(contender.build, device, BUILDS),
            built_bytes=contender.built_bytes,
            note=contender.note,
            compiled_beside_others=name in compiled,
        )


def compare_last_rows(row: Row, problem: Problem, result: Tensor, allowed: float) -> None:
    """Against the float64 reference of as many last rows as fit: fewer queries than keys are the last positions.

    Where a row's result depends on other rows of q there is no such part; then the small size is all that is compared.
    """
    if not rows_stand_alone(problem.pattern):
        return
    batch, heads, queries, _ = problem.q.shape
    pairs = CHECKED_PAIRS // elements_of_a_pair(problem.pattern, max(problem.k.shape[3], problem.v.shape[3]))
    count = max(1, min(queries, pairs // (batch * heads * problem.k.shape[2])))
    last = problem.q[:, :, queries - count :]
    settings = dict(problem.settings)
    for declared in problem.pattern.pattern.inputs:
        if "i" in declared.axes and declared.name in problem.inputs:
            axis = declared.axes.index("i")
            settings[declared.name] = problem.inputs[declared.name].narrow(axis, queries - count, count)
    expected = problem.pattern.reference(last, problem.k, problem.v, **settings)
    compare(row, problem, result[:, :, queries - count :], expected, "reference", allowed)

"""What came out, as a table on the screen, as Markdown and as JSON."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import attnc
from benchmarks.ceilings import Ceilings
from benchmarks.contenders import LABELS
from benchmarks.measuring import Entry, Row

MEGA = 1e6
NOTES = (
    "Times are medians in milliseconds, forward only, of samples taken by turns (every contender in every place of a "
    'round equally often); on a GPU the second-level cache is flushed before each. TFLOP/s and "live" count live pairs '
    "only. \"x\" is the other's median over attnc's.",
    '"dense" is torch\'s causal attention on the kernel that torch chooses: the same function in the causal rows only. '
    'FlexAttention is compiled; its block mask is built beforehand and "mask" is the time to build it once more, '
    "with the megabytes that it keeps.",
    '"extra" is the most memory that a call of attnc holds beyond its result, in megabytes: the rows\' statistics '
    '("of it stats") and whatever else.',
    '"first" is the time from nothing to a first result: for attnc reading the file, compiling it and its kernels (at '
    "two sizes); for FlexAttention its mask and its kernel. Caches on disk start empty, imports are not counted.",
    '"error" is the largest difference over the largest magnitude, among any 128 positions; each row was compared with '
    "the float64 reference at a small size (all positions) and at the timed size (the last ones), and in full with all "
    "contenders that compute the same.",
)


@dataclass(frozen=True)
class Place:
    """Where a run took place."""

    day: str
    device: str
    processors: int
    threads: int
    python: str
    torch: str
    triton: str
    attnc: str

    @classmethod
    def here(cls, device: str) -> Place:
        name = torch.cuda.get_device_name(device) if device.startswith("cuda") else f"CPU ({processor_name()})"
        return cls(
            day=date.today().isoformat(),
            device=name,
            processors=len(os.sched_getaffinity(0)),
            threads=torch.get_num_threads(),
            python=platform.python_version(),
            torch=torch.__version__,
            triton=installed("triton"),
            attnc=attnc.__version__,
        )

    def __str__(self) -> str:
        cores = f"{self.processors} cores, {self.threads} torch threads"
        versions = f"Python {self.python}, torch {self.torch}, triton {self.triton}, attnc {self.attnc}"
        return f"{self.device}, {cores}; {versions}; {self.day}"


def processor_name() -> str:
    """The CPU's name, as far as the system tells it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def headers(rows: Sequence[Row], ceilings: Ceilings | None = None) -> list[str]:
    peers = peers_of(rows)
    names = ["row", "size", "live", "attnc", *(["floor", "of it"] if ceilings else []), "TFLOP/s"]
    for peer in peers:
        names += [LABELS[peer], "x"]
    if built(rows):
        names += ["mask", "mask MB"]
    if on_gpu(rows):
        names += ["extra MB", "of it stats"]
    return [*names, "first: attnc" + "".join(f" / {LABELS[peer]}" for peer in peers if peer == "flex"), "error", "aim"]


def line(row: Row, rows: Sequence[Row], ceilings: Ceilings | None = None) -> list[str]:
    """The cells of a row, in the order of `headers`."""
    shape = row.work.timed.shape
    cells = [row.work.name, f"{shape} {str(row.dtype).removeprefix('torch.')}"]
    if "attnc" not in row.entries:
        empty = len(headers(rows, ceilings)) - 3
        return [*cells, *[""] * empty, row.failure or "WRONG: " + worst(row)]
    own = row.entries["attnc"]
    pairs = shape.batch * shape.heads * shape.queries * shape.keys
    live = "-" if row.live_pairs is None else f"{row.live_pairs / pairs:.3%}"
    cells += [live, f"{own.times.median:.3f}"]
    if ceilings:
        floor, limit = ceilings.floor(row.least_bytes, row.operations)
        cells += [f"{floor:.3f} ({limit})", f"{floor / own.times.median:.0%}"]
    cells.append("-" if row.teraflops is None else f"{row.teraflops:.3g}")
    for peer in peers_of(rows):
        times = row.times_faster(peer)
        cells += ["-", ""] if times is None else [f"{row.entries[peer].times.median:.3f}", f"{times:.2f}"]
    if built(rows):
        cells += mask_cells(row)
    if on_gpu(rows):
        cells += [megabytes(own.extra_bytes), megabytes(row.statistics_bytes)]
    firsts = [own] + [row.entries[peer] for peer in peers_of(rows) if peer == "flex" and peer in row.entries]
    return [*cells, " / ".join(f"{entry.first_seconds:.1f} s" for entry in firsts), worst(row), verdict(row)]


def mask_cells(row: Row) -> list[str]:
    for entry in row.entries.values():
        if entry.build_seconds is not None:
            return [f"{entry.build_seconds * 1e3:.2f}", megabytes(entry.built_bytes)]
    return ["", ""]


def peers_of(rows: Sequence[Row]) -> list[str]:
    """Contenders other than attnc that took part in some row."""
    return [name for name in LABELS if name != "attnc" and any(name in row.entries for row in rows)]


def built(rows: Sequence[Row]) -> bool:
    return any(entry.build_seconds is not None for row in rows for entry in row.entries.values())


def on_gpu(rows: Sequence[Row]) -> bool:
    return any(entry.extra_bytes is not None for row in rows for entry in row.entries.values())


def megabytes(count: int | None) -> str:
    return "" if count is None else f"{count / MEGA:.2f}"


def worst(row: Row) -> str:
    """The check that comes closest to what is allowed, or is furthest beyond it."""
    if not row.checks:
        return ""
    check = max(row.checks, key=lambda check: check.error / check.allowed)
    return f"{check.error:.1e} of {check.allowed:.1e} ({check.against})"


def verdict(row: Row) -> str:
    """How the row stands to what it should reach."""
    said = []
    aim = row.work.aim
    if aim is not None:
        reached = row.times_faster(aim.peer)
        state = "not measured" if reached is None else "met" if reached >= aim.times else "missed"
        said.append(f"{aim.times:g}x {LABELS[aim.peer]}: {state}")
    if row.work.spare is not None and (excess := row.excess_bytes) is not None:
        state = "met" if excess <= row.work.spare else "missed"
        said.append(f"{megabytes(excess)} MB beyond result and statistics, at most {row.work.spare / MEGA:g}: {state}")
    return "; ".join(said)


def show(rows: Sequence[Row], ceilings: Ceilings | None = None) -> None:
    """The table on the screen; as wide as it needs where that is a file."""
    table = Table(*headers(rows, ceilings))
    for row in rows:
        table.add_row(*line(row, rows, ceilings), style=None if row.right else "red")
    console = Console()
    if not console.is_terminal:
        console = Console(width=console.measure(table, options=console.options.update(width=1000)).maximum)
    console.print(table)


def markdown(
    suite: str, rows: Sequence[Row], place: Place, remarks: Sequence[str], ceilings: Ceilings | None = None
) -> str:
    """The same as text, with what is needed to judge it."""
    names = headers(rows, ceilings)
    lines = [f"# Suite `{suite}`", "", f"{place}.", "", *remarks, *([""] if remarks else [])]
    lines += [f"| {' | '.join(names)} |", "|" + " --- |" * len(names)]
    lines += [f"| {' | '.join(line(row, rows, ceilings))} |" for row in rows]
    lines += ["", *(f"- {note}" for note in NOTES)]
    if ceilings:
        lines.append(f'- "floor": {ceilings}.')
    counts = [len(entry.times.samples) for row in rows for entry in row.entries.values()]
    if counts:
        lines.append(f"- {min(counts)} to {max(counts)} samples each. Quartiles and the samples are in the JSON file.")
    lines += [f"- {remark}" for remark in remarks_of(rows)]
    return "\n".join(lines) + "\n"


def remarks_of(rows: Sequence[Row]) -> list[str]:
    """Who is missing from which row, and how the masks were built."""
    said: dict[str, list[str]] = {}
    for row in rows:
        for name, reason in row.absent.items():
            said.setdefault(f"{LABELS[name]}: {reason}", []).append(row.work.name)
        for name, entry in row.entries.items():
            if entry.note:
                said.setdefault(f"{LABELS[name]}: {entry.note}", []).append(row.work.name)
    if any(entry.compiled_beside_others for row in rows for entry in row.entries.values()):
        said["FlexAttention's first results were timed with all rows compiling at once, a process each"] = []
    return [f"{text} ({', '.join(names)})." if names else f"{text}." for text, names in said.items()]


def data(suite: str, rows: Sequence[Row], place: Place, ceilings: Ceilings | None = None) -> str:
    """Everything, as JSON. `ceilings`: what the machine can do at most."""
    found = {"suite": suite, "place": asdict(place), "ceilings": ceilings and asdict(ceilings)}
    return json.dumps({**found, "rows": [row_data(row) for row in rows]}, indent=1)


def row_data(row: Row) -> dict[str, Any]:
    aim = row.work.aim
    return {
        "name": row.work.name,
        "pattern": row.work.pattern,
        "shape": asdict(row.work.timed.shape),
        "parameters": dict(row.work.timed.parameters),
        "dtype": str(row.dtype).removeprefix("torch."),
        "live_pairs": row.live_pairs,
        "operations": row.operations,
        "least_bytes": row.least_bytes,
        "right": row.right,
        "failure": row.failure,
        "checks": [asdict(check) | {"agrees": check.agrees} for check in row.checks],
        "contenders": {name: entry_data(entry) for name, entry in row.entries.items()},
        "absent": row.absent,
        "statistics_bytes": row.statistics_bytes,
        "aim": None if aim is None else asdict(aim) | {"reached": row.times_faster(aim.peer)},
    }


def entry_data(entry: Entry) -> dict[str, Any]:
    found = asdict(entry)
    found["times"] = {
        "unit": "ms",
        "median": entry.times.median,
        "quartiles": entry.times.quartiles,
        "least": entry.times.least,
        "samples": entry.times.samples,
    }
    return found

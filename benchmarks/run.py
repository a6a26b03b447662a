"""Runs a suite: `python -m benchmarks.run fixed --json out.json` (and out.md beside it, and out.svg with --lengths).

On a CUDA device it runs the suite's rows for a GPU, else those for a CPU. Exits with 1 if a result is wrong or a row
could not be run; a missed aim is reported and is no error. `--backward` times gradients as `benchmarks.training` does.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.work import Work

SUITES = tuple(sorted(path.stem for path in (Path(__file__).parent / "suites").glob("[a-z]*.py")))
GRID = "height"  # a parameter that ties the number of tokens
CACHES = ("ATTNC_CACHE_DIR", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs what the arguments say; returns the exit status."""
    arguments = read(argv)
    import torch  # here, so that --help is quick and the caches are set first

    from benchmarks.compiling import chosen_works

    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    works = chosen_works(arguments.suite, device, arguments.quick, arguments.row)
    if not works:
        print(f"no row of `{arguments.suite}` has a name that contains {arguments.row}", file=sys.stderr)
        return 2
    works = [against(work, arguments.against) for work in at_lengths(works, arguments.lengths)]
    return run(arguments, works, device)


def at_lengths(works: Sequence[Work], lengths: Sequence[int] | None) -> list[Work]:
    """The rows at other numbers of tokens, those that have another one."""
    if not lengths:
        return list(works)
    return [work.at(length) for work in works if GRID not in work.timed.parameters for length in lengths]


def against(work: Work, names: str | None) -> Work:
    """The row beside the contenders that were asked for."""
    from dataclasses import replace

    from benchmarks.contenders import GROUPS

    if names is None:
        return work
    chosen = [one for name in names.split(",") for one in GROUPS.get(name, (name,))]
    return replace(work, peers=tuple(chosen), aim=None)


def run(arguments: argparse.Namespace, works: Sequence[Work], device: str) -> int:
    """Measures the rows one after the other, and writes what came out after each."""
    import torch

    from benchmarks import report
    from benchmarks.ceilings import Ceilings
    from benchmarks.compiling import compile_beside
    from benchmarks.measuring import Effort, Row, measure

    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    effort = Effort(3, 0.0) if arguments.quick else Effort(arguments.samples, arguments.seconds, arguments.preparing)
    started = time.perf_counter()
    compiled = compile_beside(arguments.suite, device, arguments.quick, works, arguments.jobs)
    warm_up(device)
    place = report.Place.here(device)
    ceilings = None if arguments.quick else Ceilings.here(device, dtype)
    rows: list[Row] = []
    for work in works:
        row = measure(work, device, dtype, effort, compiled.get(work.name, {}))
        rows.append(row)
        print(f"[{time.perf_counter() - started:4.0f} s] {summary(row)}", flush=True)
        if arguments.json:  # after every row, so that a run that is cut off leaves what it has
            arguments.json.write_text(report.data(arguments.suite, rows, place, ceilings), "utf-8")
            text = report.markdown(arguments.suite, rows, place, arguments.remark, ceilings)
            arguments.json.with_suffix(".md").write_text(text, "utf-8")
    report.show(rows, ceilings)
    for remark in report.remarks_of(rows):
        print(remark)
    right = all(row.right for row in rows)
    if arguments.json and arguments.lengths:
        from benchmarks.plot import draw

        draw(json.loads(arguments.json.read_text("utf-8")), arguments.json.with_suffix(".svg"))
    if arguments.backward:
        from benchmarks import training

        target = arguments.json and arguments.json.with_name(f"{arguments.json.stem}-backward.md")
        right = training.run(works, target) and right
    return 0 if right else 1


def read(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=(__doc__ or "").partition("\n\n")[2])
    parser.add_argument("suite", choices=SUITES)
    options(parser)
    return parser.parse_args(argv)


def options(parser: argparse.ArgumentParser) -> None:
    """What a run of a suite and of one file have in common."""
    parser.add_argument("--device", help="cpu or cuda; default: cuda where there is one")
    parser.add_argument("--row", action="append", metavar="TEXT", help="rows whose name contains this; repeatable")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write FILE, and Markdown beside it")
    parser.add_argument("--against", metavar="NAMES", help="contenders: sdpa, cudnn, flash, dense, flex, fla, natten")
    parser.add_argument("--lengths", type=lengths, metavar="N,N", help="the rows at these numbers of tokens; a plot")
    parser.add_argument("--backward", action="store_true", help="time gradients, too (CUDA)")
    parser.add_argument("--quick", action="store_true", help="small sizes and few samples, to see that all works")
    parser.add_argument("--samples", type=int, default=20, help="samples of each contender, at least")
    parser.add_argument("--seconds", type=float, default=1.5, help="samples beyond that, for so long a row")
    parser.add_argument("--preparing", type=float, default=60.0, help="seconds to a peer's first result; 0: any")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes that compile FlexAttention")
    parser.add_argument("--remark", action="append", default=[], help="a line for the Markdown file; repeatable")


def lengths(text: str) -> list[int]:
    """Numbers, by commas."""
    return [int(part) for part in text.split(",")]


def summary(row: object) -> str:
    """One line that a row is done."""
    from benchmarks.measuring import Row
    from benchmarks.report import verdict, worst

    assert isinstance(row, Row)
    if not row.entries:
        return f"{row.work.name}: {row.failure or 'WRONG, not timed: ' + worst(row)}"
    times = ", ".join(f"{name} {entry.times.median:.3f} ms" for name, entry in row.entries.items())
    return "; ".join(part for part in (f"{row.work.name}: {times}", verdict(row)) if part)


def warm_up(device: str) -> None:
    """Runs a pattern that no row uses, so that the first row is not charged with imports and the driver's start."""
    import torch

    import attnc

    pattern = attnc.compile("pattern nothing:\n    out = softmax[j](q @ k * scale * 0.5) @ v\n").patterns["nothing"]
    q = torch.zeros(1, 1, 16, 16, device=device)
    pattern(q, q, q)


@contextlib.contextmanager
def fresh_caches() -> Iterator[None]:
    """Empty caches on disk, this process's own: what is compiled is compiled anew, and told with its time."""
    before = {name: os.environ.get(name) for name in CACHES}
    with tempfile.TemporaryDirectory(prefix="attnc-benchmarks-") as folder:
        os.environ.update({name: str(Path(folder, name.lower())) for name in CACHES})
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # one kernel a row; rows are compiled in parallel
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


if __name__ == "__main__":
    with fresh_caches():
        status = main()
    sys.exit(status)

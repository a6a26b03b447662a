"""One file beside others: `python -m benchmarks.bench FILE --against sdpa,flex,fla`; also `attnc bench FILE ..`.

A file of examples/ that suites have rows for is measured as there. Any other is run at the sizes of its `# run:` line,
with inputs drawn as `attnc check` draws them; FlexAttention takes no part in that, since no mask is written for it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.run import SUITES, against, at_lengths, fresh_caches, options, run

if TYPE_CHECKING:
    from benchmarks.work import Work


def main(argv: Sequence[str] | None = None) -> int:
    """Runs what the arguments say; returns the exit status."""
    parser = argparse.ArgumentParser(prog="attnc bench", description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("file", type=Path, metavar="FILE")
    options(parser)
    arguments = parser.parse_args(argv)
    import torch

    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    arguments.suite, works = found_rows(arguments.file, device)
    works = [work for work in works if arguments.row is None or any(name in work.name for name in arguments.row)]
    works = [work.quick() for work in works] if arguments.quick else works
    works = [against(work, arguments.against) for work in at_lengths(works, arguments.lengths)]
    with fresh_caches():
        return run(arguments, works, device)


def found_rows(file: Path, device: str) -> tuple[str, list[Work]]:
    """(Suite, its rows of this file), or one row made from the file's own lines."""
    from benchmarks.compiling import suite_module
    from benchmarks.work import EXAMPLES

    if file.resolve().parent == EXAMPLES:
        for suite in SUITES:
            rows = [work for work in suite_module(suite).works(device) if work.pattern == file.stem]
            if rows:
                return suite, rows
    return SUITES[0], [row_of(file, device)]


def row_of(file: Path, device: str) -> Work:
    """The file's main pattern at the sizes of its `# run:` line, compared at those of its first `# check:` line."""
    import attnc
    from attnc.runtime.tools.inputs import Shape
    from attnc.runtime.tools.settings import Setting, settings
    from benchmarks.work import Size, drawn

    pattern = attnc.load(file).main
    if pattern is None:
        raise SystemExit(f"{file} holds several patterns and none of its name")
    timed = next(iter(settings(pattern.pattern, "run", pattern.known)), Setting())
    small = next(iter(settings(pattern.pattern, "check", pattern.known)), Setting())
    whole = Shape.square(2, 16, 8192, 128) if device.startswith("cuda") else Shape.square(1, 4, 4096, 64)
    sizes = Size(whole.updated(timed.sizes), timed.parameters)
    tiny = Size(Shape.square(1, 2, 200, 64).updated(small.sizes), small.parameters)
    return drawn(pattern.pattern.name, sizes, tiny, ("dense",), ranges=small.ranges, path=file)


if __name__ == "__main__":
    sys.exit(main())

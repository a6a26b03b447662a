"""The command line: `attnc check | run | explain | kernel | fmt`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.syntax import Syntax
from rich.table import Table

from attnc.dsl.diagnostics import AttnError
from attnc.runtime.options import (
    DTYPES,
    UsageError,
    chosen_setting,
    interpret_without_cuda,
    known_device,
    known_dtype,
    run_setting,
    select,
    short,
)

if TYPE_CHECKING:
    from attnc.runtime.comparison import Outcome, Target
    from attnc.runtime.pattern import CompiledPattern

app = typer.Typer(
    name="attnc",
    help="A compiler for attention: a few equations in a .attn file become fused kernels.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Files = Annotated[list[Path], typer.Argument(metavar="FILE..", help=".attn files", show_default=False)]
File = Annotated[Path, typer.Argument(metavar="FILE", help="a .attn file", show_default=False)]
Name = Annotated[str | None, typer.Option("--pattern", metavar="NAME", help="the pattern, where a file has several")]
Sets = Annotated[list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="a parameter; repeatable")]
Sizes = Annotated[str | None, typer.Option("--shape", metavar="B,H,N,D", help="batch, heads, length, width")]
Device = Annotated[str | None, typer.Option("--device", help="cpu or cuda; default: cuda where there is one")]
Dtype = Annotated[str | None, typer.Option("--dtype", help=", ".join(DTYPES))]


def reports_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Mistakes of the user's files and options are printed, without a traceback, and exit with 1."""

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except AttnError as error:
            fail(str(error))
        except UsageError as error:
            fail(f"error: {error}")

    return run


def fail(message: str) -> NoReturn:
    """Prints to the error stream and exits with 1."""
    print(message, file=sys.stderr)
    raise typer.Exit(1)


@app.command()
@reports_errors
def check(
    files: Files,
    pattern: Name = None,
    set_: Sets = None,
    shape: Sizes = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Type-check and compile files, and compare every back end with the float64 reference.

    Exits with 1 if a file has a mistake or a result falls short.
    """
    interpret_without_cuda()
    from attnc.runtime.comparison import targets

    console = Console()
    table = Table("pattern", "back end", "type", "cases", "error", "allowed", "", title=None)
    failures: list[str] = []
    for file in files:
        try:
            chosen_patterns = select(file, pattern, all_of_them=True)
        except AttnError as error:
            failures.append(str(error))
            table.add_row(file.stem, "", "", "", "", "", "[red]not checked[/]")
            continue
        for one in chosen_patterns:
            with console.status(f"{file.name}: {one.__name__}"):
                check_pattern(one, set_, shape, targets(known_device(device), known_dtype(dtype)), table, failures)
    console.print(table)
    for failure in failures:
        print(f"\n{failure}", file=sys.stderr)
    if failures:
        raise typer.Exit(1)


def check_pattern(
    pattern: CompiledPattern,
    set_: list[str] | None,
    shape: str | None,
    targets: list[Target],
    table: Table,
    failures: list[str],
) -> None:
    """Adds a row a target to the table, and what went wrong to `failures`."""
    from attnc.runtime.comparison import cases, compare
    from attnc.runtime.settings import settings

    try:
        chosen = chosen_setting(pattern, set_, shape)
        tried = list(cases(pattern, chosen, settings(pattern.pattern, "check")))
        for target in targets:
            outcomes = [compare(case, target) for case in tried]
            worst = max(outcomes, key=lambda outcome: outcome.error / outcome.allowed)
            verdict = "[green]ok[/]" if worst.agrees else "[red]falls short[/]"
            row = (str(len(outcomes)), f"{worst.error:.1e}", f"{worst.allowed:.1e}", verdict)
            table.add_row(pattern.__name__, target.label, short(target.dtype), *row)
            failures += [shortfall(outcome) for outcome in outcomes if not outcome.agrees]
    except AttnError as error:
        table.add_row(pattern.__name__, "", "", "", "", "", "[red]not compiled[/]")
        failures.append(str(error))


def shortfall(outcome: Outcome) -> str:
    """One line that says how to see a failure again."""
    case = outcome.case
    values = "".join(f" {name}={value}" for name, value in case.setting.parameters.items())
    where = f"{case.pattern.__name__} on {outcome.target.label} in {short(outcome.target.dtype)}, {case.shape}{values}"
    return f"falls short: {where}: error {outcome.error:.2e}, allowed {outcome.allowed:.2e}"


@app.command()
@reports_errors
def run(
    file: File, pattern: Name = None, set_: Sets = None, shape: Sizes = None, device: Device = None, dtype: Dtype = None
) -> None:
    """Compile a pattern, run it on made tensors, and report time, live fraction and error."""
    import torch

    from attnc.runtime.measure import measure

    console = Console()
    one = select(file, pattern)[0]
    place = known_device(device) or ("cuda" if torch.cuda.is_available() else "cpu")
    kind = known_dtype(dtype) or (torch.bfloat16 if place == "cuda" else torch.float32)
    setting, sizes = run_setting(one, set_, shape, place)
    with console.status(f"running {one.__name__}"):
        found = measure(one, sizes, setting, place, kind)
    table = Table.grid(padding=(0, 2))
    table.add_row("pattern", str(one.__name__) + "".join(f" {n}={v}" for n, v in setting.parameters.items()))
    table.add_row("shape", f"{found.shape}, {short(kind)} on {place}")
    table.add_row("time", f"{found.milliseconds:.3f} ms (median of {found.runs})")
    table.add_row("live fraction", f"{found.live_fraction:.4%} of the query-key pairs")
    agrees = found.error is None or found.error <= found.allowed
    if found.error is None:
        table.add_row("error", "not measured: at this length the float64 reference does not fit; try a smaller --shape")
    else:
        rows = f"last {found.rows_compared} rows" if found.rows_compared < sizes.queries else "all rows"
        table.add_row("error", f"{found.error:.1e} (allowed {found.allowed:.1e}), {rows} against float64")
    console.print(table)
    if not agrees:
        fail("error: the result falls short of the reference")


@app.command()
@reports_errors
def explain(
    file: File,
    pattern: Name = None,
    set_: Sets = None,
    shape: Sizes = None,
    device: Device = None,
    dtype: Dtype = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="also print the graph after every stage")] = False,
) -> None:
    """Say what each stage of the compiler did and declined, and what a call costs, as formulas and numbers."""
    from attnc.runtime.explanation import explain_at

    one = select(file, pattern)[0]
    kind = known_dtype(dtype)
    setting, sizes = run_setting(one, set_, shape, known_device(device) or "cpu")
    print(explain_at(one, sizes, setting, kind, verbose=verbose))


@app.command()
@reports_errors
def kernel(
    file: File,
    pattern: Name = None,
    plain: Annotated[bool, typer.Option("--plain", help="no colours, whatever the terminal")] = False,
) -> None:
    """Print the generated Triton kernels."""
    one = select(file, pattern)[0]
    for text in one.kernels.values():
        if plain or not sys.stdout.isatty():
            print(text)
        else:
            Console().print(Syntax(text, "python"))


@app.command()
@reports_errors
def fmt(
    files: Annotated[
        list[str], typer.Argument(metavar="FILE..", help=".attn files; - reads and writes the standard streams")
    ],
    check_: Annotated[bool, typer.Option("--check", help="change nothing; exit with 1 if a file would change")] = False,
) -> None:
    """Format files in place."""
    from attnc.dsl.format import format_source
    from attnc.dsl.parse import read_source
    from attnc.dsl.source import Source

    changed, mistakes = [], []
    for name in files:
        try:
            source = Source("<stdin>", sys.stdin.read()) if name == "-" else read_source(Path(name))
            text = format_source(source)
        except AttnError as error:
            mistakes.append(str(error))
            continue
        if name == "-" and not check_:
            sys.stdout.write(text)
        elif text != source.text:
            changed.append(name)
            if not check_:
                write(Path(name), text)
    for name in changed:
        print(f"{'would change' if check_ else 'formatted'} {name}")
    if mistakes:
        fail("\n\n".join(mistakes))
    if check_ and changed:
        raise typer.Exit(1)


def write(path: Path, text: str) -> None:
    """Replaces the text of a file."""
    try:
        path.write_text(text, encoding="utf-8", newline="\n")
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from None


def main() -> None:
    """Entry point of `attnc` and `python -m attnc`."""
    app()

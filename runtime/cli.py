"""The command line: `attnc check | run | explain | tune | kernel | draw | fmt | lsp | bench | examples`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich import box
from rich.console import Console
from rich.syntax import Syntax
from rich.table import Table

import attnc
from attnc.dsl.diagnostics import AttnError
from attnc.runtime.tools.extras import MissingExtraError, require_library
from attnc.runtime.tools.options import (
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
    pass

WIDTH = 160  # columns of a table that goes to a file or a pipe

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
        except (UsageError, MissingExtraError) as error:
            fail(f"error: {error}")

    return run


def fail(message: str) -> NoReturn:
    """Prints to the error stream and exits with 1."""
    print(message, file=sys.stderr)
    raise typer.Exit(1)


def print_version(wanted: bool) -> None:
    """What `--version` does."""
    if wanted:
        print(f"attnc {attnc.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Options before the command."""


@app.command()
def examples() -> None:
    """Print the folder of the mechanisms that come with attnc: `attnc check "$(attnc examples)"/*.attn`."""
    print(Path(attnc.__file__).parent / "examples")


@app.command()
@reports_errors
def check(
    files: Files,
    pattern: Name = None,
    set_: Sets = None,
    shape: Sizes = None,
    device: Device = None,
    dtype: Dtype = None,
    draws: Annotated[int, typer.Option(min=1, help="tensors for each call, one after the other")] = 1,
) -> None:
    """Type-check and compile files, and compare every back end, result and gradients, with the float64 reference.

    Exits with 1 if a file has a mistake or a result falls short.
    """
    interpret_without_cuda()
    from attnc.runtime.tools.check_command import checked
    from attnc.runtime.tools.comparison import targets

    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    places = targets(known_device(device), known_dtype(dtype))
    if not places:
        raise UsageError(f"no back end runs {dtype} on {device or 'this machine'}")
    columns = [f"{place.label}\n{short(place.dtype)}" for place in places]
    title = "largest error against float64, of results and of gradients"
    rows: list[list[str]] = []
    failures: list[str] = []
    remarks: list[str] = []
    for file in files:
        try:
            for one in select(file, pattern, all_of_them=True):
                with console.status(f"{file.name}: {one.__name__}"):
                    rows.append(checked(one, chosen_setting(one, set_, shape), places, draws, failures, remarks))
        except AttnError as error:
            rows.append([file.stem, "", "", *("" for _ in places), "[red]not checked[/]"])
            failures.append(str(error))
    if any(calls for _, _, calls, *_ in rows):  # else the mistakes alone are to be read
        table = Table("pattern", "causal", "calls", *columns, "", title=title, box=box.SIMPLE)
        for row in rows:
            table.add_row(*row)
        console.print(table)
    for remark in remarks:
        print(remark)
    if failures:
        fail("\n\n".join(failures))


@app.command()
@reports_errors
def run(
    file: File, pattern: Name = None, set_: Sets = None, shape: Sizes = None, device: Device = None, dtype: Dtype = None
) -> None:
    """Compile a pattern, run it on made tensors, and report time, live fraction and error."""
    import torch

    from attnc.runtime.tools.measure import measure

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
    several = sum(len(plan.branches) for plan in one.program.plans) > 1
    added = ", all branches added" if several else ""
    table.add_row("live fraction", f"{found.live_fraction:.4%} of the query-key pairs{added}")
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
    measure: Annotated[bool, typer.Option("--measure", help="times of kernels beside the predicted (CUDA)")] = False,
) -> None:
    """Say what each stage of the compiler did and declined, and what a call costs, as formulas and numbers."""
    import torch

    from attnc.runtime.tools.explanation import explain_at

    one = select(file, pattern)[0]
    place = known_device(device) or ("cuda" if measure else "cpu")
    if measure and not (place.startswith("cuda") and torch.cuda.is_available()):
        raise UsageError("--measure times kernels by events of a CUDA device, and there is none here")
    kind = known_dtype(dtype) or (torch.bfloat16 if place.startswith("cuda") else torch.float32)
    setting, sizes = run_setting(one, set_, shape, place)
    print(explain_at(one, sizes, setting, kind, device=place, verbose=verbose, measure=measure))


@app.command()
@reports_errors
def tune(
    file: File,
    pattern: Name = None,
    set_: Sets = None,
    shape: Sizes = None,
    device: Device = None,
    dtype: Dtype = None,
    most: Annotated[int, typer.Option("--most", min=2, help="tile shapes of a kernel that are measured")] = 6,
) -> None:
    """Measure tile shapes for a pattern's kernels at these sizes, and keep the fastest for later calls like it."""
    from attnc.runtime.tools.tuning_command import tune_at, tuned_on, tuning_table

    one = select(file, pattern)[0]
    place = tuned_on(known_device(device))
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    setting, sizes = run_setting(one, set_, shape, place)
    with console.status(f"tuning {one.__name__}") as status:
        outcomes = tune_at(one, sizes, setting, place, known_dtype(dtype), most, status.update)
    if outcomes:
        console.print(tuning_table(one.__name__, outcomes))
    else:
        console.print(f"no kernel of {one.__name__} has tile shapes to choose from: only attention's have")


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


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def bench(context: typer.Context) -> None:
    """Time a file beside other implementations: `attnc bench FILE --against sdpa,flex,fla`; --help says more."""
    try:
        from benchmarks.bench import main as run
    except ModuleNotFoundError:
        fail("the benchmarks are in attnc's repository, not in the installed package: run it there")
    raise typer.Exit(run(context.args))


@app.command()
@reports_errors
def draw(
    file: File,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="PICTURE", help=".svg, .png or .pdf; default: NAME.svg")
    ] = None,
    pattern: Name = None,
    set_: Sets = None,
    shape: Sizes = None,
    weights: Annotated[
        bool | None,
        typer.Option(
            "--weights/--pairs", help="the weight of every key, or only whether it has one", show_default=False
        ),
    ] = None,
    graph: Annotated[bool, typer.Option("--graph", help="what the pattern computes, as a graph")] = False,
    tile: Annotated[int | None, typer.Option("--tile", min=1, help="rows and keys of a tile")] = None,
    tensors: Annotated[
        Path | None, typer.Option("--tensors", metavar="FILE", help="q, k and inputs: a dict that torch.save wrote")
    ] = None,
) -> None:
    """Draw which keys every query sees, pair by pair and in tiles, per head where heads differ.

    Weights of keys are drawn of given tensors, and where no key, or only every later one, is left out. Parameters that
    are not set are those of the file's `# draw:` line, of its first `# check:` line, or small, so that structure shows.
    """
    from attnc.runtime.tools.picture_command import Request, write_picture

    one = select(file, pattern)[0]
    request = Request(chosen_setting(one, set_, shape), weights, graph, tile, tensors)
    print(write_picture(one, request, output or Path(f"{one.__name__}.svg")))


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


@app.command()
@reports_errors
def lsp() -> None:
    """Serve an editor over the standard streams: mistakes, types, names, formatting."""
    require_library("pygls")
    from attnc.runtime.tools.language_server import serve

    serve()


def write(path: Path, text: str) -> None:
    """Replaces the text of a file."""
    try:
        path.write_text(text, encoding="utf-8", newline="\n")
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from None


def main() -> None:
    """Entry point of `attnc` and `python -m attnc`."""
    app()

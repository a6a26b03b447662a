"""The demo without its model: small, on made tensors."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from rich.console import Console

DEMO = Path(__file__).resolve().parent.parent / "examples" / "demo_smollm.py"


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo_smollm", DEMO)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "demo_smollm", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "TOKENS", 150)
    monkeypatch.setattr(module, "LAYERS", 2)
    monkeypatch.setattr(module, "NEEDED", ("rich", "no_such_package"))
    return module


def test_without_its_model_the_demo_says_so_and_runs_on_made_tensors(
    demo: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    demo.main()
    printed = capsys.readouterr().out
    assert "not installed: no_such_package; running on made tensors" in printed
    assert "made tensors, 150 tokens" in printed
    for label in ("torch", "causal", "sliding_window(window=128)", "demo_hybrid(sinks=4, window=64, stride=8)"):
        assert f"│ {label} " in printed


def test_live_fractions_are_those_of_the_masks(demo: ModuleType) -> None:
    i, j = torch.arange(150)[:, None], torch.arange(150)
    window = (j <= i) & (i - j < 128)
    sinks = (j <= i) & ((i - j < 128) | (j < 4))
    live = {row.label: row.live for row in demo.rows(*demo.made_tensors(torch.device("cpu")))}
    assert live["causal"] == pytest.approx((j <= i).double().mean().item())
    assert live["sliding_window(window=128)"] == pytest.approx(window.double().mean().item())
    assert live["streaming(sinks=4, window=128)"] == pytest.approx(sinks.double().mean().item())


def test_another_attention_than_the_replaced_one_fails(demo: ModuleType) -> None:
    table = demo.run_tensors(Console(quiet=True), torch.device("cpu"))
    demo.show(Console(quiet=True), table, "fine")
    table[1].output = table[1].output + 1e-2
    with pytest.raises(SystemExit, match="not the attention that it replaces"):
        demo.show(Console(quiet=True), table, "not fine")

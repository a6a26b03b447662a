"""`from patterns import longformer` finds patterns/longformer.attn."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import attnc
from attnc.runtime.pattern import CompiledPattern

CAUSAL = "pattern causal:\n    out = softmax[j](q @ k * scale where j <= i) @ v\n"
TWO = CAUSAL + "pattern full:\n    out = softmax[j](q @ k * scale) @ v\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("zoo_patterns", "zoo_package", "zoo_single", "zoo_both"):
            del sys.modules[name]


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    importlib.invalidate_caches()


def test_a_file_in_a_plain_folder(folder: Path) -> None:
    write(folder / "zoo_patterns/causal.attn", CAUSAL)
    from zoo_patterns import causal  # type: ignore[import-not-found]
    from zoo_patterns.causal import causal as pattern  # type: ignore[import-not-found]

    assert isinstance(pattern, CompiledPattern)
    assert causal.causal is pattern
    assert causal.__file__ == str(folder / "zoo_patterns/causal.attn")
    q = torch.randn(1, 2, 5, 16)
    assert torch.equal(causal.reference(q, q, q), pattern.reference(q, q, q))
    assert inspect.signature(causal) == inspect.signature(pattern)


def test_a_file_at_the_top_and_inside_of_packages(folder: Path) -> None:
    write(folder / "zoo_single.attn", CAUSAL)
    write(folder / "zoo_package/__init__.py", "")
    write(folder / "zoo_package/patterns/__init__.py", "from zoo_package.patterns import causal\n")
    write(folder / "zoo_package/patterns/causal.attn", CAUSAL)
    import zoo_single  # type: ignore[import-not-found]
    from zoo_package.patterns import causal  # type: ignore[import-not-found]

    assert causal.__name__ == "zoo_package.patterns.causal"
    assert zoo_single.__spec__.origin == str(folder / "zoo_single.attn")
    assert list(zoo_single.patterns) == ["causal"]


def test_a_file_of_several_patterns_is_callable_as_its_namesake(folder: Path) -> None:
    write(folder / "zoo_patterns/causal.attn", TWO)
    write(folder / "zoo_patterns/others.attn", TWO)
    from zoo_patterns import causal, others

    assert causal.main is causal.causal
    assert others.main is None
    with pytest.raises(TypeError, match="holds several patterns, call one: causal, full"):
        others(None, None)
    with pytest.raises(AttributeError, match="no pattern `explain`: it holds causal, full"):
        others.explain  # noqa: B018


def test_python_wins_over_attn_and_attn_over_a_folder(folder: Path) -> None:
    write(folder / "zoo_both/causal.attn", CAUSAL)
    write(folder / "zoo_both/causal.py", "which = 'python'\n")
    write(folder / "zoo_both/full.attn", TWO)
    write(folder / "zoo_both/full/readme.txt", "")
    from zoo_both import causal, full  # type: ignore[import-not-found]

    assert causal.which == "python"
    assert list(full.patterns) == ["causal", "full"]


def test_a_reload_takes_the_new_text(folder: Path) -> None:
    write(folder / "zoo_patterns/causal.attn", TWO)
    from zoo_patterns import causal

    write(folder / "zoo_patterns/causal.attn", CAUSAL)
    assert list(importlib.reload(causal).patterns) == ["causal"]
    assert not hasattr(causal, "full")


def test_a_traceback_ends_in_the_file(folder: Path) -> None:
    write(folder / "zoo_patterns/wrong.attn", CAUSAL.replace("scale", "scal"))
    with pytest.raises(attnc.AttnError) as caught:
        importlib.import_module("zoo_patterns.wrong")
    last = traceback.extract_tb(caught.value.__traceback__)[-1]
    assert (last.filename, last.lineno) == (str(folder / "zoo_patterns/wrong.attn"), 2)
    assert last.line == "out = softmax[j](q @ k * scal where j <= i) @ v"
    assert "zoo_patterns.wrong" not in sys.modules
    assert "help: did you mean `scale`?" in str(caught.value)


def test_a_traceback_of_a_text_shows_it() -> None:
    with pytest.raises(attnc.AttnError) as caught:
        attnc.compile(CAUSAL.replace("scale", "scal"))
    assert (
        traceback.extract_tb(caught.value.__traceback__)[-1].line == "out = softmax[j](q @ k * scal where j <= i) @ v"
    )


def test_a_missing_module_is_still_missing(folder: Path) -> None:
    write(folder / "zoo_patterns/causal.attn", CAUSAL)
    with pytest.raises(ModuleNotFoundError, match=r"zoo_patterns\.nothing"):
        importlib.import_module("zoo_patterns.nothing")


def test_importing_attnc_is_light() -> None:
    program = "import sys, attnc; print([m for m in ('torch', 'sympy', 'triton', 'lark', 'typer') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=Path.cwd())
    assert done.stdout.strip() == "[]"

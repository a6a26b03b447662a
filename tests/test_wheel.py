"""What `pip install` of a built wheel gives to somebody who has nothing else."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("attnc", "dsl", "compiler", "runtime", "examples", "pyproject.toml", "README.md", "LICENSE")
# Of every kind of step: a softmax, a list, a state, a recurrence, pools with an iteration.
CHECKED = ("causal", "moba", "retention", "gated_delta", "nystrom")


def done(*command: str | Path, cwd: Path) -> str:
    """What a command prints; it knows nothing of this checkout."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    found = subprocess.run(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=1500
    )
    assert found.returncode == 0, found.stdout
    return found.stdout


@pytest.mark.slow
def test_a_wheel_in_an_empty_environment_checks_its_examples(tmp_path: Path) -> None:
    """Installs torch anew: some minutes."""
    source = tmp_path / "source"
    source.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)
    done(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", "dist", source, cwd=tmp_path)
    (wheel,) = (tmp_path / "dist").glob("attnc-*.whl")
    done(sys.executable, "-m", "venv", "empty", cwd=tmp_path)
    programs = tmp_path / "empty" / "bin"
    constraints = ROOT / "constraints.txt"
    done(programs / "python", "-m", "pip", "install", "--quiet", "--constraint", constraints, wheel, cwd=tmp_path)
    folder = Path(done(programs / "attnc", "examples", cwd=tmp_path).strip())
    assert folder.is_relative_to(tmp_path / "empty")
    assert {path.name for path in folder.glob("*.attn")} == {path.name for path in (ROOT / "examples").glob("*.attn")}
    files = [folder / f"{name}.attn" for name in CHECKED]
    said = done(programs / "attnc", "check", *files, "--shape", "1,2,21,16", cwd=tmp_path)
    assert said.count(" ok ") == len(CHECKED), said
    assert "draw" in done(programs / "attnc", "--help", cwd=tmp_path)

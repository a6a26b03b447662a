"""Every example's kernels compile for a GPU, whether or not there is one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Bounds that are read from 64 bits; a selection of several tiles; lone tokens.
QUICK = ["prefix_lm", "dsa", "decode:strided", "decode:gated_delta"]
NAMES = sorted(path.stem for path in (ROOT / "examples").glob("*.attn"))


def failures(names: list[str], tmp_path: Path) -> str:
    """What the compiler says, in a process without the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path / "triton"), "ATTNC_CACHE_DIR": str(tmp_path / "attnc")}
    command = [sys.executable, "-W", "ignore", "-m", "tests.runtime.hopper_kernels", *names]
    made = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    return "" if made.returncode == 0 else made.stdout + made.stderr


def test_kernels_compile_without_a_device(tmp_path: Path) -> None:
    assert failures(QUICK, tmp_path) == ""


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_example_compiles_without_a_device(name: str, tmp_path: Path) -> None:
    assert failures([name], tmp_path) == ""

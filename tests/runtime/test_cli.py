"""The command line: what it prints, what it exits with, and never a traceback for a user's mistake."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

import attnc as package
from attnc.runtime.cli import app
from attnc.runtime.modules import compile
from attnc.runtime.tools import comparison, measure, tuning, tuning_command
from attnc.runtime.tools.settings import Setting, settings

EXAMPLES = Path(__file__).parents[2] / "examples"
CAUSAL = "pattern causal:\n    out = softmax[j](q @ k * scale where j <= i) @ v\n"
TWO = CAUSAL + "pattern near(width: int = 4):\n    out = softmax[j](q @ k * scale where abs(i - j) < width) @ v\n"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ATTNC_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "causal.attn").write_text(CAUSAL)
    (tmp_path / "two.attn").write_text(TWO)
    (tmp_path / "wrong.attn").write_text(CAUSAL.replace("scale", "scal"))
    (tmp_path / "latin.attn").write_bytes("# Größe\n".encode("latin-1"))
    (tmp_path / "deep.attn").write_text("pattern x:\n    out = " + "(" * 200_000)
    (tmp_path / "huge.attn").write_text("(" * 2**20)
    (tmp_path / "empty.attn").write_text("")
    (tmp_path / "l1.attn").write_text("pattern l1:\n    out = softmax[j](-sum[d](abs(q - k)) where j <= i) @ v\n")
    return tmp_path


def attnc(*arguments: str, text: str | None = None) -> Result:
    return CliRunner().invoke(app, arguments, input=text)


def test_check_compares_every_back_end() -> None:
    done = attnc("check", "causal.attn", "two.attn", "--device", "cpu")
    assert done.exit_code == 0, done.output
    rows = [line.split() for line in done.stdout.splitlines() if line.endswith(("ok", "ok  ")) or " ok" in line]
    assert [row[0] for row in rows] == ["causal", "causal", "near"]
    for place in ("executor", "interpreter" if not torch.cuda.is_available() else "executor"):
        assert place in done.stdout


def test_check_fails_where_a_result_falls_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "tolerance", lambda dtype, length: 1e-30)
    done = attnc("check", "causal.attn", "--dtype", "float64", "--shape", "1,2,5,16")
    assert done.exit_code == 1
    assert "falls short: causal on executor in float64, B1 H2 N5 D16: out: error" in done.stderr
    assert "falls short: causal on executor in float64, B1 H2 N5 D16: gradient of k: error" in done.stderr


def test_check_draws_as_often_as_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []
    compare = comparison.compare

    def counted(case: comparison.Case, target: comparison.Target, seed: int, **more: bool) -> list[comparison.Outcome]:
        seeds.append(seed)
        return compare(case, target, seed, **more)

    monkeypatch.setattr(comparison, "compare", counted)
    done = attnc("check", "causal.attn", "--dtype", "float64", "--shape", "1,1,5,16", "--draws", "3")
    assert done.exit_code == 0, done.output
    assert seeds == [0, 1, 2]


def test_check_goes_on_after_a_wrong_file() -> None:
    done = attnc("check", "wrong.attn", "l1.attn", "causal.attn", "--dtype", "float64", "--shape", "1,1,5,16")
    assert done.exit_code == 1
    for row in (r"wrong +not checked", r"l1 +yes +not compiled", r"causal +yes +1 +\S+ \S+ +ok"):
        assert re.search(row, done.stdout), done.stdout
    assert "error[unknown-name]" in done.stderr
    assert "error[not-lowered]" in done.stderr


def test_mistakes_alone_have_no_table_above_them() -> None:
    done = attnc("check", "wrong.attn", "l1.attn")
    assert (done.exit_code, done.stdout) == (1, "")
    assert "error[unknown-name]" in done.stderr
    assert "error[not-lowered]" in done.stderr


def test_version() -> None:
    done = attnc("--version")
    assert (done.exit_code, done.stdout) == (0, f"attnc {package.__version__}\n")


def test_check_tries_what_the_file_says(folder: Path) -> None:
    lines = "# check: width=2 N=7\n# check: width=9 N=3 M=11\n# run: N=64\n"
    (two,) = (p for p in compile(lines + TWO).patterns.values() if p.__name__ == "near")
    found = list(comparison.cases(two, Setting(), settings(two.pattern, "check", two.known)))
    tried = {(c.shape.queries, c.shape.keys, c.setting.parameters.get("width")) for c in found}
    assert {(7, 7, 2), (3, 11, 9), (130, 130, None)} <= tried
    assert settings(two.pattern, "run", two.known)[0].sizes == {"N": 64}


def test_run_reports(folder: Path) -> None:
    done = attnc("run", "two.attn", "--pattern", "near", "--set", "width=3", "--shape", "1,2,64,16", "--device", "cpu")
    assert done.exit_code == 0, done.output
    assert "near width=3" in done.stdout
    assert "B1 H2 N64 D16, float32 on cpu" in done.stdout
    assert f"{(64 * 5 - 6) / 64**2:.4%} of the query-key pairs" in done.stdout
    assert re.search(r"error +\d\.\de-\d\d \(allowed \d\.\de-\d\d\), all rows against float64", done.stdout)


def test_run_says_that_branches_are_added(folder: Path) -> None:
    both = CAUSAL.replace("    out = ", "    a = ") + "    out = a + softmax[j](q @ k * scale) @ v\n"
    (folder / "both.attn").write_text(both)
    done = attnc("run", "both.attn", "--shape", "1,1,8,16", "--device", "cpu")
    assert "156.2500% of the query-key pairs, all branches added" in done.stdout
    assert "added" not in attnc("run", "causal.attn", "--shape", "1,1,8,16", "--device", "cpu").stdout


def test_run_fails_where_the_result_falls_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "tolerance", lambda dtype, length: 1e-30)
    done = attnc("run", "causal.attn", "--shape", "1,2,64,16", "--device", "cpu")
    assert (done.exit_code, done.stderr) == (1, "error: the result falls short of the reference\n")


def test_run_compares_the_last_rows_of_a_long_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "REFERENCE_PAIRS", 2**12)
    done = attnc("run", "causal.attn", "--shape", "1,2,128,16", "--device", "cpu")
    assert "last 16 rows against float64" in done.stdout
    done = attnc("run", str(EXAMPLES / "documents.attn"), "--shape", "1,2,128,16", "--device", "cpu")
    assert "last 16 rows against float64" in done.stdout


def test_explain_says_what_was_done() -> None:
    done = attnc("explain", "two.attn", "--pattern", "near", "--shape", "1,1,16,16")
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("pattern near(width: int = 4):")
    assert "live pairs    100 of B*H*N*M = 256: 39.0625%" in done.stdout
    assert len(attnc("explain", "two.attn", "--pattern", "near", "-v", "--shape", "1,1,16,16").stdout) > len(
        done.stdout
    )


def test_kernel_prints_python() -> None:
    done = attnc("kernel", "causal.attn")
    assert done.exit_code == 0
    assert "@triton.jit" in done.stdout
    ast.parse(done.stdout)


def test_fmt_formats_in_place(folder: Path) -> None:
    crooked = "pattern   causal :\n  out=softmax[j]( q@k*scale where j<=i )@v   # all\n"
    (folder / "crooked.attn").write_text(crooked)
    done = attnc("fmt", "--check", "crooked.attn", "causal.attn")
    assert (done.exit_code, done.stdout) == (1, "would change crooked.attn\n")
    assert (folder / "crooked.attn").read_text() == crooked
    done = attnc("fmt", "crooked.attn", "causal.attn")
    assert (done.exit_code, done.stdout) == (0, "formatted crooked.attn\n")
    assert (folder / "crooked.attn").read_text() == CAUSAL.replace("@ v\n", "@ v  # all\n")
    assert attnc("fmt", "--check", "crooked.attn").exit_code == 0
    assert attnc("fmt", "-", text=crooked).stdout == (folder / "crooked.attn").read_text()


def test_fmt_leaves_a_wrong_file_alone(folder: Path) -> None:
    (folder / "broken.attn").write_text("pattern x\n")
    done = attnc("fmt", "broken.attn", "causal.attn")
    assert done.exit_code == 1
    assert "error[syntax]" in done.stderr
    assert (folder / "broken.attn").read_text() == "pattern x\n"


MISTAKES = {
    "wrong file": "run wrong.attn",
    "missing file": "run nothing.attn",
    "name misspelt": "run causl.attn",
    "two parameters in one option": "run two.attn --pattern near --set width=3,height=4",
    "folder": "run cache.attn",
    "not UTF-8": "run latin.attn",
    "deep nesting": "run deep.attn",
    "a megabyte of brackets": "run huge.attn",
    "no pattern": "run empty.attn",
    "not lowered": "run l1.attn --shape 1,1,4,16",
    "several patterns": "run two.attn",
    "unknown pattern": "run two.attn --pattern causl",
    "unknown parameter": "run causal.attn --set window=3",
    "similar parameter": "run two.attn --pattern near --set widht=3",
    "no value": "run two.attn --pattern near --set width",
    "value of another type": "run two.attn --pattern near --set width=wide",
    "shape of three": "run causal.attn --shape 1,2,3",
    "shape of zero": "run causal.attn --shape 1,0,3,4",
    "device": "run causal.attn --device tpu",
    "dtype": "run causal.attn --dtype int8",
    "too wide": "run causal.attn --shape 1,1,4,512",
    "not settable": "run setting.attn --shape 1,1,4,16",
    "not a setting": "check form.attn --dtype float64",
    "input without a range": "check range.attn --dtype float64",
}


@pytest.mark.parametrize("name", list(MISTAKES))
def test_mistakes(folder: Path, golden: Callable[[str], None], name: str) -> None:
    (folder / "cache.attn").mkdir()
    (folder / "setting.attn").write_text("# run: widht=3\n" + TWO.replace("causal", "setting"))
    (folder / "form.attn").write_text("# check: N\n" + CAUSAL)
    (folder / "range.attn").write_text("# check: slope=3\npattern x:\n    input slope: real[h]\n    out = q * slope\n")
    done = attnc(*MISTAKES[name].split())
    assert done.exit_code == 1
    assert isinstance(done.exception, SystemExit)
    golden(done.stderr)


@pytest.mark.parametrize("command", ["check", "run", "explain", "kernel"])
@pytest.mark.parametrize(("file", "code"), [("wrong.attn", "unknown-name"), ("l1.attn", "not-lowered")])
def test_every_command_says_what_is_wrong_with_a_file(command: str, file: str, code: str) -> None:
    done = attnc(command, file)
    assert done.exit_code == 1
    assert done.stderr.startswith(f"error[{code}]: ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
@pytest.mark.parametrize("command", ["tune causal.attn", "explain causal.attn --measure"])
def test_what_measures_kernels_wants_a_device(command: str) -> None:
    done = attnc(*command.split())
    assert done.exit_code == 1
    assert done.stderr.startswith("error: ")
    assert "CUDA device" in done.stderr


def test_tune_prints_what_it_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([2.0, 1.0] * 3)
    monkeypatch.setattr(tuning, "milliseconds", lambda run: next(times))
    monkeypatch.setattr(tuning_command, "tuned_on", lambda device: "cpu")
    arguments = ("--shape", "1,1,40,16", "--dtype", "float32", "--most", "2")
    done = attnc("tune", "causal.attn", *arguments)
    assert done.exit_code == 0, done.output
    assert "32x32 1 warps 1 stages" in done.stdout
    assert done.stdout.count("kept, 2.00 times faster") == 3
    (Path() / "state.attn").write_text("pattern state:\n    out = sum[j]((q @ k) * v where j <= i)\n")
    done = attnc("tune", "state.attn", *arguments)
    assert done.exit_code == 0, done.output
    assert "no kernel of state has tile shapes to choose from" in " ".join(done.stdout.split())


def test_a_line_may_be_for_another_pattern(folder: Path) -> None:
    (folder / "two.attn").write_text("# run: width=2\n# check: width=2\n" + TWO)
    done = attnc("run", "two.attn", "--pattern", "causal", "--shape", "1,1,16,16", "--device", "cpu")
    assert done.exit_code == 0, done.output
    assert "near width=2" in attnc("run", "two.attn", "--pattern", "near", "--shape", "1,1,16,16").stdout


def test_the_module_runs_and_is_light() -> None:
    root = Path(__file__).parents[2]
    program = "import sys\nfrom attnc.runtime.cli import app\n"
    program += "app(['fmt', '--check', 'causal.attn'], standalone_mode=False)\n"
    program += "print([name for name in ('torch', 'triton', 'sympy') if name in sys.modules])"
    environment = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "[]"
    done = subprocess.run([sys.executable, "-m", "attnc", "--help"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0
    for command in ("check", "run", "explain", "kernel", "fmt"):
        assert command in done.stdout

"""What a user waits for: the import, and the first call of a pattern; by the processor's time, not the clock's."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from attnc.runtime import pattern

EXAMPLES = Path(__file__).parents[2] / "examples"
IMPORT, FIRST, ANOTHER = 0.5, 3.0, 1.0  # seconds
TIMES = """
import json, sys, time
import torch
marks = [time.process_time()]
import attnc
marks.append(time.process_time())
q = torch.zeros(1, 2, 64, 16)
for name in ("causal", "bigbird", "moba"):
    attnc.load(f"{sys.argv[1]}/{name}.attn").patterns[name](q, q, q)
    marks.append(time.process_time())
print(json.dumps([[after - before for before, after in zip(marks, marks[1:])], "torch._dynamo" in sys.modules]))
"""


@pytest.fixture(scope="module")
def fresh() -> tuple[list[float], bool]:
    """Seconds of the import and of three patterns in a process of their own; whether torch._dynamo came along."""
    done = subprocess.run([sys.executable, "-c", TIMES, str(EXAMPLES)], capture_output=True, text=True, check=True)
    seconds, dynamo = json.loads(done.stdout)
    return seconds, dynamo


def test_first_calls_are_quick(fresh: tuple[list[float], bool]) -> None:
    imported, first, *others = fresh[0]
    assert imported < IMPORT
    assert first < FIRST
    assert max(others) < ANOTHER


def test_a_call_does_not_bring_the_tracer(fresh: tuple[list[float], bool]) -> None:
    assert not fresh[1]


def test_constants_of_traces_are_marked_as_torch_does() -> None:
    def marked() -> None: ...

    def ours() -> None: ...

    torch.compiler.assume_constant_result(marked)
    assert vars(pattern.constant(ours)) == vars(marked)

"""What `# check:` and `# run:` lines and made inputs mean, and when a result is close enough."""

from __future__ import annotations

import math

import pytest
import torch

import attnc
from attnc.runtime.tolerance import error, tolerance
from attnc.runtime.tools.inputs import Shape, made_inputs
from attnc.runtime.tools.settings import Setting, Value, settings

TEXT = """# check: window=7 soft=0.5 strict=true sizes=2,3 N=9 g=-1..0
#   run:   window=9   scale=1   B=2
# checked: by nobody
pattern x(window: int = 64, soft: real = 1.0, strict: bool = false, sizes: ints = (4,)):
    input g: real[b, h, t]
    input slope: real[h]
    input doc: int[b, t]
    input prefix: int[b]
    input dense: int[h]
    input columns: int[h, x]
    input table: real[h, window]
    out = softmax[j](q @ k where j <= i) @ v
"""


def pattern(text: str = TEXT) -> attnc.CompiledPattern:
    return attnc.compile(text).patterns["x"]


def read(text: str, kind: str = "check") -> list[Setting]:
    found = pattern(text)
    return settings(found.pattern, kind, found.known)


def test_lines_are_read() -> None:
    parameters: dict[str, Value] = {"window": 7, "soft": 0.5, "strict": True, "sizes": (2, 3)}
    assert read(TEXT) == [Setting(parameters, {"N": 9}, {"g": (-1.0, 0.0)})]
    assert read(TEXT, "run") == [Setting({"window": 9, "scale": 1.0}, {"B": 2}, {})]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("window", "expected name=value"),
        ("windw=3", "`x` has no `windw`; did you mean `window`?"),
        ("window=3.5", "`window` must be an int, not `3.5`"),
        ("soft=much", "`soft` must be a number, not `much`"),
        ("strict=1", "`strict` must be true or false, not `1`"),
        ("sizes=a,b", "`sizes` must be ints such as 64,128, not `a,b`"),
        ("doc=3", "`doc` is an input: give the range to draw it from, such as doc=-1..0"),
        ("N=many", "`N` must be a positive int, not `many`"),
        ("M=0", "`M` must be a positive int, not `0`"),
        ("scale=x", "`scale` must be a number, not `x`"),
        ("g=0..x", "`g` must be a number, not `x`"),
    ],
)
def test_what_cannot_be_read_is_shown(line: str, message: str) -> None:
    with pytest.raises(attnc.AttnError) as caught:
        read(f"# check: {line}\n{TEXT}")
    assert message in str(caught.value)
    assert "--> <text>:1:10" in str(caught.value)


def test_shapes_follow_what_is_set() -> None:
    shape = Shape.square(1, 8, 64, 32)
    assert shape.updated({"N": 9}) == Shape(1, 8, 8, 9, 9, 32, 32)
    assert shape.updated({"M": 9, "Hk": 2, "E": 5}) == Shape(1, 8, 2, 64, 9, 32, 5)
    assert str(Shape(1, 8, 2, 5, 9, 32, 16)) == "B1 H8/2 N5/9 D32/16"


def test_made_inputs_fit_their_declarations() -> None:
    found, shape = pattern(), Shape(2, 4, 2, 5, 40, 16, 12)
    parameters = {"window": 7, "sizes": (4,)}
    made = made_inputs(found.pattern, shape, parameters, ranges={"g": (-1.0, 0.0)})
    assert found.reference(made.q, made.k, made.v, window=7, **made.inputs).shape == (2, 4, 5, 12)
    inputs = made.inputs
    assert -1 <= inputs["g"].min() < inputs["g"].max() <= 0
    assert 0 < inputs["slope"].min() < inputs["slope"].max() <= 1
    assert (inputs["doc"].diff() >= 0).all()
    assert inputs["doc"].max() > 0
    assert inputs["dense"].tolist() == [0, 1, 0, 1]
    assert ((inputs["prefix"] >= 0) & (inputs["prefix"] <= 40)).all()
    assert ((inputs["columns"] >= -1) & (inputs["columns"] < 40)).all()
    assert inputs["table"].shape == (4, 7)


def test_made_inputs_come_from_the_seed() -> None:
    found, shape = pattern(), Shape.square(1, 2, 9, 16)
    first, again, other = (made_inputs(found.pattern, shape, {"window": 7}, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.q, again.q)
    assert torch.equal(first.inputs["g"], again.inputs["g"])
    assert not torch.equal(first.q, other.q)


def test_errors_are_relative_to_the_largest_value() -> None:
    expected = torch.tensor([100.0, 1.0])
    assert error(torch.tensor([100.0, 2.0]), expected) == pytest.approx(0.01)
    assert error(torch.tensor([100.0, math.nan]), expected) == math.inf
    assert error(torch.tensor([0.0, 0.5]), torch.zeros(2)) == 0.5
    assert error(torch.zeros(0), torch.zeros(0)) == 0
    with pytest.raises(ValueError, match=r"shape \(2,\), the reference \(3,\)"):
        error(torch.zeros(2), torch.zeros(3))


def test_tolerances_follow_type_and_length() -> None:
    types = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    allowed = [tolerance(dtype, 1024) for dtype in types]
    assert allowed == sorted(allowed)
    assert tolerance(torch.float32, 4096) < 3 * tolerance(torch.float32, 1024)
    assert tolerance(torch.float32, 10**6) < 1e-2
    assert tolerance(torch.bfloat16, 128) < 0.05

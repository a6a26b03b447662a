"""Terms as text: written out, a pattern means what it meant."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import attnc
from attnc.dsl.notation import given_name, notation
from attnc.dsl.terms import Pattern, Term
from attnc.runtime.program import terms
from attnc.runtime.tools.picture_inputs import picture_inputs, picture_setting
from attnc.runtime.tools.settings import Setting

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted([*(ROOT / "examples").glob("*.attn"), *(ROOT / "tests" / "zoo").glob("*.attn")])
BLOCKS = ("scan", "repeat")


def is_written_in_the_language(pattern: Pattern) -> bool:
    """Blocks have several lines, elements of tuples and axes without a name have no notation of their own."""
    for term in terms(pattern):
        if term.form in BLOCKS or (term.form == "parameter" and "." in str(term.attribute)):
            return False
        if term.form == "concat" and not str(term.attribute).isidentifier():
            return False
    return True


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_pattern_that_is_written_out_means_the_same(file: Path) -> None:
    pattern = attnc.load(file).patterns[file.stem]
    if not is_written_in_the_language(pattern.pattern):
        assert notation(pattern.pattern.out)
        return
    text = pattern.source
    declarations = [line for line in text.splitlines() if line.lstrip().startswith(("pattern", "input", "axis"))]
    written = attnc.compile("\n".join([*declarations, f"    out = {notation(pattern.pattern.out)}\n"]))
    setting = picture_setting(
        pattern, Setting(sizes={"N": 23, "H": 2, "D": 8} if "N=" not in pattern.file.text else {})
    )
    made = picture_inputs(pattern, setting)
    settings = {**setting.parameters, **made.inputs}
    expected = pattern.reference(made.q, made.k, made.v, **settings)
    assert written.main is not None
    assert torch.equal(written.main.reference(made.q, made.k, made.v, **settings), expected)


def out_of(text: str) -> Term:
    """The result of a pattern that assigns `out`."""
    main = attnc.compile(text).main
    assert main is not None
    return main.pattern.out


@pytest.mark.parametrize(
    "condition",
    [
        "0 <= i - j < 7",
        "not (i < 3 or j < 3) and i != j",
        "i - (j - 3) == 0 or i * (j + 1) % 2 == 0",
        "(i - j) // 2 * 3 < -i",
        "j in columns",
        "(if i < j then 1 else 2) <= j",
        "abs(i - j) <= max(i, 2)",
    ],
)
def test_conditions_are_written_as_they_are_read(condition: str) -> None:
    text = f"pattern p:\n    input columns: int[x]\n    out = softmax[j](q @ k where {condition}) @ v\n"
    assert notation(out_of(text)) == f"softmax[j](q @ k where {condition}) @ v"


def test_what_has_a_name_is_not_written_out() -> None:
    out = out_of("pattern p:\n    s = q @ k * scale  # scores\n    out = softmax[j](s + s) @ v\n")
    assert notation(out, given_name) == "softmax[j](s + s) @ v"
    assert notation(out) == "softmax[j](q @ k * scale + q @ k * scale) @ v"


def test_only_a_whole_right_side_has_the_name() -> None:
    out = out_of("pattern p:\n    out = softmax[j](q @ k) @ v\n")
    assert given_name(out) == "out"
    assert given_name(out.args[0]) is None

"""How an error looks."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest

from attnc.dsl.codes import CODES
from attnc.dsl.diagnostics import SHOWN_COLUMNS, AttnError, Diagnostic, InternalError, did_you_mean, render
from attnc.dsl.source import Source, Span

TEXT = "pattern local(window: int):\n    out = softmax[j](q @ k where i - j < windo) @ v\n"
SOURCE = Source("local.attn", TEXT)


def span(text: str, source: Source = SOURCE) -> Span:
    start = source.text.index(text)
    return Span(source=source, start=start, stop=start + len(text))


def test_place_marks_and_help(golden: Callable[[str], None]) -> None:
    golden(
        render(Diagnostic("syntax", "`windo` is not defined", span("windo)"), help="did you mean `window`?\nor not"))
    )


def test_labels_on_other_lines_and_on_the_same(golden: Callable[[str], None]) -> None:
    labels = ((span("q @ k"), "the score"), (span("window: int"), "declared here"))
    golden(render(Diagnostic("syntax", "two labels", span("i - j < windo"), labels)))


def test_label_in_another_file(golden: Callable[[str], None]) -> None:
    other = Source("std.attn", "\n" * 98 + "causal() = j <= i\n" * 2)
    golden(render(Diagnostic("syntax", "elsewhere", span("softmax[j]"), ((span("j <= i", other), "from here"),))))


def test_a_long_line_is_cut_around_the_span() -> None:
    source = Source("long.attn", "x = " + "a + " * 100_000 + "here + " + "b + " * 1000)
    lines = render(Diagnostic("syntax", "long", span("here", source))).splitlines()
    assert all(len(line) < SHOWN_COLUMNS + 20 for line in lines)
    column = lines[-1].index("^^^^")
    assert lines[-2][column : column + 4] == "here"
    assert lines[-1].strip("| ") == "^^^^"


@pytest.mark.parametrize("before", ["\t", "\x1b[31m", "é", "  \u00a0 "])
def test_carets_stand_under_the_text(before: str) -> None:
    source = Source("odd.attn", f"{before}here\n")
    lines = render(Diagnostic("syntax", "odd", span("here", source))).splitlines()
    assert lines[-2].index("here") == lines[-1].index("^^^^")
    assert "\x1b" not in lines[-2]


def test_a_span_over_lines_is_marked_to_the_end_of_the_first() -> None:
    source = Source("two.attn", "x = (a\n  + b)\n")
    lines = render(Diagnostic("syntax", "two", span("(a\n  + b)", source))).splitlines()
    assert lines[-2:] == ["1 | x = (a", "  |     ^^"]


@pytest.mark.parametrize("text", ["", "x", "x\n", "x\r\n"])
def test_the_end_of_a_text_can_be_marked(text: str) -> None:
    source = Source("end.attn", text)
    rendered = render(Diagnostic("syntax", "end", Span(source=source, start=len(text), stop=len(text))))
    assert rendered.splitlines()[-1].endswith("^")
    assert "?" not in rendered


def test_an_error_renders_all_of_its_diagnostics() -> None:
    diagnostics = [Diagnostic("syntax", "one", span("out")), Diagnostic("number", "two", span("windo"))]
    text = str(AttnError(diagnostics))
    assert text == f"{render(diagnostics[0])}\n\n{render(diagnostics[1])}"


def test_an_error_travels_between_processes() -> None:
    error = AttnError([Diagnostic("syntax", "one", span("out"))])
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_codes_are_a_closed_sorted_list() -> None:
    assert list(CODES) == sorted(CODES)
    assert all(meaning and not meaning.endswith(".") for meaning in CODES.values())
    with pytest.raises(InternalError, match=r"codes\.py"):
        Diagnostic("no-such-code", "", span("out"))


def test_every_code_is_used() -> None:
    folders = [Path(__file__).parents[2] / name for name in ("dsl", "compiler", "runtime")]
    files = [path for folder in folders for path in folder.rglob("*.py") if path.name != "codes.py"]
    text = "\n".join(path.read_text("utf-8") for path in files)
    assert [code for code in CODES if f'"{code}"' not in text] == []


def test_an_error_without_a_diagnostic_is_our_mistake() -> None:
    with pytest.raises(InternalError, match="bug in attnc"):
        AttnError([])


def test_did_you_mean() -> None:
    assert did_you_mean("windo", ["window", "radius"]) == "did you mean `window`?"
    assert did_you_mean("x", ["window", "radius"]) is None

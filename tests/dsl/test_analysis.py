"""What an editor asks about a text, right, wrong and half written. `|` in a text is where the cursor stands."""

from __future__ import annotations

from pathlib import Path

import pytest

from attnc.dsl.analysis import Analysis, Place
from attnc.dsl.assistance import Proposal, origin, proposals, remark
from attnc.dsl.source import Source, Span

TEXT = """# One idea.
# check: window=3
pattern near(window: int = 4, rates: ints = (1, 2)):
    input doc: int[b, t]
    axis s = blocks(j, 4)
    score = q @ k * scale
    picked = topk[s](q @ mean[j in s](k), 2 where s.stop <= i)
    seen(r) = (i - j) // r < window
    branch(r) = softmax[j](score where seen(r) and j in picked) @ v
    out = merge(branch(rate) for rate in rates)

pattern far:
    scan t:
        S = S + outer(k, v)
        out = q @ S
"""


def at(text: str) -> tuple[Source, Place]:
    """The text without its `|`, and the place of it."""
    before = text[: text.index("|")]
    return Source("near.attn", text.replace("|", "", 1)), (before.count("\n"), len(before.rpartition("\n")[2]))


def pointed(marked: str) -> tuple[Analysis, Source, Place]:
    """TEXT with the cursor where `marked`, which occurs once in it, has `|`."""
    plain = marked.replace("|", "", 1)
    assert TEXT.count(plain) == 1
    source, place = at(TEXT.replace(plain, marked))
    return Analysis(source), source, place


@pytest.mark.parametrize(
    ("marked", "expected"),
    [
        ("score = q| @ k", "q: real[b, h, i; d]"),
        ("score = q |@ k * scale", "q @ k * scale: real[b, h, i, j]"),
        ("q @ k *| scale", "q @ k * scale: real[b, h, i, j]"),
        ("top|k[s](q", "topk[s](q @ mean[j in s](k), 2 where s.stop <= i): set of s[b, h, i]"),
        ("me|an[j in s](k)", "mean[j in s](k): real[b, h, s; d]"),
        ("s.st|op <= i", "s.stop: int[s]"),
        ("// r| < window", "r: int"),
        ("S = S| + outer", "S: real[b, h; d, e]"),
        ("q @| S\n", "q @ S: real[b, h, t; e]"),
    ],
)
def test_types_of_what_is_pointed_at(marked: str, expected: str) -> None:
    analysis, _, place = pointed(marked)
    found = analysis.type_at(place)
    assert found is not None
    assert f"{found[0].text}: {found[1]}" == expected


@pytest.mark.parametrize(
    ("marked", "said"),
    [
        ("scor|e = q", ["score = q @ k * scale", "real[b, h, i, j]", "batch, head, query, key"]),
        ("win|dow: int", ["window: int = 4", "`window`: `int`"]),
        ("pattern ne|ar", ["pattern near(window: int = 4, rates: ints = (1, 2))", "One idea."]),
        ("mer|ge(br", ["merge(a, b)", "a key that two have counts twice", "real[b, h, i; e]"]),
        ("2 wh|ere", ["only members where the condition holds take part"]),
        ("s.sto|p", ["one past the last position"]),
        ("sc|ale\n", ["unless it is given"]),
        ("branch(rate) for ra|te", ["for rate in rates"]),
        ("seen(|r) and", ["branch(r)"]),
        ("int[b, |t]", ["a token, read at i or at j"]),
    ],
)
def test_remarks(marked: str, said: list[str]) -> None:
    text = remark(*pointed(marked))
    assert text is not None
    assert [part for part in said if part not in text] == []
    assert "check:" not in text


@pytest.mark.parametrize("marked", ["# One| idea", "    |scan t"])
def test_nothing_is_said_of_comments_and_space(marked: str) -> None:
    text = remark(*pointed(marked))
    assert text is None or "scan t" in text


@pytest.mark.parametrize(
    ("marked", "line"),
    [
        ("(scor|e where", 5),
        ("branch(r|ate) for", 9),
        ("see|n(r) and", 7),
        ("seen(r|) and", 8),
        ("< win|dow", 2),
        ("k), 2 where s|.stop", 4),
        ("q @ S|\n", 13),
        ("merge(bra|nch(", 8),
    ],
)
def test_names_come_from_their_lines(marked: str, line: int) -> None:
    found = origin(*pointed(marked))
    assert isinstance(found, Span)
    assert found.source.position(found.start)[0] - 1 == line


def test_names_of_used_files_and_of_the_prelude(tmp_path: Path) -> None:
    (tmp_path / "other.attn").write_text("close(x) = x < 3\n\npattern first:\n    out = softmax[j](q @ k) @ v\n")
    text = 'use "other.attn"\npattern p:\n    out = softmax[j](q @ k where close(i) and causal()) @ v\n'
    places = {}
    for name in ("close", "causal", "other"):
        source, place = at(text.replace(name, f"{name[:2]}|{name[2:]}"))
        places[name] = origin(Analysis(source, tmp_path), source, place)
    close, causal = places["close"], places["causal"]
    assert isinstance(close, Span)
    assert (close.source.name, close.text) == (str(tmp_path / "other.attn"), "close(x) = x < 3")
    assert isinstance(causal, Span)
    assert causal.source.name == "std.attn"
    assert places["other"] == tmp_path / "other.attn"


def names(text: str, folder: Path | None = None) -> list[str]:
    source, place = at(text)
    return [proposal.name for proposal in proposals(source, folder, place)]


def test_names_to_go_on_with() -> None:
    found = names(TEXT.replace("score where seen(r)", "sc|"))
    assert found.index("score") < found.index("softmax")
    assert {"r", "picked", "seen", "window", "doc", "s", "causal", "q", "i", "M", "topk", "where"} <= set(found)
    assert not {"out", "S", "rate", "near", "far"} & set(found), "later, elsewhere, or the pattern itself"


def test_names_of_the_line_itself() -> None:
    assert {"x", "y"} <= set(names("pattern p:\n    near(x, y) = abs(|\n"))
    assert names("pattern p(rates: ints = (1, 2)):\n    out = merge(f(|) for r, s in rates)\n")[:2] == ["r", "s"]


def test_names_after_lines_that_cannot_be_read() -> None:
    found = names("pattern p(width: int = 3):\n    a = q @ (\n    b = 3 +\n    near = i - j < width\n    out = n|\n")
    assert {"width", "near"} <= set(found)
    assert names("((((|") == ["pattern", "use"]


def test_names_in_a_line_that_is_not_there_yet() -> None:
    assert {"width", "causal"} <= set(names("pattern p(width: int = 3):\n    out = |\n"))
    assert names("pattern p:\n    |\n") == ["input", "axis", "scan", "repeat"]
    assert names("pat|") == ["pattern", "use"]


def test_what_else_is_proposed() -> None:
    assert names(TEXT.replace("s.stop", "s.|")) == ["index", "start", "stop"]
    assert "real" in names("pattern p:\n    input x: r|\n")
    call = "pattern a(window: int = 3):\n    input doc: int[b, t]\n    out = softmax[j](q @ k) @ v\n"
    assert names(call + "pattern b:\n    out = a(q, k, v, |\n")[:2] == ["window = ", "doc = "]
    assert names("pattern b:\n    out = softmax[j](q @ k, |\n")[0] == "sink = "
    assert names("pattern b:  # a comm|ent\n") == []


def test_proposals_say_what_they_are() -> None:
    source, place = at(TEXT.replace("score where seen(r)", "|"))
    found = {proposal.name: proposal for proposal in proposals(source, None, place)}
    assert found["score"] == Proposal("score", "name", "score: real[b, h, i, j]")
    assert found["seen"].detail == "seen(r) = (i - j) // r < window"
    assert found["exp"].remark == "e to the x"


def test_a_wrong_statement_leaves_the_others() -> None:
    text = TEXT.replace("score = q @ k * scale", "score = q @ k * scalee").replace("S + outer(k, v)", "S + (")
    analysis = Analysis(Source("near.attn", text))
    picked = next(d for d in analysis.definitions if d.name == "picked")
    assert str(analysis.type_of(picked)) == "set of s[b, h, i]"


@pytest.mark.parametrize("cut", range(0, len(TEXT), 7))
def test_every_beginning_of_a_text_can_be_asked_about(cut: int) -> None:
    source, place = at(TEXT[:cut] + "|")
    proposals(source, None, place)
    remark(Analysis(source), source, place)

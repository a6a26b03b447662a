"""`use`: what a file sees of others, and what it may not reach."""

from __future__ import annotations

from pathlib import Path

import pytest

from attnc.dsl.check import check
from attnc.dsl.diagnostics import AttnError
from attnc.dsl.parse import read_source
from attnc.dsl.source import Source
from attnc.dsl.terms import Pattern


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        path = folder / f"{name}.attn"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


WINDOW = "near(n) = i - j < n\npattern slide(n: int = 4):\n    out = softmax[j](q @ k where near(n)) @ v\n"


def used(folder: Path, use: str, root: Path | None = None) -> dict[str, Pattern]:
    text = f'use "{use}"\npattern p:\n    out = slide(q, k, v, n = 3) + softmax[j](q @ k where near(2)) @ v\n'
    write(folder, main=text)
    return check(read_source(folder / "main.attn"), root=root)


def test_use_shows_patterns_and_functions(tmp_path: Path) -> None:
    write(tmp_path, window=WINDOW)
    assert list(used(tmp_path, "window.attn")) == ["p"]


def test_use_of_a_used_file_is_relative_to_that_file(tmp_path: Path) -> None:
    write(tmp_path / "parts", window='use "deep/n.attn"\n' + WINDOW)
    write(tmp_path / "parts" / "deep", n="nothing() = 1\n")
    assert list(used(tmp_path, "parts/window.attn")) == ["p"]


def test_what_a_used_file_uses_stays_its_own(tmp_path: Path) -> None:
    write(tmp_path, window=WINDOW, other='use "window.attn"\n')
    with pytest.raises(AttnError, match="no function or pattern `slide`"):
        used(tmp_path, "other.attn")


def test_use_above_the_root_is_refused(tmp_path: Path) -> None:
    write(tmp_path, window=WINDOW)
    inner = tmp_path / "inner"
    inner.mkdir()
    with pytest.raises(AttnError, match="outside of the folder `inner`"):
        used(inner, "../window.attn")
    assert list(used(inner, "../window.attn", root=tmp_path)) == ["p"]


def test_use_through_a_link_out_of_the_root_is_refused(tmp_path: Path) -> None:
    write(tmp_path, window=WINDOW)
    inner = tmp_path / "inner"
    inner.mkdir()
    (inner / "window.attn").symlink_to(tmp_path / "window.attn")
    with pytest.raises(AttnError, match="outside of the folder `inner`"):
        used(inner, "window.attn")


@pytest.mark.parametrize("use", ["/etc/passwd.attn", "C:\\\\x.attn", "windw.attn", "main.py", "."])
def test_use_of_what_is_no_file_of_the_tree(tmp_path: Path, use: str) -> None:
    write(tmp_path, window=WINDOW)
    with pytest.raises(AttnError) as caught:
        used(tmp_path, use)
    first = caught.value.diagnostics[0]
    assert first.code == "use"
    assert ("`window.attn`" in (first.help or "")) is (use == "windw.attn")


def test_files_that_use_one_another(tmp_path: Path) -> None:
    write(tmp_path, a='use "c.attn"\n', c='use "a.attn"\n')
    with pytest.raises(AttnError, match=r"`a\.attn` uses itself: a\.attn -> c\.attn -> a\.attn"):
        used(tmp_path, "a.attn")


def test_a_file_that_uses_itself(tmp_path: Path) -> None:
    with pytest.raises(AttnError, match="uses itself"):
        used(tmp_path, "main.attn")


def test_errors_of_a_used_file_are_shown_in_it(tmp_path: Path) -> None:
    write(tmp_path, window="pattern slide:\n    out = (q\n")
    with pytest.raises(AttnError) as caught:
        used(tmp_path, "window.attn")
    (error,) = caught.value.diagnostics
    assert error.span.source.name.endswith("window.attn")
    write(tmp_path, window=WINDOW.replace("near(n)) @", "far(n)) @"))
    with pytest.raises(AttnError) as caught:
        used(tmp_path, "window.attn")
    (error,) = caught.value.diagnostics
    assert error.code == "unknown-function"
    assert [(span.source.name[-9:], span.text) for span, _ in error.labels] == [("main.attn", "slide(q, k, v, n = 3)")]


def test_patterns_that_call_one_another_through_a_used_file(tmp_path: Path) -> None:
    text = "pattern slide(n: int = 4):\n    out = other(q, k, v)\nnear(n) = j < n\n"
    text += "pattern other:\n    out = slide(q, k, v)\n"
    write(tmp_path, window=text)
    with pytest.raises(AttnError, match="calls itself"):
        used(tmp_path, "window.attn")


@pytest.mark.parametrize("name", ["<text>", "x" * 5000, "a\0b", ""])
def test_a_source_may_have_any_name(name: str) -> None:
    assert list(check(Source(name, "pattern p:\n    out = q\n"))) == ["p"]

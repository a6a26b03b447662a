"""The site of the documentation: every page is in its table of contents, and no page is written for mkdocs alone."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parent.parent
ENTRY = re.compile(r"^ +- [^:]+: (\S+\.md)$", re.MULTILINE)


def test_every_page_is_in_the_table_of_contents() -> None:
    listed = ENTRY.findall((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    docs = ROOT / "docs"
    pages = [str(path.relative_to(docs)) for path in (*docs.glob("*.md"), *docs.glob("compiler/*.md"))]
    assert sorted(listed) == sorted([*pages, "mechanisms/index.md"])


@pytest.mark.parametrize(
    ("place", "text", "shown"),
    [
        ("x.md", "[a](../dsl/a.py) and [b](b.md)", "a and [b](b.md)"),
        ("x/y.md", "[a](../../dsl/a.py) and [b](../b.md)", "a and [b](../b.md)"),
        ("x.md", "```attn mistake\nq\n```\n```output\n", "```attn\nq\n```\n```text\n"),
        ("x.md", "```py\nq\n```\n```python\n", "```python\nq\n```\n```python\n"),
    ],
)
def test_what_the_site_shows_differently(monkeypatch: pytest.MonkeyPatch, place: str, text: str, shown: str) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    pages = importlib.import_module("site_pages")
    assert pages.on_page_markdown(text, SimpleNamespace(file=SimpleNamespace(src_uri=place))) == shown


@pytest.mark.slow
@pytest.mark.skipif(find_spec("mkdocs") is None, reason="needs the extra `docs`")
def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site" / "mechanisms" / "nsa" / "index.html").exists()

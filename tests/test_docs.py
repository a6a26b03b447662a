"""Every block of the documentation is run, and what it claims to print is compared.

```attn blocks compile, ```python blocks of a page run in order in one namespace, an ```output block is what the python
block before it prints, ```console blocks run their `attnc` commands, and every link to a file leads to one.
"""

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import attnc

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "DESIGN.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#]+)\)")


@dataclass(frozen=True)
class Block:
    """A fenced block; `line` is the line of its first character."""

    kind: str
    text: str
    line: int


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [Block(match[1], match[2], text.count("\n", 0, match.start(2)) + 1) for match in FENCE.finditer(text)]


def of_kind(kind: str) -> list[Any]:
    return [pytest.param(b, id=f"{page.name}:{b.line}") for page in PAGES for b in blocks(page) if b.kind == kind]


def commands() -> Iterator[Any]:
    for page in PAGES:
        for block in blocks(page):
            for line in block.text.splitlines() if block.kind == "console" else ():
                if line.startswith("$ attnc "):
                    yield pytest.param(line.removeprefix("$ attnc "), id=line.removeprefix("$ "))


def test_the_pages_have_blocks_of_every_kind() -> None:
    assert {block.kind for page in PAGES for block in blocks(page)} >= {"attn", "python", "output", "console"}


@pytest.mark.parametrize("block", of_kind("attn"))
def test_attn_blocks_compile(block: Block) -> None:
    assert attnc.compile(block.text).patterns


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_run_and_print_what_the_page_says(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT))
    scope: dict[str, Any] = {"__name__": "page"}
    printed = ""
    for block in blocks(page):
        if block.kind == "python":
            with contextlib.redirect_stdout(io.StringIO()) as out:
                # The leading newlines make a traceback's line number the page's.
                exec(compile("\n" * (block.line - 1) + block.text, page, "exec"), scope)
            printed = out.getvalue()
        elif block.kind == "output":
            assert printed.rstrip() == block.text.rstrip(), f"{page.name}:{block.line}"


@pytest.mark.parametrize("command", list(commands()))
def test_commands_succeed(command: str, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "attnc", *shlex.split(command, comments=True)]
    environment = os.environ | {"ATTNC_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    prose = FENCE.sub("", page.read_text(encoding="utf-8"))
    targets = [target for target in LINK.findall(prose) if "://" not in target]
    assert targets
    assert [target for target in targets if not (page.parent / target).exists()] == []

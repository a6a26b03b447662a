"""The pages of the mechanisms are those that would be built: run `python docs/mechanisms.py` where this fails."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs" / "mechanisms"
NAMES = [path.stem for path in sorted((ROOT / "examples").glob("*.attn"))]
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#]+)\)")
MOST_BYTES = 4_000  # of one mechanism's page
# A fixed pattern, a state, a selection, one that cannot be decoded.
REBUILT = ["sliding_window", "gated_delta", "nsa", "longformer"]


@pytest.fixture
def builder(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    return importlib.import_module("mechanisms")


def test_every_example_has_its_page_and_no_other_is_kept() -> None:
    assert sorted(path.stem for path in FOLDER.glob("*.md")) == sorted([*NAMES, "index"])
    assert all(path.stat().st_size <= MOST_BYTES for path in FOLDER.glob("*.md") if path.stem != "index")


def test_the_index_is_the_one_that_would_be_built(builder: ModuleType) -> None:
    assert (FOLDER / "index.md").read_text(encoding="utf-8") == builder.index(NAMES)


@pytest.mark.parametrize("name", REBUILT)
def test_a_page_is_the_one_that_would_be_built(builder: ModuleType, name: str) -> None:
    assert (FOLDER / f"{name}.md").read_text(encoding="utf-8") == builder.page(name)


def test_links_lead_somewhere() -> None:
    for page in FOLDER.glob("*.md"):
        prose = FENCE.sub("", page.read_text(encoding="utf-8"))
        targets = [target for target in LINK.findall(prose) if "://" not in target]
        assert targets, page.name
        assert [target for target in targets if not (FOLDER / target).exists()] == [], page.name


@pytest.mark.slow
def test_all_pages_are_those_that_would_be_built(builder: ModuleType) -> None:
    made: dict[str, str] = builder.pages()
    assert {path.name: path.read_text(encoding="utf-8") for path in FOLDER.glob("*.md")} == made

"""The gallery shows every example: run `python docs/gallery.py` where this fails."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import matplotlib as mpl
import pytest

ROOT = Path(__file__).resolve().parent.parent
NAMES = [path.stem for path in sorted((ROOT / "examples").glob("*.attn"))]
MOST_BYTES = 2_000_000


@pytest.fixture(scope="module")
def gallery() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gallery", ROOT / "docs" / "gallery.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_the_one_that_would_be_built(gallery: ModuleType) -> None:
    assert (ROOT / "docs" / "gallery.md").read_text(encoding="utf-8") == gallery.page(NAMES)


def test_every_example_has_its_picture_and_no_other_is_kept() -> None:
    pictures = list((ROOT / "docs" / "gallery").glob("*.svg"))
    assert sorted(path.stem for path in pictures) == sorted([*NAMES, "graph"])
    assert sum(path.stat().st_size for path in pictures) < MOST_BYTES


def test_every_family_is_of_patterns(gallery: ModuleType) -> None:
    known = {path.stem for folder in ("examples", "tests/zoo") for path in (ROOT / folder).glob("*.attn")}
    listed = [name for members in gallery.FAMILIES.values() for name in members.split()]
    assert len(set(listed)) == len(listed)
    assert set(listed) <= known


@pytest.mark.parametrize("name", ["strided", "longformer"])
def test_a_picture_is_the_one_that_would_be_built(gallery: ModuleType, name: str, tmp_path: Path) -> None:
    with mpl.rc_context(gallery.SVG):
        gallery.drawn(name).savefig(tmp_path / "x.svg", transparent=True, metadata={"Date": None})
    assert (tmp_path / "x.svg").read_text() == (ROOT / "docs" / "gallery" / f"{name}.svg").read_text()

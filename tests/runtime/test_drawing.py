"""Figures: what they hold, and the files they make."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from torch import Tensor
from typer.testing import CliRunner, Result

import attnc
from attnc.runtime.cli import app
from attnc.runtime.pattern import CompiledPattern
from attnc.runtime.tools.drawing import LIVE, NEGATIVE, PARTIAL, draw_pairs, draw_weights
from attnc.runtime.tools.extras import MissingExtraError
from attnc.runtime.tools.weights import Weights

ROOT = Path(__file__).resolve().parents[2]
WINDOW = "pattern near(window: int = 4):\n    out = softmax[j](q @ k * scale where 0 <= i - j < window) @ v\n"
LINEAR = "pattern p:\n    out = sum[j]((q @ k) * v where j <= i)\n"


@pytest.fixture(autouse=True)
def one_dot_a_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attnc.runtime.tools.drawing.SHARP", 1)


def pattern(text: str = WINDOW) -> CompiledPattern:
    main = attnc.compile(text).main
    assert main is not None
    return main


def part(values: Tensor, rows: str = "i", name: str = "") -> Weights:
    return Weights(values.double(), rows, name)


def images(figure: Figure) -> list[Any]:
    """(rows, columns, 4) of every panel."""
    return [np.asarray(axes.images[0].get_array()) for axes in figure.axes]


def headings(figure: Figure) -> list[str]:
    return [axes.get_title() for axes in figure.axes]


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for found in figure.legends for text in found.get_texts()]


def test_pairs_and_tiles_of_one_picture() -> None:
    live = torch.ones(20, 20).tril()
    live[:, 10:] = 0
    figure = draw_pairs("title", [part(live.expand(3, 20, 20))], tile=8)
    pairs, tiles = images(figure)
    assert np.array_equal(pairs[..., 3], live.numpy())
    assert np.array_equal(tiles[..., 3], [[PARTIAL, 0, 0], [1, PARTIAL, 0], [1, PARTIAL, 0]])
    assert headings(figure) == [f"{float(live.double().mean()):.1%} of the pairs live", "tiles of 8 x 8"]
    assert legend(figure) == ["all live", "some live", "none"]
    assert figure.get_suptitle() == "title"


def test_a_tile_at_the_edge_is_judged_by_what_it_holds() -> None:
    _, tiles = images(draw_pairs("", [part(torch.ones(1, 9, 11))], tile=8))
    assert np.array_equal(tiles[..., 3], np.ones((2, 2)))


def test_a_cell_has_dots_enough_for_viewers_that_smooth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attnc.runtime.tools.drawing.SHARP", 30)
    pairs, tiles = images(draw_pairs("", [part(torch.eye(20, 20)[None])], tile=8))
    assert np.array_equal(pairs[..., 3], np.kron(np.eye(20), np.ones((2, 2))))
    assert np.array_equal(tiles[..., 3], np.kron(np.eye(3) * PARTIAL, np.ones((10, 10))))


@pytest.mark.parametrize(("length", "side"), [(8, 8), (64, 8), (128, 8), (129, 16), (1024, 64)])
def test_tiles_fit_the_picture(length: int, side: int) -> None:
    figure = draw_pairs("", [part(torch.ones(1, length, 8))])
    assert headings(figure)[1] == f"tiles of {side} x {side}"


def test_heads_that_differ_have_panels_of_their_own() -> None:
    one, other = torch.ones(16, 16).tril(), torch.eye(16)
    figure = draw_pairs("", [part(torch.stack([one, other, one, one * 3]))])
    assert headings(figure) == ["heads 0, 2, 3: 53.1% live", "head 1: 6.2% live", "tiles of 8 x 8", ""]
    assert np.array_equal(images(figure)[1][..., 3], np.eye(16))
    figure = draw_weights("", [part(torch.stack([one, one, one * 3]))])
    assert headings(figure) == ["heads 0, 1: full colour from 1", "head 2: full colour from 3"]


def test_what_has_no_room_is_said() -> None:
    heads = torch.stack([torch.eye(8) * n for n in range(1, 8)])
    figure = draw_weights("title", [part(heads)])
    assert len(figure.axes) == 4
    assert figure.get_suptitle() == "title: the first 4 of 7"
    assert figure.get_suptitle() != draw_pairs("title", [part(heads)]).get_suptitle() == "title"


def test_weights_have_a_sign_and_a_strength() -> None:
    values = torch.tensor([[[1.0, -1.0], [0.25, 0.0]]])
    figure = draw_weights("", [part(values)])
    (image,) = images(figure)
    assert np.allclose(image[0, 0, :3], to_rgb(LIVE))
    assert np.allclose(image[0, 1, :3], to_rgb(NEGATIVE))
    strength = image[..., 3]
    assert strength[0, 0] == strength[0, 1] == 1
    assert 0 < strength[1, 0] < 1
    assert strength[1, 1] == 0
    assert legend(figure) == ["positive", "negative", "no weight"]
    assert legend(draw_weights("", [part(values.abs())])) == []


def test_parts_and_rows_are_named() -> None:
    figure = draw_pairs("", [part(torch.ones(1, 4, 64), "m", "near"), part(torch.ones(1, 4, 64), "m", "x" * 50)])
    assert headings(figure)[:2] == ["near: 100.0% live", f"{'x' * 28}..: 100.0% live"]
    assert figure.axes[0].get_ylabel() == "m"


def test_a_thin_line_keeps_two_dots_a_position() -> None:
    figure = draw_pairs("", [part(torch.ones(1, 1024, 1024))])
    figure.draw_without_rendering()
    box = figure.axes[0].get_window_extent()
    assert box.width / 1024 >= 2


# The method


def test_draw_without_tensors_shows_pairs() -> None:
    figure = pattern().draw(window=5)
    assert figure.get_suptitle() == "near(window=5)"
    assert np.array_equal(images(figure)[0][..., 3], np.tri(64) - np.tri(64, k=-5))


def test_draw_with_tensors_shows_their_weights() -> None:
    q, k = torch.randn(2, 3, 2, 10, 8)
    figure = pattern(LINEAR).draw(q, k)
    signs = np.stack([image[..., 0] == to_rgb(NEGATIVE)[0] for image in images(figure)])
    weights = (q[0] @ k[0].mT).tril()
    assert np.array_equal(signs, weights.numpy() < 0)
    assert len(pattern(LINEAR).draw(q, k, view="pairs").axes) == 2


@pytest.mark.parametrize(
    ("where", "weights"), [("j <= i", True), ("true", True), ("j < i", False), ("i - j < 7", False)]
)
def test_what_leaves_no_key_out_is_drawn_by_its_weights(where: str, weights: bool) -> None:
    one = pattern(WINDOW.replace("0 <= i - j < window", where))
    assert ("full colour from" in headings(one.draw())[0]) == weights
    assert "live" in headings(one.draw(view="pairs"))[0]


def test_a_line_of_the_file_says_what_to_draw() -> None:
    one = pattern(f"# check: window=9\n{WINDOW}# draw: window=6 H=3 N=40\n")
    assert one.draw().get_suptitle() == "near(window=6)"
    assert np.array_equal(images(one.draw())[0][..., 3], np.tri(40) - np.tri(40, k=-6))
    assert one.draw(window=7).get_suptitle() == "near(window=7)"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"q": torch.ones(1, 1, 2, 2)}, "a picture of a call needs q and k"),
        ({"v": torch.ones(1, 1, 2, 2)}, "a picture of a call needs q and k"),
        ({"view": "graph", "window": 3}, "tensors, parameters and tiles have no part in it"),
        ({"doc": torch.ones(1, 2)}, "`doc` is given without q and k"),
        ({"windo": 3}, "windo"),
        ({"tile": 4, "view": "weights"}, "tiles are of pairs"),
        ({"tile": 0}, "a picture with tiles of 0"),
    ],
)
def test_draw_refuses_what_it_would_ignore(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(attnc.AttnError, match=re.escape(message)):
        pattern().draw(**arguments)


def test_an_option_and_a_parameter_of_one_name_are_not_mixed_up() -> None:
    tiled = pattern(WINDOW.replace("window", "tile"))
    assert len(tiled.draw().axes) == 2
    with pytest.raises(attnc.AttnError, match="`tile` is an option of `draw` and a name of the pattern"):
        tiled.draw(tile=4)


def test_equal_pictures_are_equal_files(tmp_path: Path) -> None:
    for name in ("a.svg", "b.svg", "a.png", "b.png"):
        pattern().draw(file=tmp_path / name, window=5)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert b"<text" not in (tmp_path / "a.svg").read_bytes()


def test_a_missing_library_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    hidden = {"matplotlib", "pygls"}
    monkeypatch.setattr("attnc.runtime.tools.extras.find_spec", lambda name: None if name in hidden else found(name))
    for view in ("pairs", "weights", "graph"):
        with pytest.raises(MissingExtraError, match=r"drawing needs matplotlib: pip install 'attnc\[draw\]'"):
            pattern().draw(view=view)
    done = CliRunner().invoke(app, ["lsp"])
    assert (done.exit_code, done.stderr) == (
        1,
        "error: the language server needs pygls: pip install 'attnc[lsp]'\n",
    )
    assert issubclass(MissingExtraError, ImportError)


# The command


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "near.attn").write_text(WINDOW)
    (tmp_path / "doc.attn").write_text(
        "pattern doc:\n    input doc: int[b, t]\n    out = softmax[j](q @ k where doc[i] == doc[j]) @ v\n"
    )
    torch.save({"q": torch.randn(1, 2, 6, 4), "k": torch.randn(1, 2, 6, 4)}, tmp_path / "qk.pt")
    torch.save({"q": torch.randn(1, 2, 6, 4)}, tmp_path / "q.pt")
    torch.save([1], tmp_path / "list.pt")
    return tmp_path


def draw(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["draw", *arguments])


@pytest.mark.parametrize(
    ("arguments", "written"),
    [
        (["near.attn"], "near.svg"),
        (["near.attn", "-o", "x.png", "--set", "window=3", "--shape", "1,2,30,8", "--tile", "4"], "x.png"),
        (["near.attn", "-o", "x.svg", "--weights", "--tensors", "qk.pt"], "x.svg"),
        (["near.attn", "-o", "x.pdf", "--graph"], "x.pdf"),
    ],
)
def test_draw_writes_a_picture(folder: Path, arguments: list[str], written: str) -> None:
    done = draw(*arguments)
    assert (done.exit_code, done.stdout) == (0, f"wrote {written}\n"), done.stderr
    starts = {".svg": b"<?xml", ".png": b"\x89PNG", ".pdf": b"%PDF"}
    assert (folder / written).read_bytes().startswith(starts[Path(written).suffix])


@pytest.mark.parametrize(
    ("options", "heading"),
    [([], "full colour"), (["--pairs"], "% of the pairs live"), (["--tile", "2"], "% of the pairs live")],
)
def test_given_tensors_show_their_weights(
    folder: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], heading: str
) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr("attnc.runtime.tools.picture_command.save", lambda figure, output: figures.append(figure))
    done = draw("near.attn", "--tensors", "qk.pt", *options)
    assert done.exit_code == 0, done.stderr
    assert heading in headings(figures[0])[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["near.attn", "-o", "x.gif"], "error: a picture is written as .svg, .png, .pdf, not as `x.gif`"),
        (["near.attn", "-o", "no/x.svg"], "error: cannot write no/x.svg: No such file or directory"),
        (["near.attn", "--graph", "--set", "window=3"], "error: --graph shows the text: only"),
        (["near.attn", "--weights", "--tile", "4"], "error: --tile is for pairs"),
        (["near.attn", "--tensors", "qk.pt", "--shape", "1,1,9,4"], "error: --shape is for made tensors"),
        (["near.attn", "--tensors", "no.pt"], "error: cannot read no.pt: No such file or directory"),
        (["near.attn", "--tensors", "near.attn"], "error: near.attn is no file that torch.save wrote"),
        (["near.attn", "--tensors", "list.pt"], "error: list.pt holds no dict of tensors"),
        (["near.attn", "--tensors", "q.pt"], "error: q.pt has no `k`"),
        (["doc.attn", "--tensors", "qk.pt"], "`doc`"),
        (["near.attn", "--shape", "1,1,2000,4"], "weights of more than 1024 positions"),
    ],
)
def test_draw_says_what_does_not_go(folder: Path, arguments: list[str], message: str) -> None:
    done = draw(*arguments)
    assert done.exit_code == 1
    assert message in done.stderr
    assert not list(folder.glob("*.svg"))

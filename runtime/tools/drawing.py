"""Figures of which keys every query sees: pair by pair, in tiles, and with the weights of a call.

Drawn on nothing, in a grey and two colours that stand on white and on black, so that one file serves both.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch, PathPatch
from matplotlib.path import Path
from matplotlib.ticker import MultipleLocator
from torch import Tensor

from attnc.runtime.tools.weights import Weights

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

INK = "#7d8590"
LIVE = "#2f81f7"  # also of positive weights
NEGATIVE = "#db6d28"
PARTIAL = 0.4  # opacity of a tile in which some pairs are live
FAINT = 0.16  # and of the smallest weight that is not 0
SIDE = 2.5  # inches of a panel, its labels included
DOTS_PER_INCH = 200  # of a PNG
LEGEND = 0.2
FLAT = 0.3  # height over width of the flattest panel
SHARP = 320  # dots of an image's longer side: a viewer that smooths what it enlarges then blurs none of its cells
MOST_COLUMNS = 4  # heads or parts side by side
MOST_TILES, SMALLEST_TILE = 16, 8  # of a side of the picture; positions
DARKEST = 0.99  # share of the weights that are below the full colour: a few large ones would leave the others pale
LONGEST_HEADING = 30


@dataclass(frozen=True)
class Column:
    """What is drawn under one heading: one head, or several that are alike. `values`: (rows, M), float64."""

    heading: str
    values: Array
    rows: str


def draw_pairs(title: str, parts: list[Weights], tile: int | None = None) -> Figure:
    """Which pairs are live, and which tiles hold none, some and only live ones.

    `tile`: rows and keys of a tile; None: a power of two, at least 8, of which at most 16 fill a side.
    """
    columns, count = _columns(parts, lambda values: (values != 0).double())
    side = tile or _fitting_tile(max(columns[0].values.shape))
    across = len(columns) == 1
    figure, panels = _panels(columns, 1 if across else 2, 2 if across else len(columns), legend=True)
    above, below = ([panels[0]], [panels[1]]) if across else (panels[: len(columns)], panels[len(columns) :])
    for number, column in enumerate(columns):
        live = column.values != 0
        _show(above[number], column, _coloured(live.astype(np.float64)), side)
        _show(below[number], column, _coloured(_tiles(live, side)), side, side)
        heading = column.heading if across or not column.heading else f"{column.heading}: "
        _remark(above[number], f"{heading}{live.mean():.1%} {'live' if heading else 'of the pairs live'}")
        if across or number == 0:
            _remark(below[number], f"tiles of {side} x {side}")
    _finish(figure, _counted(title, columns, count), panels, 2 if across else len(columns))
    _legend(figure, [("all live", LIVE, 1.0), ("some live", LIVE, PARTIAL), ("none", None, 1.0)])
    return figure


def tells_by_weights(parts: list[Weights]) -> bool:
    """Whether all rows see all keys, or all keys up to their own: then only weights show what a pattern does."""
    seen = [(part.live, torch.ones_like(part.live)) for part in parts]
    return all(torch.equal(live, full) or torch.equal(live, full.tril()) for live, full in seen)


def draw_weights(title: str, parts: list[Weights]) -> Figure:
    """The weight of every key on every row, a panel for each head (one for heads that have the same)."""
    columns, count = _columns(parts, lambda values: values)
    signed = any((column.values < 0).any() for column in columns)
    figure, panels = _panels(columns, 1, len(columns), legend=signed)
    for panel, column in zip(panels, columns, strict=True):
        sizes = np.abs(column.values[column.values != 0])
        top = float(np.quantile(sizes, DARKEST)) if sizes.size else 1.0
        _show(panel, column, _coloured(_strength(column.values / top)), None)
        _remark(panel, f"{column.heading}{': ' if column.heading else ''}full colour from {top:.2g}")
    _finish(figure, _counted(title, columns, count), panels, len(columns))
    if signed:
        _legend(figure, [("positive", LIVE, 1.0), ("negative", NEGATIVE, 1.0), ("no weight", None, 1.0)])
    return figure


def _columns(parts: list[Weights], seen: Callable[[Tensor], Tensor]) -> tuple[list[Column], int]:
    """The columns of a figure, heads that look alike in one; and how many there would be if all had room."""
    columns = []
    for part in parts:
        groups: list[list[int]] = []
        shown = seen(part.values)
        for head in range(len(shown)):
            group = next((group for group in groups if torch.equal(shown[group[0]], shown[head])), None)
            if group is None:
                groups.append([head])
            else:
                group.append(head)
        for group in groups:
            heads = "" if len(groups) == 1 else f"head{'s' if len(group) > 1 else ''} {_listed(group)}"
            heading = ", ".join(text for text in (_shortened(part.part), heads) if text)
            columns.append(Column(heading, part.values[group[0]].cpu().numpy(), part.rows))
    return columns[:MOST_COLUMNS], len(columns)


def _counted(title: str, columns: list[Column], count: int) -> str:
    return title if len(columns) == count else f"{title}: the first {len(columns)} of {count}"


def _listed(heads: list[int]) -> str:
    """`0, 2, 4`, or `0-3` of neighbours."""
    if len(heads) > 2 and heads == list(range(heads[0], heads[-1] + 1)):
        return f"{heads[0]}-{heads[-1]}"
    return ", ".join(map(str, heads[:6])) + (", .." if len(heads) > 6 else "")


def _shortened(text: str) -> str:
    return text if len(text) <= LONGEST_HEADING else text[: LONGEST_HEADING - 2] + ".."


def _fitting_tile(positions: int) -> int:
    return max(SMALLEST_TILE, 1 << max(0, math.ceil(math.log2(max(positions, 1) / MOST_TILES))))


def _tiles(live: NDArray[np.bool_], side: int) -> Array:
    """Opacity of every tile; a tile that the picture's edge cuts is judged by what it holds."""
    rows, keys = (-(-length // side) * side for length in live.shape)
    padding = [(0, rows - live.shape[0]), (0, keys - live.shape[1])]

    def tiled(fill: bool) -> NDArray[np.bool_]:
        padded = np.pad(live, padding, constant_values=fill)
        return padded.reshape(rows // side, side, keys // side, side)

    some, every = tiled(False).any((1, 3)), tiled(True).all((1, 3))
    return np.where(every, 1.0, np.where(some, PARTIAL, 0.0))


def _strength(relative: Array) -> Array:
    """Opacity, with the weight's sign: the square root of the weight, so that small weights are seen."""
    strength = FAINT + (1 - FAINT) * np.sqrt(np.minimum(np.abs(relative), 1))
    return np.sign(relative) * strength


def _coloured(strength: Array) -> Array:
    """(rows, columns, 4): colours of opacities that carry a sign."""
    colours = np.where((strength < 0)[..., None], to_rgb(NEGATIVE), to_rgb(LIVE))
    return np.concatenate([colours, np.abs(strength)[..., None]], -1)


def _panels(columns: list[Column], rows: int, across: int, *, legend: bool) -> tuple[Figure, list[Axes]]:
    """An empty figure with panels of the columns' proportions, row by row."""
    height, width = columns[0].values.shape
    tall = min(max(height / max(width, 1), FLAT), 1 / FLAT)
    size = 0.45 + SIDE * across, 0.75 + LEGEND * legend + (SIDE * tall + 0.2) * rows
    # At least two dots a position: where a line of pairs is thinner than a dot it would be lost.
    figure = Figure(figsize=size, dpi=max(DOTS_PER_INCH, height, width), layout="constrained")
    grid = figure.subplots(rows, across, squeeze=False)
    return figure, list(grid.flat)


def _show(panel: Axes, column: Column, colours: Array, side: int | None, cell: int = 1) -> None:
    """An image with cells of `cell` positions, and lines between tiles."""
    rows, keys = column.values.shape
    extent = (-0.5, colours.shape[1] * cell - 0.5, colours.shape[0] * cell - 0.5, -0.5)
    fits = FLAT <= rows / max(keys, 1) <= 1 / FLAT
    dots = -(-SHARP // max(colours.shape[:2]))
    sharp = colours.repeat(dots, 0).repeat(dots, 1)
    panel.imshow(sharp, interpolation="none", extent=extent, aspect="equal" if fits else "auto")
    panel.set(xlim=(-0.5, keys - 0.5), ylim=(rows - 0.5, -0.5))
    panel.xaxis.set_major_locator(_ticks(keys))
    panel.yaxis.set_major_locator(_ticks(rows))
    if side is not None:
        panel.add_patch(_grid(rows, keys, side))
    panel.patch.set_visible(False)
    panel.tick_params(colors=INK, labelsize=8, length=2.5)
    for spine in panel.spines.values():
        spine.set(color=INK, linewidth=0.8)
    panel.set_ylabel("queries i" if column.rows == "i" else column.rows, color=INK, fontsize=9)
    panel.set_xlabel("keys j", color=INK, fontsize=9)


def _grid(rows: int, keys: int, side: int) -> PathPatch:
    """Lines between tiles, all in one path."""
    ends = [((at - 0.5, -0.5), (at - 0.5, rows - 0.5)) for at in range(side, keys, side)]
    ends += [((-0.5, at - 0.5), (keys - 0.5, at - 0.5)) for at in range(side, rows, side)]
    points = [point for line in ends for point in line] or [(-0.5, -0.5), (-0.5, -0.5)]
    lines = Path(points, [Path.MOVETO, Path.LINETO] * (len(points) // 2))
    return PathPatch(lines, edgecolor=INK, facecolor="none", linewidth=0.4, alpha=0.5)


def _ticks(positions: int) -> MultipleLocator:
    """Multiples of a power of two, about four of them."""
    return MultipleLocator(1 << max(0, math.ceil(math.log2(max(positions, 1) / 4))))


def _remark(panel: Axes, text: str) -> None:
    panel.set_title(text, color=INK, fontsize=9)


def _finish(figure: Figure, title: str, panels: list[Axes], across: int) -> None:
    """The title; and the axes' names and numbers only at the left and at the bottom, as all panels have the same."""
    figure.patch.set_alpha(0)
    figure.suptitle(title, color=INK, fontsize=11)
    for number, panel in enumerate(panels):
        if number % across:
            panel.set_ylabel("")
            panel.tick_params(labelleft=False)
        if number < len(panels) - across:
            panel.set_xlabel("")
            panel.tick_params(labelbottom=False)


def _legend(figure: Figure, entries: list[tuple[str, str | None, float]]) -> None:
    patches = [
        Patch(
            facecolor="none" if colour is None else (colour, opacity),
            edgecolor=INK if colour is None else "none",
            linewidth=0.6,
            label=label,
        )
        for label, colour, opacity in entries
    ]
    figure.legend(
        handles=patches,
        loc="outside lower center",
        ncols=len(patches),
        frameon=False,
        fontsize=8,
        labelcolor=INK,
        handlelength=1,
        handleheight=1,
    )

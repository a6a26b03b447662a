"""The figure of a pattern's graph: what it computes, operands above users."""

from __future__ import annotations

import textwrap
from itertools import pairwise
from typing import TYPE_CHECKING

from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.path import Path

from attnc.dsl.terms import Pattern
from attnc.runtime.tools.drawing import DOTS_PER_INCH, INK, LIVE, NEGATIVE
from attnc.runtime.tools.layering import layered
from attnc.runtime.tools.pipeline_graph import Shown, pipeline_graph

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# All lengths are in inches, downwards from the top left corner.
LONGEST_LINE = 40  # characters
FONT = FontProperties(family="DejaVu Sans Mono", size=7.5)
CHARACTER = 0.63 * 7.5 / 72  # width of a character of that font, with room for rounding to dots
LINE = 0.145  # from line to line
MARGIN = 0.07  # around the text of a box
GAP, BETWEEN = 0.18, 0.3  # between boxes, and between layers
TITLE = 0.34

# Colour of the edge and the text's field, opacity of the field, style of the edge.
STYLES = {
    "tensor": (INK, 0.2, "-"),
    "pointwise": (INK, 0.0, "-"),
    "contraction": (INK, 0.0, "-"),
    "reduction": (LIVE, 0.14, "-"),
    "result": (LIVE, 0.22, "-"),
    "selection": (NEGATIVE, 0.25, "-"),
    "condition": (NEGATIVE, 0.0, (0, (3, 2))),
}

Point = tuple[float, float]


def draw_graph(title: str, pattern: Pattern) -> Figure:
    """Tensors, contractions, conditions, selections and reductions of a pattern as a layered graph."""
    graph = pipeline_graph(pattern)
    texts = {node: _wrapped(shown) for node, shown in graph.nodes(data="shown")}
    widths = {node: _width(text) + 2 * MARGIN for node, text in texts.items()}
    heights = {node: LINE * (text.count("\n") + 1) + 1.4 * MARGIN for node, text in texts.items()}
    layout = layered(graph, widths, GAP)
    tall = [0.0] * (max(layout.layers.values()) + 1)
    for node, layer in layout.layers.items():
        tall[layer] = max(tall[layer], heights[node])
    middles = [TITLE + sum(tall[:layer]) + BETWEEN * layer + tall[layer] / 2 for layer in range(len(tall))]
    right = max(layout.centres[node] + widths[node] / 2 for node in graph)
    right = max(right, *(x for points in layout.paths.values() for x, _ in points), 0.11 * len(title))
    figure, canvas = _canvas(title, right, middles[-1] + tall[-1] / 2)
    for (operand, user), points in layout.paths.items():
        # Straight down past the taller boxes of a layer; curves are for the space between layers.
        passed = [(x, middles[layer] + sign * tall[layer] / 2) for x, layer in points for sign in (-1, 1)]
        start = (points[0][0], middles[points[0][1]] + heights[operand] / 2)
        stop = (points[-1][0], middles[points[-1][1]] - heights[user] / 2)
        _edge(canvas, [start, *passed[1:-1], stop])
    for node, shown in graph.nodes(data="shown"):
        centre = layout.centres[node], middles[layout.layers[node]]
        _box(canvas, shown.kind, texts[node], centre, (widths[node], heights[node]))
    return figure


def _wrapped(shown: Shown) -> str:
    lines = []
    for line in shown.label.splitlines():
        lines += textwrap.wrap(line, LONGEST_LINE, subsequent_indent="    ", break_long_words=False)
    # An SVG with text in it would drop plain spaces at the start of a line.
    return "\n".join(line.replace("    ", "\u00a0" * 4).replace("  ", "\u00a0" * 2) for line in lines)


def _width(text: str) -> float:
    return max(map(len, text.split("\n"))) * CHARACTER


def _canvas(title: str, right: float, bottom: float) -> tuple[Figure, Axes]:
    """A figure as large as what is drawn, and axes in inches."""
    edge = 0.06
    width, height = right + 2 * edge, bottom + edge
    figure = Figure(figsize=(width, height), dpi=DOTS_PER_INCH)
    figure.patch.set_alpha(0)
    canvas = figure.add_axes((0, 0, 1, 1))
    canvas.set(xlim=(-edge, right + edge), ylim=(height, 0))
    canvas.axis("off")
    canvas.text(right / 2, TITLE / 2, title, color=INK, fontsize=11, ha="center", va="center")
    return figure, canvas


def _box(canvas: Axes, kind: str, text: str, centre: Point, size: tuple[float, float]) -> None:
    colour, opacity, style = STYLES[kind]
    corner = centre[0] - size[0] / 2, centre[1] - size[1] / 2
    rounding = min(size) / 2 if kind == "tensor" else 0.04
    width = 1.6 if kind == "result" else 0.9
    shape = f"round,pad=0,rounding_size={rounding}"
    canvas.add_patch(
        FancyBboxPatch(
            corner,
            *size,
            boxstyle=shape,
            edgecolor=colour,
            facecolor=(colour, opacity),
            linewidth=width,
            linestyle=style,
        )
    )
    left = centre[0] - size[0] / 2 + MARGIN
    canvas.text(left, centre[1], text, color=INK, fontproperties=FONT, ha="left", va="center", linespacing=1.35)


def _edge(canvas: Axes, points: list[Point]) -> None:
    """A curve that leaves and enters boxes upright, through its bends."""
    vertices, codes = [points[0]], [Path.MOVETO]
    for (x, y), (next_x, next_y) in pairwise(points):
        if abs(next_x - x) < 1e-6 and abs(next_y - y) < 1e-6:
            continue  # an arrow would have no direction
        if abs(next_x - x) < 1e-6:
            vertices.append((next_x, next_y))
            codes.append(Path.LINETO)
            continue
        half = (y + next_y) / 2
        vertices += [(x, half), (next_x, half), (next_x, next_y)]
        codes += [Path.CURVE4] * 3
    arrow = FancyArrowPatch(
        path=Path(vertices, codes),
        arrowstyle="-|>,head_length=2.6,head_width=1.4",
        color=INK,
        linewidth=0.8,
        shrinkA=0,
        shrinkB=0,
        capstyle="butt",
        joinstyle="miter",
    )
    canvas.add_patch(arrow)

"""Where the boxes of a layered graph stand: operands above users, few crossings, no overlaps (Sugiyama's method).

An edge that passes a layer has a bend there: an empty box, so that edges run beside boxes and not through them.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import networkx as nx

SWEEPS = 12
BEND = 0.12  # inches of room for an edge that passes

Key = int | tuple[int, int, int]  # a node, or a bend of (operand, user, layer)


@dataclass(frozen=True)
class Layout:
    """Centres (x) and layers (from the top) of nodes; and for every edge the points that it passes, as (x, layer)."""

    centres: dict[int, float]
    layers: dict[int, int]
    paths: dict[tuple[int, int], list[tuple[float, int]]]


def layered(graph: nx.DiGraph[int], widths: dict[int, float], gap: float) -> Layout:
    """Positions of boxes of given widths, at least `gap` apart; the leftmost edge is at 0."""
    layers = _layers(graph)
    bent: nx.DiGraph[Key] = nx.DiGraph()
    bent.add_nodes_from(graph)
    rows: list[list[Key]] = [[] for _ in range(max(layers.values(), default=0) + 1)]
    for node in graph:
        rows[layers[node]].append(node)
    chains: dict[tuple[int, int], list[Key]] = {}
    for operand, user in graph.edges:
        bends: list[Key] = [(operand, user, layer) for layer in range(layers[operand] + 1, layers[user])]
        chains[operand, user] = [operand, *bends, user]
        nx.add_path(bent, chains[operand, user])
        for bend in bends:
            assert isinstance(bend, tuple)
            rows[bend[2]].append(bend)
    _order(bent, rows)
    centres = _centres(bent, rows, {key: widths[key] if isinstance(key, int) else BEND for key in bent}, gap)
    depth = {key: number for number, row in enumerate(rows) for key in row}
    return Layout(
        {node: centres[node] for node in graph},
        layers,
        {edge: [(centres[key], depth[key]) for key in chain] for edge, chain in chains.items()},
    )


def _layers(graph: nx.DiGraph[int]) -> dict[int, int]:
    """The longest path that leads to a node; what only starts paths stands right above its first user."""
    layers: dict[int, int] = {}
    for node in nx.topological_sort(graph):
        layers[node] = 1 + max((layers[operand] for operand in graph.predecessors(node)), default=-1)
    for node in reversed(list(nx.topological_sort(graph))):
        if graph.out_degree(node):
            layers[node] = min(layers[user] for user in graph.successors(node)) - 1
    top = min(layers.values(), default=0)
    return {node: layer - top for node, layer in layers.items()}


def _order(graph: nx.DiGraph[Key], rows: list[list[Key]]) -> None:
    """Sorts every row by the mean place of its neighbours in the row before; the best of some sweeps stays."""
    best, fewest = [list(row) for row in rows], _crossings(graph, rows)
    for sweep in range(SWEEPS):
        down = sweep % 2 == 0
        for row in rows if down else reversed(rows):
            place = {key: at / max(len(other) - 1, 1) for other in rows for at, key in enumerate(other)}
            near = graph.predecessors if down else graph.successors
            row.sort(key=lambda key: _mean([place[other] for other in near(key)], place[key]))
        found = _crossings(graph, rows)
        if found < fewest:
            best, fewest = [list(row) for row in rows], found
    for row, kept in zip(rows, best, strict=True):
        row[:] = kept


def _crossings(graph: nx.DiGraph[Key], rows: list[list[Key]]) -> int:
    count = 0
    for upper, lower in pairwise(rows):
        place = {key: at for at, key in enumerate(lower)}
        ends = [sorted(place[user] for user in graph.successors(key) if user in place) for key in upper]
        flat = [end for row in ends for end in row]
        count += sum(flat[n] < before for n in range(len(flat)) for before in flat[:n])
    return count


def _centres(graph: nx.DiGraph[Key], rows: list[list[Key]], widths: dict[Key, float], gap: float) -> dict[Key, float]:
    """Every box as near as the others allow to the middle of its neighbours."""
    centres: dict[Key, float] = {}
    for row in rows:
        _place(row, dict.fromkeys(row, 0.0), widths, gap, centres)
    for sweep in range(SWEEPS):
        for row in rows if sweep % 2 else reversed(rows):
            near = graph.predecessors if sweep % 2 else graph.successors
            wanted = {key: _mean([centres[other] for other in near(key)], centres[key]) for key in row}
            _place(row, wanted, widths, gap, centres)
    left = min((centres[key] - widths[key] / 2 for key in centres), default=0.0)
    return {key: centre - left for key, centre in centres.items()}


def _place(
    row: list[Key], wanted: dict[Key, float], widths: dict[Key, float], gap: float, centres: dict[Key, float]
) -> None:
    """Least squares under the row's order: boxes that would overlap form a block, which stands at its mean."""
    blocks: list[tuple[float, list[Key], float]] = []  # left edge, members, width
    for key in row:
        block = (wanted[key] - widths[key] / 2, [key], widths[key])
        while blocks and blocks[-1][0] + blocks[-1][2] + gap > block[0]:
            left, members, width = blocks.pop()
            count = len(members) + len(block[1])
            shifted = (left * len(members) + (block[0] - width - gap) * len(block[1])) / count
            block = (shifted, members + block[1], width + gap + block[2])
        blocks.append(block)
    for left, members, _ in blocks:
        for key in members:
            centres[key] = left + widths[key] / 2
            left += widths[key] + gap


def _mean(places: list[float], otherwise: float) -> float:
    return sum(places) / len(places) if places else otherwise

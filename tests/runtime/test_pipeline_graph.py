"""Graphs of patterns: their nodes, and where these stand."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import networkx as nx
import pytest
from matplotlib.patches import FancyBboxPatch

import attnc
from attnc.dsl.terms import Pattern
from attnc.runtime.tools.graph_drawing import draw_graph
from attnc.runtime.tools.layering import layered
from attnc.runtime.tools.pipeline_graph import Shown, pipeline_graph

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted([*(ROOT / "examples").glob("*.attn"), *(ROOT / "tests" / "zoo").glob("*.attn")])


def checked(text: str) -> Pattern:
    main = attnc.compile(text).main
    assert main is not None
    return main.pattern


def lines(pattern: Pattern) -> list[str]:
    """Every node with what it is made of."""
    graph = pipeline_graph(pattern)
    shown: dict[int, Shown] = dict(graph.nodes(data="shown"))
    return [
        f"{shown[node].kind}: {shown[node].label} <- {', '.join(shown[o].label for o in graph.predecessors(node))}"
        for node in graph
    ]


def test_a_softmax() -> None:
    assert lines(checked("pattern p:\n    out = softmax[j](q @ k * scale where j <= i) @ v\n")) == [
        "result: out = · @ v <- softmax[j](· * scale where ..), v",
        "reduction: softmax[j](· * scale where ..) <- where j <= i, q @ k",
        "tensor: v <- ",
        "condition: where j <= i <- ",
        "contraction: q @ k <- q, k",
        "tensor: q <- ",
        "tensor: k <- ",
    ]


@pytest.mark.parametrize("name", ["moba", "lolcats", "gated_delta", "nystrom", "longnet"])
def test_graphs_of_the_zoo(name: str, golden: Callable[[str], None]) -> None:
    folder = "examples" if (ROOT / "examples" / f"{name}.attn").exists() else "tests/zoo"
    golden("\n".join(lines(attnc.load(ROOT / folder / f"{name}.attn").patterns[name].pattern)))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_graph_is_whole_and_can_be_drawn(file: Path) -> None:
    pattern = attnc.load(file).patterns[file.stem].pattern
    graph = pipeline_graph(pattern)
    assert nx.is_directed_acyclic_graph(graph)
    sinks = [node for node in graph if graph.out_degree(node) == 0]
    assert [graph.nodes[node]["shown"].kind for node in sinks] == ["result"]
    figure = draw_graph("title", pattern)
    boxes = [patch.get_bbox() for patch in figure.axes[0].patches if isinstance(patch, FancyBboxPatch)]
    assert len(boxes) == len(graph)
    assert [pair for pair in combinations(boxes, 2) if pair[0].overlaps(pair[1])] == []


def diamond() -> nx.DiGraph[int]:
    """0 above 1 and 2 above 3; 0 also straight to 3."""
    graph: nx.DiGraph[int] = nx.DiGraph()
    graph.add_edges_from([(0, 1), (0, 2), (1, 3), (2, 3), (0, 3)])
    return graph


def test_operands_stand_above_users_and_edges_pass_beside_boxes() -> None:
    graph = diamond()
    layout = layered(graph, dict.fromkeys(graph, 1.0), gap=0.5)
    assert layout.layers == {0: 0, 1: 1, 2: 1, 3: 2}
    (passing,) = [x for x, layer in layout.paths[0, 3] if layer == 1]
    assert all(abs(passing - layout.centres[node]) > 0.5 for node in (1, 2))
    assert abs(layout.centres[1] - layout.centres[2]) >= 1.5 - 1e-9
    assert min(layout.centres[node] for node in graph) >= 0.5 - 1e-9


def test_an_operand_stands_right_above_its_first_user() -> None:
    graph: nx.DiGraph[int] = nx.DiGraph()
    graph.add_edges_from([(0, 1), (1, 2), (2, 3), (4, 3)])
    assert layered(graph, dict.fromkeys(graph, 1.0), gap=0.1).layers[4] == 2


def test_crossings_that_need_not_be_are_undone() -> None:
    graph: nx.DiGraph[int] = nx.DiGraph()
    graph.add_nodes_from(range(6))
    graph.add_edges_from([(0, 5), (1, 4), (2, 3)])
    layout = layered(graph, dict.fromkeys(graph, 1.0), gap=0.1)
    upper = sorted((layout.centres[node], node) for node in (0, 1, 2))
    lower = sorted((layout.centres[node], node) for node in (3, 4, 5))
    assert [5 - node for _, node in upper] == [node for _, node in lower]

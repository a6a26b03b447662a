"""Time against the number of tokens, with the floors that bandwidth and the matrix units set: an SVG beside the JSON.

Needs matplotlib (the extra `draw`).
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks.contenders import LABELS

Curve = dict[str, list[tuple[int, float]]]


def curves(data: dict[str, Any]) -> dict[str, Curve]:
    """By row (its name without the length): milliseconds by contender, and both floors, each over tokens."""
    found: dict[str, Curve] = defaultdict(lambda: defaultdict(list))
    ceilings = data["ceilings"]
    for row in data["rows"]:
        name, tokens = row["name"].partition(", N ")[0], row["shape"]["queries"]
        for contender, entry in row["contenders"].items():
            found[name][LABELS[contender]].append((tokens, entry["times"]["median"]))
        if ceilings and row["contenders"]:
            found[name]["bandwidth floor"].append((tokens, row["least_bytes"] / ceilings["bytes_per_second"] * 1e3))
        if ceilings and row["contenders"] and row["operations"]:
            floor = row["operations"] / ceilings["operations_per_second"] * 1e3
            found[name]["matrix-rate floor"].append((tokens, floor))
    return {name: {label: sorted(points) for label, points in curve.items()} for name, curve in found.items()}


def draw(data: dict[str, Any], path: Path) -> None:
    """One panel a row, both axes logarithmic."""
    from matplotlib.figure import Figure

    panels = curves(data)
    figure = Figure(figsize=(5 * max(len(panels), 1), 4), layout="constrained")
    for place, (name, curve) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(1, len(panels), place)
        for label, points in curve.items():
            style = "--" if label.endswith("floor") else "o-"
            axes.plot(*zip(*points, strict=True), style, label=label)
        axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="ms", title=name)
        axes.legend(fontsize="small")
    figure.savefig(path)

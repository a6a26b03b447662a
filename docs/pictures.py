"""Draws docs/patterns.svg: which keys each query of four patterns sees.

With the identity as values and equal scores, attention returns its own map: row i holds the weight of every key, and a
key is live where its weight is not 0. Run `python docs/pictures.py`; it needs matplotlib (`pip install attnc[draw]`).
"""

from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from matplotlib import pyplot
from matplotlib.colors import ListedColormap

import attnc

mpl.use("Agg")
mpl.rcParams["svg.hashsalt"] = "attnc"  # the same picture gives the same file

HERE = Path(__file__).parent
EXAMPLES = HERE.parent / "examples"
TOKENS = 96
INK = "#7d8590"  # readable on white and on black
LIVE, SOME = "#2f81f7", "#db6d28"  # live in every head, in some heads

# title, file, parameters
PANELS: list[tuple[str, str, dict[str, int]]] = [
    ("longformer", "longformer", {"radius": 6, "globals": 3}),
    ("strided", "strided", {"local": 8, "stride": 8}),
    ("neighborhood, 8 x 12 grid", "neighborhood", {"height": 8, "width": 12, "kernel": 5}),
    ("demo_hybrid (orange: odd heads)", "demo_hybrid", {"sinks": 2, "window": 12, "stride": 6}),
]


def live(pattern: Any, parameters: dict[str, int]) -> torch.Tensor:
    """(TOKENS, TOKENS): the share of two heads, one even and one odd, in which query i sees key j."""
    q = torch.zeros(1, 2, TOKENS, 8)
    k = torch.zeros(1, 1, TOKENS, 8)
    weights: torch.Tensor = pattern.reference(q, k, torch.eye(TOKENS)[None, None], **parameters)
    return (weights[0] > 0).float().mean(0)


def main() -> None:
    """Write the picture beside this file."""
    figure, axes = pyplot.subplots(1, len(PANELS), figsize=(3.0 * len(PANELS), 3.5), layout="constrained")
    for axis, (title, file, parameters) in zip(axes, PANELS, strict=True):
        shown = live(getattr(attnc.load(EXAMPLES / f"{file}.attn"), file), parameters)
        axis.imshow(shown, cmap=ListedColormap(["none", SOME, LIVE]), vmin=0, vmax=1, interpolation="none")
        axis.set_title(title, color=INK, fontsize=11)
        axis.set_xlabel(f"keys: {shown.mean():.0%} live", color=INK)
        axis.set_xticks([])
        axis.set_yticks([])
        for spine in axis.spines.values():
            spine.set_color(INK)
    axes[0].set_ylabel("queries", color=INK)
    figure.savefig(HERE / "patterns.svg", transparent=True, metadata={"Date": None})


if __name__ == "__main__":
    main()

"""Hybrids of families (zoo: hybrids), beside dense causal attention and the same hybrids written by hand."""

from __future__ import annotations

from typing import Any

from attnc.runtime.tools.inputs import Shape
from benchmarks.by_hand import HYBRIDS
from benchmarks.work import Aim, Size, Work, drawn

DENSE = ("dense",)
BY_HAND = ("by_hand",)
AIM = 1.3  # times, against the same hybrid written by hand
# (pattern, width, parameters at the timed size, at the small size, lengths of axes that nothing fixes)
ROWS: tuple[tuple[str, int, dict[str, Any], dict[str, Any], dict[str, int]], ...] = (
    ("based_window", 16, {"window": 64}, {"window": 20}, {}),
    ("lolcats", 64, {"window": 64}, {"window": 20}, {"f": 64}),
    ("infini", 64, {"segment": 2048}, {"segment": 64}, {}),
    ("hymba", 64, {"window": 1024}, {"window": 50}, {}),
    ("half_and_half", 128, {"window": 512}, {"window": 50}, {}),
    ("window_plus_blocks", 128, {"window": 512, "block": 64, "top": 8}, {"window": 40, "block": 16, "top": 2}, {}),
)


def works(device: str) -> list[Work]:
    """The rows for a kind of device."""
    gpu = device.startswith("cuda")
    rows = []
    for name, width, timed, tiny, axes in ROWS:
        shape = Shape.square(2, 16, 8192, width) if gpu else Shape.square(1, 4, 2048, min(width, 64))
        small = Shape.square(1, 2, 200, min(width, 64))
        peers, aim = (DENSE + BY_HAND, Aim("by_hand", AIM)) if name in HYBRIDS else (DENSE, None)
        rows.append(drawn(name, Size(shape, timed), Size(small, tiny), peers, axes=axes, aim=aim if gpu else None))
    wide = Size(Shape(1, 64, 4, 8192, 8192, 128, 128) if gpu else Shape(1, 16, 1, 2048, 2048, 64, 64))
    tiny = {"size": 16, "stride": 8, "block": 16, "top": 4, "window": 40}
    few = Size(Shape(1, 16, 1, 200, 200, 64, 64), tiny)
    aim = Aim("by_hand", AIM) if gpu else None
    return [*rows, drawn("nsa", wide, few, DENSE + BY_HAND, aim=aim, ranges={"gate": (0.1, 1.0)})]

"""Routed and learned sparse patterns (zoo: family 4), beside dense causal attention."""

from __future__ import annotations

from typing import Any

from attnc.runtime.tools.inputs import Shape
from benchmarks.work import Size, Work, drawn

DENSE = ("dense",)
BY_HAND = ("by_hand",)
# (pattern, parameters at the timed size, at the small size, lengths of axes that nothing fixes)
ROWS: tuple[tuple[str, dict[str, Any], dict[str, Any], dict[str, int]], ...] = (
    ("moba", {"block": 512, "top": 3}, {"block": 32, "top": 3}, {}),
    ("nsa", {}, {"size": 16, "stride": 8, "block": 16, "top": 4, "window": 40}, {}),
    ("quest", {"page": 16, "top": 64}, {"page": 8, "top": 4}, {}),
    ("seer", {"block": 64, "threshold": 0.004}, {"block": 16, "threshold": 0.1}, {"x": 64}),
    ("dsa", {"top": 2048}, {"top": 32}, {"n": 4, "x": 64}),
    ("xattention", {"block": 128, "stride": 8, "mass": 0.9}, {"block": 16, "stride": 4, "mass": 0.9}, {}),
    ("routing", {"clusters": 16}, {"clusters": 4}, {}),
    ("reformer", {"buckets": 64}, {"buckets": 8}, {}),
    ("moh", {"active": 4}, {"active": 1}, {}),
    ("mosa", {"tokens": 64}, {"tokens": 16}, {}),
    ("mixture_of_attentions", {}, {}, {}),
)


def works(device: str) -> list[Work]:
    """The rows for a kind of device."""
    shape = Shape.square(1, 16, 32768, 128) if device.startswith("cuda") else Shape.square(1, 4, 2048, 64)
    small = Shape.square(1, 2, 200, 64)
    return [
        drawn(name, Size(shape, timed), Size(small, tiny), DENSE + BY_HAND * (name == "moba"), axes=axes)
        for name, timed, tiny, axes in ROWS
    ]

"""Kernel and state patterns (zoo: family 3), beside flash-linear-attention where it is installed."""

from __future__ import annotations

from attnc.runtime.tools.inputs import Shape
from benchmarks.work import Size, Work, drawn

FLA = ("dense", "fla")
NAMES = (
    "linear",
    "retention",
    "simple_gla",
    "gla",
    "rwkv6",
    "rwkv7",
    "delta",
    "gated_delta",
    "kda",
    "forgetting",
    "mlstm",
)
NARROW = ("based", "power", "hedgehog")  # features of the square of the width
AXES = {"f": 64}  # features of a learned map


def works(device: str) -> list[Work]:
    """The rows for a kind of device."""
    gpu = device.startswith("cuda")
    wide = Size(Shape.square(2, 16, 8192, 128) if gpu else Shape.square(1, 4, 2048, 64))
    narrow = Size(Shape.square(2, 16, 8192, 16) if gpu else Shape.square(1, 4, 2048, 16))
    rows = [drawn(name, wide, Size(Shape.square(1, 2, 200, 64)), FLA) for name in NAMES]
    rows += [drawn(name, narrow, Size(Shape.square(1, 2, 200, 16)), ("dense",), axes=AXES) for name in NARROW]
    features = drawn("performer", wide, Size(Shape.square(1, 2, 200, 64)), ("dense",))
    horizon = {"horizon": wide.shape.keys}
    weighted = Size(wide.shape, horizon), Size(Shape.square(1, 2, 200, 64), {"horizon": 256})
    return [*rows, features, drawn("cosformer", *weighted, ("dense",))]

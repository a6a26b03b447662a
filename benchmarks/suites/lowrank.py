"""Low-rank patterns (zoo: family 2). Peers compute dense attention: another function, what low rank has to beat."""

from __future__ import annotations

from attnc.runtime.inputs import Shape
from benchmarks.work import Size, Work, drawn

DENSE = ("dense",)


def works(device: str) -> list[Work]:
    """The rows for a kind of device."""
    gpu = device.startswith("cuda")
    wide = Shape.square(2, 16, 16384, 64) if gpu else Shape.square(1, 4, 4096, 64)
    tiny = Shape.square(1, 2, 300, 64)
    latent = Shape(1, 16, 1, 8192, 8192, 128, 128) if gpu else Shape(1, 4, 1, 1024, 1024, 64, 64)
    latent_tiny = Shape(1, 2, 1, 130, 130, 32, 32)
    return [
        drawn("linformer", Size(wide), Size(tiny), DENSE, axes={"r": 256}),
        drawn("nystrom", Size(wide, {"landmarks": 64}), Size(tiny, {"landmarks": 16}), DENSE),
        drawn("compressed", Size(wide), Size(tiny), DENSE),
        drawn("agent", Size(wide), Size(tiny), DENSE, axes={"m": 64}),
        drawn("latent", Size(wide), Size(tiny), DENSE, axes={"m": 256}),
        drawn("mla", Size(latent), Size(latent_tiny), (), axes={"c": 256 if gpu else 64, "x": 64}),
    ]

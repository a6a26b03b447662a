"""Low-rank patterns (zoo: family 2), beside the same formula in torch, and dense causal attention."""

from __future__ import annotations

from dataclasses import replace

from attnc.runtime.tools.inputs import Shape
from benchmarks.work import Aim, Size, Work, drawn

GPU_PEERS = ("eager", "compiled", "causal_cudnn")
CPU_PEERS = ("eager", "dense")
PROJECTION = {"E": (-0.01, 0.01), "F": (-0.01, 0.01)}  # sums over 32K tokens stay in the range of scores
WEIGHTS = {"w_k": (-0.1, 0.1), "w_v": (-0.1, 0.1)}


def works(device: str) -> list[Work]:
    """The rows for a kind of device."""
    gpu = device.startswith("cuda")
    peers = GPU_PEERS if gpu else CPU_PEERS
    wide = Shape.square(1, 16, 32768, 128) if gpu else Shape.square(1, 4, 4096, 64)
    narrow = replace(wide, width=64, value_width=64)
    tiny = Shape.square(1, 2, 320, 64)
    rows = [
        drawn("linformer", Size(wide), Size(tiny), peers, axes={"r": 256}, ranges=PROJECTION),
        drawn("nystrom", Size(narrow, {"landmarks": 64}), Size(tiny, {"landmarks": 16}), peers),
        drawn("compressed", Size(narrow), Size(tiny), peers),
        drawn("agent", Size(narrow), Size(tiny), peers, axes={"m": 64}),
        drawn("latent", Size(narrow), Size(tiny), peers, axes={"m": 256}),
    ]
    aim = Aim("eager", 1.0)
    return [replace(row, aim=aim) for row in rows] + latent_rows(gpu, peers)


def latent_rows(gpu: bool, peers: tuple[str, ...]) -> list[Work]:
    """Multi-head latent attention, DeepSeek's widths (a latent of 512, 64 rotated channels): all queries, and one."""
    prefill = Shape(1, 16, 1, 32768, 32768, 128, 128) if gpu else Shape(1, 4, 1, 1024, 1024, 64, 64)
    few = replace(prefill, queries=1, keys=32768 if gpu else 4096)
    small = Shape(1, 2, 1, 130, 130, 32, 32)
    axes = {"c": 512 if gpu else 64, "x": 64}
    return [
        drawn("mla", Size(prefill), Size(small), peers, axes=axes, ranges=WEIGHTS),
        drawn(
            "mla", Size(few), Size(replace(small, queries=1)), peers, axes=axes, ranges=WEIGHTS, name="mla, one query"
        ),
    ]

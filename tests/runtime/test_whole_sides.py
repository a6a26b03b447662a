"""Kernels where one side is short: one tile holds it whole, heads that share keys are rows, vectors are cut in two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import attnc
from attnc.compiler.schedule import fused_shape
from attnc.runtime.cuda import kernel_call, launch, launch_backward, launch_single
from attnc.runtime.pattern import CompiledPattern
from attnc.runtime.tolerance import error, tolerance
from attnc.runtime.tools.inputs import Shape, made_inputs

EXAMPLES = Path(__file__).parents[2] / "examples"
RANGES = {  # scores of about 1
    "mla": {"w_k": (-0.1, 0.1), "w_v": (-0.1, 0.1)},
    "linformer": {"E": (-0.2, 0.2), "F": (-0.2, 0.2)},
}
Given = tuple[str, Shape, dict[str, Any], dict[str, int]]
# The side that a tile of 32 holds, of every attention in the order of the backward
SIDES: list[tuple[str, Given]] = [
    ("rows", ("latent", Shape(1, 2, 2, 70, 70, 16, 16), {}, {"m": 20})),
    ("", ("latent", Shape(1, 2, 2, 70, 70, 16, 16), {}, {"m": 33})),
    ("", ("latent", Shape(1, 4, 2, 70, 70, 16, 16), {}, {"m": 20})),  # a key's gradient is the sum of two heads'
    ("keys rows", ("agent", Shape(2, 2, 2, 133, 133, 16, 8), {}, {"m": 20})),
    ("keys", ("linformer", Shape(1, 4, 4, 70, 70, 24, 16), {}, {"r": 1})),
    ("keys rows", ("nystrom", Shape(1, 2, 2, 64, 64, 16, 16), {"landmarks": 5}, {})),
    ("keys keys", ("nystrom", Shape(1, 2, 2, 3, 3, 16, 16), {"landmarks": 5}, {})),
    ("keys", ("compressed", Shape(1, 4, 2, 70, 70, 16, 16), {"size": 8, "stride": 4}, {})),
    ("keys", ("causal", Shape(1, 4, 1, 50, 30, 16, 16), {}, {})),  # the first rows see no key
    ("rows", ("sliding_window", Shape(1, 2, 2, 20, 90, 16, 16), {"window": 7}, {})),  # nobody sees the first keys
    ("rows", ("causal", Shape(1, 1, 1, 1, 300, 16, 16), {}, {})),  # in parts
]


def given(name: str, shape: Shape, parameters: dict[str, Any], axes: dict[str, int]) -> tuple[CompiledPattern, Any]:
    pattern = attnc.load(EXAMPLES / f"{name}.attn").patterns[name]
    return pattern, made_inputs(pattern.pattern, shape, parameters, axes=axes, ranges=RANGES.get(name, {}))


def agrees(name: str, shape: Shape, parameters: dict[str, Any], axes: dict[str, int]) -> None:
    """The result and all gradients against the reference."""
    pattern, made = given(name, shape, parameters, axes)
    tensors = [one for one in (made.q, made.k, made.v, *made.inputs.values()) if one is not None]
    leaves = [one.requires_grad_() for one in tensors if one.is_floating_point()]
    settings = {**parameters, **made.inputs}
    out, _ = pattern.outputs(made.q, made.k, made.v, settings, backend="triton")
    expected = pattern.reference(made.q, made.k, made.v, **settings)
    weight = torch.linspace(-1, 1, out.numel()).view(out.shape)
    found = torch.autograd.grad(out, leaves, weight, allow_unused=True, materialize_grads=True)
    wanted = torch.autograd.grad(expected, leaves, weight.double(), allow_unused=True, materialize_grads=True)
    allowed = tolerance(torch.float32, max(made.k.shape[2], 16))
    assert error(out, expected) <= allowed
    assert max(error(one, other) for one, other in zip(found, wanted, strict=True)) <= allowed


@pytest.mark.parametrize(("sides", "case"), SIDES)
def test_one_kernel_gives_all_gradients(sides: str, case: Given, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []
    choose = launch_backward.fused_side

    def noted(*arguments: Any) -> Any:
        found = choose(*arguments)
        taken.append(found[0])
        return found

    monkeypatch.setattr(launch_backward, "fused_side", noted)
    agrees(*case)
    assert " ".join(taken) == sides


def test_leaves_keep_two_kernels() -> None:
    """What a score is made of beside q and k has sums of its own."""
    pattern, made = given("alibi", Shape(1, 2, 2, 9, 9, 16, 16), {}, {})
    out, _ = pattern.outputs(made.q, made.k, made.v, made.inputs, backend="triton")
    step = pattern.prepared(made.q, made.k, made.v, made.inputs).composition.attention
    assert out.shape == made.q.shape
    assert step is not None
    _, kernels = launch_backward.kernels_of(step.plan, 0)
    assert not any(kernel.fuses for kernel in kernels.kernels)


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("side", ["rows", "keys"])
@pytest.mark.parametrize("pieces", [False, True])
def test_what_a_tile_holds(itemsize: int, side: str, pieces: bool) -> None:
    for width in (16, 64, 128, 192, 256):
        for count in (1, 63, 64, 65, 128, 256, 1000):
            shape = fused_shape(width, itemsize, side, count, pieces=pieces)
            assert shape is None or shape.block_m >= count
            if shape is not None:  # 64K registers of 4 bytes hold the sums, the scores and their gradients
                sums = shape.block_m * width * (2 if side == "keys" else 1)
                assert sums + 2 * shape.block_m * shape.block_n <= 65536
    assert fused_shape(64, 2, "rows", 256) is not None
    assert fused_shape(64, 2, "keys", 64) is not None


@pytest.mark.parametrize(
    ("queries", "keys", "width", "more"),
    [(70, 70, 20, 13), (30, 70, 16, 16), (70, 30, 16, 9), (5, 5, 9, 8), (70, 70, 3, 2)],
)
def test_joined_vectors_in_two_blocks(
    queries: int, keys: int, width: int, more: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_call, "CUT_FROM", 16)
    monkeypatch.setattr(kernel_call, "LEAST_TAIL", 16)
    agrees("mla", Shape(2, 2, 1, queries, keys, width, 16), {}, {"c": 40, "x": more})


def test_blocks_of_columns() -> None:
    assert kernel_call.column_blocks(192) == (128, 64)
    assert kernel_call.column_blocks(576) == (512, 64)
    assert kernel_call.column_blocks(130) == (128, 64)
    assert kernel_call.column_blocks(200) == (256, 0)
    assert kernel_call.column_blocks(128) == (128, 0)
    assert kernel_call.column_blocks(96) == (128, 0)


@pytest.mark.parametrize(
    "case",
    [
        ("causal", Shape(2, 4, 2, 1, 700, 16, 24), {}, {}),
        ("alibi", Shape(2, 34, 1, 1, 70, 16, 16), {}, {}),
        ("sliding_window", Shape(1, 4, 2, 1, 70, 16, 16), {"window": 7}, {}),
        ("streaming", Shape(1, 4, 2, 1, 1, 16, 16), {}, {}),
        ("strided", Shape(1, 4, 2, 1, 131, 16, 16), {"local": 4, "stride": 5}, {}),
        ("sink_logit", Shape(1, 4, 2, 1, 300, 16, 16), {}, {}),
    ],
)
def test_heads_of_one_query_share_a_tile(case: Given, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "run_branch", lambda *_: pytest.fail("a tile for every head"))
    agrees(*case)


def test_tensors_that_steer_keep_a_tile_for_every_head() -> None:
    pattern, made = given("documents", Shape(1, 4, 2, 1, 20, 16, 16), {}, {})
    prepared = pattern.prepared(made.q, made.k, made.v, made.inputs)
    step = prepared.composition.attention
    assert step is not None
    assert not launch_single.takes(step.plan, prepared.call(step.plan))

"""Low rank at its edges: sequences shorter than what they are reduced to, counts that do not divide, empty blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import attnc

EXAMPLES = Path(__file__).parents[2] / "examples"


def example(name: str) -> Any:
    return attnc.load(EXAMPLES / f"{name}.attn").patterns[name]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


def qkv(queries: int, keys: int) -> list[Tensor]:
    return [drawn(1, 2, n, 4, seed=at) for at, n in enumerate((queries, keys, keys))]


def agree(pattern: Any, leaves: list[Tensor], **settings: Any) -> Tensor:
    """Result and gradients are the reference's; the result."""
    inputs = [*leaves, *(one for one in settings.values() if isinstance(one, Tensor))]
    out, expected = pattern(*leaves, **settings), pattern.reference(*leaves, **settings)
    torch.testing.assert_close(out, expected)
    found, wanted = (torch.autograd.grad(one.square().sum(), inputs) for one in (out, expected))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)
    return out.detach()  # type: ignore[no-any-return]


@pytest.mark.parametrize(("queries", "keys", "rows"), [(3, 3, 8), (1, 1, 1), (2, 5, 5)])
def test_a_sequence_shorter_than_its_projection(queries: int, keys: int, rows: int) -> None:
    agree(example("linformer"), qkv(queries, keys), E=drawn(rows, keys, seed=4), F=drawn(rows, keys, seed=5))


def test_a_projection_of_another_length_is_refused() -> None:
    with pytest.raises(attnc.AttnError, match=r"j is 6 long in `F`.*5|F.*6.*5"):
        example("linformer")(*qkv(5, 5), E=drawn(3, 5), F=drawn(3, 6))
    with pytest.raises(attnc.AttnError, match=r"r is 4 long in `F`.*3|F.*4.*3"):
        example("linformer")(*qkv(5, 5), E=drawn(3, 5), F=drawn(4, 5))


@pytest.mark.parametrize(
    ("queries", "keys", "landmarks"),
    [(7, 7, 3), (10, 10, 4), (3, 3, 8), (1, 1, 4), (4, 9, 4), (5, 5, 5)],  # short last, absent, and fewer queries
)
def test_segments_that_do_not_divide_or_are_empty(queries: int, keys: int, landmarks: int) -> None:
    agree(example("nystrom"), qkv(queries, keys), landmarks=landmarks, steps=3)


def test_no_segments_are_refused() -> None:
    with pytest.raises(attnc.AttnError, match="positive"):
        example("nystrom")(*qkv(4, 4), landmarks=0)


@pytest.mark.parametrize(("length", "size", "stride"), [(3, 4, 2), (3, 4, 4), (1, 32, 16), (9, 4, 3), (8, 4, 6)])
def test_blocks_longer_than_the_sequence_or_between_its_ends(length: int, size: int, stride: int) -> None:
    out = agree(example("compressed"), qkv(length, length), size=size, stride=stride)
    assert not out[:, :, : size - 1].any()  # no block has ended


def test_no_block_is_a_result_of_zeros() -> None:
    out = example("compressed")(*qkv(3, 3), size=8, stride=4)
    assert not out.any()


@pytest.mark.parametrize("name", ["agent", "latent"])
def test_more_latents_than_tokens(name: str) -> None:
    pattern, inputs = example(name), {{"agent": "agents", "latent": "latents"}[name]: drawn(2, 9, 4, seed=6)}
    leaves = qkv(2, 2)
    if name == "latent":
        torch.testing.assert_close(pattern(*leaves, **inputs), pattern.reference(*leaves, **inputs))
    else:
        agree(pattern, leaves, **inputs)


@pytest.mark.parametrize(("queries", "channels"), [(1, 300), (9, 300), (2, 6)])
def test_latents_of_more_channels_than_kernels_hold(queries: int, channels: int) -> None:
    weights = {"w_k": drawn(2, 4, channels, seed=1), "w_v": drawn(2, 4, channels, seed=2)}
    rotated = {"q_r": drawn(1, 2, queries, 2, seed=3), "k_r": drawn(1, 1, 9, 2, seed=4)}
    pattern, q, k = example("mla"), drawn(1, 2, queries, 4), drawn(1, 1, 9, channels, seed=5)
    settings = {**weights, **rotated}
    torch.testing.assert_close(pattern(q, k, None, **settings), pattern.reference(q, k, None, **settings))
    program, sizes = pattern.program, {"i": queries, "j": 9, "d": 4, "e": 4, "x": 2, "c": channels}
    assert program.composition_for(sizes, 256).widest(sizes) <= 256


def test_a_latent_beyond_all_bounds_is_refused() -> None:
    weights = {"w_k": drawn(2, 4, 4097), "w_v": drawn(2, 4, 4097)}
    rotated = {"q_r": drawn(1, 2, 1, 2), "k_r": drawn(1, 1, 2, 2)}
    with pytest.raises(attnc.AttnError, match="more than 4096"):
        example("mla")(drawn(1, 2, 1, 4), drawn(1, 1, 2, 4097), None, **weights, **rotated)

"""The zoo's patterns against plain torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from attnc.dsl.check import check
from attnc.dsl.source import Source
from attnc.dsl.terms import Pattern
from attnc.runtime.reference.meaning import reference

TESTS = Path(__file__).resolve().parents[1]
FOLDERS = (TESTS.parent / "examples", TESTS / "zoo")


@cache
def zoo_pattern(name: str) -> Pattern:
    """The pattern of examples/NAME.attn, or of tests/zoo/NAME.attn where that is not lowered yet."""
    path = next(folder / f"{name}.attn" for folder in FOLDERS if (folder / f"{name}.attn").exists())
    return check(Source(str(path), path.read_text()))[name]


def call(name: str, q: Tensor, k: Tensor, v: Tensor | None, **settings: object) -> Tensor:
    """The reference of a zoo pattern. Tensors among the settings are inputs, the rest parameters."""
    inputs = {key: value for key, value in settings.items() if isinstance(value, Tensor)}
    parameters = {key: value for key, value in settings.items() if key not in inputs}
    return reference(zoo_pattern(name), q, k, v, parameters, inputs)


def compare(name: str, plain: Callable[..., Tensor], *arrays: Tensor | None, **settings: object) -> Tensor:
    """Assert that result and every gradient equal those of `plain(q, k, v, **settings)`; gives the result."""
    given = [x for x in (*arrays, *settings.values()) if isinstance(x, Tensor) and x.is_floating_point()]
    real = [x.requires_grad_() for x in given]
    q, k, v = arrays
    assert q is not None
    assert k is not None
    ours, theirs = call(name, q, k, v, **settings), plain(*arrays, **settings)
    torch.testing.assert_close(ours, theirs)
    weight = torch.randn(ours.shape, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    found, expected = (
        torch.autograd.grad((out * weight).sum(), real, allow_unused=True, materialize_grads=True)
        for out in (ours, theirs)
    )
    torch.testing.assert_close(found, expected)
    return ours.detach()


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """The tensors are tiny: threads would only wait for one another, many times longer than the work takes."""
    torch.set_num_threads(1)


@pytest.fixture
def zoo() -> Callable[..., Tensor]:
    """`zoo(name, q, k, v, **settings)`."""
    return call


@pytest.fixture
def agrees() -> Callable[..., Tensor]:
    """`agrees(name, plain, q, k, v, **settings)`."""
    return compare

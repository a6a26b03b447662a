"""torch.compile takes a call of any kind of step as one graph, forward and backward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import attnc
from attnc.runtime.binding import bind
from attnc.runtime.tools.inputs import Shape, made_inputs

EXAMPLES = Path(__file__).parents[2] / "examples"

# One of each kind of step, and of what torch computes over whole arrays.
NAMES: dict[str, dict[str, Any]] = {
    "causal": {},
    "nystrom": {"landmarks": 5},
    "mla": {},
    "forgetting": {},
    "performer": {"features": 8},
    "hedgehog": {},
    "gated_delta": {},
    "lolcats": {"window": 3},
    "moba": {"block": 4},
    "xattention": {"block": 8, "stride": 4},
    "reformer": {"buckets": 4},
    "moh": {"active": 1},
    "nsa": {"size": 4, "stride": 2, "block": 4, "top": 2, "window": 5},
}


def example(name: str, shape: Shape) -> tuple[Any, dict[str, Tensor]]:
    """A pattern, and tensors of a call by name."""
    pattern = attnc.load(EXAMPLES / f"{name}.attn").patterns[name]
    ranges = {"g": (-1.0, 0.0), "f": (-1.0, 0.0)}
    made = made_inputs(pattern.pattern, shape, NAMES[name], ranges=ranges)
    return pattern, {"q": made.q, "k": made.k, "v": made.v, **made.inputs}


@pytest.mark.parametrize("shape", [Shape(1, 2, 1, 19, 19, 8, 8), Shape(2, 2, 2, 32, 32, 8, 8)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_results_lie_in_memory_as_the_fake_says(name: str, shape: Shape) -> None:
    """Inductor plans by strides, of what steps leave for the backward, too."""
    pattern, tensors = example(name, shape if name != "mla" else Shape(1, 2, 1, 19, 19, 8, 8))
    q, k, v, *inputs = tensors.values()
    prepared = pattern.prepared(q, k, v, {**NAMES[name], **dict(zip([*tensors][3:], inputs, strict=True))})
    key, ints, floats = pattern._packed(
        bind(pattern.pattern, pattern._parameters, q, k, v, {**NAMES[name], **prepared.inputs})
    )

    def called(*given: Tensor) -> list[Tensor]:
        out, lse, saved = torch.ops.attnc.attention(key, *given[:3], list(given[3:]), ints, floats, "auto")
        return [out, lse, *saved]

    real = called(q, k, v, *prepared.inputs.values())
    with FakeTensorMode() as mode:
        fake = called(*(mode.from_tensor(one) for one in (q, k, v, *prepared.inputs.values())))
    for one, told in zip(real, fake, strict=True):
        assert (one.shape, one.dtype) == (told.shape, told.dtype)
        steps = [
            (found, said) for found, said, size in zip(one.stride(), told.stride(), one.shape, strict=True) if size > 1
        ]
        assert all(found == said for found, said in steps), (one.shape, one.stride(), told.stride())


@pytest.mark.parametrize("name", NAMES)
def test_one_graph(name: str) -> None:
    pattern, tensors = example(name, Shape(1, 2, 1, 19, 19, 8, 8))
    real = [x.requires_grad_() for x in tensors.values() if x.is_floating_point()]

    def results(function: Any) -> list[Tensor]:
        out = function(**tensors, **NAMES[name])
        made = torch.autograd.grad(out.square().sum(), real, allow_unused=True, materialize_grads=True)
        return [out, *made]

    torch.compiler.reset()
    compiled = results(torch.compile(pattern, fullgraph=True, backend="aot_eager"))
    torch.testing.assert_close(compiled, results(pattern))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # inductor's own
@pytest.mark.parametrize("name", ["causal", "nystrom", "gated_delta"])
def test_the_default_backend_of_torch_compile(name: str) -> None:
    """Inductor, with something to fuse before and after."""
    pattern, tensors = example(name, Shape(1, 2, 2, 32, 32, 16, 16))
    real = [x.requires_grad_() for x in tensors.values() if x.is_floating_point()]

    def step(**given: Tensor) -> Tensor:
        out: Tensor = pattern(**{**given, "q": given["q"] * 2}, **NAMES[name])
        return out.relu()

    def results(function: Any) -> list[Tensor]:
        out = function(**tensors)
        return [out, *torch.autograd.grad(out.square().sum(), real)]

    torch.compiler.reset()
    torch.testing.assert_close(results(torch.compile(step, fullgraph=True)), results(step))

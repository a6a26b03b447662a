"""torch.compile takes a call of any kind of step as one graph, forward and backward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import attnc
from attnc.runtime.inputs import Shape, made_inputs

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


@pytest.mark.parametrize("name", NAMES)
def test_one_graph(name: str) -> None:
    pattern = attnc.load(EXAMPLES / f"{name}.attn").patterns[name]
    ranges = {"g": (-1.0, 0.0), "f": (-1.0, 0.0)}
    made = made_inputs(pattern.pattern, Shape(1, 2, 1, 19, 19, 8, 8), NAMES[name], ranges=ranges)
    tensors = {"q": made.q, "k": made.k, "v": made.v, **made.inputs}
    real = [x.requires_grad_() for x in tensors.values() if x.is_floating_point()]

    def results(function: Any) -> list[Tensor]:
        out = function(**tensors, **NAMES[name])
        made = torch.autograd.grad(out.square().sum(), real, allow_unused=True, materialize_grads=True)
        return [out, *made]

    torch.compiler.reset()
    compiled = results(torch.compile(pattern, fullgraph=True, backend="aot_eager"))
    torch.testing.assert_close(compiled, results(pattern))

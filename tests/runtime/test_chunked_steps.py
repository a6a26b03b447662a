"""Steps of a composition on the chunked kernels, interpreted."""

from __future__ import annotations

import torch
from torch import Tensor

from attnc.compiler.composition import Carry, Extent, Recur
from attnc.compiler.ir import Graph
from attnc.runtime.call import Call
from attnc.runtime.chunked_steps import (
    carry_step,
    carry_step_backward,
    recur_step,
    recur_step_backward,
    step_text,
)
from attnc.runtime.launch_chunked_recur import Recurrence
from attnc.runtime.tolerance import error, tolerance
from tests.runtime.chunked_oracle import plain_recurrence


def call_of(arrays: dict[str, Tensor], offset: int = 0) -> Call:
    q, k = arrays["q"], arrays["k"]
    sizes = {"b": q.shape[0], "h": q.shape[1], "i": q.shape[2], "d": q.shape[3], "j": k.shape[2], "t": k.shape[2]}
    return Call(q, k, arrays["v"], {"scale": 1.0}, {}, sizes, offset=offset)


def random(*names: str, tokens: int = 21) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {name: torch.randn(1, 1, tokens, 8) for name in names}


def test_a_carried_sum_of_documents() -> None:
    arrays = random("q", "k", "v")
    arrays["doc"] = torch.tensor([[0] * 5 + [1] * 11 + [4] * 5])
    step = Carry("out", "q", "k", "v", Extent("lag", Graph().literal(1), same="doc"), total="n")
    result = carry_step(step, call_of(arrays), arrays)
    exact = {name: arrays[name].double().requires_grad_() for name in "qkv"}
    i, j = torch.arange(21)[:, None], torch.arange(21)[None]
    live = (j <= i - 1) & (arrays["doc"][0][:, None] == arrays["doc"][0][None])
    weights = (exact["q"] @ exact["k"].transpose(2, 3)).masked_fill(~live, 0.0)
    out = weights @ exact["v"]
    assert result.total is not None
    assert error(result.out, out) <= tolerance(torch.float32, 21)
    assert error(result.total, weights.sum(-1)) <= tolerance(torch.float32, 21)
    cotangent = torch.randn(out.shape)
    found = carry_step_backward(step, call_of(arrays), arrays, {"out": cotangent, "n": None})
    expected = torch.autograd.grad((out * cotangent.double()).sum(), list(exact.values()))
    assert all(
        error(found[name], one) <= tolerance(torch.float32, 21) for name, one in zip("qkv", expected, strict=True)
    )


def test_an_array_in_two_places_has_one_gradient() -> None:
    arrays = random("q", "k", "v")
    step = Carry("out", "q", "k", "k", Extent("lag"))
    cotangent = torch.randn(1, 1, 21, 8)
    exact = [arrays[name].double().requires_grad_() for name in "qk"]
    out = (exact[0] @ exact[1].transpose(2, 3)).tril() @ exact[1]
    expected = torch.autograd.grad((out * cotangent.double()).sum(), exact)
    found = carry_step_backward(step, call_of(arrays), arrays, {"out": cotangent})
    assert set(found) == {"q", "k"}
    assert error(found["k"], expected[1]) <= tolerance(torch.float32, 21)


def test_a_recurrence_whose_left_array_is_missing_is_a_delta_rule() -> None:
    arrays = random("q", "k", "v")
    arrays["k"] = torch.nn.functional.normalize(arrays["k"], dim=-1)
    arrays["y"] = 0.5 * arrays["k"]
    arrays["g"] = -torch.rand(1, 1, 21)
    step = Recur("out", "q", "k", "v", "g", "x", "y")
    result = recur_step(step, call_of(arrays), arrays, keep=True)
    exact = [arrays[name].double().requires_grad_() for name in ("q", "k", "v", "y", "g")]
    q, k, v, y, g = exact
    out, _ = plain_recurrence(Recurrence(q, k, v, y, None, g), None)
    assert error(result.out, out) <= tolerance(torch.float32, 21)
    cotangent = torch.randn(out.shape)
    found = recur_step_backward(step, call_of(arrays), arrays, cotangent, result.kept)
    expected = torch.autograd.grad((out * cotangent.double()).sum(), exact)
    names = ("q", "k", "v", "y", "g")
    assert {
        name: error(found[name], one) <= tolerance(torch.float32, 21) for name, one in zip(names, expected, strict=True)
    } == dict.fromkeys(names, True)


def test_the_text_of_a_step() -> None:
    assert "def feature_gradients" in step_text(Carry("out", "q", "k", "v", Extent("all")))

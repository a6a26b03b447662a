"""What a forward keeps of its states for the gradients: the same bits as where backward makes them again."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

import attnc
from attnc.runtime import operator_autograd
from tests.runtime.test_decoding import pattern_of

TEXTS = {
    "gates": """
pattern p:
    input g: real[b, h, t]
    G = cumsum[t](g)
    out = sum[j](exp(G[i] - G[j]) * (q @ k) * scale * v where j <= i)
""",
    "every key": """
pattern p:
    out = normalize[j](exp(q) @ exp(k), eps = 1e-6) @ v
""",
    "documents": """
pattern p:
    input doc: int[b, t]
    out = sum[j]((q @ k) * scale * v where doc[i] == doc[j] and j <= i)
""",
    "several steps, of which one keeps nothing": """
pattern p:
    input g: real[b, h, t, d]
    input beta: real[b, h, t]
    G = cumsum[t](g)
    scan t:
        S = S + outer(k, beta * (v - k @ S))
        x = q * scale @ S
    y = sum[j]((q @ k * scale) ** 2 * v where j <= i)
    z = normalize[j](exp(q) @ exp(k) where j <= i, eps = 1e-6) @ v
    out = x[i] + y + z + sum[j]((q * exp(G[i] - G[j])) @ k * scale * v where j <= i)
""",
}


def leaves(text: str) -> tuple[Any, list[Tensor], dict[str, Tensor]]:
    torch.manual_seed(0)
    pattern = attnc.compile(text).p
    q, k, v = (torch.randn(1, 2, 37, 8) for _ in range(3))
    possible = {
        "g": -torch.rand(1, 2, 37, *((8,) if "t, d]" in text else ())),
        "beta": torch.rand(1, 2, 37) / 4,
        "doc": torch.arange(37).expand(1, 37) // 10,
    }
    more = {name: one for name, one in possible.items() if f"input {name}:" in text}
    given = [one.requires_grad_() for one in (q, k / 2, v, *more.values()) if one.is_floating_point()]
    return pattern, given, more


@pytest.mark.parametrize("name", TEXTS)
def test_the_same_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pattern, given, more = leaves(TEXTS[name])
    found: list[list[Tensor]] = []
    counts: list[int] = []
    for keeps in (True, False):
        monkeypatch.setattr(operator_autograd, "keeps", keeps)
        out, _ = pattern.outputs(given[0], given[1], given[2], more, "triton")
        counts.append(len(out.grad_fn.saved_tensors))
        found.append([out.detach(), *torch.autograd.grad(out.square().sum(), given)])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert counts[0] > counts[1]


def test_without_gradients_nothing_is_kept() -> None:
    pattern, given, more = leaves(TEXTS["gates"])
    with torch.no_grad():
        q, k, v, *_ = given
        key, ints, floats, inputs = pattern._checked(q, k, v, more)
        _, _, left = torch.ops.attnc.attention(key, q, k, v, inputs, ints, floats, "triton")
    assert len(left) == 1


@pytest.mark.parametrize("name", TEXTS)
def test_compiled_calls_keep_as_much(name: str) -> None:
    """What tracing says of shapes and types is what there is."""
    pattern, given, more = leaves(TEXTS[name])

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = pattern.outputs(q, k, v, more, "triton")[0]
        return out

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    found = [
        torch.autograd.grad(run(given[0], given[1], given[2]).square().sum(), given[:3]) for run in (compiled, call)
    ]
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    plain = [one.detach() for one in given[:3]]
    key, ints, floats, inputs = pattern._checked(*plain, more)
    arguments = (key, *plain, [one.detach() for one in inputs], ints, floats, "triton", True)
    checked = torch.library.opcheck(torch.ops.attnc.attention.default, arguments, test_utils=("test_faketensor",))
    assert set(checked.values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", ["linear", "gla", "gated_delta", "kda", "rwkv7"])
def test_explain_says_how_many_numbers(name: str) -> None:
    pattern = pattern_of(name)
    q, k, v = torch.rand(2, 3, 32, 8), torch.rand(2, 3, 32, 8), torch.rand(2, 3, 32, 5)  # two chunks of 16
    wide = {"gla": ("g",), "kda": ("g",), "rwkv7": ("g", "a", "b")}.get(name, ())
    names = [one.name for one in pattern.pattern.inputs]
    more: dict[str, Any] = {one: -torch.rand(2, 3, 32, *([8] if one in wide else [])) for one in names}
    text = pattern.explain(q, k, v, **more)
    said = re.search(r"keeps for gradients, on a GPU: (.*) numbers", text)
    assert said is not None
    key, ints, floats, inputs = pattern._checked(q, k, v, more)
    left = [torch.ops.attnc.attention(key, q, k, v, inputs, ints, floats, "triton", keep)[2] for keep in (False, True)]
    kept = left[1][len(left[0]) :]
    assert sum(one.numel() for one in kept) == eval(said[1], {"B": 2, "H": 3, "N": 32, "F": 8, "E": 5, "C": 16})

"""The layer: beside the same computation written out, its inputs as parameters, buffers and projections, training."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnc
from attnc.nn import Attention

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
TEXT = """
pattern gated(window: int = 4):
    input gate: real[b, h, i, 2]
    input slope: real[h]
    near = softmax[j](q @ k * scale - slope * (i - j) where 0 <= i - j < window) @ v
    all  = softmax[j](q @ k * scale where j <= i) @ v
    out  = sigmoid(gate[0]) * near + sigmoid(gate[1]) * all

pattern table(buckets: int = 6):
    input bias: real[h, buckets] = 0.5
    input columns: int[h, y]
    input live: bool[b, t]
    input forget: real[b, h, t]
    out = softmax[j](q @ k * scale + bias[min(i - j, buckets - 1)] + forget[j]
        where j <= i and live[j] and (i - j < 3 or j in columns[h])) @ v

pattern paired:
    input bias: real[b, h, i, j]
    out = softmax[j](q @ k * scale + bias) @ v

pattern open:
    input weight: real[h, r]
    out = softmax[j](q @ k * scale + weight[i - j] where j <= i) @ v

pattern read:
    out = outer(mean[j](k), mean[j](v))
"""
FILE = attnc.compile(TEXT)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def heads_of(x: Tensor, projection: nn.Linear, heads: int) -> Tensor:
    projected: Tensor = projection(x)
    split: Tensor = projected.unflatten(-1, (heads, -1))
    return split.transpose(1, 2)


def test_it_is_projections_around_the_pattern() -> None:
    layer = Attention(
        attnc.load(EXAMPLES / "sliding_window.attn"), 24, 6, 2, value_width=5, settings={"window": 3}, bias=True
    )
    x = torch.randn(2, 11, 24)
    q, k, v = (heads_of(x, getattr(layer, f"{name}_projection"), n) for name, n in (("q", 6), ("k", 2), ("v", 2)))
    out = layer.pattern.reference(q, k, v, window=3).float()
    torch.testing.assert_close(layer(x), layer.out_projection(out.transpose(1, 2).flatten(2)))
    wide = layer.pattern.reference(q, k, v, window=9).float()
    torch.testing.assert_close(layer(x, window=9), layer.out_projection(wide.transpose(1, 2).flatten(2)))
    assert "sliding_window, heads=6, key_heads=2, window=3" in repr(layer)


def test_inputs_are_parameters_and_projections() -> None:
    layer = Attention(FILE.gated, 24, 6, projected=["gate"], settings={"slope": torch.linspace(0.1, 1.0, 6)})
    assert torch.equal(layer.get_parameter("input_slope"), torch.linspace(0.1, 1.0, 6))
    assert isinstance(layer.input_gate, nn.Linear)
    x = torch.randn(2, 9, 24)
    gate = layer.input_gate(x).unflatten(-1, (6, 2)).transpose(1, 2)
    q, k, v = (heads_of(x, getattr(layer, f"{name}_projection"), 6) for name in "qkv")
    out = layer.pattern.reference(q, k, v, gate=gate, slope=layer.input_slope).float()
    torch.testing.assert_close(layer(x), layer.out_projection(out.transpose(1, 2).flatten(2)))
    layer(x).square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in layer.parameters())


def test_starts_buffers_and_inputs_of_a_call() -> None:
    columns = torch.tensor([[0, 4], [2, -1]])
    layer = Attention(FILE.table, 8, 2, settings={"buckets": 7, "columns": columns}, projected=["forget"])
    assert torch.equal(layer.get_parameter("input_bias"), torch.full((2, 7), 0.5))
    assert {"input_bias", "input_columns", "input_forget.weight", "q_projection.weight"} <= layer.state_dict().keys()
    x, live = torch.randn(3, 9, 8), torch.rand(3, 9) < 0.7
    q, k, v = (heads_of(x, getattr(layer, f"{name}_projection"), 2) for name in "qkv")
    given = {
        "bias": layer.input_bias,
        "columns": columns,
        "live": live,
        "forget": layer.get_submodule("input_forget")(x).transpose(1, 2),
    }
    out = layer.pattern.reference(q, k, v, buckets=7, **given).float()
    torch.testing.assert_close(layer(x, live=live), layer.out_projection(out.transpose(1, 2).flatten(2)))
    with pytest.raises(attnc.AttnError, match="input `live` is missing"):
        layer(x)


def test_state_is_saved_and_loaded() -> None:
    first, second = (Attention(FILE.gated, 24, 6, projected=["gate"]) for _ in range(2))
    x = torch.randn(1, 7, 24)
    assert not torch.allclose(first(x), second(x))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file))
    assert torch.equal(first(x), second(x))
    copied = copy.deepcopy(first)
    assert torch.equal(copied(x), first(x))
    with torch.no_grad():
        copied.get_parameter("input_slope").add_(1)
    assert not torch.allclose(copied(x), first(x))


def test_under_torch_compile() -> None:
    layer = Attention(FILE.gated, 24, 6, projected=["gate"])
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 9, 24)
    found = []
    for call in (layer, compiled):
        layer.zero_grad()
        out = call(x)
        out.square().mean().backward()
        found.append([out.detach(), *(parameter.grad for parameter in layer.parameters())])
    torch.testing.assert_close(*found)


def test_under_autocast() -> None:
    layer = Attention(FILE.gated, 24, 6, projected=["gate"])
    x = torch.randn(2, 9, 24)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), layer(x), atol=2e-2, rtol=2e-2)
    out.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())


def test_in_another_type() -> None:
    layer = Attention(FILE.gated, 24, 6, projected=["gate"], dtype=torch.float64)
    assert {parameter.dtype for parameter in layer.parameters()} == {torch.float64}
    assert layer(torch.randn(1, 5, 24).double()).dtype == torch.float64


def test_layers_learn() -> None:
    layer = Attention(FILE.gated, 16, 4, projected=["gate"])
    x = torch.randn(2, 12, 16)
    wanted = x.roll(1, dims=1)
    optimizer = torch.optim.Adam(layer.parameters(), 1e-2)
    losses = []
    for _ in range(60):
        loss = (layer(x) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (dict(settings={"windw": 3}), "there is no `windw`"),
        (dict(projected=["gates"]), "there is no `gates`"),
        (dict(projected=["slope"]), r"`slope: real\[h\]` cannot be projected from x"),
        (dict(settings={"slope": torch.zeros(5)}), r"`slope` is \(5,\) where the layer needs \(6,\)"),
        (dict(settings={"gate": torch.zeros(1, 6, 5, 2)}), "`gate` has the lengths of a call: give it to forward"),
    ],
)
def test_mistakes_are_located(made: dict[str, Any], message: str) -> None:
    with pytest.raises(attnc.AttnError, match=message):
        Attention(FILE.gated, 24, 6, **made)


def test_other_mistakes() -> None:
    with pytest.raises(attnc.AttnError, match=r"cannot be projected from x"):
        Attention(FILE.paired, 24, 6, projected=["bias"])
    with pytest.raises(attnc.AttnError, match="a layer needs one vector a query"):
        Attention(FILE.read, 24, 6)
    with pytest.raises(attnc.AttnError, match=r"how long is axis r of `weight`\?"):
        Attention(FILE.open, 8, 2)
    assert Attention(FILE.open, 8, 2, sizes={"r": 5}).input_weight.shape == (2, 5)
    with pytest.raises(attnc.AttnError, match="`slope` is the layer's own: it cannot be given"):
        Attention(FILE.gated, 24, 6)(torch.randn(1, 5, 24), slope=torch.zeros(6))
    with pytest.raises(ValueError, match="6 query heads cannot share 4 key heads"):
        Attention(FILE.gated, 24, 6, 4)
    with pytest.raises(ValueError, match="5 heads do not divide a width of 24"):
        Attention(FILE.gated, 24, 5)
    with pytest.raises(ValueError, match="holds several patterns, give one: gated"):
        Attention(FILE, 24, 6)

"""Weights of mechanisms that have none in their text, against gradients and against what they should be."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import attnc
from attnc.runtime.modules import AttnModule
from attnc.runtime.pattern import CompiledPattern
from attnc.runtime.tools.picture_inputs import SHAPE, picture_inputs, picture_setting
from attnc.runtime.tools.settings import Setting
from attnc.runtime.tools.weights import weights

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted([*(ROOT / "examples").glob("*.attn"), *(ROOT / "tests" / "zoo").glob("*.attn")])
LINEAR = "pattern p:\n    out = sum[j]((q @ k) * v where j <= i)\n"


def tensors(rows: int = 9, keys: int = 9, heads: int = 2, key_heads: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, heads, rows, 4), (2, key_heads, keys, 4), (2, key_heads, keys, 3))
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return q, k, v


def main(module: AttnModule) -> CompiledPattern:
    assert module.main is not None
    return module.main


def by_gradient(pattern: CompiledPattern, q: Tensor, k: Tensor, v: Tensor, **settings: object) -> Tensor:
    """(H, rows, M): the derivative of the result's first channel by the values'."""
    v = v[:1].clone().requires_grad_()
    out = pattern.reference(q[:1], k[:1], v, **settings)[0, ..., 0]
    rows = [torch.autograd.grad(element, v, retain_graph=True)[0][0, ..., 0].sum(0) for element in out.flatten()]
    return torch.stack(rows).view(*out.shape, -1).double()


@pytest.mark.parametrize(("rows", "keys", "key_heads"), [(9, 9, 2), (3, 8, 1), (7, 4, 2), (1, 1, 1)])
def test_weights_of_a_softmax(rows: int, keys: int, key_heads: int) -> None:
    q, k, v = tensors(rows, keys, key_heads=key_heads)
    (found,) = weights(main(attnc.load(ROOT / "examples/causal.attn")), q, k, v, {})
    score = q[0] @ k[0].repeat_interleave(2 // key_heads, 0).mT / 2
    dead = torch.arange(keys) > torch.arange(rows).unsqueeze(1) + max(keys - rows, 0)
    torch.testing.assert_close(found.values, score.masked_fill(dead, -torch.inf).softmax(-1))
    assert torch.equal(found.live, ~dead.expand(2, rows, keys))
    assert (found.rows, found.part) == ("i", "")


@pytest.mark.parametrize("name", ["delta", "gla", "nystrom", "infini", "linear"])
def test_weights_are_derivatives_by_the_values(name: str) -> None:
    folder = "examples" if (ROOT / "examples" / f"{name}.attn").exists() else "tests/zoo"
    pattern = main(attnc.load(ROOT / folder / f"{name}.attn"))
    setting = picture_setting(pattern, Setting(sizes={"N": 7, "H": 1, "D": 4}))
    made = picture_inputs(pattern, setting)
    settings = {**setting.parameters, **made.inputs}
    (found,) = weights(pattern, made.q, made.k, made.v, settings)
    expected = by_gradient(pattern, made.q, made.k, made.v, **settings)  # float32, as v is
    torch.testing.assert_close(found.values, expected, rtol=1e-6, atol=1e-6)


def test_values_are_not_needed() -> None:
    q, k, v = tensors()
    pattern = main(attnc.compile(LINEAR))
    assert torch.equal(weights(pattern, q, k, None, {})[0].values, weights(pattern, q, k, v, {})[0].values)


def test_the_first_of_a_batch_is_shown() -> None:
    q, k, v = tensors()
    gate = torch.rand(2, 9, dtype=torch.float64)
    pattern = main(
        attnc.compile(LINEAR.replace("p:\n", "p:\n    input gate: real[b, j]\n").replace("(q @", "(gate * q @"))
    )
    (found,) = weights(pattern, q, k, v, {"gate": gate})
    torch.testing.assert_close(found.values, (gate[0] * (q[0] @ k[0].mT)).tril())


def test_an_input_as_wide_as_the_values_keeps_its_width() -> None:
    text = "pattern p:\n    input gate: real[i, e]\n    out = gate * (softmax[j](q @ k where j <= i) @ v)\n"
    q, k, v = tensors()
    gate = torch.rand(9, 3, dtype=torch.float64)
    (found,) = weights(main(attnc.compile(text)), q, k, v, {"gate": gate})
    softmax = (q[0] @ k[0].mT).masked_fill(torch.ones(9, 9).triu(1).bool(), -torch.inf).softmax(-1)
    torch.testing.assert_close(found.values, gate.mean(1).unsqueeze(-1) * softmax)
    assert torch.equal(found.values, weights(main(attnc.compile(text)), q, k, None, {"gate": gate})[0].values)


def test_parts_of_what_is_not_linear() -> None:
    text = """
pattern p:
    near = softmax[j](q @ k where i - j < 2 and j <= i) @ v
    out  = rms_norm(near, 1e-6) + exp(softmax[j](q @ k) @ v)
"""
    q, k, v = tensors()
    near, far = weights(main(attnc.compile(text)), q, k, v, {})
    assert (near.part, far.part) == ("near", "softmax[j](q @ k) @ v")
    assert torch.equal(near.live, (torch.ones(9, 9).tril() - torch.ones(9, 9).tril(-2)).bool().expand(2, 9, 9))
    assert bool(far.live.all())


def test_an_affine_result_is_not_linear() -> None:
    q, k, v = tensors()
    (found,) = weights(main(attnc.compile(LINEAR.replace("out = ", "out = 1 + "))), q, k, v, {})
    assert found.part == ""
    torch.testing.assert_close(found.values, (q[0] @ k[0].mT).tril())


def test_without_values_the_softmaxes_are_shown() -> None:
    q, k, _ = tensors()
    (found,) = weights(main(attnc.compile("pattern p:\n    out = softmax[j](q @ k) @ k\n")), q, k, None, {})
    torch.testing.assert_close(found.values, (q[0] @ k[0].mT).softmax(-1))


def test_rows_may_be_latents() -> None:
    q, k, v = tensors()
    latents = torch.randn(2, 5, 4, dtype=torch.float64)
    text = "pattern p:\n    input latents: real[h, m, d]\n    out = softmax[j](latents @ k) @ v\n"
    (found,) = weights(main(attnc.compile(text)), q, k, v, {"latents": latents})
    assert (found.rows, found.values.shape) == ("m", (2, 5, 9))
    torch.testing.assert_close(found.values, (latents @ k[0].mT).softmax(-1))


def test_what_cannot_be_shown_is_refused() -> None:
    q, k, v = tensors()
    with pytest.raises(attnc.AttnError, match="weights of more than 1024 positions"):
        weights(main(attnc.compile(LINEAR)), q, k.repeat(1, 1, 200, 1), v.repeat(1, 1, 200, 1), {})
    with pytest.raises(attnc.AttnError, match="there are no weights to show"):
        weights(main(attnc.compile("pattern p:\n    out = q + max[j](k)\n")), q, k, None, {})
    with pytest.raises(attnc.AttnError, match="there is no `windo`"):
        weights(main(attnc.compile(LINEAR)), q, k, v, {"windo": 3})


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_pattern_has_weights_that_give_its_result(file: Path) -> None:
    """Also that the made inputs of a picture are finite, and show a key where it is live."""
    pattern = attnc.load(file).patterns[file.stem]
    setting = picture_setting(pattern, Setting(sizes={"H": 2}))
    made = picture_inputs(pattern, setting)
    settings = {**setting.parameters, **made.inputs}
    found = weights(pattern, made.q, made.k, made.v if pattern.pattern.uses_value else None, settings)
    assert made.q.shape[1] == 2
    assert made.q.shape[2] <= 80 or SHAPE.queries == 64
    for part in found:
        assert part.values.isfinite().all()
        assert part.live.any()
    if len(found) == 1 and pattern.pattern.uses_value:
        out = pattern.reference(made.q, made.k, made.v, **settings)[0]
        torch.testing.assert_close(
            found[0].values @ made.v[0].double(), out, rtol=1e-7, atol=1e-7 * float(out.abs().max())
        )

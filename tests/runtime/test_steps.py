"""Compositions: patterns of several steps, on every back end, against the reference."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

import attnc
from attnc.runtime.compute import products
from attnc.runtime.operator import choose_engine
from attnc.runtime.steps import composition as steps
from attnc.runtime.tools.comparison import SHAPES, Case, Target, compare
from attnc.runtime.tools.settings import Setting

EXAMPLES = Path(__file__).parents[2] / "examples"

TEXT = """
pattern gate(w: int = 4):            # two attentions and pointwise work on them
    input gate: real[b, h, i, 2]
    near = softmax[j](q @ k * scale where 0 <= i - j < w) @ v
    far = softmax[j](q @ k * scale where i - j >= w) @ v
    out = gate[0] * near + sigmoid(gate[1]) * far
pattern heads(w: int = 4):
    near = softmax[j](q @ k * scale where abs(i - j) < w) @ v
    out = if h < H // 2 then near else softmax[j](q @ k * scale where j <= i) @ v
pattern distance(s: int = 3):
    input slope: real[b, h]
    near = softmax[j](q @ k * scale - slope * real(abs(i - j)) where (i - j) % s == 0) @ v
    out = near + softmax[j](q @ k + slope * sin(real(i - j)) where j % s == 0) @ v
pattern features:                    # maps of one sequence each; a score that is not linear in the product
    input w: real[h, f, d]
    out = softmax[j](tanh(elu(w @ q) @ (w @ k) / 50) * 2 where j <= i) @ silu(v)
pattern products:                    # products that add up, with factors of either side
    input a: real[b, h, i, x]
    input y: real[b, h, j, x]
    input s: real[b, h, j]
    out = softmax[j]((q @ k * scale - a @ y * s) * 0.5 where j <= i) @ v
pattern prefix_sums:                 # a bias that is summed up along the tokens
    input f: real[b, h, t]
    F = cumsum[t](f)
    out = softmax[j](q @ k * scale + tanh(F[i]) - F[j] where j <= i) @ v
pattern pooled(n: int = 5):          # pools of every kind, and a window over blocks in closed form
    axis s = blocks(j, n)
    kc = (max[j in s](k) + min[j in s](k)) / 2
    out = softmax[s](q @ kc * scale where s.start <= i < s.stop + 2 * n) @ sum[j in s](v)
pattern segmented(n: int = 4):
    axis s = segments(j, n)
    out = softmax[s](q @ mean[j in s](k) where s.start < M) @ mean[j in s](v)
pattern latents:                     # latents read the keys, the queries read the latents
    input z: real[m, d]
    out = softmax[m](q @ z) @ (softmax[j](z @ k * scale) @ v)
pattern same(n: int = 3):            # a row, a query pool, as values of another attention
    axis a = blocks(i, n, 2)
    qa = mean[i in a](q)
    inner = softmax[j](qa @ k * scale where j < a.stop) @ v
    out = softmax[a](q @ qa * scale where a.start <= i) @ inner
pattern query_blocks(n: int = 4):    # blocks and segments of the queries, the last ones short
    axis a = blocks(i, n)
    axis s = segments(i, n)
    first = softmax[j](mean[i in a](q) @ k * scale where j < a.stop) @ v
    second = softmax[j](mean[i in s](q) @ k * scale where s.start <= j < s.stop) @ v
    near = softmax[a](q @ mean[i in a](q) * scale where a.start <= i) @ first
    out = near + softmax[s](q @ mean[i in s](q) * scale where s.start < M) @ second
pattern whole:                       # nothing attends
    out = q * sigmoid(q @ q) + sum[j](v) @ sum[j](v)
"""
PATTERNS = attnc.compile(TEXT, name="steps.attn").patterns
TARGETS = (
    Target("executor", "executor", "cpu", torch.float64),
    Target("executor", "executor", "cpu", torch.float32),
    Target("interpreter", "triton", "cpu", torch.float32),
)


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")  # on dead pairs, and rows that are not stored
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: f"{target.label}-{target.dtype}")
@pytest.mark.parametrize("name", list(PATTERNS))
def test_agrees_with_the_reference(name: str, target: Target) -> None:
    """Results and every gradient, on awkward shapes."""
    pattern = PATTERNS[name]
    for shape in SHAPES:
        if pattern.program.token_read is not None and shape.queries > shape.keys:
            continue
        for outcome in compare(Case(pattern, shape, Setting()), target):
            assert outcome.agrees, (shape, outcome.of, outcome.error, outcome.allowed)


def test_two_steps_of_training_are_equal_to_the_bit() -> None:
    pattern = PATTERNS["gate"]
    q, k, v = (torch.randn(2, 4, 70, 16) for _ in range(3))
    gate = torch.randn(2, 4, 70, 2)

    def step() -> list[torch.Tensor]:
        tensors = [x.clone().requires_grad_() for x in (q, k, v, gate)]
        out = pattern(*tensors[:3], gate=tensors[3])
        return [out, *torch.autograd.grad(out.square().sum(), tensors)]

    for one, other in zip(step(), step(), strict=True):
        assert torch.equal(one, other)


def test_a_graph_of_several_steps_is_one_operator() -> None:
    """torch.compile without a break, forward and backward; the operator's own rules hold."""
    pattern = PATTERNS["pooled"]
    tensors = [torch.randn(1, 2, 20, 8, requires_grad=True) for _ in range(3)]
    out = torch.compile(pattern, fullgraph=True, backend="aot_eager")(*tensors)
    torch.testing.assert_close(out, pattern(*tensors))
    made = torch.autograd.grad(out.sum(), tensors)
    wanted = torch.autograd.grad(pattern(*tensors).sum(), tensors)
    torch.testing.assert_close(made, wanted)


def test_inputs_over_pairs_are_read_where_they_are() -> None:
    """A bias and a mask of the caller's; the bias' own gradient is refused, with its place."""
    pattern = attnc.compile("""
pattern given:
    input bias: real[b, h, i, j]
    input mask: bool[i, j]
    out = softmax[j](q @ k * scale + bias where mask) @ v
""").given
    q, k, v = (torch.randn(1, 2, 20, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    bias, mask = torch.randn(1, 2, 20, 20, dtype=torch.float64), torch.rand(20, 20) > 0.5
    for backend in ("executor", "triton"):
        dtype = torch.float64 if backend == "executor" else torch.float32
        given = {"bias": bias.to(dtype), "mask": mask}
        out, _ = pattern.outputs(q.to(dtype), k.to(dtype), v.to(dtype), given, backend)
        torch.testing.assert_close(out.double(), pattern.reference(q, k, v, bias=bias, mask=mask), atol=1e-5, rtol=1e-5)
    given = {"bias": bias, "mask": mask}
    made, wanted = (torch.autograd.grad(f(q, k, v, **given).sum(), [q, k, v]) for f in (pattern, pattern.reference))
    torch.testing.assert_close(made, wanted)
    with pytest.raises(attnc.AttnError, match="the gradient of an input over pairs of positions"):
        pattern(q, k, v, bias=bias.requires_grad_(), mask=mask).sum().backward()


def drawn(name: str) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Tensors that ask for gradients, of `latents` or of linformer."""
    tensors = [torch.randn(1, 2, 20, 8, requires_grad=True) for _ in "qkv"]
    given = {"E": torch.randn(3, 20, requires_grad=True), "F": torch.randn(3, 20, requires_grad=True)}
    return tensors, given if name == "linformer" else {"z": torch.randn(3, 8, requires_grad=True)}


def test_a_product_over_the_tokens_is_not_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its result is short, and its gradients do without it; the backward makes four products, not six."""
    pattern = attnc.load(EXAMPLES / "linformer.attn").linformer
    tensors, given = drawn("linformer")
    out = pattern(*tensors, **given)
    calls = Mock(side_effect=products.contracted)
    monkeypatch.setattr(products, "contracted", calls)
    found = torch.autograd.grad(out.sum(), [*tensors, *given.values()])
    assert calls.call_count == 4
    wanted = torch.autograd.grad(pattern.reference(*tensors, **given).sum(), [*tensors, *given.values()])
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.double(), other.double(), atol=1e-4, rtol=1e-4)


def test_what_a_step_returns_is_not_kept_twice() -> None:
    """The result of the last attention is what the backward reads, with no copy beside it."""
    pattern = PATTERNS["latents"]
    tensors, given = drawn("latents")
    q, k, v = (one.detach() for one in tensors)
    prepared = pattern.prepared(q, k, v, given)
    made = steps.run(prepared.composition, prepared.frame(), choose_engine("auto", q.device))
    assert made.returned == 2
    assert [one.numel() > 0 for one in made.kept] == [True, True, False, True]
    again = steps.with_result(prepared.composition, made.kept, made.out)
    assert all(torch.equal(one, other) for one, other in zip(again, made.saved, strict=True))
    out = pattern(*tensors, **given)
    held = {one.untyped_storage().data_ptr() for one in out.grad_fn.saved_tensors if one is not None}  # type: ignore[union-attr]
    assert out.untyped_storage().data_ptr() in held

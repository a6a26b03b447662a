"""Gradients on a CPU: every way in which a real input enters, awkward shapes, cotangents and refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import attnc
from attnc.compiler.differentiate import without_gradient
from attnc.runtime import backward
from attnc.runtime.cpu.executor_backward import BackwardRun
from attnc.runtime.pattern import CompiledPattern
from attnc.runtime.tools.comparison import SHAPES, Case, Target, cases, compare
from attnc.runtime.tools.inputs import Shape, made_inputs
from attnc.runtime.tools.settings import Setting, settings

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.attn"))

# One line of each: what carries a gradient there.
TEXT = """
pattern row_side:            # a factor of q @ k, and a gate read at the query
    input temperature: real[h]
    input gate: real[b, h, t]
    out = softmax[j](q @ k * scale * temperature * sigmoid(gate[i]) where j <= i) @ v
pattern key_side:            # a bias of the key, times a distance
    input bias: real[b, h, j]
    out = softmax[j](q @ k * scale + bias * (i - j) / 10 where j <= i) @ v
pattern both_sides:          # one input at the query and at the key, through a function of the whole score
    input x: real[b, t]
    input cap: real[h]
    out = softmax[j](max(cap, 0.5) * tanh((q @ k * scale + x[i] * sin(x[j])) / max(cap, 0.5)) where j < i) @ v
pattern elements:            # elements of a vector; dead pairs would divide by zero and take logs of negatives
    input a: real[x]
    out = softmax[j](q @ k * scale + a[0] * log(i - j) + a[1] ** 2 / (i - j) where j < i) @ v
pattern tables:              # tables by distance, by block, over rows and over keys; reads outside give 0
    input near: real[h, z]
    input block: real[y]
    input rows: real[b, h, i, x]
    input keys: real[b, h, j, x]
    out = softmax[j](q @ k * scale + near[abs(i - j)] + block[i // 4 - j // 4 + 2]
        + rows[(i - j) // 3] * keys[(i - j) % 5] where j <= i + 1) @ v
pattern sinks:               # a sink of the query's position
    input sink: real[h]
    input x: real[b, t]
    out = softmax[j](q @ k * scale where j < i, sink = sink * x[i]) @ v
pattern gated(window: int = 5):  # two softmaxes and what the text does with them
    input gate: real[b, h, i, 3]
    input mix: real[h]
    near = softmax[j](q @ k * scale where 0 <= i - j < window) @ v
    far  = softmax[j](q @ k * scale where i - j >= window) @ v
    out = gate[0] * near + mix * tanh(gate[1]) * far + (if h < H // 2 then gate[2] else exp(mix)) * near * far
pattern merged(window: int = 4): # one softmax over two lists of keys, with a sink
    input slope: real[h]
    out = merge(softmax[j](q @ k * scale - slope * (i - j) where 0 <= i - j < window, sink = slope) @ v,
        softmax[j](q @ k * slope where (i - j) % 4 == 0 and j < i) @ v)
pattern slashes:             # every row its own keys
    input offsets: int[h, y]
    input slope: real[h]
    input table: real[h, z]
    input bias: real[b, h, j]
    out = softmax[j](q @ k * scale - slope * (i - j) + table[i - j] + bias where j <= i and i - j in offsets[h]) @ v
pattern strided:             # tables by distance on keys by steps
    input table: real[h, z]
    out = softmax[j](q @ k * scale + table[(i - j) // 2] where j <= i and (i - j) % 3 == 0) @ v
pattern positional:          # no q @ k at all
    input table: real[h, z]
    out = softmax[j](table[i - j] + 0.1 * j where j <= i) @ v
pattern steered:             # a mask that q @ k decides, and inputs that only steer
    input slope: real[h]
    input bound: real[h]
    input kind: real[b, t]
    allowed = q @ k > bound or kind[i] == kind[j]
    out = softmax[j](q @ k * scale - slope * (i - j) where j <= i and allowed) @ v
"""


@pytest.fixture(scope="module")
def patterns() -> Any:
    return attnc.compile(TEXT, name="gradients.attn")


NAMES = list(attnc.compile(TEXT).patterns)


def case_of(pattern: CompiledPattern, shape: Shape) -> Case | None:
    """A case, where the pattern takes the shape: reads of tokens need as many keys as queries."""
    ragged = pattern.program.token_read is None or shape.queries <= shape.keys
    return Case(pattern, shape, Setting()) if ragged else None


def gradients(pattern: Any, tensors: dict[str, Tensor], cotangent: Tensor, **settings: Any) -> dict[str, Tensor | None]:
    real = {name: x.detach().requires_grad_() for name, x in tensors.items() if x.is_floating_point()}
    out = pattern(**{**tensors, **real}, **settings)
    return dict(zip(real, torch.autograd.grad(out, list(real.values()), cotangent, allow_unused=True), strict=True))


def drawn(pattern: CompiledPattern, shape: Shape, dtype: torch.dtype, **parameters: Any) -> dict[str, Tensor]:
    made = made_inputs(pattern.pattern, shape, parameters, dtype=dtype)
    return {"q": made.q, "k": made.k, "v": made.v, **made.inputs}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_agrees_with_the_reference(patterns: Any, name: str, dtype: torch.dtype) -> None:
    target = Target("executor", "executor", "cpu", dtype)
    for shape in SHAPES:
        case = case_of(getattr(patterns, name), shape)
        if case is not None:
            assert [outcome for outcome in compare(case, target) if not outcome.agrees] == []


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_agree_in_every_case(path: Path) -> None:
    found = attnc.load(path).main
    assert found is not None
    target = Target("executor", "executor", "cpu", torch.float64)
    tried = list(cases(found, Setting(), settings(found.pattern, "check", found.known)))
    assert [outcome for case in tried for outcome in compare(case, target) if not outcome.agrees] == []
    assert len(tried) >= 4


@pytest.mark.parametrize("name", NAMES)
def test_twice_the_same_step_gives_the_same_bits(patterns: Any, name: str) -> None:
    pattern = getattr(patterns, name)
    tensors = drawn(pattern, Shape(2, 4, 2, 300, 300, 16, 16), torch.float32)
    cotangent = torch.randn(2, 4, 300, 16)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        first, *others = [gradients(pattern, tensors, cotangent) for _ in range(3)]
    finally:
        torch.set_num_threads(threads)
    for other in others:
        for key, gradient in first.items():
            again = other[key]
            assert (again is None) if gradient is None else (again is not None and torch.equal(gradient, again)), key


def test_a_window_costs_its_length_only(patterns: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the length: twice the products, forward and backward; no tensor of N x M."""
    window = attnc.compile("pattern near(w: int = 64):\n    out = softmax[j](q @ k * scale where 0 <= i - j < w) @ v\n")
    counted: list[int] = []
    plain = BackwardRun.dots

    def count(self: BackwardRun, *arguments: Any) -> Tensor:
        result = plain(self, *arguments)
        counted.append(result.numel())
        return result

    monkeypatch.setattr(BackwardRun, "dots", count)
    totals = []
    for length in (2048, 4096):
        counted.clear()
        q, k, v = (torch.randn(1, 1, length, 16, requires_grad=True) for _ in range(3))
        window(q, k, v).sum().backward()
        totals.append(sum(counted))
        assert max(counted) <= length * 256
    assert totals[1] < 2.1 * totals[0]
    assert totals[1] < 2 * 4096 * 64 * 4


def test_lse_has_a_gradient_of_its_own(patterns: Any) -> None:
    for name in ("merged", "sinks", "tables"):
        pattern = getattr(patterns, name)
        tensors = drawn(pattern, Shape(2, 4, 2, 7, 11, 8, 12), torch.float64)
        real = [x.requires_grad_() for x in tensors.values() if x.is_floating_point()]
        lse, expected = pattern.with_lse(**tensors)[1], pattern.reference_with_lse(**tensors)[1]
        torch.testing.assert_close(lse, expected)
        cotangent = torch.randn_like(lse)
        found = torch.autograd.grad(lse, real, cotangent)
        wanted = torch.autograd.grad(expected, real, cotangent, allow_unused=True, materialize_grads=True)
        torch.testing.assert_close(found, wanted)


def test_there_is_no_lse_of_two_softmaxes(patterns: Any) -> None:
    q, k, v = (torch.randn(1, 2, 4, 8) for _ in range(3))
    gate, mix = torch.randn(1, 2, 4, 3), torch.randn(2)
    for call in (patterns.gated.with_lse, patterns.gated.reference_with_lse):
        with pytest.raises(attnc.AttnError, match="no log-sum-exp of a result that is more than one softmax"):
            call(q, k, v, gate=gate, mix=mix)


def test_rows_without_keys_give_zero() -> None:
    late = attnc.compile("pattern late(w: int):\n    out = softmax[j](q @ k * scale where i - j >= w) @ v\n")
    q, k, v = (torch.randn(2, 2, 9, 8, requires_grad=True) for _ in range(3))
    out, lse = late.with_lse(q, k, v, w=4)
    assert lse[:, :, :4].isneginf().all()
    torch.autograd.backward([out, lse], [torch.randn_like(out), torch.randn_like(lse)])
    assert q.grad is not None
    assert k.grad is not None
    assert v.grad is not None
    assert (q.grad[:, :, :4] == 0).all()
    assert (q.grad[:, :, 4:] != 0).any(-1).all()
    for gradient in (k.grad, v.grad):
        assert torch.isfinite(gradient).all()
        assert (gradient[:, :, 5:] == 0).all()
    nothing = late(q, k, v, w=9)
    for gradient in torch.autograd.grad(nothing.sum(), (q, k, v)):
        assert (gradient == 0).all()


@pytest.mark.parametrize("name", ["gated", "merged", "slashes"])
def test_cotangents_of_any_strides(patterns: Any, name: str) -> None:
    pattern = getattr(patterns, name)
    tensors = drawn(pattern, Shape(2, 4, 2, 9, 9, 8, 12), torch.float64)
    one = torch.randn(12, dtype=torch.float64)
    turned = torch.randn(2, 9, 12, 4, dtype=torch.float64).permute(0, 3, 1, 2)
    for cotangent in (one.expand(2, 4, 9, 12), turned, torch.ones((), dtype=torch.float64).expand(2, 4, 9, 12)):
        found, wanted = (gradients(pattern, tensors, given) for given in (cotangent, cotangent.contiguous()))
        for key, gradient in wanted.items():
            assert gradient is not None
            torch.testing.assert_close(found[key], gradient, rtol=0, atol=0)


def test_tensors_of_any_strides(patterns: Any) -> None:
    tensors = drawn(patterns.gated, Shape(2, 4, 2, 9, 9, 8, 12), torch.float64)
    turned = {name: x.transpose(0, -1).contiguous().transpose(0, -1) for name, x in tensors.items()}
    turned["k"] = tensors["k"][:1].expand(2, -1, -1, -1)
    tensors["k"] = turned["k"].contiguous()
    cotangent = torch.randn(2, 4, 9, 12, dtype=torch.float64)
    found, wanted = (gradients(patterns.gated, given, cotangent) for given in (turned, tensors))
    torch.testing.assert_close(found, wanted)


def test_what_only_steers_has_no_gradient(patterns: Any) -> None:
    tensors = drawn(patterns.steered, Shape(1, 2, 2, 6, 6, 8, 8), torch.float32)
    found = gradients(patterns.steered, tensors, torch.randn(1, 2, 6, 8))
    assert found["bound"] is None
    assert found["kind"] is None
    assert found["slope"] is not None
    assert backward.differentiable(patterns.steered.program.plan) == {"q", "k", "v", "slope"}


def test_only_what_is_asked_for(patterns: Any) -> None:
    tensors = drawn(patterns.gated, Shape(1, 2, 1, 6, 6, 8, 8), torch.float64)
    whole = gradients(patterns.gated, tensors, torch.ones(1, 2, 6, 8, dtype=torch.float64))
    for name in ("q", "v", "gate", "mix"):
        x = tensors[name].detach().requires_grad_()
        (alone,) = torch.autograd.grad(patterns.gated(**{**tensors, name: x}).sum(), x)
        torch.testing.assert_close(alone, whole[name], rtol=0, atol=0)


def test_an_input_changed_in_place_is_noticed(patterns: Any) -> None:
    for name in ("q", "k", "v", "slope"):
        tensors = drawn(patterns.merged, Shape(1, 2, 1, 6, 6, 8, 8), torch.float32)
        tensors["q"].requires_grad_()
        given = {key: x * 1 for key, x in tensors.items()}
        out = patterns.merged(**given)
        given[name].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()


def test_a_score_without_a_rule_is_refused_where_it_is_asked_for() -> None:
    text = "pattern odd:\n    input r: real[b, h, t, x]\n    out = softmax[j](q @ k + r[i][i - j] where j <= i) @ v\n"
    odd = attnc.compile(text, name="odd.attn")
    q, k, v, r = (torch.randn(1, 1, 4, 8) for _ in range(4))
    assert odd(q, k, v, r=r).shape == (1, 1, 4, 8)
    with pytest.raises(attnc.AttnError, match=r"(?s)the gradient of `take` in a score.*odd\.attn:3"):
        odd(q.requires_grad_(), k, v, r=r)


def test_every_op_has_a_rule() -> None:
    assert without_gradient() == set()


@pytest.mark.parametrize("name", ["both_sides", "sinks", "gated", "merged"])
def test_finite_differences_agree(patterns: Any, name: str) -> None:
    """Reference and executor, both in float64, against differences of their own results."""
    pattern = getattr(patterns, name)
    tensors = drawn(pattern, Shape(1, 2, 1, 4, 5, 3, 2), torch.float64)
    names, values = list(tensors), [x.requires_grad_() for x in tensors.values()]
    for call in (pattern.reference, pattern):
        assert torch.autograd.gradcheck(lambda *given, call=call: call(**dict(zip(names, given, strict=True))), values)

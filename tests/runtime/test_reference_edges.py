"""The float64 reference: dead rows, head groups, lengths, layouts, gradients and refused calls."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from attnc.dsl.check import check
from attnc.dsl.source import Source
from attnc.dsl.terms import Pattern
from attnc.runtime.reference.meaning import reference, reference_with_lse

CAUSAL = "out = softmax[j](q @ k * scale where j <= i) @ v"


def made(body: str, parameters: str = "") -> Pattern:
    """A pattern with this body."""
    lines = "\n".join("    " + line for line in body.strip("\n").split("\n"))
    return check(Source("<test>", f"pattern made{parameters}:\n{lines}\n"))["made"]


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def qkv(heads: int = 2, rows: int = 5, keys: int = 5, key_heads: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    key_heads = heads if key_heads is None else key_heads
    return tokens(2, heads, rows, 4), tokens(2, key_heads, keys, 4, seed=1), tokens(2, key_heads, keys, 3, seed=2)


def plain_softmax(score: Tensor, live: Tensor, v: Tensor) -> Tensor:
    """Softmax over the live keys of non-empty rows."""
    return torch.softmax(score.masked_fill(~live, -torch.inf), -1) @ v


# Rows without a live key


@pytest.mark.parametrize(
    "body",
    [
        "out = softmax[j](q @ k where j < i - 1) @ v",
        "out = normalize[j](exp(q @ k) where j < i - 1) @ v",
        "out = sum[j](q @ k * v where j < i - 1)",
        "out = max[j](q @ k * v where j < i - 1)",
        "out = mean[j](q @ k * v where j < i - 1)",
        "out = merge(softmax[j](q @ k where j < i - 1) @ v, softmax[j](q @ k where j < i - 2) @ v)",
        "p = topk[j](q @ k, 2 where j < i - 1)\nout = softmax[j](q @ k where j in p) @ v",
        "axis c = blocks(j, 2)\nout = softmax[c](q @ mean[j in c](k) where c.stop < i) @ mean[j in c](v)",
    ],
)
def test_a_row_without_a_live_key_is_zero_with_gradient_zero(body: str) -> None:
    arguments = [x.requires_grad_() for x in qkv()]
    q, k, v = arguments
    out = reference(made(body), q, k, v)
    assert not out[:, :, :2].any()
    assert out[:, :, -1].any()
    gradients = torch.autograd.grad(out.sum(), arguments, allow_unused=True, materialize_grads=True)
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)
    assert not gradients[0][:, :, :2].any()


def test_dead_values_that_overflow_leave_the_gradient_alone() -> None:
    """gamma ** (i - j) is infinite above the diagonal; the gradient is that of the live pairs."""
    q, k, v = qkv()
    gamma = torch.tensor([1e-100, 0.5], dtype=torch.float64, requires_grad=True)
    body = "input gamma: real[h]\nout = sum[j](gamma ** (i - j) * (q @ k) * v where j <= i)"
    out = reference(made(body), q, k, v, {}, {"gamma": gamma})
    i, j = torch.arange(5)[:, None], torch.arange(5)
    exponent = (i - j).clamp(min=0)
    plain = ((gamma[:, None, None] ** exponent).tril() * (q @ k.mT)) @ v
    torch.testing.assert_close(out, plain)
    (ours,), (theirs,) = (torch.autograd.grad((x * x).sum(), gamma, retain_graph=True) for x in (out, plain))
    torch.testing.assert_close(ours, theirs)
    assert theirs.isfinite().all()


@pytest.mark.parametrize(
    ("score", "live"),
    [
        ("log(i - j)", "j < i"),
        ("1000.0 * g * (j - i)", "j <= i"),
        ("1 / (i - j)", "j < i"),
        ("exp(1000.0 * g * (j - i))", "j <= i"),
        ("sqrt(g * (i - j))", "j < i"),
        ("10 // (i - j) * g", "j < i"),
        ("(if j < i then log(g * (i - j)) else g * 0.0)", "j <= i"),
        ("(if j >= i then g * 0.0 else log(g * (i - j)))", "j <= i"),
        ("(if j == i then g else exp(1000.0 * g * (j - i)))", "j <= i"),
    ],
)
def test_scores_undefined_on_dead_pairs(score: str, live: str) -> None:
    q, k, v = qkv()
    g = torch.tensor([0.7, 1.3], dtype=torch.float64, requires_grad=True)
    body = f"input g: real[h]\nout = softmax[j]({score} + 0 * g + q @ k where {live}) @ v"
    out = reference(made(body), q, k, v, {}, {"g": g})
    (gradient,) = torch.autograd.grad((out * out).sum(), g)
    assert out.isfinite().all()
    assert gradient.isfinite().all()


def test_log_sum_exp_of_rows() -> None:
    q, k, v = qkv()
    sink = tokens(2, seed=5)
    body = "input sink: real[h]\nout = softmax[j](q @ k * scale where j < i, sink = sink) @ v"
    out, lse = reference_with_lse(made(body), q, k, v, {"scale": 2.0}, {"sink": sink})
    score = (2 * q @ k.mT).masked_fill(~torch.ones(5, 5, dtype=torch.bool).tril(-1), -torch.inf)
    with_sink = torch.cat([score, sink[:, None, None].expand(2, 2, 5, 1)], -1)
    torch.testing.assert_close(lse, with_sink.logsumexp(-1))
    torch.testing.assert_close(out, with_sink.softmax(-1)[..., :-1] @ v)
    _, lse = reference_with_lse(made(body), q, k, v, {}, {"sink": sink + 2000})
    torch.testing.assert_close(lse, (sink + 2000)[:, None].expand(2, 2, 5))
    _, lse = reference_with_lse(made("out = softmax[j](q @ k where j < i) @ v"), q, k, v)
    assert torch.isneginf(lse[:, :, 0]).all()
    with pytest.raises(ValueError, match="log-sum-exp"):
        reference_with_lse(made("out = sum[j](q @ k * v)"), q, k, v)


# Heads, lengths and layouts


def test_a_key_head_serves_a_run_of_query_heads() -> None:
    q, k, v = qkv(heads=6, key_heads=2)
    slope = tokens(2)
    body = "input slope: real[h]\nout = softmax[j](q @ k - slope * abs(i - j) + h) @ v"
    grouped = reference(made(body), q, k, v, {}, {"slope": slope})
    repeated = reference(
        made(body), q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1), {}, {"slope": slope.repeat_interleave(3)}
    )
    torch.testing.assert_close(grouped, repeated)


def test_fewer_queries_are_the_last_positions() -> None:
    q, k, v = qkv(rows=7, keys=7)
    g = tokens(2, 2, 7, seed=3)
    body = "input g: real[b, h, t]\naxis s = blocks(i, 2)\nm = mean[i in s](q)\n"
    body += "out = softmax[j](q @ k + g[i] * g[j - 1] where j <= i) @ v"
    whole = reference(made(body), q, k, v, {}, {"g": g})
    last = reference(made(body), q[:, :, 5:], k, v, {}, {"g": g})
    torch.testing.assert_close(last, whole[:, :, 5:])


def test_more_queries_than_keys_count_from_zero() -> None:
    q, k, v = qkv(rows=7, keys=3)
    live = torch.arange(3) <= torch.arange(7)[:, None]
    torch.testing.assert_close(reference(made(CAUSAL), q, k, v), plain_softmax(q @ k.mT / 2, live, v))
    body = "input g: real[b, h, t]\nout = softmax[j](q @ k + g[i]) @ v"
    with pytest.raises(ValueError, match="read at i"):
        reference(made(body), q, k, v, {}, {"g": tokens(2, 2, 3)})


@pytest.mark.parametrize(("rows", "keys"), [(0, 0), (0, 4), (4, 0), (1, 1)])
@pytest.mark.parametrize(
    "body",
    [
        CAUSAL,
        "out = normalize[j](exp(q @ k) where j <= i) @ v",
        "scan t:\n    S = S + outer(k, v)\n    out = q @ S",
        "axis s = blocks(j, 2)\np = topk[s](q @ mean[j in s](k), 1)\nout = softmax[j](q @ k where j in p) @ v",
        "axis s = blocks(j, 2, 1)\nout = softmax[s](q @ mean[j in s](k)) @ mean[j in s](v)",
        "out = max[j](q @ k * v)",
        "p = argmax[j](q @ k)\nout = sum[j](v where j == p)",
        "out = merge(softmax[j](q @ k) @ v, softmax[j](q @ k) @ v)",
    ],
)
def test_empty_and_single_token_sequences(body: str, rows: int, keys: int) -> None:
    if rows > keys and "scan" in body:  # a scan needs a key position for every query
        with pytest.raises(ValueError, match="read at i"):
            reference(made(body), *qkv(rows=rows, keys=keys))
        return
    out = reference(made(body), *qkv(rows=rows, keys=keys), {}, {})
    assert out.shape == (2, 2, rows, 3)
    assert keys or not out.any()


def test_strides_and_dtypes_make_no_difference() -> None:
    q, k, v = (x.to(torch.bfloat16) for x in qkv())
    qt, kt, vt = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    assert not qt.is_contiguous()
    expected = reference(made(CAUSAL), q.double(), k.double(), v.double())
    out = reference(made(CAUSAL), qt, kt, vt)
    assert out.dtype is torch.float64
    torch.testing.assert_close(out, expected, rtol=0, atol=0)


def test_results_have_the_declared_layout() -> None:
    q, k, v = qkv()
    latents = tokens(2, 6, 4)
    body = "input latents: real[h, m, d]\nout = softmax[j](latents @ k * scale) @ v"
    out = reference(made(body), q, k, v, {}, {"latents": latents})
    torch.testing.assert_close(out, torch.softmax(latents @ k.mT / 2, -1) @ v)
    # A result that doesn't vary over the queries is the same for all of them.
    out = reference(made("out = mean[j](v)"), q, k, v)
    torch.testing.assert_close(out, v.mean(2, keepdim=True).expand(2, 2, 5, 3))


# Gradients


@pytest.mark.parametrize(
    ("body", "inputs"),
    [
        ("input s: real[h]\nout = softmax[j](q @ k * scale where j < i, sink = s) @ v", {"s": (2,)}),
        (
            "input g: real[b, h, t]\nG = cumsum[t](g)\nout = softmax[j](q @ k + G[i] - G[j] where j <= i) @ v",
            {"g": (1, 2, 4)},
        ),
        ("out = normalize[j](exp(q @ k) where j <= i, eps = 0.1) @ v", {}),
        ("out = normalize[j](q @ k where j <= i, floor = 0.5) @ v", {}),
        ("out = merge(softmax[j](q @ k where j < i) @ v, softmax[j](q @ k where j + 1 < i) @ v)", {}),
        ("axis s = blocks(j, 2)\nout = softmax[s](q @ max[j in s](k)) @ mean[j in s](v)", {}),
        (
            "input g: real[b, h, t]\ninput beta: real[b, h, t]\nscan t:\n    S = exp(g) * S\n"
            "    S = S + outer(k, beta * (v - k @ S))\n    out = q * scale @ S",
            {"g": (1, 2, 4), "beta": (1, 2, 4)},
        ),
        ("x = q\nrepeat 3:\n    x = tanh(x + q)\nout = sum[j](x @ k * v where j <= i)", {}),
        ("input table: real[h, n]\nout = softmax[j](q @ k + table[min(abs(i - j), 2)]) @ v", {"table": (2, 3)}),
        ("out = if i < 2 then sum[j](sqrt(exp(q @ k)) * v) else softmax[j](q @ k) @ v", {}),
    ],
)
def test_gradients_are_those_of_finite_differences(body: str, inputs: Mapping[str, tuple[int, ...]]) -> None:
    arguments = [tokens(1, 2, 4, 2, seed=seed) for seed in range(3)]
    arguments += [tokens(*shape, seed=9 + at) * 0.5 for at, shape in enumerate(inputs.values())]

    def call(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> Tensor:
        return reference(made(body), q, k, v, {}, dict(zip(inputs, rest, strict=True)))

    assert torch.autograd.gradcheck(call, [x.requires_grad_() for x in arguments])


def test_gradients_reach_low_precision_inputs() -> None:
    q, k, v = (x.float().requires_grad_() for x in qkv(heads=4, key_heads=2))
    reference(made(CAUSAL), q, k, v).sum().backward()
    for x in (q, k, v):
        assert x.grad is not None
        assert x.grad.shape == x.shape
        assert x.grad.dtype is torch.float32


# Calls that are refused


WINDOWED = "input g: real[b, h, t]\nout = softmax[j](q @ k * scale + g[j] where i - j < window) @ v"


@pytest.mark.parametrize(
    ("parameters", "inputs", "error", "message"),
    [
        ({"widow": 3}, {"g": (2, 2, 5)}, TypeError, "unknown parameter `widow`; it has `window`"),
        ({}, {"g": (2, 2, 5)}, TypeError, "parameter `window` is missing"),
        ({"window": 2.5}, {"g": (2, 2, 5)}, TypeError, "parameter `window`: expected int, got 2.5"),
        ({"window": True}, {"g": (2, 2, 5)}, TypeError, "expected int, got True"),
        ({"window": 3}, {}, TypeError, r"input `g` \(b, h, t\) is missing"),
        ({"window": 3}, {"g": (2, 2, 5), "f": (1,)}, TypeError, "unknown input `f`"),
        ({"window": 3}, {"g": (2, 2, 6)}, ValueError, r"axis 2 \(`t`\) should be 5, not 6"),
        ({"window": 3}, {"g": (2, 3, 5)}, ValueError, r"axis 1 \(`h`\) should be 2, not 3"),
        ({"window": 3}, {"g": (2, 5)}, ValueError, r"g is declared \[b, h, t\] but has shape \(2, 5\)"),
    ],
)
def test_calls_that_do_not_fit_are_refused(
    parameters: Mapping[str, object], inputs: Mapping[str, tuple[int, ...]], error: type[Exception], message: str
) -> None:
    pattern = made(WINDOWED, "(window: int)")
    with pytest.raises(error, match=message):
        reference(pattern, *qkv(), parameters, {name: tokens(*shape) for name, shape in inputs.items()})


def test_tensors_that_do_not_fit_are_refused() -> None:
    q, k, v = qkv()
    with pytest.raises(ValueError, match="q has 2 heads, k has 3"):
        reference(made(CAUSAL), q, tokens(2, 3, 5, 4), v)
    with pytest.raises(ValueError, match=r"k is declared .* axis 3 \(`d`\) should be 4, not 2"):
        reference(made(CAUSAL), q, k[..., :2], v)
    with pytest.raises(ValueError, match="v is needed"):
        reference(made(CAUSAL), q, k, None)
    with pytest.raises(TypeError, match=r"q is declared real but is torch\.int64"):
        reference(made(CAUSAL), q.long(), k, v)
    blocks = made("axis s = blocks(j, n)\nout = softmax[s](q @ mean[j in s](k)) @ mean[j in s](v)", "(n: int)")
    with pytest.raises(ValueError, match="size and stride must be at least 1, got size=0"):
        reference(blocks, q, k, v, {"n": 0})
    with pytest.raises(ValueError, match="integer division by zero"):
        reference(made("out = softmax[j](q @ k where i // n == j // n) @ v", "(n: int)"), q, k, v, {"n": 0})

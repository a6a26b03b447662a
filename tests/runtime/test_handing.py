"""States handed from call to call: a sequence in parts is the sequence, with every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import attnc
from attnc import State
from attnc.dsl.diagnostics import AttnError
from attnc.runtime.pattern import CompiledPattern
from attnc.runtime.tolerance import error, tolerance
from tests.runtime.test_decoding import LENGTH, Sequences, pattern_of

STATES = (
    "based",
    "cosformer",
    "delta",
    "gated_delta",
    "gla",
    "hedgehog",
    "kda",
    "linear",
    "mlstm",
    "performer",
    "power",
    "retention",
    "rwkv6",
    "rwkv7",
    "simple_gla",
)
KERNELS = ("delta", "gla", "linear", "retention", "rwkv6", "rwkv7")  # one of each kind
PARTS = ([LENGTH], [13, 16], [1, 9, 19])
DOCUMENTS = """
pattern documents:
    input g: real[b, h, t]
    input doc: int[b, t]
    G = cumsum[t](g)
    out = sum[j](exp(G[i] - G[j]) * (q @ k) * scale * v where doc[i] == doc[j] and j <= i)
"""


def run(
    sequences: Sequences, parts: list[int], tensors: dict[str, Tensor], backend: str = "auto"
) -> tuple[Tensor, State]:
    """The parts one after the other, each from what the one before left."""
    given = Sequences(sequences.pattern, sequences.parameters, tensors)
    outs, state, at = [], None, 0
    for count in parts:
        part: dict[str, Any] = given.part(at, at + count)
        q, k, v = (part.pop(name, None) for name in "qkv")
        assert q is not None
        assert k is not None
        settings = {**part, **sequences.parameters}
        out, state = sequences.pattern.outputs_with_state(q, k, v, state, settings, backend)
        outs.append(out)
        at += count
    assert state is not None
    return torch.cat(outs, 2), state


def whole(sequences: Sequences, tensors: dict[str, Tensor]) -> Tensor:
    others = {name: one for name, one in tensors.items() if name not in "qkv"}
    q, k, v = (tensors.get(name) for name in "qkv")
    assert q is not None
    assert k is not None
    return sequences.pattern.reference(q, k, v, **others, **sequences.parameters)


def leaves(sequences: Sequences) -> dict[str, Tensor]:
    return {
        name: one.detach().clone().requires_grad_() if one.is_floating_point() else one
        for name, one in sequences.tensors.items()
    }


def differences(sequences: Sequences, parts: list[int], backend: str = "auto") -> dict[str, float]:
    """Errors of the result and of every gradient against the reference of the whole, as shares of what is allowed."""
    ours, theirs = leaves(sequences), leaves(sequences)
    out, _ = run(sequences, parts, ours, backend)
    expected = whole(sequences, theirs)
    weight = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5)).to(out.dtype)
    names = [name for name, one in ours.items() if one.requires_grad]
    found, exact = (
        torch.autograd.grad((one * weight).sum(), [given[name] for name in names], materialize_grads=True)
        for one, given in ((out, ours), (expected, theirs))
    )
    most = max(float(one.abs().max()) for one in exact)
    allowed = tolerance(out.dtype, LENGTH)
    errors = {"out": error(out, expected) / allowed}
    return errors | {
        name: error(one, other, most) / allowed for name, one, other in zip(names, found, exact, strict=True)
    }


@pytest.mark.parametrize("parts", PARTS, ids=str)
@pytest.mark.parametrize("name", STATES)
def test_parts_are_the_whole(name: str, parts: list[int]) -> None:
    sequences = Sequences.of(name, torch.float64)
    assert {what: off for what, off in differences(sequences, parts).items() if not off <= 1} == {}


@pytest.mark.parametrize("name", KERNELS)
def test_parts_on_generated_kernels(name: str) -> None:
    errors = differences(Sequences.of(name), [13, 16], "triton")
    assert {what: off for what, off in errors.items() if not off <= 1} == {}


@pytest.mark.parametrize("name", ["retention", "linear", "delta", "rwkv6"])
@pytest.mark.parametrize("backend", ["executor", "triton"])
def test_the_state_is_what_the_text_says(name: str, backend: str) -> None:
    """Its numbers, and gradients through it alone and to the one that comes in."""
    torch.manual_seed(1)
    pattern, dtype = pattern_of(name), torch.float32
    heads = 2 if name in ("retention", "linear") else 4  # of k and v; a decay of every head has its own states
    q, k, v = (torch.randn(2, n, 21, d, dtype=dtype, requires_grad=True) for n, d in ((4, 8), (heads, 8), (heads, 6)))
    wide = 7 if name == "linear" else 6
    gate = torch.rand(2, 4, 21, 8, requires_grad=True)
    more: dict[str, Tensor] = {
        "retention": {"gamma": torch.tensor([0.9, 0.5, 0.8, 1.0], requires_grad=True)},
        "delta": {"beta": gate[..., 0].detach().requires_grad_()},
        "rwkv6": {"g": (-gate).detach().requires_grad_(), "u": torch.randn(4, 8, requires_grad=True)},
    }.get(name, {})
    shared = 2 if name == "linear" else 4
    settings: dict[str, Any] = dict(more)
    step = next(iter(pattern.with_state(q, k, v, **settings)[1].tensors))
    start = torch.rand(2, shared, 8, wide, requires_grad=True)
    out, state = pattern.outputs_with_state(q, k, v, State(0, {step: start}), settings, backend)
    assert state.tokens == 21
    (last,) = state.tensors.values()
    assert last.dtype == torch.float32
    expected = stepwise(name, q, k, v, more, start)
    assert error(last, expected) <= tolerance(dtype, 21)
    weight = torch.randn(last.shape)
    wanted = [k, v, *(one for one in more.values() if one.dim() != 2), start]
    found = torch.autograd.grad((last * weight).sum(), wanted)
    exact = torch.autograd.grad((expected * weight).sum(), wanted)
    most = max(float(one.abs().max()) for one in exact)
    assert max(error(one, other, most) for one, other in zip(found, exact, strict=True)) <= tolerance(dtype, 21)
    assert out.shape == (2, 4, 21, 6)


def stepwise(name: str, q: Tensor, k: Tensor, v: Tensor, more: dict[str, Tensor], state: Tensor) -> Tensor:
    """The state behind the last token, token by token in float64."""
    k, v, state = (one.double() for one in (k, v, state))
    if name == "linear":
        k, v = torch.nn.functional.elu(k) + 1, torch.cat([v, torch.ones_like(v[..., :1])], -1)
    k, v = (one.repeat_interleave(state.shape[1] // one.shape[1], 1) for one in (k, v))
    scale = 1.0 if name in ("linear", "rwkv6") else 8**-0.5  # ours scales what is written
    for t in range(k.shape[2]):
        key, value = k[:, :, t, :, None], v[:, :, t, None]
        if name == "retention":
            state = state * more["gamma"].double()[:, None, None]
        if name == "rwkv6":
            state = state * more["g"].double()[:, :, t, :, None].exp()
        if name == "delta":
            beta = more["beta"].double()[:, :, t, None, None]
            state = state + key * beta * (value * scale - key.mT @ state)
        else:
            state = state + key * value * (1.0 if name == "retention" else scale)
    return state


@pytest.mark.parametrize("backend", ["executor", "triton"])
@pytest.mark.parametrize("cut", [8, 11, 16])
def test_documents_go_on_or_begin_anew(backend: str, cut: int) -> None:
    torch.manual_seed(2)
    pattern = attnc.compile(DOCUMENTS).documents
    doc = torch.tensor([[0] * 8 + [1] * 13, [2] * 11 + [5] * 5 + [6] * 5])
    q, k, v = (torch.randn(2, 2, 21, 8) for _ in range(3))
    g = -torch.rand(2, 2, 21)
    sequences = Sequences(pattern, {}, {"q": q, "k": k, "v": v, "g": g, "doc": doc})
    errors = differences(sequences, [cut, 21 - cut], backend)
    assert {what: off for what, off in errors.items() if not off <= 1} == {}
    _, state = run(sequences, [cut, 21 - cut], sequences.tensors, backend)
    assert state.tensors["doc"].tolist() == [1, 6]


def test_the_last_queries_of_a_part() -> None:
    sequences = Sequences.of("gla", torch.float64)
    _, state = run(sequences, [13], sequences.part(0, 13))
    part = sequences.part(13, LENGTH)
    g = part["g"]
    later, _ = sequences.pattern.with_state(part["q"][:, :, -5:], part["k"], part["v"], state=state, g=g)
    assert error(later, whole(sequences, sequences.tensors)[:, :, -5:]) <= tolerance(torch.float64, LENGTH)
    with pytest.raises(AttnError, match="a key for every query"):
        sequences.pattern.with_state(part["q"], part["k"][:, :, -5:], part["v"][:, :, -5:], g=g[:, :, -5:])


def test_positions_count_on() -> None:
    """cosformer weighs keys by where they stand; the same parts with a count of 0 give something else."""
    sequences = Sequences.of("cosformer", torch.float64)
    _, state = run(sequences, [13], sequences.part(0, 13))
    assert state.tokens == 13
    part: dict[str, Any] = sequences.part(13, LENGTH)
    later = sequences.pattern.with_state(**part, state=state, **sequences.parameters)[0]
    other = sequences.pattern.with_state(**part, state=state._replace(tokens=0), **sequences.parameters)[0]
    expected = whole(sequences, sequences.tensors)[:, :, 13:]
    assert error(later, expected) <= tolerance(torch.float64, LENGTH)
    assert error(other, expected) > 1e-3


def test_detached_states_end_gradients() -> None:
    pattern = pattern_of("retention")
    q, k, v = (torch.randn(1, 2, 5, 4, requires_grad=True) for _ in range(3))
    gamma = torch.tensor([0.5, 0.9])
    _, state = pattern.with_state(q, k, v, gamma=gamma)
    out, _ = pattern.with_state(q.detach(), k.detach(), v.detach(), state=state.detach(), gamma=gamma)
    assert not out.requires_grad
    out, _ = pattern.with_state(q.detach(), k.detach(), v.detach(), state=state, gamma=gamma)
    assert out.requires_grad


def test_compiled_without_a_graph_break() -> None:
    pattern = pattern_of("simple_gla")

    def halves(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
        first, second = (slice(0, 9), slice(9, 20))
        out, state = pattern.with_state(q[:, :, first], k[:, :, first], v[:, :, first], g=g[:, :, first])
        rest, _ = pattern.with_state(q[:, :, second], k[:, :, second], v[:, :, second], state=state, g=g[:, :, second])
        return torch.cat([out, rest], 2)

    given = [torch.randn(1, 2, 20, 8, requires_grad=True) for _ in range(3)]
    g = (-torch.rand(1, 2, 20)).requires_grad_()
    compiled = torch.compile(halves, fullgraph=True, backend="aot_eager")
    out, expected = compiled(given[0], given[1], given[2], g), pattern.reference(*given, g=g)
    assert error(out, expected) <= tolerance(torch.float32, 20)
    found = torch.autograd.grad(out.square().sum(), [*given, g])
    exact = torch.autograd.grad(expected.square().sum(), [*given, g])
    most = max(float(one.abs().max()) for one in exact)
    assert max(error(one, other, most) for one, other in zip(found, exact, strict=True)) <= tolerance(torch.float32, 20)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("causal", "it needs earlier k, v of j, too"),
        ("hymba", "it needs earlier k, v of j, too"),
        ("linear_full", "a query depends on later tokens here"),
        ("infini", "it needs earlier k, v of j, too"),
    ],
)
def test_what_needs_more_is_refused(name: str, reason: str) -> None:
    pattern: CompiledPattern = pattern_of(name)
    sequences = Sequences.of(name)
    part: dict[str, Any] = dict(sequences.tensors)
    with pytest.raises(AttnError, match="hands no state from call to call") as caught:
        pattern.with_state(**part, **sequences.parameters)
    assert reason in str(caught.value)


def test_a_state_that_does_not_fit_is_refused() -> None:
    pattern = pattern_of("retention")
    q, k, v = (torch.randn(1, 2, 5, 4) for _ in range(3))
    gamma = torch.tensor([0.5, 0.9])
    _, state = pattern.with_state(q, k, v, gamma=gamma)
    (name,) = state.tensors
    for wrong, message in (
        (State(5, {}), "the state holds"),
        (State(5, {name: state.tensors[name][:, :, :3]}), "where \\(1, 2, 4, 4\\) is expected"),
        (State(5, {name: state.tensors[name].int()}), "is no real tensor"),
    ):
        with pytest.raises(AttnError, match=message):
            pattern.with_state(q, k, v, state=wrong, gamma=gamma)


def test_the_operator_with_states_under_opcheck() -> None:
    pattern = pattern_of("retention")
    q, k, v = (torch.randn(1, 2, 9, 4, requires_grad=True) for _ in range(3))
    start = torch.randn(1, 2, 4, 4, requires_grad=True)
    inputs = [torch.tensor([0.5, 0.9], requires_grad=True), start]
    arguments: tuple[Any, ...] = (pattern.program.handing.key, q, k, v, inputs, [], [0.5], "auto")
    assert set(torch.library.opcheck(torch.ops.attnc.attention.default, arguments).values()) == {"SUCCESS"}
    out, lse, saved = torch.ops.attnc.attention(*arguments)
    of_state = torch.randn_like(saved[-1])
    detached = [[one.detach() for one in given] for given in (saved, (q, k, v), inputs)]
    given = (
        arguments[0],
        torch.randn_like(out),
        None,
        [of_state],
        out.detach(),
        lse.detach(),
        detached[0],
        *detached[1],
    )
    needed = [True] * 5
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    gradient = torch.ops.attnc.attention_backward.default
    checked = torch.library.opcheck(gradient, (*given, detached[2], [], [0.5], "auto", needed), test_utils=tests)
    assert set(checked.values()) == {"SUCCESS"}

"""Carried sums in chunks against the sum over pairs and the recurrence, with gradients."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from time import process_time
from typing import Any

import pytest
import torch
from torch import Tensor

from attnc.runtime.cpu.carried import advance, carry, carry_backward
from attnc.runtime.cpu.reaches import Reach
from attnc.runtime.tolerance import error, tolerance

# Optional arrays are passed by stars.
forward: Any = carry
backward: Any = carry_backward
FEATURES, WIDTH = 6, 5
# What decays look like: none, a log decay a token (of all heads, of key heads), one for all tokens, one a channel.
DECAYS = {
    "none": (),
    "token": (2, 4, "M"),
    "key head": (2, 2, "M"),
    "head": (1, 4, 1),
    "channel": (2, 4, "M", FEATURES),
    "steady channel": (1, 1, 1, FEATURES),
}
REACHES = [("lag", 0), ("lag", 1), ("lag", 70), ("period", 1), ("period", 7), ("period", 63), ("period", 100)]


@dataclass(frozen=True)
class Call:
    query: Tensor
    key: Tensor
    value: Tensor
    decay: Tensor | None
    reach: Reach

    @property
    def arrays(self) -> Any:
        """query, key, value and decay."""
        return self.query, self.key, self.value, self.decay

    @property
    def tensors(self) -> list[Tensor]:
        return [one for one in (self.query, self.key, self.value, self.decay) if one is not None]


def made(
    rows: int, keys: int, decay: str, reach: Reach, *, abrupt: bool = False, dtype: torch.dtype = torch.float64
) -> Call:
    """Two key heads for four query heads. `abrupt`: log decays of -50 among ones near 0."""
    generator = torch.Generator().manual_seed(rows + keys)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    g = None
    if DECAYS[decay]:
        shape = [keys if size == "M" else int(size) for size in DECAYS[decay]]
        g = -random(*shape).abs()
        if abrupt:
            g = torch.where(random(*shape) < -0.8, torch.full_like(g, -50), g / 100)
    query, key, value = random(2, 4, rows, FEATURES), random(2, 2, keys, FEATURES), random(2, 2, keys, WIDTH)
    return Call(query, key, value, g, replace(reach, offset=max(keys - rows, 0)))


def by_pairs(call: Call) -> Tensor:
    """The definition: weights of all pairs, in float64. Differentiable."""
    query, key, value = (
        one.double().repeat_interleave(4 // one.shape[1], 1) for one in (call.query, call.key, call.value)
    )
    rows, keys, reach = query.shape[2], key.shape[2], call.reach
    i, j = torch.arange(rows)[:, None] + reach.offset, torch.arange(keys)
    live = torch.ones(rows, keys, dtype=torch.bool)
    if reach.kind == "lag":
        live = j <= i - reach.amount
    elif reach.kind == "period":
        live = j < i // reach.amount * reach.amount
    if reach.same is not None:
        live = live & (reach.same[:, None, i.clamp(max=keys - 1)] == reach.same[:, None, None, :])
    weights = query @ key.mT
    if call.decay is not None:
        decay = call.decay.double().repeat_interleave(4 // call.decay.shape[1], 1)
        decay = decay if decay.dim() == 4 else decay.unsqueeze(-1)
        length = max(rows + reach.offset, keys)
        decay = decay.expand(-1, -1, length, -1)
        u = torch.arange(length)
        between = ((u > j[:, None]) & (u <= i[:, :, None])).double()
        spans = torch.einsum("iju,bhuf->bhijf", between, decay).exp()
        weights = (query.unsqueeze(3) * key.unsqueeze(2) * spans).sum(-1)
    return torch.where(live, weights, 0.0) @ value


def check(call: Call) -> None:
    """Result and every gradient."""
    exact = [one.detach().double().requires_grad_() for one in call.tensors]
    wanted = by_pairs(Call(exact[0], exact[1], exact[2], exact[3] if call.decay is not None else None, call.reach))
    allowed = tolerance(call.query.dtype, call.key.shape[2]) * (50 if call.query.dtype == torch.float64 else 1)
    out, _ = carry(call.query, call.key, call.value, call.decay, call.reach)
    assert error(out, wanted) <= allowed
    cotangent = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = torch.autograd.grad(wanted, exact, cotangent, allow_unused=True, materialize_grads=True)
    found = carry_backward(call.query, call.key, call.value, call.decay, cotangent.to(out.dtype), call.reach)
    for ours, theirs in zip((one for one in found[:4] if one is not None), gradients, strict=True):
        assert error(ours, theirs) <= allowed


@pytest.mark.parametrize("decay", DECAYS)
def test_reaches(decay: str) -> None:
    for (kind, amount), (rows, keys) in product(REACHES, [(1, 1), (63, 63), (5, 131)]):
        check(made(rows, keys, decay, Reach(kind, amount)))


@pytest.mark.parametrize("decay", [name for name in DECAYS if name != "none"])
def test_abrupt_decays(decay: str) -> None:
    """What is forgotten costs no digits of what is kept, in float32 too. Nothing overflows."""
    for dtype in (torch.float64, torch.float32):
        check(made(150, 150, decay, Reach(), abrupt=True, dtype=dtype))
        check(made(20, 131, decay, Reach("lag", 3), abrupt=True, dtype=dtype))
        check(made(20, 131, decay, Reach("period", 9), abrupt=True, dtype=dtype))


@pytest.mark.parametrize("decay", ["none", "token", "channel"])
def test_packed_documents(decay: str) -> None:
    for keys, (kind, amount) in product((1, 90, 131), [("lag", 0), ("lag", 4), ("period", 7), ("period", 100)]):
        same = torch.randint(0, 5, (2, keys), generator=torch.Generator().manual_seed(keys)).sort(-1).values
        check(made(min(keys, 60), keys, decay, Reach(kind, amount, same=same)))


def test_all_keys_and_keys_ahead() -> None:
    for rows, keys in [(45, 19), (5, 131), (70, 70), (3, 0)]:
        check(made(rows, keys, "none", Reach("all")))
        check(made(rows, keys, "none", Reach("lag", -3)))


def test_more_queries_than_keys() -> None:
    for decay, (kind, amount) in product(["none", "head", "steady channel"], REACHES):
        check(made(45, 19, decay, Reach(kind, amount)))


def test_periods_far_longer_than_the_sequence() -> None:
    """No array is as long as the period, or as its square."""
    for decay in ("none", "token"):
        check(made(40, 90, decay, Reach("period", 10**9)))
        check(made(90, 90, decay, Reach("period", 89)))


def test_nothing_to_sum() -> None:
    for rows, keys in [(0, 0), (4, 0), (0, 4)]:
        call = made(rows, keys, "none", Reach())
        out, state = carry(call.query, call.key, call.value)
        assert out.shape == (2, 4, rows, WIDTH)
        assert not out.any()
        assert state.shape == (2, 4, FEATURES, WIDTH)
        gradients = carry_backward(call.query, call.key, call.value, None, out)
        assert [None if one is None else one.shape for one in gradients[:4]] == [
            call.query.shape,
            call.key.shape,
            call.value.shape,
            None,
        ]


def test_a_decay_of_minus_infinity_forgets() -> None:
    call = made(70, 70, "token", Reach())
    assert call.decay is not None
    decay = torch.where(torch.arange(70) % 10 == 0, -torch.inf, call.decay)
    out, _ = carry(call.query, call.key, call.value, decay)
    same = (torch.arange(70) // 10).expand(2, 70)
    expected, _ = carry(call.query, call.key, call.value, call.decay, Reach(same=same))
    assert error(out, expected) < 1e-9


@pytest.mark.parametrize("decay", ["none", "token", "channel"])
def test_parts_and_tokens_go_on_from_a_state(decay: str) -> None:
    """A sequence in two parts, and token by token, is the whole sequence; so are the gradients through the state."""
    call = made(90, 90, decay, Reach())
    key, value = (one.repeat_interleave(2, 1) for one in (call.key, call.value))
    whole, last = carry(call.query, key, value, call.decay)
    cut = 37

    def part(one: Any, start: int, stop: int) -> Any:
        return None if one is None else one[:, :, start:stop]

    arrays: Any = (call.query, key, value, call.decay)
    first, state = forward(*(part(one, 0, cut) for one in arrays))
    second, end = forward(*(part(one, cut, 90) for one in arrays), state=state)
    assert error(torch.cat([first, second], 2), whole) < 1e-12
    assert error(end, last) < 1e-12
    token = state
    for t in range(cut, 90):
        at: Any = [None if one is None else one[:, :, t] for one in arrays]
        out, token = advance(at[0], at[1], at[2], at[3], token)
        assert error(out, whole[:, :, t]) < 1e-12

    cotangent = torch.randn_like(whole)
    expected: Any = carry_backward(call.query, key, value, call.decay, cotangent)
    late: Any = backward(
        *(part(one, cut, 90) for one in arrays),
        cotangent[:, :, cut:],
        state=state,
    )
    early: Any = backward(
        *(part(one, 0, cut) for one in arrays),
        cotangent[:, :, :cut],
        grad_state=late[4],
    )
    for n in range(4 if call.decay is not None else 3):
        assert error(torch.cat([early[n], late[n]], 2), expected[n]) < 1e-11


@pytest.mark.parametrize("near_one", [True, False])
def test_long_sequences(near_one: bool) -> None:
    """32K tokens in float32 against the recurrence in float64."""
    generator = torch.Generator().manual_seed(0)
    length = 2**15
    query, key, value = (torch.randn(1, 1, length, size, generator=generator) for size in (4, 4, 3))
    decay = -torch.rand(1, 1, length, generator=generator) * (1e-4 if near_one else 50)
    out, _ = carry(query, key, value, decay)
    state, expected = torch.zeros(4, 3, dtype=torch.float64), []
    q, k, v, kept = query[0, 0].double(), key[0, 0].double(), value[0, 0].double(), decay[0, 0].double().exp()
    for t in range(length):
        state = torch.addr(state * kept[t], k[t], v[t])
        expected.append(q[t] @ state)
    assert error(out[0, 0], torch.stack(expected)) <= tolerance(torch.float32, length)


def test_low_precision_is_summed_in_float32() -> None:
    call = made(300, 300, "token", Reach())
    low: Any = [one.to(torch.bfloat16) for one in call.tensors]
    out, state = forward(*low)
    assert out.dtype == state.dtype == torch.float32
    assert error(out, forward(*(one.float() for one in low))[0]) < 1e-6
    gradients = backward(*low, out)
    assert all(one is None or one.dtype in (torch.bfloat16, torch.float32) for one in gradients)


def test_equal_inputs_give_equal_bits() -> None:
    call = made(300, 300, "channel", Reach(), dtype=torch.float32)
    once, again = (forward(*call.arrays)[0] for _ in range(2))
    assert torch.equal(once, again)
    first, second = (backward(*call.arrays, once) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True) if x is not None and y is not None)


def test_strided_arrays() -> None:
    call = made(80, 80, "token", Reach())
    strided: Any = [one.transpose(1, 2).contiguous().transpose(1, 2) for one in call.tensors]
    assert torch.equal(forward(*strided)[0], forward(*call.arrays)[0])


def test_refusals() -> None:
    call = made(8, 8, "none", Reach())
    state = torch.zeros(2, 4, FEATURES, WIDTH, dtype=torch.float64)
    with pytest.raises(ValueError, match="does not go on from a state"):
        carry(call.query, call.key, call.value, None, Reach("lag", 2), state)
    with pytest.raises(ValueError, match="sorted along the sequence"):
        carry(call.query, call.key, call.value, None, Reach(same=torch.tensor([[0, 1, 0, 1, 0, 1, 0, 1]] * 2)))


def test_cost_grows_with_the_length() -> None:
    """Sixteen times the tokens take sixteen times as long, not 256 times; forward and backward."""

    def seconds(length: int) -> float:
        generator = torch.Generator().manual_seed(0)
        query, key, value = (torch.randn(1, 1, length, 16, generator=generator) for _ in range(3))
        decay = -torch.rand(1, 1, length, generator=generator)
        best = float("inf")
        for _ in range(3):
            started = process_time()
            out, _ = carry(query, key, value, decay)
            carry_backward(query, key, value, decay, out)
            best = min(best, process_time() - started)
        return best

    seconds(1024)
    assert seconds(2**16) < 4 * 16 * seconds(2**12)

"""States with a change of rank one in chunks against the recurrence, with gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from attnc.runtime.cpu.recurrent import advance, recur, recur_backward
from attnc.runtime.tolerance import error, tolerance

# Optional arrays are passed by stars.
forward: Any = recur
backward: Any = recur_backward
one_more: Any = advance
WIDTH, VALUE = 7, 5
DECAYS: dict[str, tuple[int | str, ...]] = {
    "none": (),
    "token": (2, 4, "M"),
    "head": (1, 4, 1),
    "channel": (2, 4, "M", WIDTH),
    "key head's channel": (1, 2, "M", WIDTH),
}
Arrays = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor]


def made(rows: int, keys: int, decay: str, *, abrupt: bool = False, dtype: torch.dtype = torch.float64) -> Arrays:
    """A delta rule: k of length 1, x = -beta k, y = exp(g) k; k and v have half the heads."""
    generator = torch.Generator().manual_seed(rows + keys)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    query, value = random(2, 4, rows, WIDTH), random(2, 2, keys, VALUE)
    key = normalize(random(2, 2, keys, WIDTH), dim=-1)
    left = -torch.sigmoid(random(2, 4, keys, 1)) * key.repeat_interleave(2, 1)
    right = key.repeat_interleave(2, 1)
    if not DECAYS[decay]:
        return query, key, value, None, left, right
    shape = [keys if size == "M" else int(size) for size in DECAYS[decay]]
    g = -random(*shape).abs()
    if abrupt:
        g = torch.where(random(*shape) < -0.8, torch.full_like(g, -50), g / 100)
    factor = g.repeat_interleave(4 // g.shape[1], 1).exp()
    return query, key, value, g, left, right * (factor if g.dim() == 4 else factor.unsqueeze(-1))


def stepwise(arrays: Arrays, offset: int) -> Tensor:
    """The definition, one position after the other, in float64. Differentiable."""
    query, key, value, decay, left, right = (
        None if one is None else one.double().repeat_interleave(4 // one.shape[1], 1) for one in arrays
    )
    assert query is not None
    assert key is not None
    assert value is not None
    assert left is not None
    assert right is not None
    if decay is not None:
        decay = (decay if decay.dim() == 4 else decay.unsqueeze(-1)).expand(2, 4, key.shape[2], -1)
    state = query.new_zeros(2, 4, WIDTH, VALUE)
    reads = []
    for t in range(key.shape[2]):
        read = right[:, :, t, None] @ state
        state = state if decay is None else decay[:, :, t, :, None].exp() * state
        state = state + left[:, :, t, :, None] * read + key[:, :, t, :, None] * value[:, :, t, None]
        if t >= offset:
            reads.append((query[:, :, t - offset, None] @ state).squeeze(-2))
    return torch.stack(reads, 2)


def check(arrays: Arrays) -> None:
    """Result and every gradient."""
    offset = arrays[1].shape[2] - arrays[0].shape[2]
    exact = [None if one is None else one.detach().double().requires_grad_() for one in arrays]
    given: Any = tuple(exact)
    wanted = stepwise(given, offset)
    allowed = tolerance(arrays[0].dtype, arrays[1].shape[2]) * (50 if arrays[0].dtype == torch.float64 else 1)
    out, _ = forward(*arrays, offset=offset)
    assert error(out, wanted) <= allowed
    cotangent = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = torch.autograd.grad(wanted, [one for one in exact if one is not None], cotangent)
    found = backward(*arrays, cotangent.to(out.dtype), offset=offset)
    for ours, theirs in zip((one for one in found[:6] if one is not None), gradients, strict=True):
        assert error(ours, theirs) <= allowed


@pytest.mark.parametrize("decay", DECAYS)
def test_against_the_recurrence(decay: str) -> None:
    for rows, keys in [(1, 1), (63, 63), (150, 150), (5, 131)]:
        check(made(rows, keys, decay))


@pytest.mark.parametrize("decay", [name for name in DECAYS if name != "none"])
def test_abrupt_decays(decay: str) -> None:
    for dtype in (torch.float64, torch.float32):
        check(made(150, 150, decay, abrupt=True, dtype=dtype))


@pytest.mark.parametrize("decay", ["none", "token", "channel"])
def test_long_in_float32(decay: str) -> None:
    arrays = made(1000, 1000, decay, abrupt=True, dtype=torch.float32)
    assert error(forward(*arrays)[0], stepwise(arrays, 0)) <= tolerance(torch.float32, 1000)


@pytest.mark.parametrize("decay", ["none", "token", "channel"])
def test_parts_and_tokens_go_on_from_a_state(decay: str) -> None:
    """A sequence in two parts, and token by token, is the whole sequence; so are the gradients through the state."""
    arrays: Any = tuple(
        None if one is None else one.repeat_interleave(4 // one.shape[1], 1) for one in made(90, 90, decay)
    )
    cut = 37

    def part(start: int, stop: int) -> Any:
        return tuple(None if one is None else one[:, :, start:stop] for one in arrays)

    whole, last = forward(*arrays)
    first, state = forward(*part(0, cut))
    second, end = forward(*part(cut, 90), state=state)
    assert error(torch.cat([first, second], 2), whole) < 1e-12
    assert error(end, last) < 1e-12
    token = state
    for t in range(cut, 90):
        out, token = one_more(*(None if one is None else one[:, :, 0] for one in part(t, t + 1)), token)
        assert error(out, whole[:, :, t]) < 1e-12

    cotangent = torch.randn_like(whole)
    expected = backward(*arrays, cotangent)
    late = backward(*part(cut, 90), cotangent[:, :, cut:], state=state)
    early = backward(*part(0, cut), cotangent[:, :, :cut], grad_state=late[6])
    for before, after, wanted in zip(early[:6], late[:6], expected[:6], strict=True):
        if before is not None and after is not None and wanted is not None:
            assert error(torch.cat([before, after], 2), wanted) < 1e-11


def test_equal_inputs_give_equal_bits() -> None:
    arrays = made(200, 200, "channel", dtype=torch.float32)
    once, again = (forward(*arrays)[0] for _ in range(2))
    assert torch.equal(once, again)


def test_nothing_to_read() -> None:
    arrays = made(4, 4, "token")
    out, state = recur(arrays[0][:, :, :0], *arrays[1:], offset=4)
    assert out.shape == (2, 4, 0, VALUE)
    assert error(state, forward(*arrays)[1]) < 1e-12

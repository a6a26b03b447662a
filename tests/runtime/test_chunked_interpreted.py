"""Carried sums and recurrences on the chunked kernels against float64: interpreted, and compiled with the gpu mark."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from attnc.runtime.cpu.reaches import Reach
from attnc.runtime.cuda.launch_chunked_carry import carry_backward, carry_forward
from attnc.runtime.cuda.launch_chunked_recur import Recurrence, recur_forward
from attnc.runtime.tolerance import error, tolerance
from tests.runtime.chunked_oracle import Recurring, Sum, recurrence_errors, sum_errors

SUMS = {
    "plain": Sum(),
    "segments": Sum(1, 1, 1, 1, 66, 66, 8, 8, "channel", total=True),
    "one token": Sum(rows=1, keys=1, f=1, e=1, decay="channel", total=True),
    "shared heads, odd widths": Sum(1, 2, 1, 2, 21, 21, 18, 17, "scalar", total=True),
    "two key heads, fewer decays": Sum(2, 4, 2, 1, 5, 5, 8, 5, "scalar"),
    "last queries": Sum(1, 2, 1, 2, 9, 21, 8, 5, "channel", Reach(offset=12), total=True),
    "more queries than keys": Sum(1, 1, 1, 1, 35, 18, 8, 8, "scalar"),
    "all keys": Sum(1, 2, 1, 1, 30, 41, 18, 7, "none", Reach("all"), total=True),
    "periods": Sum(1, 1, 1, 1, 30, 21, 8, 7, "none", Reach("period", 7), total=True),
    "long periods that decay": Sum(1, 1, 1, 1, 41, 41, 8, 7, "scalar", Reach("period", 20)),
    "lag": Sum(1, 1, 1, 1, 40, 40, 18, 7, "none", Reach("lag", 3), total=True),
    "lag that decays": Sum(1, 1, 1, 1, 40, 40, 8, 7, "scalar", Reach("lag", 3)),
    "long lag that decays": Sum(1, 2, 1, 1, 10, 30, 8, 7, "channel", Reach("lag", 18, 20)),
    "reads before the update": Sum(1, 1, 1, 1, 20, 20, 8, 7, "channel", Reach(offset=-1)),
    "states": Sum(1, 2, 1, 2, 37, 37, 8, 7, "scalar", states=True, keep=True),
    "states of channels": Sum(1, 1, 1, 1, 37, 37, 18, 7, "channel", states=True, keep=True),
    "states that heads share": Sum(1, 4, 2, 1, 37, 37, 8, 7, "scalar", states=True),
    "states with totals": Sum(1, 2, 2, 2, 37, 37, 8, 7, "scalar", total=True, states=True, keep=True),
    "shared states with totals, last queries": Sum(1, 2, 1, 1, 5, 39, 18, 7, "none", Reach(offset=34), True, True),
    "states of segments": Sum(1, 1, 1, 1, 66, 66, 8, 8, "channel", total=True, states=True),
    "strong decay": Sum(1, 1, 1, 1, 40, 40, 8, 7, "channel", strength=20.0),
    "resets": Sum(1, 1, 1, 1, 40, 40, 8, 7, "scalar", resets=(0, 7, 16, 33)),
}
RECURRENCES = {
    "delta": Recurring(),
    "delta, one token": Recurring(rows=1, keys=1, f=1, e=1),
    "gated delta": Recurring(decay="scalar", states=True, keep=True, heads=2),
    "delta of channels": Recurring(decay="channel"),
    "delta of channels, strong": Recurring(decay="channel", strength=20.0, f=8, e=7),
    "general": Recurring(delta=False, f=8),
    "general, scalar": Recurring(delta=False, decay="scalar", e=7),
    "general, channels": Recurring(delta=False, decay="channel", states=True, keep=True, f=8, e=7),
    "last queries": Recurring(rows=5, keys=21, offset=16, decay="scalar", f=8, e=7),
    "reads before the update": Recurring(offset=-1, decay="channel", f=8, e=7),
    "equal keys": Recurring(equal=True, f=8, e=7),
}


@pytest.mark.parametrize("name", SUMS)
def test_a_carried_sum_and_its_gradients(name: str) -> None:
    errors = sum_errors(SUMS[name], "cpu", torch.float32)
    assert {one: error for one, error in errors.items() if not error <= 1} == {}


@pytest.mark.parametrize("name", RECURRENCES)
def test_a_recurrence_and_its_gradients(name: str) -> None:
    errors = recurrence_errors(RECURRENCES[name], "cpu", torch.float32)
    assert {one: error for one, error in errors.items() if not error <= 1} == {}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SUMS)
def test_a_carried_sum_on_a_gpu(name: str, dtype: torch.dtype) -> None:
    case = SUMS[name]
    for f, e in ((case.f, case.e), (128, 128), (100, 200)):
        errors = sum_errors(replace(case, f=f, e=e), "cuda", dtype)
        assert {one: error for one, error in errors.items() if not error <= 1} == {}, (f, e)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", RECURRENCES)
def test_a_recurrence_on_a_gpu(name: str, dtype: torch.dtype) -> None:
    case = RECURRENCES[name]
    for f, e in ((case.f, case.e), (128, 128)):
        errors = recurrence_errors(replace(case, f=f, e=e), "cuda", dtype)
        assert {one: error for one, error in errors.items() if not error <= 1} == {}, (f, e)


def test_equal_calls_give_equal_bits() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 40, 16) for _ in range(3))
    g = -torch.rand(1, 2, 40)
    first, second = (carry_backward(q, k, v, g, v) for _ in range(2))
    assert torch.equal(first.key, second.key)
    assert first.decay is not None
    assert second.decay is not None
    assert torch.equal(first.decay, second.decay)


@pytest.mark.parametrize("shape", [(0, 1, 5), (1, 1, 0)])
def test_nothing_to_sum(shape: tuple[int, int, int]) -> None:
    batch, heads, rows = shape
    q = torch.randn(batch, heads, rows, 4)
    k = torch.randn(batch, heads, 3, 4)
    assert carry_forward(q, k, k).out.shape == (batch, heads, rows, 4)
    assert carry_backward(q, k, k, None, q).key.eq(0).all()


def test_no_keys_give_zeros() -> None:
    q, k = torch.randn(1, 2, 5, 4), torch.randn(1, 1, 0, 4)
    result = carry_forward(q, k, k, total=True)
    assert result.total is not None
    assert result.out.eq(0).all()
    assert result.total.eq(0).all()


def test_a_gate_that_is_not_a_number_shows() -> None:
    q = torch.ones(1, 1, 20, 4)
    decay = torch.zeros(1, 1, 20)
    decay[0, 0, 3] = float("nan")
    assert carry_forward(q, q, q, decay).out[0, 0, 3:].isnan().all()


def test_what_does_not_fit_is_refused() -> None:
    q = torch.randn(1, 1, 20, 4)
    with pytest.raises(ValueError, match="every key"):
        carry_forward(q, q, q, torch.zeros(1, 1, 20), reach=Reach("all"))
    with pytest.raises(ValueError, match="fewer than 20"):
        carry_forward(q, q, q, torch.zeros(1, 1, 7))
    with pytest.raises(ValueError, match="do not fit"):
        carry_forward(q, q[..., :3], q)
    with pytest.raises(TypeError, match="float64"):
        carry_forward(q.double(), q.double(), q.double())
    with pytest.raises(ValueError, match="period"):
        carry_forward(q, q, q, reach=Reach("period", 0))
    with pytest.raises(ValueError, match="goes with reach of periods"):
        carry_forward(q, q, q, reach=Reach("all"), final=True)
    wide = torch.zeros(1, 1, 2, 300)
    with pytest.raises(ValueError, match="at most 128"):
        recur_forward(Recurrence(wide, wide, wide, wide))


def test_constant_decays_and_documents() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, 37, 8) for _ in range(3))
    same = torch.tensor([[0] * 5 + [1] * 20 + [3] * 12])
    decay = torch.tensor(-0.3).view(1, 1, 1)
    steps = decay.expand(1, 1, 37).clone()
    live = same[0][:, None] == same[0][None]
    exact = [one.double().requires_grad_() for one in (q, k, v, steps)]
    through = exact[3].cumsum(2)
    spans = (through[..., :, None] - through[..., None, :]).masked_fill(~live.tril(), -torch.inf)
    out = (exact[0] @ exact[1].transpose(2, 3) * spans.exp()) @ exact[2]
    reach = Reach(same=same)
    assert error(carry_forward(q, k, v, decay, reach=reach).out, out) <= tolerance(torch.float32, 37)
    expected = torch.autograd.grad((out * v.double()).sum(), exact)
    found = carry_backward(q, k, v, decay, v, reach=reach)
    assert found.decay is not None
    assert error(found.decay, expected[3].sum(2, keepdim=True)) <= tolerance(torch.float32, 37)
    assert error(found.key, expected[1]) <= tolerance(torch.float32, 37)

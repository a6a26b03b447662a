"""Patterns that carry a state, end to end: what they compile to, gradients, and what is said about them."""

from __future__ import annotations

import warnings
from pathlib import Path
from time import process_time

import pytest
import torch

import attnc
from attnc.compiler.composition import Attend, Carry, Compute, Extreme, Recur, Regroup, Sequential
from attnc.dsl.diagnostics import AttnError
from attnc.runtime.pattern import CompiledPattern
from attnc.runtime.steps.sequential import RUN, SequentialWarning
from attnc.runtime.tools.comparison import Case, Target, cases, compare
from attnc.runtime.tools.settings import Setting, settings

EXAMPLES = Path(__file__).parents[2] / "examples"
STATES: dict[str, list[type]] = {
    "linear": [Carry],
    "linear_full": [Carry],
    "performer": [Carry],
    "cosformer": [Carry],
    "hedgehog": [Carry],
    "based": [Carry],
    "power": [Carry],
    "retention": [Carry],
    "simple_gla": [Carry],
    "gla": [Carry],
    "rwkv6": [Carry],
    "mlstm": [Carry],
    "rwkv7": [Recur],
    "delta": [Recur],
    "gated_delta": [Recur],
    "kda": [Recur],
    "forgetting": [Attend],
    "lolcats": [Attend, Extreme, Carry],
    "based_window": [Attend, Carry],
    "infini": [Carry, Attend],
    "hymba": [Attend, Carry],
    "half_and_half": [Carry, Attend],
    "mixture_of_attentions": [Regroup, Carry, Regroup],
}
EXACT = Target("executor", "executor", "cpu", torch.float64)


def example(name: str) -> CompiledPattern:
    found = attnc.load(EXAMPLES / f"{name}.attn").main
    assert found is not None
    return found


def cases_of(pattern: CompiledPattern) -> list[Case]:
    return list(cases(pattern, Setting(), settings(pattern.pattern, "check", frozenset())))


@pytest.mark.parametrize("name", STATES)
def test_heavy_steps(name: str) -> None:
    """No pattern is left to pairs, or to one position after the other."""
    kinds = [type(step) for step in example(name).program.composition.steps if not isinstance(step, Compute)]
    assert sorted(kinds, key=str) == sorted(STATES[name], key=str)


@pytest.mark.parametrize("name", STATES)
def test_every_shape_with_gradients(name: str) -> None:
    for case in cases_of(example(name))[:5]:
        assert [outcome for outcome in compare(case, EXACT) if not outcome.agrees] == []


def test_a_power_is_a_program_of_its_own_for_each_exponent() -> None:
    power = example("power")
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, 9, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    results = [power(q, k, v, degree=degree) for degree in (1, 2, 3, 4)]
    for degree, result in enumerate(results, 1):
        torch.testing.assert_close(result, power.reference(q, k, v, degree=degree), rtol=1e-7, atol=1e-7)
    assert not torch.allclose(results[1], results[3])
    with pytest.raises(AttnError, match="only whole powers up to 4"):
        power(q, k, v, degree=6)


def test_weights_that_do_not_separate_say_why_and_where() -> None:
    text = "pattern p:\n    out = normalize[j](relu(q @ k) where j <= i) @ v\n"
    with pytest.raises(AttnError, match="`relu` of a value of row and key together") as raised:
        attnc.compile(text).p.program.composition  # noqa: B018
    assert raised.value.diagnostics[0].span.text == "relu(q @ k)"


UNKNOWN = """pattern unknown:
    input beta: real[b, h, t]
    scan t:
        S = tanh(S) * sigmoid(beta) + outer(k, v - tanh(k @ S))
        z = z + k
        out = q @ S / (1 + abs(q @ z)) + v
"""


def test_an_unknown_scan_runs_step_by_step_and_warns_once() -> None:
    pattern = attnc.compile(UNKNOWN).unknown
    kinds = [type(step) for step in pattern.program.composition.steps if not isinstance(step, Compute)]
    assert kinds == [Sequential]
    RUN.warned.clear()
    with pytest.warns(SequentialWarning, match="`tanh` makes its next state no linear function of the last"):
        assert [one for one in compare(cases_of(pattern)[0], EXACT) if not one.agrees] == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for case in cases_of(pattern)[1:3]:
            assert [one for one in compare(case, EXACT) if not one.agrees] == []


def test_explain_says_what_carries_a_state_and_what_it_costs() -> None:
    q, k, v = (torch.randn(1, 2, 8, 4) for _ in range(3))
    text = example("simple_gla").explain(q, k, v, g=-torch.rand(1, 2, 8))
    assert "1_carry: a state carried along the keys, read where j <= i; q = 0_value, k = k, v = v; log decay g" in text
    assert "weights that separate into values of the row and of the key: no pair is formed" in text
    assert "1_carry: FLOPs = B*H*(2*F*E*(N + M) + 2*C*N*(F + E))" in text
    assert "live pairs" not in text
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SequentialWarning)  # it runs the steps
        text = attnc.compile(UNKNOWN).unknown.explain(q, k, v, beta=torch.rand(1, 2, 8))
    assert (
        "one position after the other: `tanh` makes its next state no linear function of the last (`tanh(S)`)" in text
    )


EXTREMES = """pattern widest(window: int = 5):
    input slope: real[h]
    s = q @ k * scale - slope * (i - j)
    top = max[j](s where 0 <= i - j < window)
    low = min[j](s where i - j >= window)
    out = softmax[j](q @ k * scale where j <= i) @ v * exp(low - top)
"""


def test_largest_and_smallest_scores_of_a_row() -> None:
    pattern = attnc.compile(EXTREMES).widest
    kinds = [type(step) for step in pattern.program.composition.steps if not isinstance(step, Compute)]
    assert sorted(kinds, key=str) == sorted([Attend, Extreme, Extreme], key=str)
    for case in cases_of(pattern):
        assert [outcome for outcome in compare(case, EXACT) if not outcome.agrees] == []


def test_equal_largest_scores_share_the_gradient() -> None:
    pattern = attnc.compile("pattern p:\n    out = softmax[j](q @ k) @ v * max[j](q @ k where j <= i)\n").p
    q, k = torch.ones(1, 1, 70, 4, dtype=torch.float64), torch.ones(1, 1, 70, 4, dtype=torch.float64)
    v = torch.randn(1, 1, 70, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tensors = [one.requires_grad_() for one in (q, k, v)]
    found, wanted = (torch.autograd.grad(f(*tensors).square().sum(), tensors) for f in (pattern, pattern.reference))
    torch.testing.assert_close(found, wanted)


def test_sums_of_exponentials_are_softmaxes() -> None:
    """Weights that no state can carry, exp of a score, under any normaliser, and split by what pairs choose."""
    text = """pattern p(window: int = 6):
    s = q @ k * scale
    near = i - j < window
    bounded = normalize[j](exp(s) where j <= i, floor = 3) @ v
    split   = normalize[j](if near then exp(s) else exp(s / 2 - 1) where j <= i, eps = 0.5) @ v
    out = bounded + split
"""
    pattern = attnc.compile(text).p
    kinds = [type(step) for step in pattern.program.composition.steps if not isinstance(step, Compute)]
    assert kinds == [Attend] * 3
    for case in cases_of(pattern):
        assert [outcome for outcome in compare(case, EXACT) if not outcome.agrees] == []


@pytest.mark.parametrize("name", ["linear", "gla", "kda", "lolcats"])
def test_eight_times_the_tokens_cost_eight_times_as_much(name: str) -> None:
    """Forward and backward; 64 times would be all pairs. Of this process alone, so that others do not count."""
    pattern = example(name)

    def seconds(length: int) -> float:
        generator = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(1, 1, length, 16, generator=generator).requires_grad_() for _ in range(3))
        given = {
            "gla": {"g": -torch.rand(1, 1, length, 16, generator=generator)},
            "kda": {
                "g": -torch.rand(1, 1, length, 16, generator=generator),
                "beta": torch.rand(1, 1, length, generator=generator) / 20,
            },
            "lolcats": {"w": torch.randn(1, 8, 16, generator=generator)},
        }.get(name, {})
        best = float("inf")
        for _ in range(2):
            started = process_time()
            pattern(q, k, v, **given).sum().backward()
            best = min(best, process_time() - started)
        return best

    assert seconds(2**15) < 3 * 8 * seconds(2**12)


def test_negative_bases_are_refused() -> None:
    q, k, v = (torch.randn(1, 2, 8, 4) for _ in range(3))
    with pytest.raises(ValueError, match="the base of a power of the distance is negative"):
        example("retention")(q, k, v, gamma=torch.tensor([0.5, -0.5]))


@pytest.mark.parametrize("name", ["simple_gla", "kda"])
def test_operator_and_compile(name: str) -> None:
    """Fake shapes are those of real results, and gradients pass through torch.compile's tracing."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 20, 4, generator=generator).requires_grad_() for _ in range(3))
    given = {"g": -torch.rand(1, 2, 20, *([4] if name == "kda" else []), generator=generator)}
    if name == "kda":
        given["beta"] = torch.rand(1, 2, 20, generator=generator) / 4
    pattern = example(name)
    compiled = torch.compile(lambda *tensors: pattern(*tensors, **given), backend="aot_eager", fullgraph=True)
    expected = torch.autograd.grad(pattern(q, k, v, **given).sum(), (q, k, v))
    torch.testing.assert_close(torch.autograd.grad(compiled(q, k, v).sum(), (q, k, v)), expected)

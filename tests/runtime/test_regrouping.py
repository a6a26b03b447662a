"""Attention in orders of its own on a CPU: groups, chosen rows and keys, specialists; results, gradients, work done."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import attnc
from attnc.compiler.composition import Attend, Regroup
from attnc.runtime.pattern import CompiledPattern
from attnc.runtime.steps.composition import KINDS
from attnc.runtime.tools.comparison import Case, Target, compare
from attnc.runtime.tools.explanation import streamed_pairs
from attnc.runtime.tools.inputs import Shape, made_inputs
from attnc.runtime.tools.settings import Setting

# One line of each: how rows and keys come to be in an order of their own.
GROUPS = """
pattern grouped:             # the same group for every head
    input route: real[b, t, 4]
    group = argmax[4](route)
    out = softmax[j](q @ k * scale where group[i] == group[j]) @ v
pattern causal:              # a group of each head
    input means: real[h, 3, d]
    group(x) = argmax[3](means @ x)
    out = softmax[j](q @ k * scale where j <= i and group(q) == group(k)) @ v
pattern past:                # no key for many a row; more queries than keys allowed
    input means: real[h, 7, d]
    group(x) = argmax[7](means @ x)
    out = softmax[j](q @ k * scale where j < i - 2 and group(k) == group(q)) @ v
pattern alone:               # one group of all
    input route: real[b, t, 1]
    group = argmax[1](route)
    out = softmax[j](q @ k * scale where j <= i and group[i] == group[j]) @ v
pattern rounded:             # groups that are numbers of blocks of a line, some below 0
    group(x) = floor(2 * (x @ x) - 5)
    out = softmax[j](q @ k * scale where j <= i and group(q) == group(k)) @ v
pattern windows(window: int = 6): # intervals, remainders and two cases inside of a group
    input route: real[b, h, t, 3]
    group = argmax[3](route)
    near = 0 <= i - j < window or (j < i and (i - j) % 3 == 1)
    out = softmax[j](q @ k * scale where group[i] == group[j] and near) @ v
pattern leaves:              # what the score reads at rows, at keys and at their distance
    input route: real[b, t, 3]
    input slope: real[h]
    input bias: real[b, h, t]
    input sink: real[b, h, t]
    input table: real[h, 9]
    group = argmax[3](route)
    score = q @ k * scale * sigmoid(bias[i]) + bias[j] - slope * (i - j) + table[i - j]
    out = softmax[j](score where j <= i and group[i] == group[j], sink = sink[i]) @ v
pattern shifted:             # groups that are compared by more than their names
    input route: real[b, t, 5]
    group = argmax[5](route)
    out = softmax[j](q @ k * scale where group[i] + 1 == 2 * group[j]) @ v
"""
CHOSEN = """
pattern both(tokens: int = 7): # the same tokens as queries and as keys
    input router: real[b, h, t]
    chosen = topk[t](router, tokens)
    out = softmax[j](q @ k * scale where i in chosen and j in chosen and j <= i) @ v
pattern keys(tokens: int = 7): # tokens that every row sees
    input router: real[b, t]
    chosen = topk[t](router, tokens)
    out = softmax[j](q @ k * scale where j in chosen and j <= i) @ v
pattern rows:                # rows that see the past, by a score; some heads may have none
    input router: real[b, h, i]
    out = softmax[j](q @ k * scale where router > 0.7 and j <= i) @ v
pattern sinking:             # a row without a key has its sink
    input router: real[b, h, i]
    input sink: real[b, h, i]
    out = softmax[j](q @ k * scale where router > 0.2 and j <= i, sink = sink) @ v
pattern nobody:              # no row takes part
    input router: real[b, h, i]
    out = softmax[j](q @ k * scale where router > 1000 and j <= i) @ v
pattern choosy:              # keys that score well, in groups
    input route: real[b, t, 3]
    input worth: real[b, h, t]
    group = argmax[3](route)
    kept = threshold[t](worth, 0.0)
    out = softmax[j](q @ k * scale where group[i] == group[j] and j in kept and i >= j) @ v
"""
NEEDED = """
pattern heads(active: int = 1): # the best heads of a token
    input router: real[b, i, h]
    chosen = topk[h](router, active)
    weight = softmax[h](router where h in chosen)
    out = weight * (softmax[j](q @ k * scale) @ v)
pattern specialists(window: int = 9): # each token goes to one, or to none
    input router: real[b, i, 5]
    input doc: int[b, t]
    input columns: int[h, y]
    input slope: real[h]
    s = q @ k * scale
    near = softmax[j](s - slope * (i - j) where 0 <= i - j < window) @ v
    same = softmax[j](s where doc[i] == doc[j] and abs(i - j) < 40) @ v
    some = softmax[j](s where j in columns[h] or i // 8 == j // 8) @ v
    comb = softmax[j](s where j <= i and (i - j < 4 or j % 5 == 4 or (i - j) % 7 == 0)) @ v
    chosen = argmax[5](router)
    gate = softmax[5](router)[chosen]
    out = gate * (if chosen == 0 then near else if chosen == 1 then same
        else if chosen == 2 then some else if chosen == 3 then comb else mean[j](v))
pattern halves:              # every branch asked for somewhere, both by some rows
    input route: int[b, t]
    a = softmax[j](q @ k * scale where j <= i) @ v
    b2 = softmax[j](q @ k * scale where j >= i) @ v
    out = if route[i] == 0 then a else if route[i] == 1 then b2 else a - b2
"""
EXECUTOR = Target("executor", "executor", "cpu", torch.float64)
# One token, heads that share keys, fewer queries than keys, more queries than keys, several tiles of rows.
SHAPES = (
    Shape(1, 1, 1, 1, 1, 4, 4),
    Shape(2, 4, 2, 37, 37, 4, 6),
    Shape(1, 4, 1, 5, 23, 6, 4),
    Shape(1, 2, 2, 21, 9, 4, 4),
)
LONG = Shape(1, 2, 1, 150, 150, 4, 4)


def loaded(text: str) -> list[CompiledPattern]:
    module = attnc.compile(text)
    return [getattr(module, name) for name in module.patterns]


ALL = [pattern for text in (GROUPS, CHOSEN, NEEDED) for pattern in loaded(text)]


def fits(pattern: CompiledPattern, shape: Shape) -> bool:
    return pattern.program.token_read is None or shape.queries <= shape.keys


@pytest.mark.parametrize("pattern", ALL, ids=lambda pattern: pattern.pattern.name)
def test_results_and_gradients_agree_with_the_reference(pattern: CompiledPattern) -> None:
    for shape in (*SHAPES, LONG):
        if fits(pattern, shape):
            outcomes = compare(Case(pattern, shape, Setting()), EXECUTOR)
            assert [outcome for outcome in outcomes if not outcome.agrees] == []


@pytest.mark.parametrize("pattern", ALL, ids=lambda pattern: pattern.pattern.name)
def test_every_pattern_runs_in_an_order_of_its_own(pattern: CompiledPattern) -> None:
    steps = [step for step in pattern.program.composition.steps if type(step) in KINDS]
    assert all(isinstance(step, Regroup) for step in steps)
    assert not any(isinstance(step, Attend) for step in steps)


INTERPRETER = Target("interpreter", "triton", "cpu", torch.float32)


@pytest.mark.parametrize(
    "name", ["causal", "windows", "leaves", "both", "keys", "choosy", "heads", "specialists", "rows", "sinking"]
)
def test_kernels_agree_with_the_reference(name: str) -> None:
    (pattern,) = (one for one in ALL if one.pattern.name == name)
    outcomes = compare(Case(pattern, Shape(1, 4, 2, 40, 40, 4, 4), Setting()), INTERPRETER)
    assert [outcome for outcome in outcomes if not outcome.agrees] == []


def by_name(name: str) -> CompiledPattern:
    return next(one for one in ALL if one.pattern.name == name)


def drawn(length: int, heads: int = 4, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, heads, length, 8, generator=generator) for _ in range(3)]


def test_groups_cost_their_own_pairs() -> None:
    q, k, v = drawn(1024)
    group = torch.arange(1024) % 16  # neighbours are never in one group
    route = torch.nn.functional.one_hot(group, 16)[None].float()
    text = """pattern p:
    input route: real[b, t, 16]
    g = argmax[16](route)
    out = softmax[j](q @ k where {}) @ v
"""
    for condition, share in (("g[i] == g[j]", 1 / 16), ("g[i] == g[j] and j <= i", 1 / 32)):
        found = streamed_pairs(attnc.compile(text.format(condition)).p.prepared(q, k, v, {"route": route}))
        assert found.live == pytest.approx(4 * 1024**2 * share, rel=0.05)
        assert found.visited <= 1.1 * 4 * 1024**2 / 16


def test_tokens_that_nobody_chose_cost_nothing() -> None:
    q, k, v = drawn(512)
    pattern, router = by_name("heads"), torch.randn(1, 512, 4)
    everything = streamed_pairs(pattern.prepared(q, k, v, {"router": router, "active": 4}))
    one = streamed_pairs(pattern.prepared(q, k, v, {"router": router, "active": 1}))
    assert everything.live == 4 * one.live == 4 * 512**2
    assert one.visited < one.live + 4 * 64 * 512  # the last tile of each head is not full


def test_a_window_of_chosen_rows_stays_a_window() -> None:
    q, k, v = drawn(2048, heads=1)
    text = """pattern p(window: int = 32):
    input router: real[b, i, 2]
    chosen = argmax[2](router)
    out = if chosen == 0 then softmax[j](q @ k where 0 <= i - j < window) @ v else 0 * mean[j](v)
"""
    found = streamed_pairs(attnc.compile(text).p.prepared(q, k, v, {"router": torch.randn(1, 2048, 2)}))
    assert found.live < 1.1 * 1024 * 32
    assert found.visited < 8 * found.live


def test_expert_choice_gives_0_where_no_head_chose_a_token() -> None:
    q, k, v = drawn(64)
    router = torch.zeros(1, 4, 64)
    router[..., :3] = 1
    out = by_name("both")(q, k, v, router=router, tokens=3)
    assert torch.equal(out[:, :, 3:], torch.zeros(1, 4, 61, 8))
    assert bool((out[:, :, :3] != 0).any(-1).all())


@pytest.mark.parametrize("name", ["causal", "both", "specialists"])
def test_twice_the_same_step_gives_the_same_bits(name: str) -> None:
    pattern = by_name(name)
    made = compare_inputs(pattern, Shape(2, 4, 2, 150, 150, 8, 8))
    cotangent = torch.randn(2, 4, 150, 8)

    def step() -> list[Tensor]:
        given = {key: x.detach().requires_grad_() if x.is_floating_point() else x for key, x in made.items()}
        out = pattern(**given)
        real = [x for x in given.values() if x.requires_grad]
        return [out, *torch.autograd.grad(out, real, cotangent, allow_unused=True, materialize_grads=True)]

    assert all(torch.equal(x, y) for x, y in zip(step(), step(), strict=True))


def compare_inputs(pattern: CompiledPattern, shape: Shape) -> dict[str, Tensor]:
    made = made_inputs(pattern.pattern, shape, {}, dtype=torch.float32)
    assert made.v is not None
    return {"q": made.q, "k": made.k, "v": made.v, **made.inputs}


@pytest.mark.parametrize(
    "router", [torch.randn(1, 20, 3), torch.randn(1, 4, 20), torch.randn(20, 4)], ids=lambda x: str(x.shape)
)
def test_a_router_of_another_shape_is_refused(router: Tensor) -> None:
    q, k, v = drawn(20)
    with pytest.raises(attnc.AttnError, match="router"):
        by_name("heads")(q, k, v, router=router)


def test_gradients_come_through_the_gate_alone() -> None:
    q, k, v = drawn(20)
    router = torch.randn(1, 20, 4, requires_grad=True)
    out = by_name("heads")(q, k, v, router=router, active=1)  # the softmax over one head is 1
    (gradient,) = torch.autograd.grad(out.sum(), router)
    assert torch.allclose(gradient, torch.zeros_like(gradient), atol=1e-6)
    out = by_name("heads")(q, k, v, router=router, active=2)
    (gradient,) = torch.autograd.grad(out.sum(), router)
    assert ((gradient != 0).sum(-1) == 2).all()


def test_compiles_as_one_graph() -> None:
    q, k, v = drawn(40)
    pattern = by_name("both")
    router = torch.randn(1, 4, 40, requires_grad=True)

    def call(q: Tensor, router: Tensor) -> Tensor:
        return pattern(q, k, v, router=router)

    traced: Any = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert torch.equal(traced(q, router), call(q, router))

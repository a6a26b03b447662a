"""The CPU back end against the float64 reference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from attnc.compiler.pipeline import lower
from attnc.compiler.plan import Plan
from attnc.dsl.check import check
from attnc.dsl.source import Source
from attnc.dsl.terms import Pattern
from attnc.runtime.binding import flat
from attnc.runtime.call import Call, make_call
from attnc.runtime.cpu.executor import ELEMENTS, execute, live_pairs, visited_pairs
from attnc.runtime.reference.meaning import reference, reference_with_lse
from attnc.runtime.tolerance import error, tolerance
from attnc.runtime.tools.inputs import Shape, made_inputs
from tests.compiler.pairs import names

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SHAPES = (
    Shape(1, 1, 1, 1, 1, 1, 1),
    Shape(2, 4, 2, 63, 63, 8, 5),
    Shape(1, 3, 1, 37, 72, 5, 8),
    Shape(1, 2, 2, 1, 77, 16, 16),
    Shape(2, 2, 1, 140, 140, 4, 4),
    Shape(1, 2, 2, 90, 40, 4, 4),
)
SMALL: dict[str, dict[str, Any]] = {
    "bigbird": {"block": 8, "randoms": 2, "seed": 3},
    "block_local": {"block": 7},
    "dilated_window": {"window": 4, "dilation": 3},
    "duo": {"window": 6, "sinks": 2},
    "local_window": {"radius": 5},
    "longformer": {"radius": 3, "globals": 4},
    "longnet": {"segments": (8, 32), "rates": (1, 4)},
    "neighborhood": {"height": 8, "width": 9, "kernel": 3, "dilation": 2},
    "relative_bias": {"buckets": 8, "distance": 20},
    "sliding_window": {"window": 6},
    "sparse_fixed": {"block": 8, "summary": 3},
    "streaming": {"sinks": 2, "window": 5},
    "strided": {"local": 4, "stride": 6},
    "swin": {"height": 8, "width": 9, "window": 3, "shift": 1},
}
FAMILY = names()


@dataclass(frozen=True)
class Compiled:
    pattern: Pattern
    plan: Plan


@cache
def compiled(text: str) -> Compiled:
    """The last pattern of a text."""
    pattern = list(check(Source("<text>", text)).values())[-1]
    return Compiled(pattern, lower(pattern))


def example(name: str) -> Compiled:
    return compiled((EXAMPLES / f"{name}.attn").read_text())


def values(pattern: Pattern, given: Mapping[str, Any], width: int) -> dict[str, Any]:
    """All parameters of a call."""
    found = {p.name: p.default for p in pattern.parameters} | dict(given)
    found["scale"] = found.get("scale") or width**-0.5
    return found


def make(
    known: Compiled, q: Tensor, k: Tensor, v: Tensor, parameters: dict[str, Any], inputs: dict[str, Tensor]
) -> Call:
    return make_call(known.plan, q, k, v, flat(parameters), inputs)


def reads_tokens(known: Compiled) -> bool:
    return any("t" in declared.axes for declared in known.pattern.inputs)


def compare(
    known: Compiled, shape: Shape, given: Mapping[str, Any], dtype: torch.dtype = torch.float64, seed: int = 0
) -> None:
    """Result (and lse, where the reference gives one) agree."""
    parameters = values(known.pattern, given, shape.width)
    made = made_inputs(known.pattern, shape, parameters, dtype=dtype, seed=seed)
    out, lse = execute(known.plan, make(known, made.q, made.k, made.v, parameters, made.inputs))
    assert out.dtype == dtype
    expected = reference(known.pattern, made.q, made.k, made.v, parameters, made.inputs)
    assert error(out, expected) <= tolerance(dtype, shape.keys)
    if len(known.plan.branches) > 1:
        return
    _, statistic = reference_with_lse(known.pattern, made.q, made.k, made.v, parameters, made.inputs)
    assert lse.shape == (shape.batch, shape.heads, shape.queries)
    finite = torch.isfinite(statistic)
    assert torch.equal(torch.isfinite(lse), finite)
    assert bool((lse[~finite] == -torch.inf).all())
    assert error(lse[finite], statistic[finite]) <= 4 * tolerance(dtype, shape.keys)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", FAMILY)
def test_family_agrees_with_the_reference(name: str, shape: Shape) -> None:
    known = example(name)
    if shape.queries > shape.keys and reads_tokens(known):
        pytest.skip("inputs over tokens have no value at the last queries")
    compare(known, shape, SMALL.get(name, {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["causal", "alibi", "softcap", "strided", "longnet", "vertical_slash", "sink_logit"])
def test_low_precision(name: str, dtype: torch.dtype) -> None:
    compare(example(name), SHAPES[1], SMALL.get(name, {}), dtype)


@pytest.mark.parametrize("name", ["causal", "sliding_window", "dilated_window", "strided", "relative_bias", "alibi"])
def test_many_tiles(name: str) -> None:
    """Enough rows that batches of several tiles, several pieces a row and full pieces occur."""
    known = example(name)
    given = {"sliding_window": {"window": 200}, "dilated_window": {"window": 100, "dilation": 5}}.get(name, {})
    for shape in (Shape(1, 1, 1, 2500, 2500, 4, 3), Shape(1, 4, 2, 700, 1300, 4, 3)):
        compare(known, shape, given, torch.float32)


def test_strides() -> None:
    """Rows apart in memory, heads last, a batch that is one row repeated, a transposed head."""
    known = example("sliding_window")
    parameters = values(known.pattern, {"window": 9}, 8)
    base = torch.randn(2, 70, 4, 8, dtype=torch.float64)
    layouts = (
        base.transpose(1, 2),
        torch.randn(2, 4, 140, 8, dtype=torch.float64)[:, :, ::2],
        torch.randn(1, 4, 70, 8, dtype=torch.float64).expand(2, -1, -1, -1),
        torch.randn(2, 4, 8, 70, dtype=torch.float64).transpose(2, 3),
    )
    for q in layouts:
        for k in layouts:
            v = k + 1 if k is layouts[0] else k
            out, _ = execute(known.plan, make(known, q, k, v, parameters, {}))
            assert error(out, reference(known.pattern, q, k, v, parameters, {})) < 1e-12


def test_rows_without_keys_are_zero() -> None:
    known = compiled("pattern p:\n    out = softmax[j](q @ k where j + 5 <= i and i % 3 != 0) @ v\n")
    made = made_inputs(known.pattern, Shape(1, 2, 2, 20, 20, 4, 4), {}, dtype=torch.float64)
    out, lse = execute(known.plan, make(known, made.q, made.k, made.v, {"scale": 1.0}, {}))
    empty = torch.tensor([i < 5 or i % 3 == 0 for i in range(20)])
    assert bool((out[:, :, empty] == 0).all())
    assert bool((lse[:, :, empty] == -torch.inf).all())
    assert bool(torch.isfinite(lse[:, :, ~empty]).all())
    compare(known, Shape(1, 2, 2, 20, 20, 4, 4), {})


def test_a_sink_without_keys() -> None:
    """The denominator holds the sink alone: out is 0 and lse the sink."""
    text = "pattern p:\n    input s: real[h]\n    out = softmax[j](q @ k where j + 3 <= i, sink = s[h]) @ v\n"
    compare(compiled(text), Shape(2, 2, 1, 9, 9, 4, 4), {})


@pytest.mark.parametrize(("queries", "keys"), [(0, 5), (5, 0), (0, 0)])
def test_empty_sequences(queries: int, keys: int) -> None:
    known = example("sliding_window")
    q, k, v = torch.randn(1, 2, queries, 4), torch.randn(1, 2, keys, 4), torch.randn(1, 2, keys, 3)
    out, lse = execute(known.plan, make(known, q, k, v, {"window": 3, "scale": 1.0}, {}))
    assert torch.equal(out, torch.zeros(1, 2, queries, 3))
    assert torch.equal(lse, torch.full((1, 2, queries), -torch.inf))


def test_tokens_end_where_keys_end() -> None:
    known = example("documents")
    made = made_inputs(known.pattern, Shape(1, 1, 1, 9, 5, 4, 4), {})
    with pytest.raises(ValueError, match=r"documents: `doc` has 5 tokens .* but there are 9 queries"):
        make(known, made.q, made.k, made.v, {"scale": 1.0}, made.inputs)


MIXED = {
    "merged": """pattern p(w: int = 4):
    out = merge(softmax[j](q @ k * scale where 0 <= i - j < w) @ v, softmax[j](q @ k where j < 3) @ v)
""",
    "temperature": """pattern p:
    input tau: real[b, h, t]
    input bias: real[b, h, j]
    out = softmax[j](-(q @ k) * tau[i] / 3.0 - (bias - abs(i - j) / 7) where j <= i) @ v
""",
    "by score": """pattern p:
    out = softmax[j](tanh(q @ k) * 3 where j <= i and (q @ k > 0 or j == i)) @ v
""",
    "lists a batch": """pattern p:
    input columns: int[b, x]
    out = softmax[j](q @ k * scale where j <= i and (j - 1 in columns or i == j)) @ v
""",
}


@pytest.mark.parametrize("name", MIXED)
@pytest.mark.parametrize("shape", [Shape(2, 4, 2, 70, 70, 4, 4), Shape(1, 2, 2, 9, 30, 4, 4)], ids=str)
def test_mixed(name: str, shape: Shape) -> None:
    compare(compiled(MIXED[name]), shape, {})


def test_subnormal_weights_and_extreme_scores() -> None:
    known = compiled("pattern p:\n    out = softmax[j](q @ k * scale - 40.0 * (i - j) where j <= i) @ v\n")
    compare(known, Shape(1, 1, 1, 90, 90, 4, 4), {}, torch.float32)
    q = torch.full((1, 1, 3, 1), 3e18)
    k = torch.tensor([1e18, -1e18, 5e17]).view(1, 1, 3, 1)
    v = torch.tensor([1.0, 2.0, 3.0]).view(1, 1, 3, 1)
    full = example("full")
    out, lse = execute(full.plan, make(full, q, k, v, {"scale": 1.0}, {}))
    assert bool((out == 1).all())
    torch.testing.assert_close(lse, torch.full((1, 1, 3), 3e36))


# Which pairs


ATOMS = [
    "j <= i",
    "i - j < w",
    "abs(i - j) <= w",
    "j < w",
    "i < w",
    "i >= w * 2",
    "(i - j) % s == 0",
    "j % s == s - 1",
    "j % s >= 1",
    "i % s == j % s",
    "i // s == j // s",
    "i // s - j // s == 1",
    "doc[i] == doc[j]",
    "doc[i] != doc[j]",
    "j < prefix",
    "j in columns[h]",
    "i - j in columns[h]",
    "h % 2 == 1",
    "2 * j <= i",
    "i + j < 3 * w",
    "(i % s) * (j % s) <= 2",
    "j // s % 2 == 0",
    "i // s % 2 == j // s % 2",
]
conditions = st.recursive(
    st.sampled_from(ATOMS),
    lambda inner: st.one_of(
        st.builds("({} and {})".format, inner, inner),
        st.builds("({} or {})".format, inner, inner),
        st.builds("(not {})".format, inner),
    ),
    max_leaves=5,
)
HEADER = """pattern p(w: int = 3, s: int = 2):
    input doc: int[b, t]
    input prefix: int[b]
    input columns: int[h, x]
"""


def alive(known: Compiled, parameters: dict[str, Any], inputs: dict[str, Tensor], shape: Shape) -> tuple[Tensor, Call]:
    """Each pair's share of its row as the executor sees it, times the row's live keys, and the same of the reference.

    With q = 0 every live key weighs the same, and with v = 1 on the diagonal the result is the matrix of weights:
    a pair visited twice weighs double.
    """
    q = torch.zeros(shape.batch, shape.heads, shape.queries, 1, dtype=torch.float64)
    k = torch.zeros(shape.batch, shape.key_heads, shape.keys, 1, dtype=torch.float64)
    v = torch.eye(shape.keys, dtype=torch.float64).expand(shape.batch, shape.key_heads, -1, -1)
    call = make(known, q, k, v, parameters, inputs)
    found, _ = execute(known.plan, call)
    expected = reference(known.pattern, q, k, v, parameters, inputs)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    return expected > 0, call


@given(
    condition=conditions,
    w=st.integers(1, 9),
    s=st.integers(1, 7),
    queries=st.integers(1, 20),
    extra=st.integers(0, 9),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=80, deadline=None)
def test_every_live_pair_is_visited_once(condition: str, w: int, s: int, queries: int, extra: int, seed: int) -> None:
    known = compiled(f"{HEADER}    out = softmax[j](q @ k * scale where {condition}) @ v\n")
    shape = Shape(2, 4, 2, queries, queries + extra, 1, queries + extra)
    generator = torch.Generator().manual_seed(seed)
    inputs = {
        "doc": torch.randint(0, 4, (2, shape.keys), generator=generator),
        "prefix": torch.randint(0, shape.keys + 1, (2,), generator=generator),
        "columns": torch.randint(-2, shape.keys, (4, 5), generator=generator),
    }
    if seed % 2:
        inputs["doc"] = inputs["doc"].sort(-1).values
    live, call = alive(known, {"w": w, "s": s, "scale": 1.0}, inputs, shape)
    assert live_pairs(known.plan, call) == int(live.sum())


@pytest.mark.parametrize("name", [name for name in FAMILY if name != "longnet"])
def test_family_visits_every_live_pair_once(name: str) -> None:
    known = example(name)
    for queries, keys in ((72, 72), (30, 72)):
        shape = Shape(2, 4, 2, queries, keys, 1, keys)
        parameters = values(known.pattern, SMALL.get(name, {}), 1)
        made = made_inputs(known.pattern, shape, parameters, dtype=torch.float64)
        inputs = {key: torch.zeros_like(x) if x.is_floating_point() else x for key, x in made.inputs.items()}
        live, call = alive(known, parameters, inputs, shape)
        assert live_pairs(known.plan, call) == int(live.sum())


WASTE = [  # visited pairs over live pairs at a length where tiles matter
    ("causal", {}, 1.1),
    ("sliding_window", {"window": 512}, 1.15),
    ("dilated_window", {"window": 256, "dilation": 8}, 1.3),
    ("strided", {"local": 128, "stride": 128}, 1.5),
    ("sparse_fixed", {"block": 128, "summary": 8}, 1.35),
    ("longformer", {"radius": 256, "globals": 64}, 1.2),
    ("bigbird", {"block": 64, "randoms": 3}, 1.01),
    ("block_local", {"block": 256}, 1.3),
    ("streaming", {"sinks": 4, "window": 1024}, 1.1),
    ("neighborhood", {"height": 64, "width": 64, "kernel": 7, "dilation": 2}, 5.0),
    ("longnet", {"segments": (256, 1024), "rates": (1, 4)}, 1.01),
]


@pytest.mark.parametrize(("name", "given", "most"), WASTE, ids=[name for name, *_ in WASTE])
def test_waste_is_bounded(name: str, given: dict[str, Any], most: float) -> None:
    known = example(name)
    shape = Shape(1, 4, 4, 4096, 4096, 1, 1)
    parameters = values(known.pattern, given, 1)
    made = made_inputs(known.pattern, shape, parameters)
    call = make(known, made.q, made.k, made.v, parameters, made.inputs)
    live, visited = live_pairs(known.plan, call), visited_pairs(known.plan, call)
    assert live <= visited <= most * live


class Largest(TorchDispatchMode):
    """Notes the most elements of any new tensor."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for one in result if isinstance(result, tuple) else (result,):
            if isinstance(one, Tensor):
                self.elements = max(self.elements, one.untyped_storage().nbytes() // one.element_size())
        return result


@pytest.mark.parametrize("name", ["causal", "sliding_window", "documents", "vertical_slash", "relative_bias"])
def test_nothing_is_quadratic(name: str) -> None:
    known = example(name)
    shape = Shape(1, 1, 1, 6000, 6000, 8, 8)
    parameters = values(known.pattern, {}, 8)
    made = made_inputs(known.pattern, shape, parameters)
    call = make(known, made.q, made.k, made.v, parameters, made.inputs)
    with Largest() as largest:
        execute(known.plan, call)
    assert largest.elements <= 4 * ELEMENTS
    assert largest.elements < 6000 * 6000 // 8

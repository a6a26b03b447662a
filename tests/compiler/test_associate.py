"""Which sums over keys separate, into what, and why the others don't."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnc.compiler.algebra import Algebra
from attnc.compiler.associate import Associated, Declined, associate
from attnc.compiler.build import build
from attnc.compiler.ir import Graph, Node, text, walk
from attnc.compiler.simplify import simplify
from attnc.dsl.check import check
from attnc.dsl.source import Source
from tests.compiler.positions import LENGTH, World

HEADER = """pattern probe(window: int = 3, segment: int = 3, horizon: int = 9):
    input g: real[b, h, t]
    input c: real[b, h, t, d]
    input n: real[b, h, t]
    input gamma: real[h]
    input u: real[h, d]
    input doc: int[b, t]
    G = cumsum[t](g)
    C = cumsum[t](c)
    s = q @ k * scale
"""


def found(line: str) -> tuple[Graph, Node, Associated | Declined]:
    """The one reduction over keys of a pattern whose last line is given."""
    pattern = check(Source("probe.attn", f"{HEADER}    {line}\n"))["probe"]
    graph = Graph()
    out = simplify(graph, build(graph, pattern))
    results = [(node, associate(graph, Algebra(graph), node)) for node in walk(out)]
    ((node, result),) = [(node, result) for node, result in results if result is not None]
    return graph, node, result


def world(seed: int = 0) -> World:
    random = np.random.default_rng(seed)
    tensors: dict[str, Any] = {name: random.normal(size=(LENGTH, 3)) for name in ("q", "k")}
    tensors |= {"v": random.normal(size=(LENGTH, 2)), "u": random.normal(size=3)}
    tensors |= {
        "c": -random.random((LENGTH, 3)),
        "g": -random.random(LENGTH),
        "n": random.normal(size=LENGTH),
        "gamma": np.float64(0.7),
    }
    tensors["doc"] = np.sort(random.integers(0, 3, LENGTH))
    return World(tensors, {"scale": 0.6, "window": 3, "segment": 3, "horizon": 9})


def reaches(associated: Associated, at: World, i: int, j: int) -> bool:
    """Whether a row sees a key, by the extent."""
    (reach,) = {part.reach for part in associated.parts}
    amount = 0 if reach.amount is None else int(at.at(reach.amount))
    seen = {"all": True, "lag": j <= i - amount, "period": amount and j < i // max(amount, 1) * amount}[reach.kind]
    same = reach.same is None or at.at(reach.same, t=i) == at.at(reach.same, t=j)
    return bool(seen and same)


def weights(associated: Associated, at: World, i: int, j: int) -> Any:
    """The weighted value of a pair as the parts have it; the decay is a sum over j < u <= i."""
    total: Any = 0.0
    for part in associated.parts:
        decay: Any = 0.0
        if part.decay is not None:
            decay = sum((at.at(part.decay, t=u) for u in range(j + 1, i + 1)), start=0.0)
            assert np.all(np.asarray(decay) <= 0)
        weight = np.sum(at.at(part.query, i=i) * at.at(part.key, j=j) * np.exp(decay))
        value = at.at(part.value, j=j)
        times = 1.0 if part.times is None else at.at(part.times, i=i)
        total = total + weight * value * times
    return total


def assert_same(line: str, seed: int = 0) -> Associated:
    """Every pair's weighted value is that of the text."""
    _, node, result = found(line)
    assert isinstance(result, Associated), result
    at = world(seed)
    if node.op == "sum":
        body, condition, value = *node.args, None
    elif any(arg.op == "normalize" for arg in node.args):
        normalized, value = node.args
        body, condition = normalized.args[:2]
    else:
        (body, value), condition = node.args, None
    for i, j in product(range(LENGTH), repeat=2):
        live = condition is None or bool(at.at(condition, i=i, j=j))
        expected = at.at(body, i=i, j=j) * (1.0 if value is None else at.at(value, j=j)) if live else 0.0
        ours = weights(result, at, i, j) if reaches(result, at, i, j) else 0.0
        np.testing.assert_allclose(ours, np.broadcast_to(expected, np.shape(ours)), rtol=1e-9, atol=1e-12)
    return result


CAUSAL = "where j <= i"
SEPARABLE = {
    "a feature map": f"out = normalize[j]((elu(q) + 1) @ (elu(k) + 1) {CAUSAL}, eps = 1e-6) @ v",
    "a feature map of whole vectors": f"out = normalize[j](softmax[d](q) @ softmax[d](k) {CAUSAL}) @ v",
    "a polynomial": f"out = normalize[j](1 + s + s**2 / 2 {CAUSAL}) @ v",
    "a power": f"out = normalize[j](s**4 {CAUSAL}, eps = 1e-6) @ v",
    "a cube of a sum": f"out = sum[j]((1 - s)**3 * v {CAUSAL})",
    "two different dots": f"out = sum[j](s * (relu(q) @ relu(k)) * v {CAUSAL})",
    "a decay": f"out = sum[j](exp(G[i] - G[j]) * s * v {CAUSAL})",
    "a scaled decay": f"out = sum[j](exp((G[i] - G[j]) * 0.5) * s * v {CAUSAL})",
    "two decays at once": f"out = sum[j](exp(G[i] - G[j]) * gamma ** (i - j) * s * v {CAUSAL})",
    "a decay by channel": f"out = sum[j]((q * exp(C[i] - C[j])) @ k * v {CAUSAL})",
    "decays by channel and by token": f"out = sum[j](exp(G[i] - G[j]) * ((q * exp(C[i] - C[j])) @ k) * v {CAUSAL})",
    "a decay, and none": f"out = sum[j]((exp(G[i] - G[j]) + 1) * s * v {CAUSAL})",
    "a power of the distance": f"out = sum[j](gamma ** (i - j) * s * v {CAUSAL})",
    "a linear decay": f"out = sum[j](exp(-0.2 * (i - j)) * s * v {CAUSAL})",
    "an input gate": f"out = normalize[j](exp(G[i] - G[j] + n[j]) * s {CAUSAL}, floor = 1) @ v",
    "gates of both sides": f"out = sum[j](exp(n[i] + n[j]) * s * v {CAUSAL})",
    "a cosine of the distance": f"out = sum[j](s * cos(pi() / 2 * (i - j) / horizon) * v {CAUSAL})",
    "a sine with a decay by channel": f"out = sum[j](sin(0.3 * (i - j)) * ((q * exp(C[i] - C[j])) @ k) * v {CAUSAL})",
    "only decays": f"out = sum[j](exp(G[i] - G[j]) * v {CAUSAL})",
    "only the keys' values": f"out = sum[j](v {CAUSAL})",
    "a value that the row scales": f"out = sum[j](s * (v * exp(n[i])) {CAUSAL})",
    "a vector of parameters": f"out = sum[j](((q + u) @ k) * v {CAUSAL})",
    "a row that chooses": f"out = sum[j]((if n[i] < 0 then s else 2 * s**2) * v {CAUSAL})",
    "all keys": "out = normalize[j]((elu(q) + 1) @ (elu(k) + 1), eps = 1e-6) @ v",
    "no condition at all": "out = s @ v",
    "a shifted prefix": "out = sum[j](s * v where i - j >= window)",
    "a shifted prefix with a decay": "out = sum[j](exp(G[i] - G[j]) * s * v where i - j >= window)",
    "the keys ahead too": "out = sum[j](s * v where j <= i + 2)",
    "earlier segments": "out = normalize[j](s where j // segment < i // segment) @ v",
    "two bounds of which one is enough": "out = sum[j](s * v where j <= i and j // segment < i // segment)",
    "two bounds of which either may be the smaller": "out = sum[j](s * v where j <= i and i - j >= window)",
    "documents": "out = sum[j](s * v where j <= i and doc[i] == doc[j])",
    "keys of one kind": "out = sum[j](s * v where j <= i and n[j] > 0)",
    "rows of one kind": "out = sum[j](s * v where j <= i and i % 2 == 0)",
    "key sinks left out": "out = sum[j](s * v where j <= i and j >= 2)",
}
PARTS = {"a decay, and none": 2}
FEATURES = {"a polynomial": 1 + 3 + 6, "a power": 15, "two different dots": 9}  # D = 3


@pytest.mark.parametrize("case", SEPARABLE)
def test_separable(case: str) -> None:
    associated = assert_same(SEPARABLE[case])
    assert len(associated.parts) == PARTS.get(case, 1)
    if case in FEATURES:
        assert len(world().at(associated.parts[0].query, i=0)) == FEATURES[case]


INSEPARABLE = {
    "out = sum[j](exp(s) * v where j <= i)": ("q @ k * scale", "only a feature map"),
    "out = normalize[j](relu(s) where j <= i) @ v": ("relu(s)", "`relu`"),
    "out = normalize[j](s**5 where j <= i) @ v": (None, "whole powers up to 4"),
    "out = normalize[j](s**0.5 where j <= i) @ v": (None, "whole powers up to 4"),
    "out = normalize[j](s / (1 + s) where j <= i) @ v": ("(1 + s)", "it divides by"),
    "out = normalize[j](cos(s) where j <= i) @ v": (None, "its angle"),
    "out = sum[j](s * v where 0 <= i - j < window)": (None, "upper bound"),
    "out = sum[j](s * v where j <= i or j < 4)": (None, "union"),
    "out = sum[j](s * v where (i - j) % 2 == 0 and j <= i)": (None, "upper bound"),
    "out = sum[j](exp(G[i] - G[j]) * s * v)": (None, "no bound where keys lie behind"),
    "out = sum[j](exp(G[i] - G[j]) * s * v where j <= i + 1)": (None, "no bound where keys lie behind"),
    "out = sum[j](s * v where j <= 2 * i)": (None, "equal steps"),
    "out = sum[j](s * v where j <= i and i - j >= h)": (None, "equal steps"),
    "out = sum[j]((if i - j < window then s else s**2) * v where j <= i)": (None, "row and key together"),
    "out = normalize[j](if i - j < window then s else s**2 where j <= i) @ v": (None, "upper bound"),
    "out = sum[j](n[j] ** (i - j) * v where j <= i)": (None, "the same at all positions"),
    "out = sum[j](s * v where doc[i] == doc[j])": (None, "packed"),
    "out = softmax[i](s where j <= i) @ v": (None, "along the keys it is `softmax[j]`"),
}


@pytest.mark.parametrize("line", INSEPARABLE)
def test_declined_with_a_reason_and_a_place(line: str) -> None:
    _, _, result = found(line)
    where, reason = INSEPARABLE[line]
    assert isinstance(result, Declined)
    assert reason in result.reason
    assert where is None or (result.node.span is not None and result.node.span.text == where)


def test_softmax_and_sums_of_one_sequence_are_no_carried_sums() -> None:
    for line in ("out = softmax[j](s where j <= i) @ v", "out = q @ (sum[j](k) * 1.0) * (softmax[j](s) @ v)"):
        pattern = check(Source("probe.attn", f"{HEADER}    {line}\n"))["probe"]
        graph = Graph()
        out = simplify(graph, build(graph, pattern))
        assert [associate(graph, Algebra(graph), node) for node in walk(out)].count(None) == len(list(walk(out)))


def test_exponents_that_would_overflow_are_decays() -> None:
    """exp(G[i]) and exp(-G[j]) are never formed apart."""
    _, _, result = found("out = sum[j](exp(G[i] - G[j] + n[j]) * s * v where j <= i)")
    assert isinstance(result, Associated)
    for part in result.parts:
        assert "cumsum" not in text(part.query) + text(part.key)
        assert part.decay is not None
        assert text(part.decay) == "return g"


ATOMS = st.sampled_from(
    [
        "s",
        "(relu(q) @ relu(k))",
        "(softmax[d](q) @ k)",
        "exp(G[i] - G[j])",
        "gamma ** (i - j)",
        "cos(0.4 * (i - j))",
        "sin(0.2 * (i - j) + 1)",
        "exp(n[j])",
        "n[i]",
        "2.5",
        "(1 - s)",
        "(q * exp(C[i] - C[j])) @ k",
    ]
)
WEIGHTS = st.recursive(
    ATOMS,
    lambda inner: st.tuples(inner, st.sampled_from(["+", "-", "*"]), inner).map(lambda x: f"({' '.join(x)})"),
    max_leaves=4,
)


@given(WEIGHTS, st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_random_weights_keep_their_values(weight: str, seed: int) -> None:
    line = f"out = sum[j]({weight} * v where j <= i)"
    _, _, result = found(line)
    if isinstance(result, Declined):
        assert "decay for each channel" in result.reason or "products" in result.reason
        return
    assert_same(line, seed)

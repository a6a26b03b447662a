"""The torch meaning of the graph's ops."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from attnc.compiler.ir import Graph, Node
from attnc.compiler.ops import POINTWISE
from attnc.compiler.pipeline import lower
from attnc.compiler.plan import Plan
from attnc.dsl.check import check
from attnc.dsl.source import Source
from attnc.dsl.types import Base, Type
from attnc.runtime.call import make_call
from attnc.runtime.evaluate import MEANING, Environment
from attnc.runtime.scalars import SCALAR

TEXT = """pattern p(n: int = 5, x: real = 0.5):
    input g: real[b, h, t]
    input key_bias: real[b, h, j]
    input row: real[b, i, 3]
    input table: int[h, n]
    input shared: real[b, 1, j]
    out = softmax[j](q @ k * scale + key_bias + shared + real(table[0]) + x where j <= i) @ v
"""
BATCH, HEADS, KEY_HEADS, ROWS, KEYS = 2, 4, 2, 3, 7


def plan() -> Plan:
    pattern = check(Source("<text>", TEXT))["p"]
    return replace(lower(pattern), inputs=pattern.inputs)  # those too that the text does not read


def environment(**inputs: Tensor) -> Environment:
    """Positions (B, H, N, M) of a call with N < M."""
    made = {
        "g": torch.randn(BATCH, HEADS, KEYS),
        "key_bias": torch.randn(BATCH, KEY_HEADS, KEYS),
        "row": torch.randn(BATCH, ROWS, 3),
        "table": torch.randint(0, 9, (HEADS, 5)),
        "shared": torch.randn(BATCH, 1, KEYS),
    } | inputs
    q, k = torch.randn(BATCH, HEADS, ROWS, 4), torch.randn(BATCH, KEY_HEADS, KEYS, 4)
    known = plan()
    call = make_call(known, q, k, k, {"n": 5, "x": 0.5, "scale": 1.0}, made)
    assert call.offset == KEYS - ROWS
    positions = {
        "b": torch.arange(BATCH).view(-1, 1, 1, 1),
        "h": torch.arange(HEADS).view(1, -1, 1, 1),
        "i": torch.arange(ROWS).view(1, 1, -1, 1) + call.offset,
        "j": torch.arange(KEYS).view(1, 1, 1, -1),
    }
    return Environment(known, call, positions, torch.float64)


def tensor(graph: Graph, name: str, base: Base, indices: str, *axes: str) -> Node:
    return graph.make("input", type=Type(base, frozenset(indices), axes), attribute=name)


def test_every_pointwise_op_has_a_meaning() -> None:
    assert MEANING.keys() == POINTWISE.keys()


REALS = st.floats(-4, 4).map(lambda x: round(x, 3))
INTS = st.integers(-9, 9)
OTHERS: dict[str, Callable[[float], float]] = {
    "sigmoid": lambda x: 1 / (1 + math.exp(-x)),
    "relu": lambda x: max(x, 0.0),
    "elu": lambda x: x if x > 0 else math.expm1(x),
    "silu": lambda x: x / (1 + math.exp(-x)),
    "softplus": lambda x: math.log1p(math.exp(x)),
}
PYTHON: dict[str, Callable[..., Any]] = {**SCALAR, **OTHERS}
BOOLS = {"not", "and", "or"}
ONLY_INTS = {"floordiv", "mod"}
ONLY_REALS = {"exp", "log", "tanh", "sin", "cos", "sqrt", "floor", "div", *OTHERS}


@pytest.mark.parametrize("op", sorted(POINTWISE))
@given(data=st.data())
def test_pointwise_values(op: str, data: Any) -> None:
    """Every op against Python's own arithmetic."""
    count = {"select": 3}.get(op, 1 if op in OTHERS or op in UNARY else 2)
    for base in (Base.INT, Base.REAL):
        if (base is Base.INT and op in ONLY_REALS) or (base is Base.REAL and op in ONLY_INTS | {"to_real"}):
            continue
        if op in BOOLS:
            numbers = [data.draw(st.booleans()) for _ in range(count)]
        else:
            numbers = [data.draw(REALS if base is Base.REAL else INTS) for _ in range(count)]
        if op == "select":
            numbers[0] = data.draw(st.booleans())
        if op in ("log", "sqrt", "pow"):
            numbers[0] = abs(numbers[0]) + 1
        if op == "pow" and base is Base.INT:
            numbers[1] = abs(numbers[1])
        if op in ("div", "floordiv", "mod"):
            numbers[1] = abs(numbers[1]) + 1
        graph = Graph()
        node = graph.make(op, *(graph.literal(number) for number in numbers))
        at = Environment(PLAN, CALL, {"i": torch.arange(1)}, torch.float64)
        found = at.value(node)
        expected = PYTHON[op](*numbers)
        assert found.dtype == {Base.BOOL: torch.bool, Base.INT: torch.int64, Base.REAL: torch.float64}[node.type.base]
        assert found.item() == pytest.approx(expected, rel=1e-12, abs=1e-12)


UNARY = {"to_real", "neg", "not", "abs", "exp", "log", "tanh", "sin", "cos", "sqrt", "floor"}
AT = environment()
PLAN, CALL = AT.plan, AT.call


def test_inputs_are_read_at_positions() -> None:
    """Heads shared by groups, a literal 1 dropped, rows from the call's offset, tokens read at i and at j."""
    graph, at = Graph(), environment()
    inputs = {name: value.double() for name, value in at.call.inputs.items()}
    bias = at.value(tensor(graph, "key_bias", Base.REAL, "bhj"))
    assert torch.equal(bias, inputs["key_bias"].repeat_interleave(2, 1)[:, :, None, :])
    shared = at.value(tensor(graph, "shared", Base.REAL, "bj"))
    assert torch.equal(shared, inputs["shared"][:, :, None, :])
    row = tensor(graph, "row", Base.REAL, "bi", "3")
    assert torch.equal(at.value(row), inputs["row"][:, None, :, None, :])
    token = tensor(graph, "g", Base.REAL, "bht")
    at_row = graph.make("rename", token, type=Type(Base.REAL, frozenset("bhi")), attribute=("t", "i"))
    at_key = graph.make("rename", token, type=Type(Base.REAL, frozenset("bhj")), attribute=("t", "j"))
    assert torch.equal(at.value(at_row), inputs["g"][:, :, -ROWS:, None])
    assert torch.equal(at.value(at_key), inputs["g"][:, :, None, :])


def test_take_and_shift_read_zero_outside() -> None:
    graph, at = Graph(), environment()
    table = tensor(graph, "table", Base.INT, "h", "n")
    place = graph.make("sub", graph.index("j"), graph.literal(1))
    taken = at.value(graph.make("take", table, place, type=Type(Base.INT, frozenset("hj")), attribute="n"))
    expected = torch.zeros(1, HEADS, 1, KEYS, dtype=torch.int64)
    expected[0, :, 0, 1:6] = at.call.inputs["table"]
    assert torch.equal(taken, expected)
    bias = tensor(graph, "key_bias", Base.REAL, "bhj")
    before = at.value(graph.make("shift", bias, place, type=bias.type, attribute="j"))
    assert bool((before[..., 0] == 0).all())
    assert torch.equal(before[..., 1:], at.value(bias)[..., :-1])
    row = tensor(graph, "row", Base.REAL, "bi", "3")
    above = graph.make("sub", graph.index("i"), graph.literal(1))
    moved = at.value(graph.make("shift", row, above, type=row.type, attribute="i"))
    assert bool((moved[:, :, 0] == 0).all())
    assert torch.equal(moved[:, :, 1:], at.value(row)[:, :, :-1])


def test_vectors_broadcast_against_scalars() -> None:
    graph, at = Graph(), environment()
    row = tensor(graph, "row", Base.REAL, "bi", "3")
    product = at.value(graph.make("mul", row, graph.make("to_real", graph.index("j"))))
    assert product.shape == (BATCH, 1, ROWS, KEYS, 3)
    assert torch.equal(product, at.value(row) * torch.arange(KEYS).view(1, 1, 1, -1, 1))


def test_a_deep_graph_needs_no_deep_stack() -> None:
    graph, at = Graph(), environment()
    node = graph.index("j")
    for _ in range(5000):
        node = graph.make("add", node, graph.literal(1))
    assert torch.equal(at.value(node).view(-1), torch.arange(KEYS) + 5000)

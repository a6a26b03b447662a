"""Needed rows: what is not needed changes nothing, and the patterns that route say so in their own words."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnc.compiler.build import build
from attnc.compiler.describe import formula
from attnc.compiler.ir import Graph, Node, substitute, walk
from attnc.compiler.needs import needs, nonzero
from attnc.compiler.simplify import simplify
from attnc.dsl.check import check
from attnc.dsl.source import Source
from attnc.dsl.types import Base
from tests.compiler.graphs import At, Maker, graphs, places, same, value


@settings(max_examples=300, deadline=None)
@given(made=graphs("real", depth=5), at=st.lists(places(), min_size=4, max_size=4), data=st.data())
def test_what_is_not_needed_may_be_anything(made: tuple[Graph, Node], at: list[At], data: st.DataObject) -> None:
    graph, root = made
    found = needs(graph, root)
    inside = [node for node in walk(root) if node.type.base is Base.REAL and not node.type.axes and node in found]
    node = data.draw(st.sampled_from(inside))
    replaced = graph.make("select", found[node], node, graph.literal(7.25))
    changed = substitute(graph, root, {node: replaced})
    for one in at:
        expected, got = value(root, one), value(changed, one)
        if not (math.isnan(expected) or math.isnan(got)):  # 0 * NaN is not 0, but nobody asks for it
            assert same(expected, got)


@st.composite
def zeros(draw: st.DrawFn) -> tuple[Graph, Node]:
    """A real that is 0 here and there: products and sums of what an `if` makes 0."""
    maker = Maker(draw)

    def made(depth: int) -> Node:
        if depth == 0:
            sides = [maker.real(1), maker.graph.literal(0.0)]
            return maker.graph.make("select", maker.boolean(2), *(sides if draw(st.booleans()) else sides[::-1]))
        op = draw(st.sampled_from(["mul", "add", "sub", "select", "neg", "div"]))
        if op == "neg":
            return maker.graph.make("neg", made(depth - 1))
        first = [maker.boolean(1)] if op == "select" else []
        return maker.graph.make(op, *first, made(depth - 1), maker.real(1) if op == "div" else made(depth - 1))

    return maker.graph, made(draw(st.integers(0, 3)))


@settings(max_examples=300, deadline=None)
@given(made=zeros(), at=st.lists(places(), min_size=4, max_size=4))
def test_where_nonzero_does_not_hold_the_value_is_0(made: tuple[Graph, Node], at: list[At]) -> None:
    graph, root = made
    condition = nonzero(graph, root)
    for one in at:
        assert value(condition, one) or value(root, one) == 0 or math.isnan(value(root, one))


def branch_needs(text: str) -> list[str]:
    """What each softmax over keys is needed for, in the order of the text."""
    graph = Graph()
    root = simplify(graph, build(graph, check(Source("<text>", text))["p"]))
    found = needs(graph, root)
    return [formula(found[node]) for node in walk(root) if node.op == "dot" and node.attribute == "j"]


ATTEND = "softmax[j](q @ k{}) @ v"


@pytest.mark.parametrize(
    ("equations", "expected"),
    [
        ("out = {a}", ["true"]),
        ("out = if route[i] == 0 then {a} else {b}", ["route[i] == 0", "route[i] != 0"]),
        (
            "out = if route[i] == 0 then {a} else if h < 2 then {b} else {a}",
            ["route[i] == 0 or route[i] != 0 and 2 <= h", "route[i] != 0 and h < 2"],
        ),
        ("out = real(route[i]) * ({a})", ["true"]),
        ("out = (if route[i] == 1 then gate[i] else 0.0) * ({a}) + {b}", ["route[i] == 1", "true"]),
        ("out = -(softmax[h](gate[i] where route[i] > h) * ({a} + {b}))", ["h < route[i]", "h < route[i]"]),
        ("x = {a}\n    out = if route[i] == 0 then x / sqrt(x @ x) else 2 * ({b})", ["route[i] == 0", "route[i] != 0"]),
        ("out = group_sum(if h == 0 then {a} else {b})", ["h == 0", "h != 0"]),
        ("out = if h == 0 then group_sum({a}) else {b}", ["true", "h != 0"]),
        ("out = if route[i] == 0 then sum[h]({a} where h < 2) else {b}", ["route[i] == 0 and h < 2", "route[i] != 0"]),
    ],
)
def test_needs_of_branches(equations: str, expected: list[str]) -> None:
    text = "pattern p:\n    input route: int[b, t]\n    input gate: real[b, h, t]\n    "
    equations = equations.format(a=ATTEND.format(""), b=ATTEND.format(" where j <= i"))
    assert branch_needs(text + equations + "\n") == expected


def test_a_weight_that_only_happens_to_be_0_is_needed_for_its_gradient() -> None:
    text = "pattern p:\n    input gate: real[b, i, h]\n    out = gate * ({}) + relu(gate) * ({})\n"
    assert branch_needs(text.format(ATTEND.format(""), ATTEND.format(" where j <= i"))) == ["true", "true"]

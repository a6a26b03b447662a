"""Simplification: every rule by example, and the value of random graphs before and after."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnc.compiler import simplify as rules
from attnc.compiler import verify
from attnc.compiler.describe import formula
from attnc.compiler.ir import Graph, Node, walk
from attnc.compiler.simplify import RULES, simplify
from attnc.dsl.types import Base, Type
from tests.compiler.graphs import At, graphs, places, same, value


class Parts:
    """The nodes that the examples are made of."""

    def __init__(self) -> None:
        self.graph = graph = Graph()
        self.make, self.number = graph.make, graph.literal
        self.i, self.j, self.n = graph.index("i"), graph.index("j"), graph.size("i")
        self.f, self.g = (graph.make("parameter", type=Type(Base.BOOL), attribute=name) for name in "fg")
        self.x, self.y, self.s = (graph.make("parameter", type=Type(Base.REAL), attribute=name) for name in "xys")
        self.q, self.k = (
            graph.make("input", type=Type(Base.REAL, frozenset({index}), ("d",)), attribute=name)
            for name, index in (("q", "i"), ("k", "j"))
        )
        self.gate = graph.make("input", type=Type(Base.REAL, frozenset({"b", "t"})), attribute="gate")

    def dot(self, x: Node, y: Node) -> Node:
        return self.make("dot", x, y, type=Type(Base.REAL, x.type.indices | y.type.indices), attribute="d")

    def read(self, node: Node, target: str) -> Node:
        indices = node.type.indices - {"t"} | {target}
        return self.make("rename", node, type=Type(node.type.base, indices), attribute=("t", target))


Example = tuple[Callable[..., Node | None], str, Callable[[Parts], Node], str]

EXAMPLES: list[Example] = [
    (rules.fold_constants, "sum", lambda p: p.make("add", p.number(2), p.number(3)), "5"),
    (rules.fold_constants, "floor-division", lambda p: p.make("floordiv", p.number(-7), p.number(2)), "-4"),
    (rules.fold_constants, "modulo", lambda p: p.make("mod", p.number(-7), p.number(3)), "2"),
    (rules.fold_constants, "comparison", lambda p: p.make("lt", p.number(2), p.number(3)), "true"),
    (rules.fold_constants, "real", lambda p: p.make("to_real", p.number(3)), "3.0"),
    (rules.fold_constants, "division-by-0", lambda p: p.make("floordiv", p.number(1), p.number(0)), "1 // 0"),
    (rules.drop_neutral, "plus-0", lambda p: p.make("add", p.i, p.number(0)), "i"),
    (rules.drop_neutral, "0-plus", lambda p: p.make("add", p.number(0), p.i), "i"),
    (rules.drop_neutral, "minus-0", lambda p: p.make("sub", p.i, p.number(0)), "i"),
    (rules.drop_neutral, "0-minus", lambda p: p.make("sub", p.number(0), p.i), "0 - i"),
    (rules.drop_neutral, "times-1", lambda p: p.make("mul", p.x, p.number(1.0)), "x"),
    (rules.drop_neutral, "over-1", lambda p: p.make("div", p.x, p.number(1.0)), "x"),
    (rules.drop_neutral, "floor-over-1", lambda p: p.make("floordiv", p.i, p.number(1)), "i"),
    (rules.drop_neutral, "modulo-1", lambda p: p.make("mod", p.i, p.number(1)), "0"),
    (rules.drop_neutral, "power-1", lambda p: p.make("pow", p.x, p.number(1)), "x"),
    (rules.drop_neutral, "int-over-1-is-real", lambda p: p.make("div", p.i, p.number(1)), "i / 1"),
    (rules.fold_logic, "true-and", lambda p: p.make("and", p.number(True), p.f), "f"),
    (rules.fold_logic, "false-and", lambda p: p.make("and", p.f, p.number(False)), "false"),
    (rules.fold_logic, "false-or", lambda p: p.make("or", p.number(False), p.f), "f"),
    (rules.fold_logic, "twice", lambda p: p.make("or", p.f, p.f), "f"),
    (rules.fold_logic, "not-not", lambda p: p.make("not", p.make("not", p.f)), "f"),
    (rules.fold_logic, "if-true", lambda p: p.make("select", p.number(True), p.x, p.y), "x"),
    (rules.fold_logic, "if-false", lambda p: p.make("select", p.number(False), p.x, p.y), "y"),
    (rules.fold_logic, "same-branches", lambda p: p.make("select", p.f, p.x, p.x), "x"),
    (rules.negate_comparison, "less", lambda p: p.make("not", p.make("lt", p.i, p.j)), "j <= i"),
    (rules.negate_comparison, "at-most", lambda p: p.make("not", p.make("le", p.i, p.j)), "j < i"),
    (rules.negate_comparison, "equal", lambda p: p.make("not", p.make("eq", p.i, p.j)), "i != j"),
    (rules.negate_comparison, "unequal", lambda p: p.make("not", p.make("ne", p.i, p.j)), "i == j"),
    (rules.negate_comparison, "a-NaN-is-on-no-side", lambda p: p.make("not", p.make("lt", p.x, p.y)), "not x < y"),
    (rules.hoist_scalar_from_dot, "left", lambda p: p.dot(p.make("mul", p.q, p.s), p.k), "q @ k * s"),
    (rules.hoist_scalar_from_dot, "right", lambda p: p.dot(p.q, p.make("mul", p.s, p.k)), "q @ k * s"),
    (rules.hoist_scalar_from_dot, "quotient", lambda p: p.dot(p.make("div", p.q, p.s), p.k), "q @ k / s"),
    (
        rules.hoist_scalar_from_dot,
        "scalar-over-vector",
        lambda p: p.dot(p.make("div", p.s, p.q), p.k),
        "s / q @ k",
    ),
    (
        rules.hoist_scalar_from_dot,
        "both-sides",
        lambda p: p.dot(p.make("mul", p.make("mul", p.q, p.s), p.x), p.make("div", p.k, p.y)),
        "q @ k * x * s / y",
    ),
    (rules.push_rename, "sum", lambda p: p.read(p.make("add", p.gate, p.gate), "i"), "gate[i] + gate[i]"),
    (rules.push_rename, "index", lambda p: p.read(p.graph.index("t"), "j"), "j"),
    (rules.push_rename, "leaf", lambda p: p.read(p.gate, "j"), "gate[j]"),
    (rules.expand_power, "square", lambda p: p.make("pow", p.x, p.number(2)), "x * x"),
    (rules.expand_power, "cube", lambda p: p.make("pow", p.x, p.number(3)), "x ** 3"),
]


@pytest.mark.parametrize(
    ("make", "expected"), [pytest.param(*one[2:], id=f"{one[0].__name__}-{one[1]}") for one in EXAMPLES]
)
def test_a_rule_gives(make: Callable[[Parts], Node], expected: str) -> None:
    parts = Parts()
    assert formula(simplify(parts.graph, make(parts))) == expected


def test_every_rule_has_an_example() -> None:
    assert {one[0] for one in EXAMPLES} == set(RULES)


@settings(max_examples=150, deadline=None)
@given(made=st.sampled_from(["integer", "boolean", "real"]).flatmap(graphs), at=st.lists(places(), min_size=4))
def test_values_stay(made: tuple[Graph, Node], at: list[At]) -> None:
    graph, before = made
    after = simplify(graph, before)
    verify.graph(after)
    assert after.type.base is before.type.base
    assert after.type.indices <= before.type.indices
    assert all(same(value(before, one), value(after, one)) for one in at)


@settings(max_examples=60, deadline=None)
@given(made=graphs("boolean"))
def test_simplified_graphs_stay(made: tuple[Graph, Node]) -> None:
    graph, before = made
    after = simplify(graph, before)
    assert simplify(graph, after) is after
    assert len(list(walk(after))) <= len(list(walk(before))) + 2 * sum(one.op == "rename" for one in walk(before))


def test_spans_survive() -> None:
    """A diagnostic or a comment in the kernel can still point at the text."""
    from attnc.dsl.check import check
    from attnc.dsl.source import Source

    text = "pattern p:\n    out = softmax[j]((q * scale) @ k where not (i < j) and 1 < 2) @ v\n"
    from attnc.compiler.build import build

    graph = Graph()
    out = simplify(graph, build(graph, check(Source("p.attn", text))["p"]))
    spans = {node.op: node.span.text for node in walk(out) if node.span is not None}
    assert spans["le"] == "i < j"
    assert spans["mul"] == "(q * scale) @ k"

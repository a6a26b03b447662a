"""Rewrites that shorten a graph without changing its meaning.

A rule is given a node whose operands are already simplified and returns its replacement, or None.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable

from attnc.compiler.ir import Graph, Node, walk
from attnc.compiler.ops import OPS
from attnc.dsl.types import Base, Type

Rule = Callable[[Graph, Node], Node | None]

FOLDED: dict[str, Callable[..., bool | int | float]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "neg": operator.neg,
    "abs": abs,
    "minimum": min,
    "maximum": max,
    "floordiv": operator.floordiv,
    "mod": operator.mod,
    "div": operator.truediv,
    "to_real": float,
    "floor": math.floor,
    "lt": operator.lt,
    "le": operator.le,
    "eq": operator.eq,
    "ne": operator.ne,
    "not": operator.not_,
}


def is_literal(node: Node, value: float | None = None) -> bool:
    """Whether a node is a literal (of that value)."""
    return node.op == "literal" and (value is None or (node.attribute == value and node.type.base is not Base.BOOL))


def fold_constants(graph: Graph, node: Node) -> Node | None:
    """f(2, 3) -> its value"""
    if node.op not in FOLDED or not node.args or not all(arg.op == "literal" for arg in node.args):
        return None
    try:
        value = FOLDED[node.op](*(arg.attribute for arg in node.args))
    except (ArithmeticError, ValueError):
        return None
    if isinstance(value, int) and abs(value) >= 2**62:
        return None
    return graph.make("literal", type=Type(node.type.base), attribute=value, span=node.span)


def drop_neutral(graph: Graph, node: Node) -> Node | None:
    """x + 0 -> x, x - 0 -> x, x * 1 -> x, x / 1 -> x, x // 1 -> x, x % 1 -> 0, x ** 1 -> x"""
    if len(node.args) != 2:
        return None
    x, y = node.args
    neutral = {"add": 0, "sub": 0, "mul": 1, "floordiv": 1, "pow": 1, "div": 1}.get(node.op)
    kept = None
    if neutral is not None and is_literal(y, neutral):
        kept = x
    elif node.op in ("add", "mul") and neutral is not None and is_literal(x, neutral):
        kept = y
    elif node.op == "mod" and is_literal(y, 1):
        return graph.literal(0)
    return kept if kept is not None and kept.type == node.type else None


def fold_logic(graph: Graph, node: Node) -> Node | None:
    """true and x -> x, false or x -> x, x and x -> x, not not x -> x, if true then x else y -> x"""
    if node.op in ("and", "or"):
        folded = (graph.all_of if node.op == "and" else graph.any_of)(node.args)
        return folded if folded is not node else None
    if node.op == "not" and node.args[0].op == "not":
        return node.args[0].args[0]
    if node.op == "select":
        condition, accepted, otherwise = node.args
        chosen = accepted if accepted is otherwise else None
        if condition.op == "literal":
            chosen = accepted if condition.attribute else otherwise
        return chosen if chosen is not None and chosen.type == node.type else None
    return None


def negate_comparison(graph: Graph, node: Node) -> Node | None:
    """not (x < y) -> y <= x on ints; not (x == y) -> x != y"""
    if node.op != "not" or node.args[0].op not in ("lt", "le", "eq", "ne"):
        return None
    comparison = node.args[0]
    x, y = comparison.args
    if comparison.op in ("eq", "ne"):
        return graph.make("ne" if comparison.op == "eq" else "eq", x, y, span=comparison.span)
    if Base.REAL in (x.type.base, y.type.base):
        return None  # a NaN is on neither side
    return graph.make("le" if comparison.op == "lt" else "lt", y, x, span=comparison.span)


def hoist_scalar_from_dot(graph: Graph, node: Node) -> Node | None:
    """dot(x * s, y / r) -> dot(x, y) * s / r where s and r have no vector axis"""
    if node.op != "dot":
        return None
    scalars: list[tuple[str, Node]] = []
    x, y = (_without_scalars(arg, str(node.attribute), scalars) for arg in node.args)
    if not scalars:
        return None
    type = Type(node.type.base, x.type.indices | y.type.indices, node.type.axes)
    result = graph.make("dot", x, y, type=type, attribute=node.attribute, span=node.span)
    for op, scalar in scalars:
        result = graph.make(op, result, scalar, span=node.span)
    return result


def _without_scalars(operand: Node, axis: str, found: list[tuple[str, Node]]) -> Node:
    """x of x * s * .. / r, and the scalars with their ops, innermost last."""
    while operand.op in ("mul", "div") and axis in operand.type.axes:
        vector, scalar = operand.args
        if operand.op == "mul" and axis not in vector.type.axes:
            vector, scalar = scalar, vector
        if scalar.type.axes or axis not in vector.type.axes:
            break
        found.append((operand.op, scalar))
        operand = vector
    return operand


def push_rename(graph: Graph, node: Node) -> Node | None:
    """(x + y)[i] -> x[i] + y[i]; t[i] -> i"""
    if node.op != "rename":
        return None
    assert isinstance(node.attribute, tuple)
    source, target = str(node.attribute[0]), str(node.attribute[1])
    (value,) = node.args
    if source not in value.type.indices:
        return value
    if value.op == "index":
        return graph.index(target)
    if not OPS[value.op].pointwise:
        return None
    args = []
    for arg in value.args:
        type = Type(arg.type.base, (arg.type.indices - {source}) | {target}, arg.type.axes, arg.type.selects)
        if source in arg.type.indices:
            arg = simplify_node(graph, graph.make("rename", arg, type=type, attribute=node.attribute, span=node.span))
        args.append(arg)
    return graph.make(value.op, *args, span=value.span)


def expand_power(graph: Graph, node: Node) -> Node | None:
    """x ** 2 -> x * x"""
    if node.op == "pow" and is_literal(node.args[1], 2):
        return graph.make("mul", node.args[0], node.args[0], span=node.span)
    return None


RULES: tuple[Rule, ...] = (
    fold_constants,
    drop_neutral,
    fold_logic,
    negate_comparison,
    hoist_scalar_from_dot,
    push_rename,
    expand_power,
)


def simplify_node(graph: Graph, node: Node) -> Node:
    """Apply the rules to one node until none fires."""
    for _ in range(100):
        for rule in RULES:
            replacement = rule(graph, node)
            if replacement is not None and replacement is not node:
                node = replacement
                break
        else:
            return node
    return node


def simplify(graph: Graph, root: Node) -> Node:
    """Apply the rules bottom-up."""
    done: dict[Node, Node] = {}
    for node in walk(root):
        done[node] = simplify_node(graph, graph.rebuild(node, tuple(done[arg] for arg in node.args)))
    return done[root]

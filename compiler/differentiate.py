"""The derivative of a score with respect to q @ k and to the real inputs inside it, as nodes.

Reverse mode on the graph: adjoints flow from the score to the leaves. What depends on one side only (a slope a
head, a prefix sum a position) is one leaf, whatever it is computed from: kernels sum its adjoint over the other
side, and torch carries it on to the inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from attnc.compiler.build import unlowered
from attnc.compiler.ir import Graph, Node, walk
from attnc.compiler.ops import OPS
from attnc.compiler.simplify import simplify
from attnc.dsl.types import Base

Rule = Callable[[Graph, Node, Node], tuple[Node | None, ...]]


@dataclass(frozen=True)
class Leaf:
    """A value inside a score that real inputs reach.

    `side`: `row` (no j), `key` (no i), or `pair`: a read of a real table at an int of i and j. `adjoint`: the
    derivative of the score with respect to it, over (b, h, i, j).
    """

    value: Node
    side: str
    adjoint: Node


@dataclass(frozen=True)
class ScoreGradient:
    """`dot`: the derivative with respect to q @ k (None where the score has none).

    `pairs`: real inputs over i and j. They have a gradient as large as they are, which no back end works out.
    """

    dot: Node | None
    leaves: tuple[Leaf, ...]
    pairs: tuple[Node, ...] = ()


def differentiate(score: Node) -> ScoreGradient:
    """The derivatives of one branch's score. Raises a located error where an op has no gradient rule."""
    graph = Graph()
    carriers = carrying(score)
    sides = {node: side_of(node, carriers) for node in walk(score)}
    adjoints: dict[Node, Node] = {score: graph.literal(1.0)}
    inner = reachable(score, sides, carriers)
    known = set(inner)
    for node in reversed(inner):
        adjoint = adjoints.get(node)
        if adjoint is None or sides[node] is not None or node.op in ("dot", "input"):
            continue
        rule = GRADIENTS.get(node.op)
        if rule is None:
            raise unlowered(node, f"the gradient of `{node.op}` in a score")
        for arg, part in zip(node.args, rule(graph, node, adjoint), strict=True):
            if part is not None and arg in known:
                held = adjoints.get(arg)
                adjoints[arg] = part if held is None else graph.make("add", held, part)
    leaves, pairs, dot = [], [], None
    for node in inner:
        side = sides[node]
        if node not in adjoints:
            continue
        if node.op == "dot":
            dot = simplify(graph, adjoints[node])
        elif side is not None:
            leaves.append(Leaf(node, side, simplify(graph, adjoints[node])))
        elif node.op == "input":
            pairs.append(node)
    return ScoreGradient(dot, tuple(leaves), tuple(pairs))


def reachable(score: Node, sides: dict[Node, str | None], carriers: dict[Node, Carried]) -> list[Node]:
    """The nodes between the score and its leaves, operands first; leaves are not entered."""
    order: list[Node] = []
    seen: set[Node] = set()

    def visit(node: Node) -> None:
        if node in seen or not carriers[node].gradient:
            return
        seen.add(node)
        if sides[node] is None and node.op != "dot":
            for arg in node.args:
                visit(arg)
        order.append(node)

    visit(score)
    return order


@dataclass(frozen=True)
class Carried:
    """What is somewhere below a node. `gradient`: q @ k or a real input that the node does not round away at once."""

    product: bool
    real: bool
    gradient: bool


def carrying(score: Node) -> dict[Node, Carried]:
    """For every node of a score."""
    found: dict[Node, Carried] = {}
    for node in walk(score):
        below = [found[arg] for arg in node.args]
        product = node.op == "dot" or any(one.product for one in below)
        is_input = node.op == "input" and node.type.base is Base.REAL
        real = is_input or any(one.real for one in below)
        carries = node.type.base is Base.REAL and node.op not in CONSTANT
        found[node] = Carried(product, real, carries and (product or real))
    return found


def side_of(node: Node, carriers: dict[Node, Carried]) -> str | None:
    """`row`, `key` or `pair` where the node is a leaf; None where adjoints pass through."""
    if not carriers[node].gradient or carriers[node].product:
        return None
    if not node.depends_on("j"):
        return "row"
    if not node.depends_on("i"):
        return "key"
    return "pair" if node.op == "take" and node.args[0].op == "input" else None


def _select(graph: Graph, condition: Node, accepted: Node | None, otherwise: Node | None) -> Node:
    zero = graph.literal(0.0)
    return graph.make("select", condition, accepted or zero, otherwise or zero)


def _times(graph: Graph, *factors: Node) -> Node:
    result = factors[0]
    for factor in factors[1:]:
        result = graph.make("mul", result, factor)
    return result


def _one_minus(graph: Graph, node: Node) -> Node:
    return graph.make("sub", graph.literal(1.0), node)


def _power(graph: Graph, node: Node, adjoint: Node) -> tuple[Node | None, ...]:
    """d x^y = y x^(y - 1) dx + log(x) x^y dy"""
    x, y = node.args
    one = graph.literal(1) if y.type.base is Base.INT else graph.literal(1.0)
    lowered = graph.make("pow", x, graph.make("sub", y, one))
    exponent = y if y.type.base is Base.REAL else graph.make("to_real", y)
    by_x = _times(graph, adjoint, exponent, lowered)
    by_y = _times(graph, adjoint, node, graph.make("log", x)) if y.type.base is Base.REAL else None
    return by_x, by_y


def _silu(graph: Graph, node: Node, adjoint: Node) -> tuple[Node | None, ...]:
    """d x s(x) = s (1 + x (1 - s)) dx"""
    (x,) = node.args
    gate = graph.make("sigmoid", x)
    inner = graph.make("add", graph.literal(1.0), _times(graph, x, _one_minus(graph, gate)))
    return (_times(graph, adjoint, gate, inner),)


def _extreme(graph: Graph, node: Node, adjoint: Node) -> tuple[Node | None, ...]:
    """The gradient goes to the chosen operand; half to each where they tie, as torch does."""
    x, y = node.args
    low, high = (x, y) if node.op == "minimum" else (y, x)
    half = _times(graph, adjoint, graph.literal(0.5))
    tie = graph.make("eq", x, y)
    to_x = _select(graph, graph.make("lt", low, high), adjoint, None)
    to_y = _select(graph, graph.make("lt", high, low), adjoint, None)
    return graph.make("select", tie, half, to_x), graph.make("select", tie, half, to_y)


GRADIENTS: dict[str, Rule] = {
    "add": lambda g, n, a: (a, a),
    "sub": lambda g, n, a: (a, g.make("neg", a)),
    "mul": lambda g, n, a: (g.make("mul", a, n.args[1]), g.make("mul", a, n.args[0])),
    "div": lambda g, n, a: (
        g.make("div", a, n.args[1]),
        g.make("neg", g.make("div", _times(g, a, n), n.args[1])),
    ),
    "neg": lambda g, n, a: (g.make("neg", a),),
    "abs": lambda g, n, a: (_select(g, g.make("lt", n.args[0], g.literal(0.0)), g.make("neg", a), a),),
    "exp": lambda g, n, a: (_times(g, a, n),),
    "log": lambda g, n, a: (g.make("div", a, n.args[0]),),
    "tanh": lambda g, n, a: (_times(g, a, _one_minus(g, _times(g, n, n))),),
    "sigmoid": lambda g, n, a: (_times(g, a, n, _one_minus(g, n)),),
    "relu": lambda g, n, a: (_select(g, g.make("lt", g.literal(0.0), n.args[0]), a, None),),
    "elu": lambda g, n, a: (
        _select(g, g.make("lt", g.literal(0.0), n.args[0]), a, _times(g, a, g.make("add", n, g.literal(1.0)))),
    ),
    "silu": _silu,
    "softplus": lambda g, n, a: (_times(g, a, g.make("sigmoid", n.args[0])),),
    "sin": lambda g, n, a: (_times(g, a, g.make("cos", n.args[0])),),
    "cos": lambda g, n, a: (g.make("neg", _times(g, a, g.make("sin", n.args[0]))),),
    "sqrt": lambda g, n, a: (g.make("div", _times(g, a, g.literal(0.5)), n),),
    "pow": _power,
    "minimum": _extreme,
    "maximum": _extreme,
    "select": lambda g, n, a: (None, _select(g, n.args[0], a, None), _select(g, n.args[0], None, a)),
}
CONSTANT = frozenset({"to_real", "floor"})  # real from int, int from real: nothing flows


def without_gradient() -> set[str]:
    """Pointwise ops of reals that have neither a rule nor a constant derivative; the tests want it empty."""
    real = {
        op for op, info in OPS.items() if info.pointwise and info.base is not Base.BOOL and info.base is not Base.INT
    }
    return real - set(GRADIENTS) - CONSTANT

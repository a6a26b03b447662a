"""How a value moves along an index: what grows with it takes its extremes over a range at the range's ends.

A kernel then works out the tiles that rows touch from their first and their last row, not from all of them.
"""

from __future__ import annotations

from attnc.compiler.ir import Node, walk

UP, LEVEL, DOWN = 1, 0, -1


def trend(node: Node, index: str) -> int | None:
    """UP where a value never falls as the index grows, DOWN where it never rises, LEVEL where it stays; else None.

    Divisors are taken to be positive (see plan.Requirement).
    """
    positive = frozenset(one.args[1] for one in walk(node) if one.op in ("floordiv", "mod"))
    done: dict[Node, int | None] = {}  # expressions share parts
    for inner in walk(node):
        done[inner] = _trend(inner, index, positive, done)
    return done[node]


def _trend(node: Node, index: str, positive: frozenset[Node], done: dict[Node, int | None]) -> int | None:
    if not node.depends_on(index):
        return LEVEL
    if node.op == "index":
        return UP
    if node.op == "select" and not node.args[0].depends_on(index):
        return _joined(*(done[arg] for arg in node.args[1:]))
    if node.op not in ("neg", "add", "sub", "mul", "floordiv", "minimum", "maximum"):
        return None
    first, *others = (done[arg] for arg in node.args)
    if node.op == "neg":
        return _times(first, -1)
    (second,) = others
    match node.op:
        case "sub":
            return _joined(first, _times(second, -1))
        case "floordiv":
            return first if second == LEVEL else None
        case "mul":
            (left, right) = node.args
            if second == LEVEL:
                return _times(first, _sign(right, positive))
            return _times(second, _sign(left, positive)) if first == LEVEL else None
    return _joined(first, second)


def _joined(one: int | None, other: int | None) -> int | None:
    """The trend of a sum, a minimum or a maximum."""
    if one is None or other is None or one * other < 0:
        return None
    return one or other


def _times(way: int | None, sign: int | None) -> int | None:
    return None if way is None or sign is None else way * sign


def _sign(node: Node, positive: frozenset[Node]) -> int | None:
    """The sign of a factor, where it is known: 0 may stand for what is not negative, too."""
    if node in positive or node.op == "size":
        return 1
    if node.op == "literal" and isinstance(node.attribute, int):
        return 1 if node.attribute >= 0 else -1
    return None

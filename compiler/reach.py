"""How far an int can be from 0, counted in lengths of the sequence; what does not fit a table is not read from one."""

from __future__ import annotations

from math import inf

from attnc.compiler.ir import Node, walk

Reach = tuple[float, float]  # -low * L <= value <= high * L, where L = max(N, M) >= 1; inf: not known
UNKNOWN: Reach = (inf, inf)
POSITIONS = {("index", "i"), ("index", "j"), ("size", "i"), ("size", "j"), ("size", "t")}


def reach(root: Node) -> Reach:
    """Bounds of an int. A divisor is positive, unless it varies by position."""
    known: dict[Node, Reach] = {}
    for node in walk(root):
        known[node] = _reach(node, [known[arg] for arg in node.args])
    return known[root]


def _reach(node: Node, ends: list[Reach]) -> Reach:
    """`ends`: of the operands."""
    if node.op == "literal" and isinstance(node.attribute, int):
        return max(-node.attribute, 0), max(node.attribute, 0)
    if (node.op, node.attribute) in POSITIONS:
        return 0, 1
    match node.op, ends:
        case "add", [(low, high), (low_y, high_y)]:
            return low + low_y, high + high_y
        case "sub", [(low, high), (low_y, high_y)]:
            return low + high_y, high + low_y
        case "neg", [(low, high)]:
            return high, low
        case "abs", [(low, high)]:
            return 0, max(low, high)
        case "mul", _:
            return _times(node, ends)
        case "floordiv", [(low, high), _] if not node.args[1].type.indices:
            return low, high
        case "mod", [(low, high), (_, high_y)] if not node.args[1].type.indices:
            return 0, min(high if low == 0 else inf, high_y)
        case "minimum", [(low, high), (low_y, high_y)]:
            return max(low, low_y), min(high, high_y)
        case "maximum", [(low, high), (low_y, high_y)]:
            return min(low, low_y), max(high, high_y)
        case "select", [_, (low, high), (low_y, high_y)]:
            return max(low, low_y), max(high, high_y)
    return UNKNOWN


def _times(node: Node, ends: list[Reach]) -> Reach:
    """A product with a number; of two values nothing is known."""
    for slot, arg in enumerate(node.args):
        factor = arg.attribute
        if arg.op == "literal" and isinstance(factor, int):
            low, high = ends[1 - slot]
            if factor == 0:
                return 0, 0
            return (factor * low, factor * high) if factor > 0 else (-factor * high, -factor * low)
    return UNKNOWN

"""Whether a condition holds on all pairs of a tile, from the tile's least and largest positions alone."""

from __future__ import annotations

from attnc.compiler.emit.expressions import Expressions, View
from attnc.compiler.ir import Node, walk
from attnc.compiler.trends import DOWN, UP, trend

READS = ("input", "derived", "take", "rename", "dot")


def certain(node: Node, scalars: Expressions) -> str | None:
    """The text of a scalar that implies the condition; None: there is no telling.

    It reads `i_low`, `i_high`, `j_low` and `j_high`, scalars.
    """
    if node.op == "literal":
        return "1 == 1" if node.attribute else None
    if node.op in ("and", "or"):
        found = [certain(arg, scalars) for arg in node.args]
        if node.op == "and":
            return None if None in found else " & ".join(f"({text})" for text in found)
        return " | ".join(f"({text})" for text in found if text) or None
    if node.op not in ("lt", "le", "ne"):
        return None
    left, right = node.args
    if not (settled(left) and settled(right)):
        return None

    def before(one: Node, other: Node, sign: str) -> str | None:
        most, least = extreme(one, scalars, largest=True), extreme(other, scalars, largest=False)
        return None if most is None or least is None else f"{most} {sign} {least}"

    if node.op == "ne":
        apart = [text for text in (before(left, right, "<"), before(right, left, "<")) if text]
        return " | ".join(f"({text})" for text in apart) or None
    return before(left, right, "<" if node.op == "lt" else "<=")


def settled(node: Node) -> bool:
    """Whether a value is one of positions and parameters."""
    indices = {str(one.attribute) for one in walk(node) if one.op == "index"}
    return indices <= {"i", "j"} and not any(one.op in READS for one in walk(node))


def extreme(node: Node, scalars: Expressions, *, largest: bool) -> str | None:
    """The largest (smallest) value over a tile, where it moves one way along either side."""
    ends = {}
    for index in ("i", "j"):
        way = trend(node, index)
        if way is None:
            return None
        ends[index] = "_high" if way == (UP if largest else DOWN) else "_low"
    return scalars.text(node, View(**ends))

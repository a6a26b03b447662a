"""Finds the streamed branches of a result: each softmax over keys with its sum of values.

What remains above them, the epilogue, is pointwise over the branches' outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

from attnc.compiler.build import unlowered
from attnc.compiler.ir import Graph, Node, substitute, walk
from attnc.compiler.ops import OPS
from attnc.dsl.types import Base, Type

LEAVES = frozenset({"literal", "parameter", "size", "index", "input", "derived", "branch"})


@dataclass(frozen=True)
class Softmax:
    """One branch before its domain is known."""

    score: Node
    condition: Node
    sink: Node | None


@dataclass(frozen=True)
class Outline:
    """A result as branches and what combines them."""

    branches: tuple[Softmax, ...]
    merged: bool
    epilogue: Node


def find_branches(graph: Graph, out: Node) -> Outline:
    """Split a result; raises a located error for what has no streamed form."""
    if out.op == "merge":
        branches = tuple(read_branch(graph, arg) for arg in out.args)
        return Outline(branches, True, branch_output(graph, 0))
    found: dict[Node, Node] = {}
    for node in walk(out):
        if is_branch(node):
            found[node] = branch_output(graph, len(found))
    epilogue = substitute(graph, out, found)
    for node in sorted(walk(epilogue), key=telling):
        check_epilogue(node)
    if not found:
        raise unlowered(out, "a result without a softmax over the keys")
    return Outline(tuple(read_branch(graph, node) for node in found), False, epilogue)


def is_branch(node: Node) -> bool:
    """Whether a node is `softmax[j](..) @ value`."""
    return node.op == "dot" and node.attribute == "j" and any(arg.op == "softmax" for arg in node.args)


def branch_output(graph: Graph, number: int) -> Node:
    """The node that stands for a branch's output, (b, h, i; e)."""
    return graph.make("branch", type=Type(Base.REAL, frozenset({"b", "h", "i"}), ("e",)), attribute=number)


def read_branch(graph: Graph, node: Node) -> Softmax:
    """The parts of `softmax[j](score where condition, sink = ..) @ v`."""
    if not is_branch(node):
        raise unlowered(node, f"`{node.op}` in the place of a softmax branch")
    weights, value = node.args if node.args[0].op == "softmax" else node.args[::-1]
    if value.op != "input" or value.attribute != "v":
        raise unlowered(value, "a value other than `v` under a softmax over keys")
    if weights.attribute != ("j", None):
        raise unlowered(weights, "a softmax over something other than the keys j")
    score, condition, *rest = weights.args
    for part in (score, condition, *rest):
        check_score(part)
    return Softmax(score, condition, rest[0] if rest else None)


def check_score(score: Node) -> None:
    """Scores and conditions are pointwise in q @ k, inputs, positions and parameters."""
    stack, seen = [score], set[Node]()
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.op == "dot":
            if {(arg.op, arg.attribute) for arg in node.args} != {("input", "q"), ("input", "k")}:
                raise unlowered(node, "a dot product other than `q @ k` in a score")
            continue
        if node.op == "topk":
            continue  # a selection: the domain stage says whether it can be listed
        if node.op == "rename" and node.args[0].op == "input":
            continue
        if not (OPS[node.op].pointwise or node.op in LEAVES or node.op in ("take", "member")):
            raise unlowered(node, f"`{node.op}` inside a score")
        if node.op == "input" and node.attribute in ("q", "k", "v"):
            raise unlowered(node, f"the vector `{node.attribute}` outside of `q @ k` in a score")
        stack.extend(node.args)


def telling(node: Node) -> int:
    """Rank of a node as the place of an error: a reduction says more than the products and inputs inside it."""
    if node.op == "dot":
        return 1
    return 2 if OPS[node.op].pointwise or node.op in LEAVES else 0


def check_epilogue(node: Node) -> None:
    """The epilogue is pointwise in the branches' outputs, inputs of the row and parameters."""
    if not (OPS[node.op].pointwise or node.op in LEAVES or node.op in ("take", "rename")):
        raise unlowered(node, f"`{node.op}` outside of a softmax over keys")
    if node.op == "input" and node.attribute in ("q", "k", "v"):
        raise unlowered(node, f"`{node.attribute}` outside of a softmax over keys")
    if node.depends_on("j"):
        raise unlowered(node, "a value over the keys j outside of a softmax")

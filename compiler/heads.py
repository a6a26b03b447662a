"""Heads that a step is needed for: in `if h < H // 2 then far else near`, each branch runs on its own heads alone.

Needs go from the result down through the `Compute` steps, as `compiler.needs` has it within one. Where what is left
for a step's array is an interval of heads in closed form, the step runs on those: `heads` of `Attend`, `Carry` and
`Recur`. Two such branches have disjoint programs; none computes, stores or differentiates what the other's heads show.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass, replace

from attnc.compiler.algebra import Algebra, Coordinate, Interval, solve
from attnc.compiler.composition import Attend, Carry, Compute, Heads, Recur, Step
from attnc.compiler.conditions import disjunction
from attnc.compiler.ir import Graph, Node, walk
from attnc.compiler.needs import either, needs
from attnc.compiler.verify import step_reads

NUMBERS = frozenset({"literal", "parameter", "size"})


def dispatched(graph: Graph, steps: Sequence[Step]) -> tuple[list[Step], list[str]]:
    """The steps, those with `heads` that are needed for some only; and notes on those that run for more."""
    needed: dict[str, Node] = {steps[-1].name: graph.literal(True)}
    made: list[Step] = []
    notes = []
    for step in reversed(steps):
        need = None
        for name in arrays_of(step):
            need = either(graph, need, needed[name]) if name in needed else need
        if isinstance(step, Compute):
            for node, part in needs(graph, step.node, need).items():
                if node.op == "input":
                    name = str(node.attribute)
                    needed[name] = either(graph, needed.get(name), part)
        else:
            needed |= dict.fromkeys(step_reads(step), graph.literal(True))
        dispatches = isinstance(step, Attend | Carry | Recur) and getattr(step, "handing", None) is None
        heads = interval(graph, need) if need is not None and dispatches else None
        if heads is not None and counts_heads(step):
            notes.append(f"{step.name} runs on all heads: what it computes counts them")
        elif heads is not None and isinstance(step, Attend | Carry | Recur):
            step = replace(step, heads=heads)
        made.append(step)
    return made[::-1], notes


def arrays_of(step: Step) -> list[str]:
    """The arrays that a step leaves."""
    others = [getattr(step, part, None) for part in ("lse", "total")]
    return [step.name, *(name for name in others if name is not None)]


def interval(graph: Graph, need: Node) -> Heads | None:
    """The heads outside of which a condition is false, where sizes and parameters say which; a call may have fewer."""
    conjunctions = disjunction(graph, need)
    if len(conjunctions) != 1:
        return None
    algebra = Algebra(graph)
    bounds: dict[str, Node] = {}
    for atom in conjunctions[0]:
        found = solve(algebra, atom, "h") if atom.type.indices == {"h"} and not atom.type.axes else None
        if isinstance(found, Interval) and found.coordinate == Coordinate():
            for op, end in (("maximum", found.lo), ("minimum", found.hi)):
                if end is not None and is_number(end):
                    bounds[op] = graph.make(op, bounds[op], end) if op in bounds else end
    if not bounds:
        return None
    return Heads(bounds.get("maximum", graph.literal(0)), bounds.get("minimum", graph.size("h")))


def is_number(root: Node) -> bool:
    """Whether sizes and parameters alone say a value."""
    return all(node.args or node.op in NUMBERS for node in walk(root))


def counts_heads(step: Step) -> bool:
    """Whether a step has the number of a head, or how many there are, in what it computes."""
    return any(node.op in ("index", "size") and node.attribute == "h" for root in nodes_of(step) for node in walk(root))


def nodes_of(part: object) -> Iterator[Node]:
    """Every node that a step holds."""
    if isinstance(part, Node):
        yield part
    elif isinstance(part, tuple | list):
        for one in part:
            yield from nodes_of(one)
    elif is_dataclass(part):
        for field in fields(part):
            if field.name != "graph":
                yield from nodes_of(getattr(part, field.name))

"""A softmax over i and j as a plan: tables, the domain of its condition, and what verifies them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from attnc.compiler import verify
from attnc.compiler.algebra import Algebra
from attnc.compiler.decompose import Decomposer
from attnc.compiler.domains import DomainBuilder
from attnc.compiler.ir import Node
from attnc.compiler.membership import Tables
from attnc.compiler.plan import Branch, Domain, Plan, Rows
from attnc.compiler.selection import split
from attnc.compiler.tabulate import tabulate
from attnc.dsl.terms import Input


@dataclass(frozen=True)
class Softmax:
    """One branch before its domain is known."""

    score: Node
    condition: Node
    sink: Node | None


def stream(at: Decomposer, softmaxes: Sequence[Softmax], inputs: Mapping[str, Input], *, merged: bool) -> Plan:
    """The plan of one softmax, or of several that are merged."""
    graph, pattern = at.graph, at.pattern
    algebra = Algebra(graph)
    tables = Tables(graph, algebra, at.blocks())
    branches = tuple(branch for softmax in softmaxes for branch in _branches(at, algebra, tables, softmax))
    for branch in branches:
        verify.branch(branch)
    plan = Plan(
        name=pattern.name,
        source=pattern.source,
        parameters=pattern.parameters,
        inputs=tuple(inputs.values()),
        branches=branches,
        merged=merged or len(branches) > 1,
        derived=tuple(tables.derived),
        graph=graph,
        blocks=tables.axes,
    )
    verify.plan(plan)
    return plan


def _branches(at: Decomposer, algebra: Algebra, tables: Tables, softmax: Softmax) -> list[Branch]:
    """A branch of the keys in closed form, and one of those that a selection lists, where there is one."""
    graph = at.graph
    score = tables.readable(tabulate(graph, softmax.score, tables))
    parts = split(graph, softmax.condition)
    closed = softmax.condition if parts is None else parts.closed
    branches = []
    if closed is None and softmax.sink is not None:
        closed = graph.literal(False)  # a branch of no key has the sink
    if closed is not None:
        condition = tables.settled(tabulate(graph, closed, tables))
        domain = DomainBuilder(graph, algebra, tables).build(condition)
        branches.append(Branch(score, condition, domain, softmax.sink))
    if parts is not None and parts.members is not None:
        rest = tables.readable(tabulate(graph, parts.rest, tables))
        selected = at.selected[str(parts.members.attribute)]
        branches.append(Branch(score, rest, Domain((), Rows()), None, selected=selected))
    return branches

"""A softmax over i and j as a plan: tables, the domain of its condition, and what verifies them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from attnc.compiler import verify
from attnc.compiler.algebra import Algebra
from attnc.compiler.decompose import Decomposer
from attnc.compiler.domains import DomainBuilder
from attnc.compiler.ir import Graph, Node
from attnc.compiler.membership import Tables
from attnc.compiler.plan import Branch, Plan
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
    branches = tuple(_branch(graph, algebra, tables, softmax) for softmax in softmaxes)
    for branch in branches:
        verify.branch(branch)
    plan = Plan(
        name=pattern.name,
        source=pattern.source,
        parameters=pattern.parameters,
        inputs=tuple(inputs.values()),
        branches=branches,
        merged=merged,
        derived=tuple(tables.derived),
        graph=graph,
        blocks=tables.axes,
    )
    verify.plan(plan)
    return plan


def _branch(graph: Graph, algebra: Algebra, tables: Tables, softmax: Softmax) -> Branch:
    score = tables.readable(tabulate(graph, softmax.score, tables))
    condition = tabulate(graph, softmax.condition, tables)
    domain = DomainBuilder(graph, algebra, tables).build(condition)
    return Branch(score, condition, domain, softmax.sink)

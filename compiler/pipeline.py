"""The stages that turn a checked pattern into a plan, in order. This file is the table of contents."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from attnc.compiler import verify
from attnc.compiler.algebra import Algebra
from attnc.compiler.branches import Outline, Softmax, find_branches
from attnc.compiler.build import build, build_term
from attnc.compiler.describe import describe_domain, describe_passes
from attnc.compiler.domains import DomainBuilder
from attnc.compiler.ir import Graph, Node, text, walk
from attnc.compiler.membership import Tables
from attnc.compiler.plan import Blocks, Branch, Plan, Requirement
from attnc.compiler.simplify import simplify
from attnc.compiler.tabulate import tabulate
from attnc.compiler.transpose import Transposer
from attnc.dsl.terms import Pattern


@dataclass(frozen=True)
class Stage:
    """What one stage left: its graph or plan as text, and notes on what it did and declined."""

    name: str
    text: str
    notes: tuple[str, ...] = ()


Observe = Callable[[Stage], None]


def lower(pattern: Pattern, observe: Observe | None = None) -> Plan:
    """Compile a checked pattern to a plan.

    Raises AttnError, located in the pattern's text, for a form that has no lowering yet. `observe` is called
    after every stage.
    """
    report = observe or (lambda stage: None)
    graph = Graph()

    out = build(graph, pattern)
    verify.graph(out)
    report(Stage("build", text(out)))

    out = simplify(graph, out)
    verify.graph(out)
    report(Stage("simplify", text(out)))

    outline = find_branches(graph, out)
    verify.outline(outline)
    report(Stage("branches", outline_text(outline), outline_notes(outline)))

    algebra = Algebra(graph)
    tables = Tables(graph, algebra, axis_blocks(graph, pattern))
    branches = tuple(lower_branch(graph, algebra, tables, softmax) for softmax in outline.branches)
    for branch in branches:
        verify.branch(branch)
        report(Stage("domains", describe_domain(branch.domain), branch.domain.notes))

    plan = Plan(
        name=pattern.name,
        source=pattern.source,
        parameters=pattern.parameters,
        inputs=pattern.inputs,
        branches=branches,
        merged=outline.merged,
        epilogue=outline.epilogue,
        derived=tuple(tables.derived),
        requirements=tuple(requirements(walk(out))),
        output_axes=pattern.output_axes,
        uses_value=pattern.uses_value,
        graph=graph,
        blocks=tables.axes,
    )
    verify.plan(plan)
    return plan


def transpose(plan: Plan, observe: Observe | None = None) -> Plan:
    """The plan with the transposed domains of its branches, which the gradients of k and v stream over.

    Apart from `lower`, so that a call without gradients does not pay for it. Raises AttnError, located, for a
    condition that can't be turned around.
    """
    assert plan.graph is not None
    report = observe or (lambda stage: None)
    algebra = Algebra(plan.graph)
    tables = Tables(plan.graph, algebra, plan.blocks, plan.derived)
    branches = []
    for branch in plan.branches:
        if branch.selected is not None:  # its lists are turned around in the call
            branches.append(branch)
            continue
        passes = Transposer(plan.graph, algebra, tables).passes(branch.condition)
        branches.append(replace(branch, transposed=passes))
        notes = tuple(note for domain in passes for note in domain.notes)
        report(Stage("transposed domains", describe_passes(passes), notes))
    made = replace(plan, branches=tuple(branches), transposed_derived=tuple(tables.derived[len(plan.derived) :]))
    for branch in made.branches:
        verify.transposed(branch)
    verify.plan(made)
    return made


def trace(pattern: Pattern) -> list[Stage]:
    """Every stage of a compilation."""
    stages: list[Stage] = []
    transpose(lower(pattern, stages.append), stages.append)
    return stages


def lower_branch(graph: Graph, algebra: Algebra, tables: Tables, softmax: Softmax) -> Branch:
    """One branch: tables for what a kernel should not compute, then the domain of its condition."""
    score = tables.readable(tabulate(graph, softmax.score, tables))
    condition = tabulate(graph, softmax.condition, tables)
    domain = DomainBuilder(graph, algebra, tables).build(condition)
    return Branch(score, condition, domain, softmax.sink)


def axis_blocks(graph: Graph, pattern: Pattern) -> dict[str, Blocks]:
    """The declared axes of blocks."""
    return {
        axis.name: Blocks(
            axis.over,
            simplify(graph, build_term(graph, axis.size)),
            simplify(graph, build_term(graph, axis.stride)) if axis.stride else None,
        )
        for axis in pattern.axes
        if axis.kind == "blocks"
    }


def requirements(nodes: Iterable[Node]) -> Iterable[Requirement]:
    """Divisors must be positive: the runtime checks them, every rule on // and % relies on it."""
    seen: set[Node] = set()
    for node in nodes:
        if node.op in ("floordiv", "mod") and node.span is not None:
            divisor = node.args[1]
            if divisor.op == "literal" or divisor.type.indices or divisor in seen:
                continue
            seen.add(divisor)
            yield Requirement(divisor, divisor.span or node.span)


def outline_text(outline: Outline) -> str:
    """The branches and the epilogue as graphs."""
    parts = [f"branch {n}:\n{text(branch.score, branch.condition)}" for n, branch in enumerate(outline.branches)]
    return "\n".join([*parts, f"epilogue:\n{text(outline.epilogue)}"])


def outline_notes(outline: Outline) -> tuple[str, ...]:
    """What the outline means for execution."""
    if outline.merged:
        return (f"{len(outline.branches)} branches, one kernel each, joined by log-sum-exp",)
    if outline.epilogue.op == "branch":
        return ("one softmax over keys: the streamed skeleton",)
    return (f"{len(outline.branches)} branches, one kernel each; the pointwise epilogue runs as torch operators",)

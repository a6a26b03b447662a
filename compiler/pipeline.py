"""The stages that turn a checked pattern into steps and plans, in order. This file is the table of contents."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from attnc.compiler import verify
from attnc.compiler.absorb import Projection, absorb
from attnc.compiler.algebra import Algebra
from attnc.compiler.attention import attend
from attnc.compiler.build import build, unlowered
from attnc.compiler.carrying import carry_sums, extremes, run_scans
from attnc.compiler.composition import Attend, Composition, Regroup, Step
from attnc.compiler.decompose import Decomposer, Rule
from attnc.compiler.describe import describe_branch, describe_passes, describe_step
from attnc.compiler.grouping import regroup
from attnc.compiler.heads import dispatched
from attnc.compiler.ir import Graph, Node, text, walk
from attnc.compiler.membership import Tables
from attnc.compiler.plan import Plan, Requirement
from attnc.compiler.reassociate import reassociate
from attnc.compiler.simplify import simplify
from attnc.compiler.statics import by_default
from attnc.compiler.transpose import Transposer
from attnc.dsl.terms import Pattern

# What `decompose` tries on a value, in order: the first rule that knows it makes its steps.
RULES: tuple[Rule, ...] = (regroup, attend, run_scans, carry_sums, extremes)


@dataclass(frozen=True)
class Stage:
    """What one stage left: its graph or plan as text, and notes on what it did and declined."""

    name: str
    text: str
    notes: tuple[str, ...] = ()


Observe = Callable[[Stage], None]


def compose(pattern: Pattern, observe: Observe | None = None, *, absorbed: bool = False) -> Composition:
    """Compile a checked pattern to its steps. `absorbed`: queries take over projections of the keys (see `absorb`).

    Raises AttnError, located in the pattern's text, for a form that has no lowering yet. `observe` is called
    after every stage.
    """
    report = observe or (lambda stage: None)
    pattern = by_default(pattern)
    graph = Graph()

    out = build(graph, pattern)
    verify.graph(out)
    report(Stage("build", text(out)))

    out = simplify(graph, out)
    verify.graph(out)
    report(Stage("simplify", text(out)))

    needs = tuple(requirements(walk(out)))
    out = reassociate(graph, out)
    turned, projections = absorb(graph, out)
    out = turned if absorbed else out
    verify.graph(out)

    parts = Decomposer(graph, pattern, RULES)
    parts.finish(out)
    verify.steps(parts.steps, parts.inputs)
    steps, more = dispatched(graph, parts.steps)
    notes = [*parts.notes, *more, *(absorb_note(one) for one in projections)]
    report(Stage("steps", "\n".join(describe_step(step) for step in steps), tuple(notes)))
    for plan in plans(steps):
        for branch in plan.branches:
            report(Stage("domains", describe_branch(branch), branch.domain.notes))

    return Composition(
        name=pattern.name,
        source=pattern.source,
        parameters=pattern.parameters,
        inputs=pattern.inputs,
        axes=pattern.axes,
        steps=tuple(steps),
        arrays=parts.inputs,
        requirements=needs,
        output_axes=pattern.output_axes,
        uses_value=pattern.uses_value,
        projections=projections,
        graph=graph,
    )


def absorb_note(projection: Projection) -> str:
    """What a projection of the keys means for execution."""
    return (
        f"keys are projected from {projection.inner} to {projection.outer} where many queries share that; "
        f"few queries take the projection over and read {projection.inner}"
    )


def plans(steps: Iterable[Step]) -> list[Plan]:
    """The plans of the steps that stream keys."""
    attends = (step.attend if isinstance(step, Regroup) else step for step in steps)
    return [step.plan for step in attends if isinstance(step, Attend)]


def lower(pattern: Pattern) -> Plan:
    """The plan of a pattern that is one attention over q, k and v as they are given.

    Raises AttnError, located, for any other pattern.
    """
    step = compose(pattern).attention
    if step is None:
        raise unlowered(pattern.out, "a pattern of several steps, where one attention is asked for,")
    return step.plan


def transpose(plan: Plan, observe: Observe | None = None) -> Plan:
    """The plan with the transposed domains of its branches, which the gradients of k and v stream over.

    Apart from `compose`, so that a call without gradients does not pay for it. Raises AttnError, located, for a
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
    for plan in plans(compose(pattern, stages.append).steps):
        transpose(plan, stages.append)
    return stages


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

"""Every predicate on a stage fails where what it promises is broken, and shows the values around the bad one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from attnc.compiler import pipeline, verify
from attnc.compiler.domains import DomainBuilder
from attnc.compiler.ir import Graph, Node
from attnc.compiler.pipeline import lower, transpose
from attnc.compiler.plan import Bounds, Branch, Domain, KeySet, Plan, Rows, Run, Stepped
from attnc.dsl.diagnostics import InternalError
from attnc.dsl.types import Base, Type
from tests.compiler.pairs import example, names

GRAPH = Graph()
ROW, KEY, ONE = GRAPH.index("i"), GRAPH.index("j"), GRAPH.literal(1)
SCORE = GRAPH.literal(0.5)
TRUE = GRAPH.literal(True)
FLAWED = GRAPH.make("softmax", ROW, type=Type(Base.INT), attribute=("j", None))


def fails(check: Callable[[Any], None], broken: object, message: str) -> None:
    with pytest.raises(InternalError, match=message) as caught:
        check(broken)
    assert "return " in str(caught.value), "the graph around the value is shown"


@pytest.mark.parametrize("name", names())
def test_what_the_compiler_makes_passes(name: str) -> None:
    plan = transpose(lower(example(name)))
    for branch in plan.branches:
        verify.branch(branch)
        verify.transposed(branch)
    verify.plan(plan)


def test_a_pointwise_type_is_that_of_the_operands() -> None:
    verify.graph(GRAPH.make("add", ROW, KEY))
    wrong = Node("add", (ROW, KEY), Type(Base.INT, frozenset("i")))
    fails(verify.graph, wrong, "add has type int.i., its operands give int.i, j.")
    fails(verify.graph, Node("lt", (ROW, KEY), Type(Base.INT, frozenset("ij"))), "lt has type int")


def test_ops_are_in_the_table() -> None:
    fails(verify.graph, Node("fuse", (ROW,), ROW.type), "unknown op fuse")
    with pytest.raises(KeyError, match="fuse"):
        GRAPH.make("fuse", ROW)


def test_scores_are_real_and_conditions_bool() -> None:
    domain = Domain((), Rows())
    verify.branch(Branch(SCORE, TRUE, domain, None))
    fails(verify.branch, Branch(ROW, TRUE, domain, None), "a score of type int")
    fails(verify.branch, Branch(SCORE, ROW, domain, None), "a condition of type int")


def branch_with(key_set: KeySet, score: Node = SCORE) -> Branch:
    return Branch(score, TRUE, Domain((key_set,), lower(example("full")).branches[0].domain.rows), None)


def test_domains_are_ones_that_a_kernel_can_walk() -> None:
    run = Run(Bounds(ONE, ROW), None)
    good = KeySet(None, (run, run), TRUE)
    verify.branch(branch_with(good))
    fails(verify.branch, branch_with(replace(good, walk=Stepped(ONE, ONE))), "several runs on a walk")
    fails(verify.branch, branch_with(replace(good, mask=ROW)), "a mask of type int")
    fails(verify.branch, branch_with(replace(good, runs=(Run(Bounds(ONE, KEY), None),))), "a bound of type int.j.")
    fails(verify.branch, branch_with(replace(good, runs=(Run(run.outer, Bounds(ONE, KEY)),))), "a bound of type int.j.")
    fails(verify.branch, branch_with(replace(good, runs=(Run(Bounds(SCORE, ROW), None),))), "a bound of type real")
    fails(verify.branch, branch_with(replace(good, runs=(Run(Bounds(FLAWED, ROW), None),))), "softmax is left")
    selected = GRAPH.make("member", ROW, KEY, type=Type(Base.BOOL, frozenset("ij")))
    fails(verify.branch, branch_with(replace(good, mask=selected)), "member is left")
    fails(verify.branch, branch_with(good, GRAPH.make("to_real", FLAWED)), "softmax is left")


def test_passes_over_keys_are_checked_too() -> None:
    plan = transpose(lower(example("causal")))
    (branch,) = plan.branches
    (domain,) = branch.transposed
    (key_set,) = domain.key_sets
    bad = replace(domain, key_sets=(replace(key_set, runs=(Run(Bounds(ONE, ROW), None),)),))
    fails(verify.transposed, replace(branch, transposed=(bad,)), "after transposed domains: a bound of type int.i.")


def unmade(plan: Plan, **changes: Any) -> Plan:
    """The plan with its first key set changed and no tables made."""
    (branch, *others) = plan.branches
    (key_set, *rest) = branch.domain.key_sets
    changed = replace(branch.domain, key_sets=(replace(key_set, **changes), *rest))
    return replace(plan, branches=(replace(branch, domain=changed), *others), derived=())


def test_tables_that_are_read_are_made() -> None:
    documents = lower(example("documents"))
    verify.plan(documents)
    fails(verify.plan, replace(documents, derived=()), "table equal_bounds0.lo is read and not made")
    slashes = lower(example("vertical_slash"))
    verify.plan(slashes)
    fails(verify.plan, unmade(slashes, mask=TRUE), "table listing0.list is walked and not made")
    table = GRAPH.make("derived", type=Type(Base.INT, frozenset("i")), attribute="gone.hi")
    run = Run(Bounds(ONE, table), None)
    fails(verify.plan, unmade(lower(example("full")), runs=(run,)), "table gone.hi is read")
    fails(
        verify.plan, unmade(lower(example("full")), runs=(Run(Bounds(ONE, ROW), run.outer),)), "table gone.hi is read"
    )


def test_a_broken_stage_is_not_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """`lower` runs the predicates: it stops at the stage that broke."""
    causal = example("causal")
    monkeypatch.setattr(DomainBuilder, "build", lambda self, condition: Domain((KeySet(None, (), ROW),), ROWS))
    with pytest.raises(InternalError, match="after domains"):
        lower(causal)
    monkeypatch.setattr(pipeline, "simplify", lambda graph, out: Node("add", (out, out), Type(Base.INT)))
    with pytest.raises(InternalError, match="after graph"):
        lower(causal)


ROWS = lower(example("full")).branches[0].domain.rows

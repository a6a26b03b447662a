"""What must hold after each stage. A failure is a bug of the compiler, never of the pattern."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from attnc.compiler import plan as plans
from attnc.compiler.composition import Attend, Carry, Choose, Compute, Extreme, Recur, Regroup, Sequential, Step
from attnc.compiler.ir import Node, pointwise_type, text, walk
from attnc.compiler.ops import OPS
from attnc.dsl.diagnostics import InternalError
from attnc.dsl.terms import Input
from attnc.dsl.types import Base

LEAVES = frozenset({"literal", "parameter", "size", "index", "input", "derived"})


def graph(root: Node) -> None:
    """Every pointwise node has the type that its operands give; every node is in the op table."""
    for node in walk(root):
        if node.op not in OPS:
            fail("graph", f"unknown op {node.op}", node)
        if OPS[node.op].pointwise and pointwise_type(node.op, node.args) != node.type:
            fail(
                "graph", f"{node.op} has type {node.type}, its operands give {pointwise_type(node.op, node.args)}", node
            )


def steps(made: Sequence[Step], arrays: Mapping[str, Input]) -> None:
    """Steps read what is there, and nothing that torch computes is over pairs of positions."""
    for step in made:
        for name in step_reads(step):
            if name not in arrays:
                raise InternalError(f"after steps: {step.name} reads {name}, which no step left")


def step_reads(step: Step) -> list[str]:
    """Names of the arrays that a step reads."""
    match step:
        case Compute(_, node) | Sequential(_, node):
            return [str(one.attribute) for one in walk(node) if one.op == "input"]
        case Attend():
            return [step.query, step.key, step.value, *(entry.name for entry in step.plan.inputs)]
        case Extreme():
            return step_reads(step.attend)
        case Choose():
            parts = [step.score, step.condition, *(part for part in (step.amount, step.force) if part is not None)]
            return [str(one.attribute) for one in walk(*parts) if one.op == "input"]
        case Regroup():
            return regroup_reads(step)
        case Carry():
            read = [step.query, step.key, step.value, step.decay, step.extent.same]
            read += [step.near.query, step.near.key] if step.near is not None else []
        case Recur():
            read = [step.query, step.key, step.value, step.decay, step.left, step.right]
    if step.handing is not None:
        read += [step.handing.before, *(step.handing.document or ())[:1]]
    return [name for name in read if name is not None]


def regroup_reads(step: Regroup) -> list[str]:
    """What attention in an order of its own reads: not what the step itself makes for it."""
    nodes = [node for order in (step.rows, step.keys) if order for node in (order.group, order.live)]
    nodes += [node for one in step.ranges for node in (one.low, one.high)]
    read = [str(one.attribute) for node in nodes if node for one in walk(node) if one.op == "input"]
    read += [name for name in step_reads(step.attend) if name not in step.made]
    return [*read, *(moved.source for moved in step.moved)]


def branch(lowered: plans.Branch) -> None:
    """The domain is one that a kernel can walk, the score one that it can evaluate."""
    if lowered.score.type.base is not Base.REAL:
        fail("domains", f"a score of type {lowered.score.type}", lowered.score)
    if lowered.condition.type.base is not Base.BOOL:
        fail("domains", f"a condition of type {lowered.condition.type}", lowered.condition)
    domain("domains", lowered.domain, "j")
    readable("domains", lowered.score)


def transposed(lowered: plans.Branch) -> None:
    """The passes over keys are, too; each has one key set, for one kernel."""
    for one in lowered.transposed:
        domain("transposed domains", one, "i")


def domain(stage: str, made: plans.Domain, key: str) -> None:
    """Bounds are ints of the row, masks bools that a kernel can evaluate; only consecutive sets have several runs."""
    for key_set in made.key_sets:
        if key_set.walk is not None and len(key_set.runs) != 1:
            fail(stage, "several runs on a walk", key_set.mask)
        if key_set.mask.type.base is not Base.BOOL:
            fail(stage, f"a mask of type {key_set.mask.type}", key_set.mask)
        for run in key_set.runs:
            for bounds in (run.outer, run.inner):
                for bound in (bounds.lo, bounds.hi) if bounds else ():
                    if bound.depends_on(key) or bound.type.base is not Base.INT:
                        fail(stage, f"a bound of type {bound.type}", bound)
                    readable(stage, bound)
        readable(stage, key_set.mask)


def readable(stage: str, root: Node) -> None:
    """A kernel can evaluate it: pointwise, leaves, reads of tables, q @ k."""
    for node in walk(root):
        if not (OPS[node.op].pointwise or node.op in LEAVES or node.op in ("take", "rename", "dot")):
            fail(stage, f"{node.op} is left in a kernel expression", node)


def plan(made: plans.Plan) -> None:
    """Every derived table that is read is made."""
    tables = (*made.derived, *made.transposed_derived)
    names = {f"{derived.name}.{part}" for derived in tables for part in derived.parts}
    for one in made.branches:
        for key_set in (key_set for domain in (one.domain, *one.transposed) for key_set in domain.key_sets):
            bounds = [side for run in key_set.runs for side in (run.outer, run.inner) if side is not None]
            for node in walk(one.score, key_set.mask, *(bound for side in bounds for bound in (side.lo, side.hi))):
                if node.op == "derived" and node.attribute not in names:
                    fail("plan", f"table {node.attribute} is read and not made", node)
            for table in (getattr(key_set.walk, part, None) for part in ("table", "rank", "starts")):
                if table is not None and table not in names:
                    fail("plan", f"table {table} is walked and not made", key_set.mask)


def fail(stage: str, message: str, node: Node) -> None:
    """Raise InternalError with the values around the bad one."""
    raise InternalError(f"after {stage}: {message}\n{text(node)}")

"""Which parts of a pattern share a launch on a GPU, and why the others do not: lines of `attnc explain`.

A launch computes a branch of a softmax, a state, or values of rows. Branches that read the same arrays could load them
once in one launch. What that saves is set against the products of the branch: from BALANCE operations for each byte on
it waits for those, and would only lose registers to the sums of the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from attnc.compiler.composition import Attend, Carry, Composition, Compute, Recur, Step
from attnc.compiler.describe import formula
from attnc.compiler.fuse import groups
from attnc.compiler.verify import step_reads

BALANCE = 200  # bfloat16 operations in the time of a byte: an H100's 600 TFLOP/s and 3 TB/s, both as measured
ELEMENT = 2  # bytes
ONE_KERNEL = (
    "one kernel of rows, which reads each once; not inside of a branch's kernel, since gradients ask for what each "
    "branch left"
)


@dataclass(frozen=True)
class Streamed:
    """A softmax in a call: the operations of its products, and the elements of its query, key and value."""

    operations: int
    elements: tuple[int, int, int]


def describe_launches(composition: Composition, streamed: Mapping[str, Streamed]) -> list[str]:
    """A line a heavy step, and one a value where several of them meet; none where there is one heavy step.

    `streamed`: by the names of the steps that attend.
    """
    heavy = [step for step in composition.steps if isinstance(step, Attend | Carry | Recur)]
    if len(heavy) < 2:
        return []
    lines = [f"{step.name}: {launch_of(step, heavy, streamed.get(step.name))}" for step in heavy]
    names = {name: step.name for step in heavy for name in (step.name, getattr(step, "total", None)) if name}
    for step in composition.steps:
        met = dict.fromkeys(names[name] for name in step_reads(step) if name in names)
        if len(met) > 1 and isinstance(step, Compute):
            own = any(group.root is step.node for group in groups(step.node))
            lines.append(
                f"{step.name}: joins {', '.join(met)} by {ONE_KERNEL if own else 'torch: it reads other rows too'}"
            )
    return ["launches on a GPU", *(f"    {line}" for line in lines)]


def launch_of(step: Attend | Carry | Recur, heavy: Sequence[Step], streamed: Streamed | None) -> str:
    """Whether a step has launches of its own, on which heads, and why."""
    own = "its own"
    if isinstance(step, Attend) and len(step.plan.branches) > 1:
        own = f"one for each of {len(step.plan.branches)} sets of keys, joined by log-sum-exp"
    if step.heads is not None:
        own += f", on heads {formula(step.heads.first)} <= h < {formula(step.heads.last)}"
    others = [other for other in heavy if other is not step and vectors(other) & vectors(step)]
    if not others:
        return f"{own}: no other reads what it does"
    names = ", ".join(other.name for other in others)
    if not isinstance(step, Attend) or streamed is None:
        softmax = [other.name for other in others if isinstance(other, Attend)]
        if not softmax:
            return f"{own}: a program holds one state"
        return f"{own}: its state runs along the keys, while {', '.join(softmax)} takes them a tile of rows at a time"
    shared = {name for other in others for name in vectors(other)}
    operands = zip((step.query, step.key, step.value), streamed.elements, strict=True)
    size = ELEMENT * sum(count for name, count in operands if name in shared)
    found = f"{own}: with {names} it would load {size:,} bytes of bfloat16 less"
    each = streamed.operations // max(size, 1)
    if each >= BALANCE:
        return f"{found}, but does {each:,} operations for each, and from {BALANCE} on it waits for those"
    return f"{found}, with {each:,} operations for each; no kernel holds the sums of both"


def vectors(step: Step) -> set[str]:
    """The arrays that a heavy step loads."""
    return {step.query, step.key, step.value} if isinstance(step, Attend | Carry | Recur) else set()

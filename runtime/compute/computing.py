"""A `Compute` step at run time: its array by torch, in the type that its readers need."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import lru_cache

import torch
from torch import Tensor

from attnc.compiler.composition import Attend, Carry, Composition, Compute, Recur, Regroup
from attnc.compiler.ir import Node, walk
from attnc.compiler.plan import Plan
from attnc.runtime.compute.arrays import Arrays, Frame
from attnc.runtime.compute.products import SHORT_TYPES
from attnc.runtime.steps.attending import rounded_operands

SUMS = ("add", "sub", "neg", "mul")
MOVED = ("concat", "matrix", "unmatrix", "transpose")  # rounding what they move is rounding what they give


def arrays_of(step: Compute, frame: Frame) -> Arrays:
    """What evaluates a step."""
    return Arrays(frame, rounding=roundable(step.node) if step.name in frame.rounded else ())


def computed(step: Compute, frame: Frame, arrays: Arrays) -> Tensor:
    """What the step leaves: exact up to float32 sums, or rounded to the type of q where all of its readers round it."""
    found = arrays.held(step.node)
    return found.to(frame.tensors["q"].dtype) if step.name in frame.rounded else found


@lru_cache(maxsize=1024)
def roundable(root: Node) -> frozenset[Node]:
    """The parts of a value that may be rounded where the value is: those that are only moved on the way to it."""
    users = Counter(arg for node in walk(root) for arg in node.args)
    found, stack = {root}, [root]
    while stack:
        node = stack.pop()
        inner = [arg for arg in node.args if users[arg] == 1] if node.op in MOVED else []
        found |= set(inner)
        stack += inner
    return frozenset(found)


def rounded_arrays(composition: Composition, q: Tensor) -> frozenset[str]:
    """Steps whose arrays are only read by what rounds them to the type of q; the result is rounded to it anyway.

    Values over one sequence, outputs of attention and reads of states.
    """
    if q.dtype not in SHORT_TYPES or q.device.type != "cuda":
        return frozenset()
    return frozenset(rounded_names(composition, q.device))


def rounded_names(composition: Composition, device: torch.device) -> set[str]:
    """The same by the steps alone, for a 16-bit type: from the result back, so that what reads an array is known."""
    names = {step.name for step in composition.steps if isinstance(step, Compute | Attend | Carry | Recur | Regroup)}
    outputs = {step.name for step in composition.steps if isinstance(step, Attend)}
    for step in reversed(composition.steps):
        exact = _exact_reads(step, device)
        if isinstance(step, Compute) and step.name in names:
            exact -= summed(step.node) & outputs
        names -= exact
    return names


@lru_cache(maxsize=1024)
def summed(root: Node) -> frozenset[str]:
    """Arrays of which a value is a sum, weighted or not: rounding these is no more than rounding the value is.

    What divides, or is put into another function, is not among them.
    """
    inside, outside = {root}, set()
    for node in reversed(list(walk(root))):  # readers before what they read
        kept = node.args if node.op in SUMS else node.args[:1] if node.op == "div" else ()
        inside |= set(kept) if node in inside else set()
        outside |= set(node.args[len(kept) :]) if node in inside else set(node.args)
    return frozenset(str(node.attribute) for node in inside - outside if node.op == "input")


def _exact_reads(step: object, device: torch.device) -> set[str]:
    """Arrays that a step needs as they are."""
    if isinstance(step, Compute):
        return set(_names(step.node))
    if isinstance(step, Carry | Recur | Regroup):
        return set(_names(step)) - {step.name}
    if isinstance(step, Attend):
        rounds = rounded_operands(step, device)
        return {entry.name for entry in step.plan.inputs} | (set() if rounds else {step.query, step.key, step.value})
    return set(_names(step))  # its own name, too


def _names(part: object) -> Iterator[str]:
    """Every name that a step holds, and every array that its nodes read."""
    if isinstance(part, str):
        yield part
    elif isinstance(part, Node):
        yield from (str(node.attribute) for node in walk(part) if node.op == "input")
    elif isinstance(part, Plan):
        yield from (entry.name for entry in part.inputs)
    elif isinstance(part, Mapping):
        for name, value in part.items():
            yield from (*_names(name), *_names(value))
    elif isinstance(part, tuple | list | set | frozenset):
        for value in part:
            yield from _names(value)
    elif is_dataclass(part) and not isinstance(part, type):
        for field in fields(part):
            yield from _names(getattr(part, field.name))

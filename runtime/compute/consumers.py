"""In what type the arrays of `Compute` steps are kept, and the gradients of heavy steps' results: as their readers are.

What only kernels read that take bfloat16 is made in it, so that no array is made in float32 and then cast.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from attnc.compiler.composition import Attend, Carry, Composition, Compute, Recur, Regroup, Step
from attnc.compiler.ir import walk
from attnc.runtime.compute.arrays import Frame
from attnc.runtime.steps.attending import rounded_operands
from attnc.runtime.steps.carrying import narrow_features

REMEMBERED = 256


@dataclass(frozen=True)
class Readers:
    """The steps that read an array as an operand of products, whether it is the result, and whether others read it."""

    products: tuple[Step, ...]
    result: bool
    other: bool


class Consumers:
    """The readers of every array of a composition."""

    def __init__(self, composition: Composition) -> None:
        self.steps = {name: step for step in composition.steps for name in names_of(step)}
        found: dict[str, list[Step]] = {}
        others: dict[str, int] = {}
        for step in composition.steps:
            products, rest = reads(step)
            for name in products:
                found.setdefault(name, []).append(step)
            for name in rest:
                others[name] = others.get(name, 0) + 1
        last = names_of(composition.steps[-1])[0]
        self.readers = {name: Readers(tuple(found.get(name, ())), name == last, name in others) for name in self.steps}
        self.count = {name: len(found.get(name, ())) + others.get(name, 0) + (name == last) for name in self.steps}

    def dtype(self, name: str, frame: Frame, width: int) -> torch.dtype:
        """What the array `name`, that many elements wide, is kept in."""
        readers = self.readers[name]
        if readers.other:
            return frame.real
        wanted = {taken(step, name, frame, width) for step in readers.products}
        if readers.result:
            wanted.add(frame.tensors["q"].dtype)
        return wanted.pop() if len(wanted) == 1 else frame.real

    def cotangent(self, name: str, frame: Frame) -> torch.dtype:
        """What the gradient of a step's array is worth in: what its step's products are of, where it has one reader."""
        step = self.steps.get(name)
        if isinstance(step, Regroup):
            step = step.attend
        if isinstance(step, Carry | Recur | Attend) and name == step.name and self.count[name] == 1:
            query = frame.tensors[step.query]
            return taken(step, step.query, frame, query.shape[-1])
        return frame.tensors[name].dtype


_known: dict[int, tuple[Composition, Consumers]] = {}  # a composition has no hash


def consumers_of(composition: Composition) -> Consumers:
    """`Consumers`, once a composition."""
    found = _known.get(id(composition))
    if found is None:
        if len(_known) > REMEMBERED:
            _known.clear()
        found = _known[id(composition)] = composition, Consumers(composition)
    return found[1]


def names_of(step: Step) -> list[str]:
    """The arrays that a step leaves."""
    names = [step.name]
    if isinstance(step, Attend | Regroup):
        names.append(step.lse)
    if isinstance(step, Carry) and step.total:
        names.append(step.total)
    return names


def reads(step: Step) -> tuple[list[str], list[str]]:
    """The arrays that a step reads: operands of its products, and others. One that is both is among the others."""
    if isinstance(step, Carry):
        others = [name for name in (step.decay, step.extent.same) if name]
        others += [step.near.query, step.near.key] if step.near is not None else []
        operands = [step.query, step.key, step.value]
    elif isinstance(step, Recur):
        others = [step.decay] if step.decay else []
        operands = [step.query, step.key, step.value, step.left, step.right]
    elif isinstance(step, Attend):
        others, operands = [entry.name for entry in step.plan.inputs], [step.query, step.key, step.value]
    elif isinstance(step, Compute):
        others, operands = [str(node.attribute) for node in walk(step.node) if node.op == "input"], []
    else:
        others, operands = [name for name in everything(step) if name not in names_of(step)], []
    return [name for name in dict.fromkeys(operands) if name not in others], others


def everything(step: Step) -> list[str]:
    """All names below a step: too many rather than too few."""
    found: list[str] = []
    stack: list[Any] = list(vars(step).values())
    while stack:
        one = stack.pop()
        if isinstance(one, str):
            found.append(one)
        elif hasattr(one, "op"):
            found += [str(node.attribute) for node in walk(one) if node.op == "input"]
        elif isinstance(one, dict):
            stack += [*one.keys(), *one.values()]
        elif isinstance(one, tuple | list):
            stack += one
        elif hasattr(one, "__dataclass_fields__") and not isinstance(one, torch.Tensor):
            stack += [getattr(one, name) for name in one.__dataclass_fields__ if name != "graph"]
    return found


def taken(step: Step, name: str, frame: Frame, width: int) -> torch.dtype:
    """What a step's products are of; `width`: of the array `name`."""
    given = frame.tensors["q"].dtype
    if isinstance(step, Attend):
        return given if rounded_operands(step, frame.device) else frame.real
    assert isinstance(step, Carry | Recur)
    if name in (step.query, step.key):
        features = width
    elif step.query in frame.tensors:
        features = frame.tensors[step.query].shape[-1]
    else:
        return frame.real
    return torch.bfloat16 if narrow_features(frame, features) else frame.real

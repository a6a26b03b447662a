"""Float64 meaning of whole branches: scans, repeats and merged softmaxes."""

from __future__ import annotations

import torch

from attnc.dsl.terms import Repeat, Scan, Term
from attnc.dsl.types import Type
from attnc.runtime.reference.arrays import Array, aligned, layout
from attnc.runtime.reference.binding import DTYPES
from attnc.runtime.reference.leaves import axis_size
from attnc.runtime.reference.reductions import softmax_with_lse
from attnc.runtime.reference.scopes import BlockScope, Rule, Scope, walk


def zeros(scope: Scope, type: Type) -> Array:
    """The zero of a type, in full size."""
    order = layout(type.indices)
    shape = [axis_size(scope, name) for name in (*order, *type.axes)]
    return Array(torch.zeros(shape, dtype=DTYPES[type.base], device=scope.binding.device), order, type.axes)


def scan(scope: Scope, term: Term) -> Array:
    """States start at zero; every position runs the steps in order."""
    block = term.block
    assert isinstance(block, Scan)
    whole = BlockScope(scope, block, {}, None)
    for step in walk(step for _, step in block.steps):
        if not whole.owns(step):
            scope.value(step)  # so that every axis length is known before the states are made
    names = {
        name: zeros(scope, Type(type.base, type.indices - {block.index}, type.axes)) for name, type in block.states
    }
    results: list[Array] = []
    for position in range(scope.index_size(block.index)):
        step_scope = BlockScope(scope, block, dict(names), position)
        for name, step in block.steps:
            step_scope.names[name] = step_scope.value(step)
        results.append(step_scope.named(block.result))
        names = {name: step_scope.named(name) for name in names}
    if not results:
        return zeros(scope, term.type)
    order = layout(name for result in results for name in result.indices)
    # A state may gain indices after the first position; `broadcast_tensors` gives them all the same shape.
    tensors = torch.broadcast_tensors(*(result.over(order, len(term.type.axes)) for result in results))
    stacked = layout((*order, block.index))
    return Array(torch.stack(tensors, stacked.index(block.index)), stacked, term.type.axes)


def repeat(scope: Scope, term: Term) -> Array:
    """States start at args[1:]; args[0] rounds of the steps."""
    block = term.block
    assert isinstance(block, Repeat)
    count = scope.integer(term.args[0])
    names = {name: scope.value(arg) for (name, _), arg in zip(block.states, term.args[1:], strict=True)}
    for _ in range(count):
        round_scope = BlockScope(scope, block, dict(names), None)
        for name, step in block.steps:
            round_scope.names[name] = round_scope.value(step)
        names = {name: round_scope.named(name) for name in names}
    return names[block.result]


def branch_with_lse(scope: Scope, term: Term) -> tuple[Array, Array]:
    """Output and log-sum-exp of a softmax branch: `dot(softmax[x], value)` over x, or a merge of such."""
    if term.form == "merge":
        return merged(scope, term)
    if term.form == "dot":
        for weights, value in (term.args, term.args[::-1]):
            along = weights.attribute[0] if isinstance(weights.attribute, tuple) else None
            if weights.form == "softmax" and along == term.attribute and value.form != "softmax":
                return scope.value(term), softmax_with_lse(scope, weights)[1]
    raise ValueError(
        f"{scope.binding.pattern.name}: `{term.span.text}` has no log-sum-exp: it is not `softmax[j](..) @ value`"
    )


def merged(scope: Scope, term: Term) -> tuple[Array, Array]:
    """Branches weighted by their share of the sum of exponentials; a key counts once a branch."""
    branches = [branch_with_lse(scope, arg) for arg in term.args]
    order, _, tensors = aligned(*(lse for _, lse in branches))
    lse = torch.stack(torch.broadcast_tensors(*tensors))
    present = lse > -torch.inf
    top = lse.detach().amax(0)
    # An absent branch has a constant for its lse, so whatever the derivative is here goes nowhere.
    share = torch.where(present, (lse - top).exp(), torch.zeros_like(lse))
    total = share.sum(0)
    empty = total == 0
    total = torch.where(empty, torch.ones_like(total), total)
    indices, axes, outputs = aligned(*(out for out, _ in branches))
    weights = [Array(part / total, order).over(indices, len(axes)) for part in share]
    out = sum((weight * output for weight, output in zip(weights, outputs, strict=True)), torch.zeros_like(outputs[0]))
    whole = torch.where(empty, torch.full_like(total, -torch.inf), top + total.log())
    return Array(out, indices, axes), Array(whole, order)


def merge(scope: Scope, term: Term) -> Array:
    """The output of `merged`."""
    return merged(scope, term)[0]


BLOCKS: dict[str, Rule] = {
    "scan": scan,
    "repeat": repeat,
    "merge": merge,
}

"""Float64 meaning of leaves: constants, sizes, positions and inputs."""

from __future__ import annotations

import torch

from attnc.dsl.terms import Term
from attnc.dsl.types import BUILT_IN_INDICES, Base
from attnc.runtime.reference.arrays import Array, arranged
from attnc.runtime.reference.binding import DTYPES
from attnc.runtime.reference.scopes import Rule, Scope


def scalar(scope: Scope, value: object, base: Base) -> Array:
    """A value that does not vary."""
    return Array(torch.tensor(value, dtype=DTYPES[base], device=scope.binding.device))


def literal(scope: Scope, term: Term) -> Array:
    """The number or truth value itself."""
    return scalar(scope, term.attribute, term.type.base)


def parameter(scope: Scope, term: Term) -> Array:
    """A parameter by name; an element of a tuple is `name.0`."""
    name, values = str(term.attribute), scope.binding.parameters
    if name not in values:
        raise ValueError(f"{scope.binding.pattern.name}: parameter `{name}` is missing")
    return scalar(scope, values[name], term.type.base)


def size(scope: Scope, term: Term) -> Array:
    """The length of an index or axis."""
    return scalar(scope, axis_size(scope, str(term.attribute)), Base.INT)


def axis_size(scope: Scope, name: str) -> int:
    """Length of an index or of a vector axis."""
    if name in BUILT_IN_INDICES or name in scope.binding.axes:
        return scope.index_size(name)
    if name.isdigit():
        return int(name)
    for axis, fixed in scope.binding.pattern.sizes:
        if axis == name:
            return scope.integer(fixed)
    if name in scope.binding.axis_sizes:
        return scope.binding.axis_sizes[name]
    raise ValueError(f"{scope.binding.pattern.name}: the length of axis `{name}` is not known: no argument has it")


def index(scope: Scope, term: Term) -> Array:
    """Global positions: queries start at `offset`."""
    name = str(term.attribute)
    position = torch.arange(scope.index_size(name), device=scope.binding.device)
    return Array(position + scope.binding.origin(name), (name,))


def start(scope: Scope, term: Term) -> Array:
    """First position of every member of a declared axis."""
    name = str(term.attribute)
    return Array(scope.members(name)[0], (name,))


def stop(scope: Scope, term: Term) -> Array:
    """One past the last position of every member of a declared axis, never past the sequence."""
    name = str(term.attribute)
    return Array(scope.members(name)[1], (name,))


def input_value(scope: Scope, term: Term) -> Array:
    """An input. Fewer heads than queries have: each is read by as many query heads in a row."""
    binding, name = scope.binding, str(term.attribute)
    if name not in binding.inputs:
        return scope.value(default(scope, name))
    tensor, declared = binding.inputs[name], binding.layouts[name]
    varies = [axis in BUILT_IN_INDICES or axis in binding.axes for axis in declared]
    # A `1` among the indices stands for one that it doesn't vary over, such as (b, 1, j, x).
    dropped = [at for at, axis in enumerate(declared) if axis == "1" and any(varies[at:])]
    for at in reversed(dropped):
        tensor = tensor.select(at, 0)
    kept = [axis for at, axis in enumerate(declared) if at not in dropped]
    order = tuple(axis for axis in kept if axis in BUILT_IN_INDICES or axis in binding.axes)
    for axis in order:
        at, length = kept.index(axis), scope.index_size(axis)
        if axis == "h":
            tensor = tensor.repeat_interleave(length // tensor.shape[at], at)
        if tensor.shape[at] != length:
            raise ValueError(
                f"{binding.pattern.name}: {name} has {tensor.shape[at]} members of `{axis}`; there are {length}"
            )
    places = sorted(range(len(kept)), key=lambda at: kept[at] not in order)
    return arranged(tensor.permute(places), order, tuple(axis for axis in kept if axis not in order))


def default(scope: Scope, name: str) -> Term:
    """Default of an input that was not given."""
    term = next((entry.default for entry in scope.binding.pattern.inputs if entry.name == name), None)
    if term is None:
        raise ValueError(f"{scope.binding.pattern.name}: {name} is read but was not given")
    return term


def named(scope: Scope, term: Term) -> Array:
    """A state or an earlier step of the enclosing block."""
    return scope.named(str(term.attribute))


LEAVES: dict[str, Rule] = {
    "literal": literal,
    "parameter": parameter,
    "size": size,
    "index": index,
    "start": start,
    "stop": stop,
    "input": input_value,
    "state": named,
    "local": named,
}

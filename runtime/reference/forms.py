"""Float64 meaning of pointwise forms and structure."""

from __future__ import annotations

from collections.abc import Callable
from string import ascii_letters

import torch
from torch import Tensor

from attnc.dsl.terms import Term
from attnc.runtime.compute.gaussian import orthogonal_gaussian
from attnc.runtime.compute.hashing import uniform
from attnc.runtime.reference.arrays import Array, aligned, arranged, common_shape, layout
from attnc.runtime.reference.binding import DTYPES
from attnc.runtime.reference.leaves import axis_size
from attnc.runtime.reference.scopes import Rule, Scope

# Pointwise


def pointwise(function: Callable[..., Tensor]) -> Rule:
    """The rule that applies a function to aligned operands."""

    def rule(scope: Scope, term: Term) -> Array:
        order, axes, tensors = aligned(*(scope.operand(term, arg) for arg in term.args))
        result = function(*tensors).to(DTYPES[term.type.base])
        return Array(result, order, axes)

    return rule


def elu(x: Tensor) -> Tensor:
    """x if x > 0 else exp(x) - 1."""
    return torch.where(x > 0, x, torch.expm1(x.clamp(max=0)))


def power(x: Tensor, y: Tensor) -> Tensor:
    """x ** y; ints stay ints."""
    if not y.dtype.is_floating_point and not x.dtype.is_floating_point and bool((y < 0).any()):
        raise ValueError("an int to a negative power is not an int; write real(x) ** y")
    return torch.pow(x, y)


def floor_divide(x: Tensor, y: Tensor) -> Tensor:
    """x // y on ints, towards minus infinity."""
    return torch.div(nonzero(x, y)[0], y, rounding_mode="floor")


def modulo(x: Tensor, y: Tensor) -> Tensor:
    """x % y on ints, with the sign of y."""
    return torch.remainder(*nonzero(x, y))


def nonzero(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The operands, if no divisor is 0."""
    if bool((y == 0).any()):
        raise ValueError("integer division by zero")
    return x, y


def select(scope: Scope, term: Term) -> Array:
    """Each branch is evaluated for the positions that take it (see LiveScope): the other gets gradient 0."""
    condition = scope.value(term.args[0])
    accepted = scope.where(condition).value(term.args[1])
    otherwise = scope.where(Array(~condition.data, condition.indices, condition.axes)).value(term.args[2])
    order, axes, tensors = aligned(condition, accepted, otherwise)
    taken, first, second = tensors
    return Array(torch.where(taken, first, second), order, axes)


def hashed(scope: Scope, term: Term) -> Array:
    """See `attnc.runtime.compute.hashing`."""
    order, axes, tensors = aligned(*(scope.operand(term, arg) for arg in term.args))
    return Array(uniform(tensors), order, axes)


POINTWISE: dict[str, Rule] = {
    "to_real": pointwise(lambda x: x),
    "neg": pointwise(torch.neg),
    "not": pointwise(torch.logical_not),
    "abs": pointwise(torch.abs),
    "exp": pointwise(torch.exp),
    "log": pointwise(torch.log),
    "tanh": pointwise(torch.tanh),
    "sigmoid": pointwise(torch.sigmoid),
    "relu": pointwise(torch.relu),
    "elu": pointwise(elu),
    "silu": pointwise(lambda x: x * torch.sigmoid(x)),
    "softplus": pointwise(lambda x: torch.logaddexp(x, torch.zeros_like(x))),
    "sin": pointwise(torch.sin),
    "cos": pointwise(torch.cos),
    "sqrt": pointwise(torch.sqrt),
    "floor": pointwise(torch.floor),
    "add": pointwise(torch.add),
    "sub": pointwise(torch.sub),
    "mul": pointwise(torch.mul),
    "div": pointwise(torch.true_divide),
    "floordiv": pointwise(floor_divide),
    "mod": pointwise(modulo),
    "pow": pointwise(power),
    "minimum": pointwise(torch.minimum),
    "maximum": pointwise(torch.maximum),
    "lt": pointwise(torch.lt),
    "le": pointwise(torch.le),
    "eq": pointwise(torch.eq),
    "ne": pointwise(torch.ne),
    "and": pointwise(torch.logical_and),
    "or": pointwise(torch.logical_or),
    "select": select,
    "uniform": hashed,
}


# Structure


def gather(scope: Scope, source: Array, along: str, position: Array) -> Array:
    """`source` at global positions along an index, which is replaced by the indices of `position`; outside: 0."""
    length, origin = scope.index_size(along), scope.binding.origin(along)
    others = layout((*(name for name in source.indices if name != along), *position.indices))
    rank = len(source.axes)
    if length == 0:
        lengths = [scope.index_size(name) for name in others]
        return Array(source.data.new_zeros(*lengths, *source.data.shape[len(source.indices) :]), others, source.axes)
    # The index goes last among the indices, under its own name even where `position` varies over it too.
    data = source.expand(along, length)
    kept = tuple(name for name in data.indices if name != along)
    body = data.data.movedim(data.indices.index(along), len(kept))
    for at, name in enumerate(others):
        if name not in kept:
            body = body.unsqueeze(at)
    place = position.over(others) - origin
    shape = common_shape(body.shape[: len(others)], place.shape)
    tail = body.shape[len(others) + 1 :]
    body = body.expand(*shape, length, *tail)
    place = place.expand(shape).reshape(*shape, 1, *(1,) * rank)
    inside = (place >= 0) & (place < length)
    taken = torch.gather(body, len(shape), place.clamp(0, length - 1).expand(*shape, 1, *tail))
    return Array(torch.where(inside, taken, torch.zeros_like(taken)).squeeze(len(shape)), others, source.axes)


def rename(scope: Scope, term: Term) -> Array:
    """Tokens of one index read at another. Queries that don't exist (i read at t, N < M) are 0."""
    source, target = names(term)
    value = scope.value(term.args[0])
    binding = scope.binding
    if binding.origin(source) == binding.origin(target) and scope.index_size(source) == scope.index_size(target):
        renamed = tuple(target if name == source else name for name in value.indices)
        return arranged(value.data, renamed, value.axes)
    if target == "i" and scope.index_size("i") > scope.index_size(source):
        raise ValueError(
            f"{binding.pattern.name}: a token input (of {scope.index_size(source)} positions) is read at i, "
            f"but there are {scope.index_size('i')} queries"
        )
    position = torch.arange(scope.index_size(target), device=binding.device) + binding.origin(target)
    return gather(scope, value, source, Array(position, (target,)))


def names(term: Term) -> tuple[str, ...]:
    """The attribute as a tuple of names."""
    assert isinstance(term.attribute, tuple)
    return tuple(str(name) for name in term.attribute)


def shift(scope: Scope, term: Term) -> Array:
    """A read at a computed position of the same index."""
    return gather(scope, scope.value(term.args[0]), str(term.attribute), scope.value(term.args[1]))


def take(scope: Scope, term: Term) -> Array:
    """Positions outside the axis (or negative) read 0, as in `shift`."""
    value, position = (scope.operand(term, arg) for arg in term.args)
    at = value.axes.index(str(term.attribute))
    length = value.data.shape[len(value.indices) + at]
    rest = value.axes[:at] + value.axes[at + 1 :]
    order = layout((*value.indices, *position.indices))
    body = value.over(order).movedim(len(order) + at, len(order))
    place = position.over(order)
    shape = common_shape(body.shape[: len(order)], place.shape)
    tail = body.shape[len(order) + 1 :]
    if length == 0:
        return Array(body.new_zeros(*shape, *tail), order, rest)
    place = place.expand(shape).reshape(*shape, 1, *(1,) * len(rest))
    inside = (place >= 0) & (place < length)
    place = place.clamp(0, length - 1).expand(*shape, 1, *tail)
    taken = torch.gather(body.expand(*shape, length, *tail), len(shape), place)
    return Array(torch.where(inside, taken, torch.zeros_like(taken)).squeeze(len(shape)), order, rest)


def contract(x: Array, y: Array, subscript_x: list[str], subscript_y: list[str], result: list[str]) -> Tensor:
    """einsum with a letter per index name or vector axis label."""
    letters = dict(zip(dict.fromkeys(subscript_x + subscript_y), ascii_letters, strict=False))
    left, right, out = ("".join(letters[name] for name in part) for part in (subscript_x, subscript_y, result))
    return torch.einsum(f"{left},{right}->{out}", x.data, y.data)


def dot(scope: Scope, term: Term) -> Array:
    """Over a vector axis: the left's last of that name with the right's first. Over an index: both have it."""
    x, y = (scope.operand(term, arg) for arg in term.args)
    shared = str(term.attribute)
    order = layout((*x.indices, *y.indices))
    if shared in x.axes and shared in y.axes:
        left = len(x.axes) - 1 - x.axes[::-1].index(shared)
        return product(x, y, left, y.axes.index(shared), order)
    length = scope.index_size(shared)
    x, y = x.expand(shared, length), y.expand(shared, length)
    order = layout(name for name in (*x.indices, *y.indices) if name != shared)
    labels_x, labels_y = axis_labels("x", x), axis_labels("y", y)
    data = contract(x, y, [*x.indices, *labels_x], [*y.indices, *labels_y], [*order, *labels_x, *labels_y])
    return Array(data, order, x.axes + y.axes)


def axis_labels(side: str, array: Array) -> list[str]:
    """One einsum label per vector axis."""
    return [f"{side}.{at}" for at in range(len(array.axes))]


def product(x: Array, y: Array, left: int, right: int, order: tuple[str, ...]) -> Array:
    """Contraction of two vector axes given by their places."""
    labels_x, labels_y = axis_labels("x", x), axis_labels("y", y)
    labels_y[right] = labels_x[left]
    kept_x = [label for at, label in enumerate(labels_x) if at != left]
    kept_y = [label for at, label in enumerate(labels_y) if at != right]
    data = contract(x, y, [*x.indices, *labels_x], [*y.indices, *labels_y], [*order, *kept_x, *kept_y])
    return Array(data, order, x.axes[:left] + x.axes[left + 1 :] + y.axes[:right] + y.axes[right + 1 :])


def matmul(scope: Scope, term: Term) -> Array:
    """The left's last vector axis with the right's first."""
    x, y = (scope.operand(term, arg) for arg in term.args)
    return product(x, y, len(x.axes) - 1, 0, layout((*x.indices, *y.indices)))


def outer(scope: Scope, term: Term) -> Array:
    """Every element of one with every element of the other."""
    x, y = (scope.operand(term, arg) for arg in term.args)
    order = layout((*x.indices, *y.indices))
    labels_x, labels_y = axis_labels("x", x), axis_labels("y", y)
    data = contract(x, y, [*x.indices, *labels_x], [*y.indices, *labels_y], [*order, *labels_x, *labels_y])
    return Array(data, order, x.axes + y.axes)


def concat(scope: Scope, term: Term) -> Array:
    """Vectors end to end."""
    arrays = [scope.operand(term, arg) for arg in term.args]
    order = layout(name for array in arrays for name in array.indices)
    tensors = [array.over(order) for array in arrays]
    shape = common_shape(*(tensor.shape[: len(order)] for tensor in tensors))
    data = torch.cat([tensor.expand(*shape, tensor.shape[-1]) for tensor in tensors], -1)
    return Array(data, order, (str(term.attribute),))


def matrix(scope: Scope, term: Term) -> Array:
    """Indices as leading vector axes."""
    value = scope.value(term.args[0])
    moved = names(term)
    for name in moved:
        value = value.expand(name, scope.index_size(name))
    kept = tuple(name for name in value.indices if name not in moved)
    return Array(value.over(kept + moved), kept, moved + value.axes)


def transpose(scope: Scope, term: Term) -> Array:
    """The last two vector axes exchanged."""
    value = scope.operand(term, term.args[0])
    return Array(value.data.transpose(-1, -2), value.indices, (*value.axes[:-2], value.axes[-1], value.axes[-2]))


def identity(scope: Scope, term: Term) -> Array:
    """1 where both axes agree."""
    name = str(term.attribute)
    data = torch.eye(axis_size(scope, name), dtype=torch.float64, device=scope.binding.device)
    return Array(data, (), (name, name))


def projection(scope: Scope, term: Term) -> Array:
    """See `attnc.runtime.compute.gaussian`."""
    features, width, seed = (scope.integer(arg) for arg in term.args)
    return Array(orthogonal_gaussian(features, width, seed, device=scope.binding.device), (), names(term))


def detach(scope: Scope, term: Term) -> Array:
    """The value without its gradient."""
    value = scope.operand(term, term.args[0])
    return Array(value.data.detach(), value.indices, value.axes)


STRUCTURE: dict[str, Rule] = {
    "rename": rename,
    "shift": shift,
    "take": take,
    "dot": dot,
    "matmul": matmul,
    "outer": outer,
    "concat": concat,
    "matrix": matrix,
    "transpose": transpose,
    "identity": identity,
    "orthogonal_gaussian": projection,
    "detach": detach,
}

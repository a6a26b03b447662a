"""Products of whole arrays, what takes vectors and matrices apart and together, random constants, and repeats."""

from __future__ import annotations

from string import ascii_letters

import torch
from torch import Tensor

from attnc.compiler.ir import Node
from attnc.runtime.compute.arrays import RULES, Arrays, arranged
from attnc.runtime.compute.gaussian import orthogonal_gaussian
from attnc.runtime.compute.hashing import uniform
from attnc.runtime.compute.products import Spelling, product, taken_as_held
from attnc.runtime.compute.rounds import rounds, runs


def _contract(at: Arrays, node: Node, left: list[str], right: list[str], kept: list[str]) -> Tensor:
    """einsum over labels of vector axes; indices are shared by name."""
    x, y = node.args
    mine, yours = x.type.ordered_indices(), y.type.ordered_indices()
    letters = dict(zip(dict.fromkeys([*mine, *yours, *left, *right]), ascii_letters, strict=False))
    both = [at.held(x), at.held(y)]
    if "h" in mine and "h" in yours:
        places = mine.index("h"), yours.index("h")
        most = max(tensor.shape[place] for tensor, place in zip(both, places, strict=True))
        both = [at.heads(tensor, place, most) for tensor, place in zip(both, places, strict=True)]
    out = [*node.type.ordered_indices(), *kept]
    if node.op != "outer" and not at.frame.tracing and taken_as_held(both[0], both[1], at.frame.real):
        spelling = Spelling((*mine, *left), (*yours, *right), tuple(out))
        dtype = both[0].dtype if node in at.rounding else at.frame.real
        return product(both[0], both[1], spelling, dtype, at.products.get(node))
    spelt = ["".join(letters[name] for name in part) for part in ([*mine, *left], [*yours, *right], out)]
    return torch.einsum(f"{spelt[0]},{spelt[1]}->{spelt[2]}", *(one.to(at.frame.real) for one in both))


def _labels(node: Node) -> tuple[list[str], list[str]]:
    """A label for every vector axis of both operands."""
    return [f"x.{n}" for n in range(len(node.args[0].type.axes))], [
        f"y.{n}" for n in range(len(node.args[1].type.axes))
    ]


def _dot(at: Arrays, node: Node) -> Tensor:
    """Over a vector axis: the left's last of that name with the right's first. Over an index: both have it."""
    left, right = _labels(node)
    shared, (x, y) = str(node.attribute), (arg.type.axes for arg in node.args)
    kept = [*left, *right]
    if shared in x and shared in y:
        mine = left[len(x) - 1 - x[::-1].index(shared)]
        yours = right[y.index(shared)]
        right[right.index(yours)] = mine
        kept = [label for label in (*left, *right) if label != mine]
    return _contract(at, node, left, right, kept)


def _matmul(at: Arrays, node: Node) -> Tensor:
    left, right = _labels(node)
    right[0] = left[-1]
    return _contract(at, node, left, right, [*left[:-1], *right[1:]])


def _outer(at: Arrays, node: Node) -> Tensor:
    left, right = _labels(node)
    return _contract(at, node, left, right, [*left, *right])


def _concat(at: Arrays, node: Node) -> Tensor:
    parts = at.aligned(node.args, at.held)
    shape = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
    return torch.cat([part.expand(*shape, part.shape[-1]) for part in parts], -1)


def _matrix(at: Arrays, node: Node) -> Tensor:
    """Indices made vector axes, before those that there are."""
    (arg,) = node.args
    assert isinstance(node.attribute, tuple)
    own, moved = list(arg.type.ordered_indices()), [str(name) for name in node.attribute]
    tensor = at.held(arg)
    for name in moved:
        tensor = at.full(tensor, own.index(name), name)
    order = [own.index(name) for name in (*node.type.ordered_indices(), *moved)]
    return tensor.permute([*order, *range(len(own), tensor.dim())])


def _unmatrix(at: Arrays, node: Node) -> Tensor:
    """The first vector axis made an index."""
    (arg,) = node.args
    return arranged(at.held(arg), [*arg.type.ordered_indices(), str(node.attribute)], len(node.type.axes))


def _transpose(at: Arrays, node: Node) -> Tensor:
    return at.held(node.args[0]).transpose(-1, -2)


def _identity(at: Arrays, node: Node) -> Tensor:
    return torch.eye(at.frame.length(str(node.attribute)), dtype=at.frame.real, device=at.frame.device)


def _projection(at: Arrays, node: Node) -> Tensor:
    features, width, seed = (at.integer(arg) for arg in node.args)
    if at.frame.tracing:  # what is drawn is remembered, and must not be a tensor without values
        return torch.empty(features, width, dtype=at.frame.real, device=at.frame.device)
    return orthogonal_gaussian(features, width, seed, dtype=at.frame.real, device=at.frame.device)


def _detach(at: Arrays, node: Node) -> Tensor:
    return at.value(node.args[0]).detach()


def _uniform(at: Arrays, node: Node) -> Tensor:
    return uniform(at.aligned(node.args)).to(at.frame.real)


def _group_sum(at: Arrays, node: Node) -> Tensor:
    """Sum over the query heads of a key head, given to each of them."""
    (arg,) = node.args
    place = arg.type.ordered_indices().index("h")
    heads = at.frame.sizes["h"]
    group = heads // at.frame.sizes["key_heads"]
    tensor = at.full(at.value(arg), place, "h")
    summed: Tensor = tensor.unflatten(place, (-1, group)).sum(place + 1)
    return summed.repeat_interleave(group, place)


# Blocks


def _local(at: Arrays, node: Node) -> Tensor:
    return at.names[str(node.attribute)]


def _repeat(at: Arrays, node: Node) -> Tensor:
    """A fixed number of rounds; the block is closed: what it reads from outside are args (see `ir.Block`)."""
    if runs(at, node):
        return rounds(at, node)
    block = node.block
    assert block is not None
    values = [at.value(arg) for arg in node.args[1:]]
    names = dict(zip([*block.states, *block.captured], values, strict=True))
    for _ in range(at.integer(node.args[0])):
        inner = Arrays(at.frame, at.rows)
        inner.names = dict(names)
        for name, step in block.steps:
            inner.names[name] = inner.value(step)
            inner.known.clear()
        names |= inner.names
    return names[block.result]


RULES |= {
    "dot": _dot,
    "matmul": _matmul,
    "outer": _outer,
    "concat": _concat,
    "matrix": _matrix,
    "unmatrix": _unmatrix,
    "transpose": _transpose,
    "identity": _identity,
    "orthogonal_gaussian": _projection,
    "detach": _detach,
    "uniform": _uniform,
    "group_sum": _group_sum,
    "state": _local,
    "local": _local,
    "repeat": _repeat,
}

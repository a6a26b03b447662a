"""Reads of whole arrays at computed places with torch: of a position along an index, of an element of a vector axis."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attnc.compiler.ir import Node
from attnc.dsl.diagnostics import InternalError
from attnc.runtime.compute.arrays import RULES, Arrays, layout
from attnc.runtime.scalars import of_node


def _shift(at: Arrays, node: Node) -> Tensor:
    """A read at a computed global position along an index; what lies outside is 0."""
    source, position = node.args
    along = str(node.attribute)
    own = source.type.ordered_indices()
    place = own.index(along)
    if at.rows is not None and along == "i":
        raise InternalError("rows are read at other rows in a chunk")
    tensor = at.full(at.value(source), place, along).movedim(place, len(own) - 1)
    rest = [name for name in own if name != along]
    origin = at.frame.offset if along == "i" else at.frame.axis(along).first if along in at.frame.axes else 0
    return gathered(at, node, tensor, rest, position, origin)


def _take(at: Arrays, node: Node) -> Tensor:
    """An element of a vector axis; what lies outside is 0."""
    source, position = node.args
    own = source.type.ordered_indices()
    place = len(own) + source.type.axes.index(str(node.attribute))
    return gathered(at, node, at.value(source).movedim(place, len(own)), own, position, 0)


def gathered(at: Arrays, node: Node, tensor: Tensor, rest: Sequence[str], position: Node, origin: int) -> Tensor:
    """`tensor`: dimensions `rest`, then the one that is read at a position, then vector axes."""
    indices = layout((*rest, *position.type.indices))
    for place, name in enumerate(indices):
        if name not in rest:
            tensor = tensor.unsqueeze(place)
    rank, length = len(indices), tensor.shape[len(indices)]
    tail = tensor.shape[rank + 1 :]
    single = of_node(position, at.frame.parameters, at.frame.sizes)
    if single is not None and length:
        within = 0 <= single - origin < length
        return tensor.select(rank, int(single) - origin) if within else torch.zeros_like(tensor.select(rank, 0))
    found = at.over(position, indices) - origin
    if length == 0:
        return tensor.new_zeros(*torch.broadcast_shapes(tensor.shape[:rank], found.shape), *tail)
    if "h" in indices:
        head = indices.index("h")
        most = max(tensor.shape[head], found.shape[head])
        tensor, found = at.heads(tensor, head, most), at.heads(found, head, most)
    shape = torch.broadcast_shapes(tensor.shape[:rank], found.shape)
    inside = (found >= 0) & (found < length)
    places = [
        torch.arange(size, device=tensor.device).view(-1, *(1,) * (rank - 1 - n)) if tensor.shape[n] != 1 else 0
        for n, size in enumerate(shape)
    ]
    taken = tensor[(*places, found.clamp(0, length - 1).expand(shape))]
    return torch.where(
        inside[(..., *(None,) * len(tail))], taken, torch.zeros((), dtype=taken.dtype, device=taken.device)
    )


RULES |= {"shift": _shift, "take": _take}

"""Steps on some heads of a call (`compiler.heads`): narrowed operands, and arrays that have those heads alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from attnc.compiler.composition import Attend, Carry, Recur, Step
from attnc.compiler.verify import step_reads
from attnc.runtime.compute.arrays import Frame, Span
from attnc.runtime.scalars import of_node


def span_of(step: Step, frame: Frame) -> Span | None:
    """The heads first .. last that a step runs on, in whole groups of key heads; None: all."""
    heads = step.heads if isinstance(step, Attend | Carry | Recur) else None
    if heads is None:
        return None
    count = frame.sizes["h"]
    first, last = (of_node(end, frame.parameters, frame.sizes) for end in (heads.first, heads.last))
    if not isinstance(first, int) or not isinstance(last, int):
        return None
    lengths = [frame.tensors[name].shape[place] for name, place in places(step, frame).items()]
    group = math.lcm(*(count // length for length in lengths if length > 1))
    first = max(min(first, count - 1), 0) // group * group
    last = min(max(-(-last // group) * group, first + group), count)  # where none is needed, one group stands for it
    return None if (first, last) == (0, count) else (first, last)


def places(step: Step, frame: Frame) -> dict[str, int]:
    """The arrays of heads that a step reads, with the dimension that counts them."""
    names = dict.fromkeys(name for name in step_reads(step) if "h" in frame.layouts[name])
    return {name: frame.layouts[name].index("h") for name in names}


def narrowed(step: Step, frame: Frame, span: Span | None) -> Frame:
    """The frame of a step on some heads."""
    if span is None:
        return frame
    first, last = span
    count, key_heads = frame.sizes["h"], frame.sizes["key_heads"]
    tensors = dict(frame.tensors)
    for name, place in places(step, frame).items():
        length = tensors[name].shape[place]
        if length > 1:
            tensors[name] = tensors[name].narrow(place, first * length // count, (last - first) * length // count)
    sizes = {**frame.sizes, "h": last - first, "key_heads": max(key_heads * (last - first) // count, 1)}
    return replace(frame, tensors=tensors, sizes=sizes)


def in_all_heads(step: Step, frame: Frame, span: Span | None, found: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Gradients of what a step read of `frame`, from those of what it read of the narrowed one: 0 in other heads."""
    if span is None:
        return found
    made = dict(found)
    for name, place in places(step, frame).items():
        shape = frame.tensors[name].shape
        if name in made and shape[place] > 1:
            made[name] = among_others(made[name], place, span[0] * shape[place] // frame.sizes["h"], shape)
    return made


def among_others(part: Tensor, place: int, first: int, shape: Sequence[int]) -> Tensor:
    """A tensor of that shape with `part` from `first` on along a dimension, and 0 before and behind."""
    whole = part.new_empty(shape)
    last = first + part.shape[place]
    for start, stop in ((0, first), (last, shape[place])):
        if stop > start:
            whole.narrow(place, start, stop - start).zero_()
    whole.narrow(place, first, part.shape[place]).copy_(part)
    return whole

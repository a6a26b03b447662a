"""Selections on CUDA: the operands of a generated kernel (see `compiler.emit.selecting`), and its launch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attnc.compiler.composition import Choose, Scores
from attnc.compiler.emit.selecting import selecting_kernel
from attnc.compiler.ir import Node, walk
from attnc.compiler.schedule_selecting import MOST, TAKEN_ONE_BY_ONE, WIDEST, held, power, selecting_shape
from attnc.dsl.types import Base
from attnc.runtime.call import Call
from attnc.runtime.compute.arrays import Arrays, Frame
from attnc.runtime.cuda.kernel_call import INTERPRETED, KernelCall, Kernels, interpreting, padded, processors

PROGRAMS = 2  # of a processor, each with buffers of its own
EXACT = frozenset(
    {"relu", "neg", "abs", "maximum", "minimum", "concat", "detach", "rename"}
)  # give what they are given

_loaded: dict[int, tuple[Scores, Kernels]] = {}


def kernels_of(scores: Scores) -> Kernels:
    """The kernel of a selection, made once a process."""
    if id(scores) not in _loaded:
        _loaded[id(scores)] = (scores, Kernels(scores.plan, [selecting_kernel(scores)]))
    return _loaded[id(scores)][1]


@dataclass(frozen=True)
class Vectors:
    """The product's operands: q (B or 1, H, lines, d), k (B or 1, heads, places, d), and what k has beyond the type of
    both; None where nothing."""

    q: Tensor
    k: Tensor
    low: Tensor | None

    def over(self, batch: int, heads: int) -> Vectors:
        """The same with every batch row, and every head of q."""
        low = None if self.low is None else self.low.expand(batch, -1, -1, -1)
        return Vectors(self.q.expand(batch, heads, -1, -1), self.k.expand(batch, -1, -1, -1), low)

    def by_turns(self, sizes: Mapping[str, int], members: int) -> Vectors:
        """The keys of the members' places, all of one turn after the other: k (B, heads * TURNS, members, d).

        A member has its place of turn t in line t: tiles of members are copied as they lie. A place that a member
        does not have is any other.
        """
        width, stride = sizes["PLACE_WIDTH"], sizes["PLACE_STRIDE"]
        start = torch.arange(members, device=self.k.device) * sizes["MEMBER_WIDTH"]
        first = torch.div(start - width + stride, stride, rounding_mode="floor").clamp_(min=0)
        turn = torch.arange(sizes["TURNS"], device=self.k.device)
        place = (first + turn[:, None]).clamp_(max=max(sizes["PLACES"] - 1, 0)).flatten()

        def laid(k: Tensor) -> Tensor:
            if not sizes["PLACES"]:
                return k.new_zeros(k.shape[0], k.shape[1] * len(turn), members, k.shape[3])
            taken: Tensor = k.index_select(2, place).unflatten(2, (len(turn), members)).flatten(1, 2)
            return taken

        return Vectors(self.q, laid(self.k), None if self.low is None else laid(self.low))


def select(step: Choose, frame: Frame, batch: int, width: int) -> Tensor | None:
    """The lists (batch, heads, lines, width), int32, of all members of the rows' axis; None where no kernel fits."""
    scores = step.scores
    if scores is None or frame.real is torch.float64 or width > MOST:
        return None
    at = Arrays(frame)
    lanes, heads = lanes_of(step, frame)
    count, members = frame.length(step.rows) if step.rows else 1, frame.length(step.axis)
    lists = torch.empty((batch, lanes, count, width), dtype=torch.int32, device=frame.device)
    if not lists.numel():  # there are no lines, or no members
        return lists
    vectors = vectors_of(step, scores, at)
    if vectors.q.shape[-1] > WIDEST:
        return None
    own = sizes_of(step, scores, frame)
    vectors = vectors.over(batch, lanes * heads)
    sizes = own | {"b": batch, "h": lanes * heads, "i": count, "d": vectors.q.shape[-1]}
    inputs = {name: array_of(step, scores, at, node) for name, node in scores.arrays.items()}
    offset = frame.offset if step.rows == "i" else 0
    sizes |= {"j": members, "t": members, "offset": offset}
    call = Call(vectors.q, vectors.k, None, dict(frame.parameters), inputs, sizes, offset=offset)
    told = {"LANES": lanes, "HEADS": heads, "WANTED": width, "WIDTH": width, "TURNS": own.get("TURNS", 1)}
    if scores.places is not None and scores.key is not None:
        vectors = vectors.by_turns(own, members)
    launch(scores, call, vectors, lists, told)
    return lists


def launch(scores: Scores, call: Call, vectors: Vectors, lists: Tensor, sizes: Mapping[str, int]) -> None:
    """Runs the kernel."""
    parts, members, width = 1 if vectors.low is None else 2, call.sizes["j"], sizes["WIDTH"]
    vector = padded(vectors.q.shape[-1]) if scores.query is not None else 0
    itemsize, heads = vectors.q.element_size(), sizes["HEADS"]
    shape = INTERPRETED if interpreting() else selecting_shape(vector, itemsize, parts, members, heads)
    shape = replace(shape, block_m=min(shape.block_m, padded(call.sizes["i"])))
    kept = held(shape, members, width)
    device = lists.device
    batch, lanes, count, _ = lists.shape
    programs = -(-count // shape.block_m) * lanes * batch
    buffers = dict.fromkeys(("held", "held_used", "held_last"), lists)
    if not kept.resident:
        programs = min(programs, processors(lists) * PROGRAMS)
        lines = programs * shape.block_m
        buffers["held"] = torch.empty(lines * kept.capacity, dtype=torch.int64, device=device)
        for name in ("held_used", "held_last"):
            buffers[name] = torch.empty(lines, dtype=torch.int32, device=device)
    low = vectors.k if vectors.low is None else vectors.low
    run = KernelCall(
        call, {"q": vectors.q, "k": vectors.k, "k_low": low, "v": vectors.k, "lists": lists, **buffers}, shape
    )
    run.sizes |= sizes
    # Branches within a loop that copies tiles are compiled wrongly with products in three passes (see `kernel.alive`)
    plain = {"VIEW": False, "VIEW_Q": False} if scores.query is None or vectors.q.element_size() > 2 else {}
    kernels = kernels_of(scores)
    run.run(
        kernels,
        kernels.kernels[0],
        (programs, 1),
        PARTS=parts,
        RESIDENT=kept.resident,
        CAPACITY=kept.capacity,
        AT_ONCE=kept.at_once,
        PADDED=max(power(width), 2) if kept.resident else 128,
        FORCED=scores.force is not None,
        FEW=width if width <= TAKEN_ONE_BY_ONE else 0,
        **plain,
    )


def lanes_of(step: Choose, frame: Frame) -> tuple[int, int]:
    """Lists of a line, and the heads that the scores of each are summed over."""
    heads, key_heads = frame.sizes["h"], frame.sizes["key_heads"]
    if step.heads == "each":
        return heads, 1
    if step.heads == "group":
        return key_heads, heads // key_heads
    head = step.scores.head if step.scores else None
    return 1, frame.length(head) if head else 1


def sizes_of(step: Choose, scores: Scores, frame: Frame) -> dict[str, int]:
    """The pattern's lengths under `outer_` names, and those of the places that a member's score sums over."""
    sizes = {f"outer_{name}": frame.length(name) for name in (*frame.sizes, *frame.axes) if name not in ("b", "h")}
    if scores.places is None:
        return sizes
    member = frame.axis(step.axis)
    width, stride = 1, 1
    if scores.places in frame.axes:
        place = frame.axis(scores.places)
        width, stride = place.width, place.stride
    sizes |= {"PLACES": frame.length(scores.places), "PLACE_WIDTH": width, "PLACE_STRIDE": stride}
    turns = most_places(member.width, width, stride)
    return sizes | {"MEMBER_WIDTH": member.width, "LENGTH": member.length, "TURNS": turns}


def most_places(member: int, width: int, stride: int) -> int:
    """The most places of `width`, one every `stride`, that overlap a member: tokens s .. s + member, s = n * member."""
    starts = range(0, stride, math.gcd(member, stride))
    return max((start + member - 1) // stride - (start - width) // stride for start in starts)


# Operands


def vectors_of(step: Choose, scores: Scores, at: Arrays) -> Vectors:
    """The product's vectors, of one type: the call's where the lines' are of it, else float32.

    A bfloat16 line meets wider keys as two numbers of bfloat16 each, which hold 16 bits of them.
    """
    if scores.query is None or scores.key is None:
        empty = torch.zeros(1, 1, 1, 1, device=at.frame.device)
        return Vectors(empty, empty, None)
    heads = scores.head if scores.head not in (None, "h") else "h"
    q = laid(at, scores.query, ("b", str(heads), step.rows))
    k = laid(at, scores.key, ("b", str(heads), scores.places or step.axis))
    if q.dtype == k.dtype:
        return Vectors(q, k, None)
    if q.dtype != torch.bfloat16:
        return Vectors(q.float(), k.float(), None)
    high = k.to(torch.bfloat16)
    return Vectors(q, high, (k - high.float()).to(torch.bfloat16))


def laid(at: Arrays, node: Node, names: Sequence[str]) -> Tensor:
    """A vector over `names` (some of which it may not vary over: 1 long there), then its axis."""
    frame = at.frame
    if node.op == "input" and frame.layouts[str(node.attribute)][:-1] == tuple(names):
        return frame.tensors[str(node.attribute)]
    element = frame.tensors["q"].dtype
    exact = all(one.op in EXACT if one.op != "input" else keeps(frame, one, element) for one in walk(node))
    tensor = Arrays(replace(frame, real=element)).value(node) if exact else at.value(node)
    return placed(tensor, (*node.type.ordered_indices(), *node.type.axes), names)


def keeps(frame: Frame, node: Node, element: torch.dtype) -> bool:
    """Whether an input is of the element type of the call."""
    return frame.tensors[str(node.attribute)].dtype == element


def placed(tensor: Tensor, own: Sequence[str], names: Sequence[str]) -> Tensor:
    """Dimensions `own` as `names`, 1 long where there is none, and what is left after them."""
    rest = [name for name in own if name not in names]
    for name in names:
        if name not in own:
            tensor, own = tensor.unsqueeze(0), (name, *own)
    return tensor.permute([list(own).index(name) for name in (*names, *rest)])


def array_of(step: Choose, scores: Scores, at: Arrays, node: Node) -> Tensor:
    """A value of one side, in the layout that the kernel's plan declares."""
    swapped = {step.rows: "i", step.axis: "j", str(scores.places): "j"}
    if scores.head is not None:
        swapped[scores.head] = "h"
    own = [swapped.get(name, name) for name in (*node.type.ordered_indices(), *node.type.axes)]
    names = [name for name in "bhij" if name in own]
    given = at.frame.layouts[str(node.attribute)] if node.op == "input" else ()
    if [swapped.get(name, name) for name in given] == names:
        tensor = at.frame.tensors[str(node.attribute)]
    else:
        tensor = placed(at.value(node), own, names)
    return tensor.float() if node.type.base is Base.REAL else tensor

"""What a call leaves to the next one: states of a pattern, for sequences that come in parts, with gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from attnc.runtime.program import program
from attnc.runtime.refusal import listed, refuse
from attnc.runtime.steps.handed import StateError

if TYPE_CHECKING:
    from attnc.dsl.terms import Pattern


class State(NamedTuple):
    """What the tokens so far leave to later ones. Made by `pattern.with_state(..)`, or by hand to begin with.

    `tokens`: how many there were; positions that the text reads (i, j, t) count from it. `tensors`, by name:

    - of every step that carries a state, (B, heads, F, E) in the type of sums, float32, or float64 for float64: the
      sum over the tokens of key features times values, decayed. Heads are those of k and v where query heads share
      it, else H. With a `normalize`, E is one longer: the last column is the sum of the key features.
    - of an input that packs documents (`doc[i] == doc[j]`), (B,) ints: the last token's. Where the first token of the
      next call has another, its state begins at 0.

    `pattern.cache(..)` and `decode` keep the same without gradients; `explain` names the steps.
    """

    tokens: int
    tensors: dict[str, Tensor]

    def detach(self) -> State:
        """The same, where gradients end: for truncated backpropagation through time."""
        return State(self.tokens, {name: one.detach() for name, one in self.tensors.items()})


class Names(NamedTuple):
    """Of a program that hands states over: its key, whether it counts tokens, the names of the tensors, which are ints,
    and their places among what steps leave."""

    key: str
    counts: bool
    names: tuple[str, ...]
    ints: tuple[bool, ...]
    places: tuple[int, ...]


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # a graph cannot hold compiling a text
def names_of(key: str) -> Names:
    """The program of calls that go on from states. Raises AttnError, located, where there is none."""
    from attnc.runtime.steps.composition import places_of

    found = program(key).handing
    composition = found.composition
    handed = composition.handed
    places = places_of(composition)
    ints = tuple(len(composition.arrays[one.before].axes) == 1 for one in handed)
    return Names(
        found.key, found.counts, tuple(one.name for one in handed), ints, tuple(places[one.after] for one in handed)
    )


def call_with_state(
    pattern: Pattern,
    key: str,
    tensors: tuple[Tensor, Tensor, Tensor | None, list[Tensor]],
    numbers: tuple[list[int], list[float]],
    state: State | None,
    backend: str,
) -> tuple[Tensor, State]:
    """The operator on q, k, v and the inputs, with ints and floats as it takes them, from a state."""
    names = names_of(key)
    q, k, v, inputs = tensors
    ints, floats = numbers
    if q.shape[2] > k.shape[2]:
        refuse(pattern, "decoding", "a state goes on with a key for every query", given={"q": q, "k": k})
    entered = [*inputs, *entering(pattern, names, q, state)]
    before = 0 if state is None else state.tokens
    counted = [*ints, before] if names.counts else ints
    try:
        out, _, left = torch.ops.attnc.attention(names.key, q, k, v, entered, counted, floats, backend)
    except StateError as error:
        refuse(pattern, "shape", str(error))
    tensors_left = {name: left[at] for name, at in zip(names.names, names.places, strict=True)}
    return out, State(before + k.shape[2], tensors_left)


def entering(pattern: Pattern, names: Names, q: Tensor, state: State | None) -> list[Tensor]:
    """The tensors of a state in order; without one, tensors of no element, and documents that nothing reads."""
    if state is None:
        return [
            torch.empty(q.shape[:1], dtype=torch.int64, device=q.device) if ints else q.new_empty((0, 0, 0, 0))
            for ints in names.ints
        ]
    if set(state.tensors) != set(names.names):
        message = f"the state holds {listed(state.tensors) or 'nothing'}, where {listed(names.names)} are expected"
        refuse(pattern, "argument", message)
    made = []
    for name, ints in zip(names.names, names.ints, strict=True):
        one = state.tensors[name]
        if one.device != q.device:
            refuse(pattern, "device", f"`{name}` of the state is on {one.device} and `q` on {q.device}")
        if ints and tuple(one.shape) != (q.shape[0],):
            refuse(pattern, "shape", f"`{name}` of the state has shape {tuple(one.shape)}, not ({q.shape[0]},)")
        if not ints and (not one.is_floating_point() or one.dim() != 4):
            refuse(pattern, "dtype", f"`{name}` of the state is no real tensor of 4 dimensions")
        made.append(one)
    return made

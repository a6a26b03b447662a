"""States that steps take from an earlier call and leave to a later one (see `compiler.handing`), with gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from attnc.compiler.composition import Carry, Recur
from attnc.runtime.compute.arrays import Frame

Operands = Sequence[Tensor | None]


class StateError(ValueError):
    """A state that does not fit a call. `name`: its step."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(message)
        self.name = name


def state_heads(operands: Operands) -> int:
    """Heads whose states differ. `operands`: query, key, value and decay of a sum, or more of a recurrence."""
    query, key, value, decay, *changes = operands
    assert query is not None
    assert key is not None
    assert value is not None
    heads = max(one.shape[1] for one in operands if one is not None)
    shared = max(key.shape[1], value.shape[1])
    return heads if changes or (decay is not None and decay.shape[1] > shared) else shared


def state_shape(step: Carry | Recur, frame: Frame, operands: Operands) -> list[int]:
    """(batch, heads, features, values[+ 1 with a total])."""
    _, key, value, *_ = operands
    assert key is not None
    assert value is not None
    wider = isinstance(step, Carry) and step.total is not None
    return [frame.sizes["b"], state_heads(operands), key.shape[-1], value.shape[-1] + wider]


def initial_state(step: Carry | Recur, frame: Frame, operands: Operands, same: Tensor | None = None) -> Tensor | None:
    """The state before the first key; None: 0. `same` (b, t): it is kept where its document goes on."""
    if step.handing is None:
        return None
    state = frame.tensors[step.handing.before]
    if state.numel() == 0:
        return None
    expected = state_shape(step, frame, operands)
    if list(state.shape) != expected:
        message = f"the state of `{step.name}` has shape {tuple(state.shape)} where {tuple(expected)} is expected"
        raise StateError(step.name, message)
    if same is None or step.handing.document is None:
        return state
    goes_on = frame.tensors[step.handing.document[0]] == same[:, 0]
    return torch.where(goes_on[:, None, None, None], state, 0.0)


def left_shapes(step: Carry | Recur, frame: Frame, operands: Operands) -> list[tuple[list[int], torch.dtype]]:
    """Shape and type of what is left for a later call."""
    if step.handing is None:
        return []
    shapes = [(state_shape(step, frame, operands), frame.real)]
    if step.handing.document is not None:
        shapes.append(([frame.sizes["b"]], frame.tensors[step.handing.document[0]].dtype))
    return shapes


def left_states(step: Carry | Recur, frame: Frame, state: Tensor | None, same: Tensor | None = None) -> list[Tensor]:
    """What a step leaves for a later call, of its last state."""
    if step.handing is None or state is None:
        return []
    left = [state.contiguous()]
    if step.handing.document is not None and same is not None:
        left.append(same[:, -1].to(frame.tensors[step.handing.document[0]].dtype, copy=True))
    return left


# Rows that read the state before the update of their own position: they begin at `offset` = -1 or later


def first_row(query: Tensor, state: Tensor) -> Tensor:
    """The read (b, h, 1, e) of a row before the first key."""
    return query[:, :, :1].to(state.dtype) @ by_head(state, query.shape[1])


def first_row_gradients(cotangent: Tensor, query: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Those of that row and of the state."""
    given, heads = cotangent[:, :, :1].to(state.dtype), query.shape[1]
    of_state = query[:, :, :1].to(state.dtype).mT @ given
    return given @ by_head(state, heads).mT, by_group(of_state, state.shape[1])


def at_keys(rows: Tensor, offset: int) -> tuple[Tensor, int]:
    """Rows that have a key, up to the last key, whose row is 0; and where they begin."""
    rows = pad(rows, (0, 0, 0, 1))
    return (rows[:, :, 1:], 0) if offset < 0 else (rows, offset)


def from_keys(rows: Tensor, offset: int) -> Tensor:
    """What `at_keys` took, with 0 for a row before the first key."""
    rows = rows[:, :, :-1]
    return pad(rows, (0, 0, 1, 0)) if offset < 0 else rows


def by_head(x: Tensor, heads: int) -> Tensor:
    """(b, heads, ..) of fewer heads that are shared."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def by_group(x: Tensor, heads: int) -> Tensor:
    """The sum over the heads that share one of `heads`."""
    return x if x.shape[1] == heads else x.unflatten(1, (heads, -1)).sum(2)

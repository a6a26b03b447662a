"""Calls that repeat: the second of a kind is recorded, later ones do what was recorded (see `tape`).

A kind of call is all that Python decides on: the program and its parameters, and each tensor's type, device, shape,
strides and alignment, and which of them are one memory. The contents are free to change.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from threading import Lock

import torch
from torch import Tensor

from attnc.runtime.clock import running
from attnc.runtime.recording.tape import Recorder, current
from attnc.runtime.recording.tape_text import ChangedError, Tape, program_of

REMEMBERED = 256  # kinds of calls
HELD = 2**29  # bytes that all recordings keep on devices
VARIANTS = 4  # recordings of a kind, for elements that the host reads
ALIGNMENT = 16  # bytes, as Triton's kernels ask

Run = Callable[[], list[Tensor]]
Key = tuple[object, ...]


@dataclass
class Kind:
    """What is known of one kind of call. `reason`: why it is not recorded."""

    tapes: list[Tape] = field(default_factory=list)
    reason: str | None = None


class CaptureError(RuntimeError):
    """A call cannot be captured in a CUDA graph."""


_kinds: OrderedDict[Key, Kind] = OrderedDict()
_lock = Lock()
# Where calls are recorded: on a CPU what torch does outweighs what Python does. ATTNC_RECORD=0: nowhere.
devices: set[str] = set() if os.environ.get("ATTNC_RECORD") == "0" else {"cuda"}


def repeated(name: str, key: Key, tensors: Sequence[Tensor | None], run: Run) -> list[Tensor]:
    """The results of `run`, which follow from the key and the tensors alone.

    Raises CaptureError where a CUDA graph is captured and the call is not yet recorded, or waits for the device.
    """
    first = next(tensor for tensor in tensors if tensor is not None)
    if first.device.type not in devices or current() is not None or running() is not None:
        return run()
    full = (name, *key, *described(tensors), *modes(first.device))
    capturing = first.is_cuda and torch.cuda.is_current_stream_capturing()
    kind = _kinds.get(full)
    if kind is None:
        if capturing:
            raise CaptureError(f"{name}: call it three times with tensors of these shapes before a CUDA graph captures")
        remember(full)
        return run()
    tapes = kind.tapes
    if capturing:
        refuse_waiting(name, kind)
    for at, tape in enumerate(tapes):
        try:
            found = on_device(first, tape, tensors)
        except ChangedError:
            continue
        if at:  # the next call most likely reads what this one did
            kind.tapes = [tape, *tapes[:at], *tapes[at + 1 :]]
        return found
    if kind.reason is not None or len(tapes) >= VARIANTS:
        return run()
    return record(kind, tensors, run)


def on_device(first: Tensor, tape: Tape, tensors: Sequence[Tensor | None]) -> list[Tensor]:
    """A recorded call on its tensors' device."""
    if not first.is_cuda or torch.cuda.current_device() == first.device.index:
        return tape.run(*tensors)
    with torch.cuda.device(first.device):
        return tape.run(*tensors)


def record(kind: Kind, tensors: Sequence[Tensor | None], run: Run) -> list[Tensor]:
    """Runs, and records what is done."""
    recorder = Recorder(tensors)
    with recorder:
        results = run()
    made = None if recorder.failed() else program_of(recorder, results)
    if made is not None:
        with _lock:
            kind.tapes = [made, *kind.tapes]
        release()
    kind.reason = kind.reason or recorder.failure
    return results


def refuse_waiting(name: str, kind: Kind) -> None:
    """Raises where a call cannot run without the host."""
    if kind.reason is not None:
        raise CaptureError(f"{name} cannot be captured in a CUDA graph: {kind.reason}")
    if any(tape.reads for tape in kind.tapes):
        raise CaptureError(f"{name} cannot be captured in a CUDA graph: tensors decide the sizes of what it makes")
    if not kind.tapes:
        raise CaptureError(f"{name}: call it three times with tensors of these shapes before a CUDA graph captures")


def described(tensors: Sequence[Tensor | None]) -> Key:
    """What Python may decide on of tensors, but for their contents."""
    places = [0 if one is None else one.data_ptr() for one in tensors]
    same: object = None if len({*places}) == len(places) else tuple(places.index(place) for place in places)
    parts: list[object] = [same]
    for one, place in zip(tensors, places, strict=True):
        if one is None:
            parts.append(None)
        else:
            parts += (one.dtype, one.shape, one.stride(), one.device, place % ALIGNMENT)
    return tuple(parts)


def modes(device: torch.device) -> Key:
    """Modes of torch that change what its operators do."""
    if not torch.is_autocast_enabled(device.type):
        return (torch.are_deterministic_algorithms_enabled(),)
    return torch.are_deterministic_algorithms_enabled(), torch.get_autocast_dtype(device.type)


def remember(key: Key) -> None:
    """Notes a kind of call; the one that was noted first gives way."""
    with _lock:
        _kinds[key] = Kind()
        if len(_kinds) > REMEMBERED:
            _kinds.popitem(last=False)


def release() -> None:
    """Drops the oldest recordings while all of them keep too much."""
    with _lock:
        total = sum(tape.bytes for kind in _kinds.values() for tape in kind.tapes)
        for kind in list(_kinds.values())[:-1]:
            if total <= HELD:
                break
            total -= sum(tape.bytes for tape in kind.tapes)
            kind.tapes = []


def forget() -> None:
    """Drops all that is known of calls."""
    with _lock:
        _kinds.clear()

"""Records what a call does to tensors: the operations and launches, without the Python that decided on them.

All that Python decides on (shapes, strides, types, parameters) is the same for the next call of the same kind, so that
call may do the recorded operations alone (`tape_text` writes them down as straight-line code). What does not follow
from the call's tensors is worked out once and kept. Where an element that does is read by the host, the recording
notes what was read: the operations hold as long as the same is read again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._C import _len_torch_dispatch_stack
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

LONGEST = 4096  # events; a longer one is of no use: its call waits for the device anyway
LARGEST = 2**24  # bytes of a tensor that is kept between calls; larger ones are made again
UNFILLED = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "empty_permuted")
FILLED = ("zeros", "ones", "full", "zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full")

Geometry = tuple[tuple[int, ...], tuple[int, ...], int]  # size, strides, offset in the storage


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: a view of a root."""

    root: int
    geometry: Geometry


@dataclass
class Root:
    """The memory that an operation made, or that came from outside.

    `varies`: it follows from the call's tensors; else `tensor` holds it. `filled`: made to be written, so that a
    launch that gets it may do so.
    """

    geometry: Geometry
    dtype: torch.dtype
    varies: bool
    tensor: Tensor | None
    given: int | None = None  # its number among the call's tensors
    foreign: bool = False  # older than the recording
    filled: bool = False
    blank: bool = False  # nothing that was seen has written it yet
    shared: bool = False  # with another root: it may not be written


@dataclass(frozen=True)
class Operation:
    """A torch operator. `args` and `kwargs` hold places; `made`: the new roots by their place among the results."""

    function: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    made: Mapping[int, int]
    results: int
    written: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Launch:
    """A kernel. `start(*tensors)` launches it as it was, with the tensors at `places`."""

    start: Any
    places: tuple[Place, ...]


@dataclass(frozen=True)
class Read:
    """An element that the host read, and what it was."""

    place: Place
    value: Any


Event = Operation | Launch | Read


class Recorder(TorchDispatchMode):
    """A recording of one call. `failure` says why it cannot be used, if it can't."""

    def __init__(self, tensors: Sequence[Tensor | None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.events: list[Event] = []
        self.roots: list[Root] = []
        self.failure: str | None = None
        self._places = WeakTensorKeyDictionary()
        for number, tensor in enumerate(tensors):
            if tensor is not None and tensor not in self._places:
                self._root(tensor, varies=True, given=number)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.failed():
            return func(*args, **kwargs)
        if func._can_decompose():
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        places = [self.place(tensor, new=func is torch.ops.aten.lift_fresh.default) for tensor in given]
        result = func(*args, **kwargs)
        if self.failed():
            return result
        varies = any(self.roots[place.root].varies for place in places)
        if func._schema.name == "aten::_local_scalar_dense":
            if varies:
                self.events.append(Read(places[0], result))
            return result
        if varies and (reason := _undecided(func, args, result)):
            self.fail(reason)
        if not self.failed():
            self._note(func, args, kwargs, list(zip(given, places, strict=True)), varies, result)
        return result

    def place(self, tensor: Tensor, new: bool = False) -> Place:
        """Where a tensor lies; one that is not known was there before, and stays as it is."""
        found: Place | None = self._places.get(tensor)
        if found is None:
            if tensor.is_cuda and not new and not lasts(tensor):
                self.fail("a tensor of unknown origin")
            found = self._root(tensor, varies=False, foreign=True)
        return found

    def failed(self) -> bool:
        """Whether the recording is given up."""
        return self.failure is not None

    def fail(self, reason: str) -> None:
        """Gives the recording up."""
        self.failure = self.failure or reason
        self.events.clear()
        self.roots.clear()
        self._places.clear()

    def launch(self, start: Any, tensors: Sequence[Tensor]) -> None:
        """Notes the launch of a kernel, `start(*tensors)`, which may write what was made to be written."""
        if self.failed():
            return
        places = [self.place(tensor) for tensor in tensors]
        if self.failed():
            return
        for place in places:
            self.roots[place.root].blank = False
            if self.roots[place.root].filled:
                self._vary(place.root)
        self.events.append(Launch(start, tuple(places)))

    def _root(self, tensor: Tensor, *, varies: bool, **more: Any) -> Place:
        shown = geometry(tensor)
        self.roots.append(Root(shown, tensor.dtype, varies, None if varies else tensor, **more))
        self._places[tensor] = place = Place(len(self.roots) - 1, shown)
        return place

    def _vary(self, root: int) -> None:
        self.roots[root].varies, self.roots[root].tensor = True, None

    def _note(
        self, func: Any, args: Any, kwargs: Any, given: list[tuple[Tensor, Place]], varies: bool, result: Any
    ) -> None:
        """One operation: what it writes, and what it makes that is no view of what there was."""
        if len(self.events) > LONGEST:
            return self.fail("too many operations")
        written = self._written(func, args, kwargs, varies)
        if self.failed():
            return None
        storages = {tensor.untyped_storage()._cdata: place for tensor, place in given}
        results = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        made: dict[int, int] = {}
        name = func._schema.name.removeprefix("aten::")
        for number, tensor in enumerate(results):
            if tensor in self._places:
                continue
            base = storages.get(tensor.untyped_storage()._cdata)
            if base is None:
                made[number] = len(self.roots)
                blank, filled = name in UNFILLED, name in FILLED
                changes = (varies and not filled) or tensor.untyped_storage().nbytes() > LARGEST
                self._root(tensor, varies=changes or blank, filled=blank or filled, blank=blank)
            elif self.roots[base.root].dtype != tensor.dtype:  # the same memory as another type
                made[number] = len(self.roots)
                self.roots[base.root].shared = True
                self._root(tensor, varies=varies, shared=True)
            else:
                self._places[tensor] = Place(base.root, geometry(tensor))
        if not made and not written:
            return None
        if name not in (*UNFILLED, *FILLED) and not self.seen([place.root for _, place in given]):
            return None
        if not isinstance(result, Tensor) and any(not isinstance(one, Tensor) for one in result or ()):
            return self.fail(f"{name} gives more than tensors")
        held_args, held_kwargs = tree_map(self._hold, (tuple(args), dict(kwargs)))
        self.events.append(Operation(func, held_args, held_kwargs, made, len(results), written))
        return None

    def _hold(self, leaf: Any) -> Any:
        return self._places[leaf] if isinstance(leaf, Tensor) else leaf

    def _written(self, func: Any, args: Any, kwargs: Any, varies: bool) -> frozenset[int]:
        """The roots that an operation changes in place."""
        if not func._schema.is_mutable or func is torch.ops.aten.detach_.default:
            return frozenset()
        found: set[int] = set()
        for at, declared in enumerate(func._schema.arguments):
            if declared.alias_info is None or not declared.alias_info.is_write:
                continue
            value = args[at] if at < len(args) else kwargs.get(declared.name)
            found |= {self._places[leaf].root for leaf in tree_leaves(value) if isinstance(leaf, Tensor)}
        for root in found:
            if self.roots[root].given is not None or self.roots[root].foreign or self.roots[root].shared:
                self.fail(f"{func} writes a tensor of the call or of a cache")
                return frozenset()
            self.roots[root].blank = False
            if varies:
                self._vary(root)
        return frozenset(found)

    def seen(self, read: Sequence[int]) -> bool:
        """Whether all that is read was written by something that was seen; else the recording lacks what did."""
        if any(self.roots[root].blank and 0 not in self.roots[root].geometry[0] for root in read):
            self.fail("a kernel was launched unseen")
        return not self.failed()


def geometry(tensor: Tensor) -> Geometry:
    """How a tensor lies in its storage."""
    return tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset())


def _undecided(func: Any, args: Any, result: Any) -> str | None:
    """Why an operation cannot be done again without Python: its result's size or contents are not the call's alone."""
    if torch.Tag.nondeterministic_seeded in func.tags:
        return f"{func} draws numbers"
    if torch.Tag.data_dependent_output in func.tags:
        return f"{func} reads elements"
    if torch.Tag.dynamic_output_shape in func.tags:
        indices = args[1] if func is torch.ops.aten.index.Tensor else [None]
        if func is not torch.ops.aten.index.Tensor or any(
            one is not None and one.dtype in (torch.bool, torch.uint8) for one in indices
        ):
            return f"{func}: tensors decide the size of its result"
    devices = {leaf.device.type for leaf in tree_leaves(result) if isinstance(leaf, Tensor)}
    given = {leaf.device.type for leaf in tree_leaves(args) if isinstance(leaf, Tensor)}
    return "elements are copied to the host" if "cpu" in devices and "cuda" in given else None


_lasting = WeakTensorKeyDictionary()


def lasting(tensor: Tensor) -> Tensor:
    """Declares that a tensor on a GPU is kept between calls and never changes, so that recordings may hold it."""
    _lasting[tensor] = True
    return tensor


def lasts(tensor: Tensor) -> bool:
    """Whether a tensor was declared to be `lasting`."""
    return tensor in _lasting


def current() -> Recorder | None:
    """The recording that is under way; autograd's threads have it too."""
    if not _len_torch_dispatch_stack():
        return None
    return next((mode for mode in reversed(_get_current_dispatch_mode_stack()) if isinstance(mode, Recorder)), None)

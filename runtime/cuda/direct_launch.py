"""Launches in which nothing but the tensors' addresses differs from one before.

Triton's launcher looks at every argument again, and encodes every tensor descriptor again, in Python: tens of
microseconds a launch. Here arguments are laid out once, addresses are put in as numbers, and descriptors that were
encoded for an address are kept. It goes by the launcher of Triton 3.6 and 3.7; where that has another form, and where
somebody listens to launches, Triton's own way is taken.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from copy import copy
from typing import Any

from torch import Tensor

ADDRESSES = 32  # of which a descriptor is kept, a place
PARTS = ("launch", "launch_cooperative_grid", "launch_pdl", "global_scratch_size", "profile_scratch_size")


class Interpreted:
    """A launch in Triton's interpreter, or by its own dispatch. Called with the tensors that `tensors_of` gives."""

    def __init__(self, function: Any, grid: tuple[int, ...], values: Sequence[Any], constants: dict[str, Any]) -> None:
        self.launch = function[grid]
        self.values, self.constants = values, constants

    def __call__(self, *tensors: Tensor) -> None:
        self.launch(*filled(self.values, tensors), **self.constants)


class Direct:
    """A launch of a compiled kernel. `values`: all arguments, as Triton's launcher takes them."""

    def __init__(self, compiled: Any, grid: tuple[int, ...], values: Sequence[Any]) -> None:
        from triton import knobs

        self.runtime = knobs.runtime
        self.values = [without_tensor(value) for value in values]
        self.plain = compiled[(*grid, *(1,) * (3 - len(grid)))]
        self.raw = raw_launch(compiled, (*grid, *(1,) * (3 - len(grid))))
        if self.raw is not None:
            self.lay_out(compiled, values)

    def lay_out(self, compiled: Any, values: Sequence[Any]) -> None:
        """The arguments in a row, with the places of addresses and of descriptors."""
        launch = compiled.run.launch
        formats = iter(
            inspect.getclosurevars(launch).nonlocals["tensordesc_meta"] if inspect.isfunction(launch) else ()
        )
        self.row: list[Any] = []
        self.addresses: list[int] = []
        self.slots: list[tuple[int, Slot | None]] = []
        for value in values:
            if isinstance(value, Tensor):
                self.slots.append((len(self.row), None))
                self.row.append(0)
            elif isinstance(getattr(value, "base", None), Tensor):
                slot = Slot(value, next(formats))
                parts = slot.encoded(value.base)
                self.slots.append((len(self.row), slot))
                self.row += parts
            else:
                self.row.append(value)

    def __call__(self, *tensors: Tensor) -> None:
        if self.raw is None or listeners(self.runtime):
            self.plain(*filled(self.values, tensors))
            return
        row = self.row.copy()
        for (at, slot), tensor in zip(self.slots, tensors, strict=True):
            if slot is None:
                row[at] = tensor.data_ptr()
            else:
                row[at] = slot.encoded(tensor)[0]
        self.raw(row)


class Slot:
    """A descriptor among the arguments: its parts, by address."""

    def __init__(self, template: Any, form: Any) -> None:
        self.template, self.form = without_tensor(template), form
        self.known: dict[int, list[Any]] = {}

    def encoded(self, tensor: Tensor) -> list[Any]:
        """What Triton's launcher makes of the descriptor."""
        address = tensor.data_ptr()
        found = self.known.get(address)
        if found is None:
            from triton.backends.nvidia.driver import make_tensordesc_arg

            first, *others = make_tensordesc_arg(with_tensor(self.template, tensor), self.form)
            found = [address if isinstance(first, Tensor) else first, *others]
            if len(self.known) >= ADDRESSES:
                self.known.clear()
            self.known[address] = found
        return found


def raw_launch(compiled: Any, grid: tuple[int, ...]) -> Callable[[list[Any]], None] | None:
    """Triton's launch in C as a function of a row of arguments; None where it has another form."""
    run = compiled.run
    if not all(hasattr(run, part) for part in PARTS) or run.global_scratch_size or run.profile_scratch_size:
        return None
    launch = run.launch
    if inspect.isfunction(launch):
        outer = inspect.getclosurevars(launch).nonlocals
        if not {"launcher", "tensordesc_meta", "tensordesc_indices"} <= {*outer}:
            return None
        launch = outer["launcher"]
    from triton.runtime import driver

    active: Any = driver.active
    device, stream = active.get_current_device(), active.get_current_stream
    function, packed = compiled.function, compiled.packed_metadata
    flags = run.launch_cooperative_grid, run.launch_pdl
    if hasattr(run, "kernel_signature") and hasattr(run, "arg_annotations"):  # Triton 3.7
        last = (packed, None, None, None, None, None, run.arg_annotations, run.kernel_signature)
        return lambda row: launch(*grid, stream(device), function, *flags, *last, row)
    middle = (None, None, packed, None, None, None)
    return lambda row: launch(*grid, stream(device), function, *flags, *middle, *row)


def listeners(runtime: Any) -> bool:
    """Whether a profiler listens to launches."""
    hooks = runtime.launch_enter_hook, runtime.launch_exit_hook
    return any(getattr(hook, "calls", hook) for hook in hooks)


def tensors_of(values: Sequence[Any]) -> list[Tensor]:
    """The tensors among arguments, those of descriptors too."""
    found = (value if isinstance(value, Tensor) else getattr(value, "base", None) for value in values)
    return [tensor for tensor in found if isinstance(tensor, Tensor)]


def without_tensor(value: Any) -> Any:
    """An argument that holds no memory."""
    if isinstance(value, Tensor):
        return Tensor
    return with_tensor(value, Tensor) if isinstance(getattr(value, "base", None), Tensor) else value


def with_tensor(template: Any, tensor: Any) -> Any:
    """A descriptor of another tensor of the same form."""
    made = copy(template)
    made.base = tensor
    return made


def filled(values: Sequence[Any], tensors: Sequence[Tensor]) -> list[Any]:
    """The arguments with tensors in place."""
    rest = iter(tensors)
    return [
        next(rest)
        if value is Tensor
        else with_tensor(value, next(rest))
        if getattr(value, "base", 0) is Tensor
        else value
        for value in values
    ]

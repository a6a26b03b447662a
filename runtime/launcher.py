"""Launches of generated kernels, of whatever module: what Triton chose for arguments of a kind is asked for once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType
from typing import Any

from torch import Tensor

from attnc.runtime.direct_launch import Direct, Interpreted, tensors_of, without_tensor
from attnc.runtime.tape import current

REMEMBERED = 256  # compiled kernels of one function
Grid = tuple[int, ...]


class Launchers:
    """The kernels of a module by name, as launchers; everything else as the module has it."""

    def __init__(self, module: ModuleType) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._module, name)
        if hasattr(found, "run") and hasattr(found, "arg_names"):
            found = Launcher(found)
        setattr(self, name, found)
        return found


class Launcher:
    """A kernel of a module. `launcher[grid](*values, **constants)` launches it as Triton's own function does."""

    def __init__(self, function: Any) -> None:
        self.function = function
        self.arg_names: Sequence[str] = function.arg_names
        self.known: OrderedDict[tuple[object, ...], Any] = OrderedDict()

    def __getitem__(self, grid: Grid) -> Callable[..., Any]:
        return partial(self.launch, grid)

    def launch(self, grid: Grid, *values: Any, **constants: Any) -> Any:
        """Launch; gives Triton's compiled kernel (None in the interpreter)."""
        key = (*(kind_of(value) for value in values), *constants.items())
        compiled = self.known.get(key)
        if compiled is None:
            compiled = self.first(grid, values, constants)
            if compiled is not None:
                self.known[key] = compiled
                if len(self.known) > REMEMBERED:
                    self.known.popitem(last=False)
            return compiled
        self.again(compiled, grid, values, constants)
        return compiled

    def first(self, grid: Grid, values: Sequence[Any], constants: dict[str, Any]) -> Any:
        """A launch by Triton's own dispatch."""
        compiled = self.function[grid](*values, **constants)
        self.note(compiled, grid, values, constants)
        return compiled

    def again(self, compiled: Any, grid: Grid, values: Sequence[Any], constants: dict[str, Any]) -> None:
        """A launch of what Triton chose for arguments of these kinds before."""
        last = self.last(len(values), constants)
        if last is None:
            self.function[grid](*values, **constants)
        else:
            compiled[(*grid, *(1,) * (3 - len(grid)))](*values, *last)
        self.note(compiled, grid, values, constants)

    def note(self, compiled: Any, grid: Grid, values: Sequence[Any], constants: dict[str, Any]) -> None:
        """Tells the recording that is under way, if there is one."""
        recorder = current()
        if recorder is None:
            return
        last = None if compiled is None else self.last(len(values), constants)
        plain = [without_tensor(value) for value in values]
        start = (
            Interpreted(self.function, grid, plain, constants)
            if last is None
            else Direct(compiled, grid, [*values, *last])
        )
        recorder.launch(start, tensors_of(values))

    def last(self, count: int, constants: dict[str, Any]) -> tuple[Any, ...] | None:
        """The constants in the order of the kernel's arguments, of which `count` come before; None where some lack."""
        names = self.arg_names[count:]
        return tuple(constants[name] for name in names) if all(name in constants for name in names) else None


def kind_of(value: Any) -> object:
    """What Triton's choice of a kernel depends on, of an argument (a superset of it)."""
    if isinstance(value, Tensor):
        return value.dtype, value.data_ptr() % 16 == 0, value.device
    if type(value) is int:
        return value == 1, value % 16 == 0, -(2**31) <= value < 2**31, value >= 2**63
    base = getattr(value, "base", None)
    if isinstance(base, Tensor):  # a tensor descriptor
        return base.dtype, base.data_ptr() % 16 == 0, tuple(value.shape), tuple(value.strides), tuple(value.block_shape)
    return type(value) if isinstance(value, float) else value

"""Kernels of generated modules as their callers get them: launches like Triton's own, and recordings know of each."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

from torch import Tensor

from attnc.runtime.clock import running
from attnc.runtime.cuda.direct_launch import Direct, Interpreted, tensors_of, without_tensor
from attnc.runtime.recording.tape import current

REMEMBERED = 256  # compiled kernels of one function
Grid = tuple[int, ...]


class Launchers(ModuleType):
    """A module whose kernels are launchers; everything else is as the module has it."""

    def __init__(self, module: ModuleType) -> None:
        super().__init__(module.__name__)
        self._module = module

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._module, name)
        if hasattr(found, "run") and hasattr(found, "arg_names"):
            found = Launcher(found)
        setattr(self, name, found)
        return found


class Launcher:
    """A kernel. `launcher[grid](*values, **constants)` launches it as Triton's own function does, gives what Triton
    chose (a `Chosen`; None in the interpreter), and asks Triton once for arguments of a kind."""

    def __init__(self, function: Any) -> None:
        self.function = function
        self.known: OrderedDict[tuple[object, ...], Chosen] = OrderedDict()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.function, name)

    def __getitem__(self, grid: Grid) -> Callable[..., Any]:
        return partial(self._launch, grid)

    def _launch(self, grid: Grid, *values: Any, **constants: Any) -> Chosen | None:
        key = (*(kind_of(value) for value in values), *constants.items())
        chosen = self.known.get(key)
        names = self.function.arg_names[len(values) :]
        last = [constants[name] for name in names] if all(name in constants for name in names) else None
        if chosen is not None and last is not None:
            chosen[grid](*values, *last)
            return chosen
        compiled = timed(self.function.__name__, values, lambda: self.function[grid](*values, **constants))
        if recorder := current():
            plain = [without_tensor(value) for value in values]
            start: Any = Interpreted(self.function, grid, plain, constants)
            if compiled is not None and last is not None:
                start = Direct(compiled, (*grid, *(1,) * (3 - len(grid))), [*values, *last])
            recorder.launch(start, tensors_of(values))
        if compiled is None:
            return None
        chosen = self.known[key] = Chosen(compiled)
        if len(self.known) > REMEMBERED:
            self.known.popitem(last=False)
        return chosen


class Chosen:
    """A compiled kernel. `chosen[grid](*values)` launches it, all arguments in order."""

    def __init__(self, compiled: Any) -> None:
        self.compiled = compiled

    def __getattr__(self, name: str) -> Any:
        return getattr(self.compiled, name)

    def __getitem__(self, grid: Grid) -> Callable[..., None]:
        return partial(self._launch, (*grid, *(1,) * (3 - len(grid))))

    def _launch(self, grid: Grid, *values: Any) -> None:
        timed(self.compiled.name, values, lambda: self.compiled[grid](*values))
        if recorder := current():
            recorder.launch(Direct(self.compiled, grid, values), tensors_of(values))


def timed(name: str, values: tuple[Any, ...], launch: Callable[[], Any]) -> Any:
    """Launches, by the clock where one runs."""
    clock = running()
    if clock is None:
        return launch()
    with clock.timing(name, any(tensor.is_cuda for tensor in tensors_of(values))):
        return launch()


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

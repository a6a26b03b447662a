"""Arguments of a call against the declarations of a pattern: names, types, shapes, devices.

Traced by torch.compile, so it is plain code over tuples and dicts; sizes may be symbolic.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnc.dsl.diagnostics import did_you_mean
from attnc.dsl.terms import Input, Parameter, Pattern
from attnc.dsl.types import Base
from attnc.runtime.refusal import extra_inputs, layouts, listed, refuse
from attnc.runtime.scalars import of_term

WIDEST = 256  # largest D and E that the kernels hold in registers
WIDEST_ATTENDED = 1024  # what a step may attend with, forward: a latent that few queries take as it is
WIDEST_LATENT = 4096  # of what is projected to them
REALS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTS = (torch.int64, torch.int32)
TOKENS = {"i": "i", "j": "j", "t": "j"}


@dataclass(frozen=True)
class Bound:
    """A checked call. `parameters` holds tuples whole and always `scale`; `inputs` are in the order of their
    declaration; `sizes` holds every axis that is known."""

    q: Tensor
    k: Tensor
    v: Tensor | None
    parameters: dict[str, Any]
    inputs: dict[str, Tensor]
    sizes: dict[str, int]

    @property
    def tensors(self) -> dict[str, Tensor]:
        built_in = {"q": self.q, "k": self.k} | ({} if self.v is None else {"v": self.v})
        return built_in | self.inputs


@dataclass(frozen=True)
class Checked:
    """A form of call that was checked: the operator's arguments but for the tensors that are given.

    `names`: the inputs in order; `defaults`: those that are not given.
    """

    key: str
    ints: list[int]
    floats: list[float]
    names: tuple[str, ...]
    defaults: dict[str, Tensor]

    def inputs(self, settings: Mapping[str, Any]) -> list[Tensor]:
        """The inputs of a call of this form."""
        if not self.defaults:
            return [settings[name] for name in self.names]
        return [self.defaults[name] if name in self.defaults else settings[name] for name in self.names]


def form_of(q: Any, k: Any, v: Any, settings: Mapping[str, Any]) -> tuple[object, ...] | None:
    """All that `bind` looks at; None where that is not so plain, or tensors made for it would not serve later."""
    form: list[object] = [torch.is_inference_mode_enabled()]
    for value in (q, k, v, *settings.values()):
        if type(value) is Tensor or type(value) is torch.nn.Parameter:
            form += (value.shape, value.dtype, value.device)
        elif value is None or type(value) in (bool, int, float):
            form += (type(value), value)
        elif type(value) is tuple and all(type(one) is int for one in value):
            form.append(value)
        else:
            return None
    return (*settings, *form)


def bind(
    pattern: Pattern, parameters: tuple[Parameter, ...], q: Any, k: Any, v: Any, settings: Mapping[str, Any]
) -> Bound:
    """Checks the arguments of a call.

    `parameters` are the pattern's with `scale` among them. Raises AttnError, located at the declaration of the
    argument at fault.
    """
    _names(pattern, parameters, settings)
    extra = extra_inputs(pattern)
    given = {"q": q, "k": k} | ({} if v is None else {"v": v})
    given |= {declared.name: settings[declared.name] for declared in extra if settings.get(declared.name) is not None}
    if v is None and pattern.uses_value:
        refuse(pattern, "argument", "`v` is missing", about="v", given=given)
    _tensors(pattern, given)
    sizes = _attention_sizes(pattern, given)
    values = {p.name: _parameter(pattern, p, settings.get(p.name), sizes) for p in parameters}
    sizes |= fixed_sizes(pattern, values, sizes)
    for declared in extra:
        if declared.name in given:
            _layout(pattern, declared, given, sizes)
    inputs = {
        declared.name: given[declared.name] if declared.name in given else _default(pattern, declared, q, values, sizes)
        for declared in extra
    }
    return Bound(q, k, v, values, inputs, sizes)


def parameter_values(
    pattern: Pattern, parameters: tuple[Parameter, ...], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Values of the parameters alone, without a call: `scale`, which a call knows, is 1 where it is not given.

    Raises AttnError for a setting that is no parameter, or of the wrong type, or missing.
    """
    known = [p.name for p in parameters]
    for name in settings:
        if name not in known:
            refuse(pattern, "argument", f"there is no parameter `{name}`", help=f"there are {listed(known)}")
    for p in parameters:
        if p.default is None and p.name != "scale" and settings.get(p.name) is None:
            refuse(pattern, "argument", f"parameter `{p.name}` is missing and has no default", about=p.name)
    return {p.name: _parameter(pattern, p, settings.get(p.name), {"d": 1}) for p in parameters}


def flat(parameters: Mapping[str, Any]) -> dict[str, bool | int | float]:
    """Parameters by name, the elements of tuples as `segments.0`, `segments.1` .."""
    result: dict[str, bool | int | float] = {}
    for name, value in parameters.items():
        if isinstance(value, tuple):
            result |= {f"{name}.{at}": item for at, item in enumerate(value)}
        else:
            result[name] = value
    return result


def _names(pattern: Pattern, parameters: tuple[Parameter, ...], settings: Mapping[str, Any]) -> None:
    """Every keyword is declared, and every declaration without a default is there."""
    extra = extra_inputs(pattern)
    known = [p.name for p in parameters] + [declared.name for declared in extra]
    for name in settings:
        if name not in known:
            takes = f"it takes {listed(known)}"
            help = did_you_mean(name, known)
            refuse(pattern, "argument", f"there is no `{name}`", help=f"{help}\n{takes}" if help else takes)
    for p in parameters:
        if p.default is None and p.name != "scale" and settings.get(p.name) is None:
            refuse(pattern, "argument", f"parameter `{p.name}` is missing and has no default", about=p.name)
    for declared in extra:
        if declared.default is None and settings.get(declared.name) is None:
            axes = ", ".join(declared.axes)
            message = f"input `{declared.name}` is missing: {declared.base}[{axes}]"
            refuse(pattern, "argument", message, about=declared.name)


def _tensors(pattern: Pattern, given: Mapping[str, Any]) -> None:
    """Every tensor is one, of a type that its declaration allows, on the device of q."""
    integers = {declared.name for declared in pattern.inputs if declared.base is Base.INT}
    booleans = {declared.name for declared in pattern.inputs if declared.base is Base.BOOL}
    for name, value in given.items():
        if not isinstance(value, Tensor):
            refuse(pattern, "argument", f"`{name}` must be a tensor, not {type(value).__name__}", about=name)
        allowed = INTS if name in integers else (torch.bool,) if name in booleans else REALS
        if value.dtype not in allowed:
            *most, last = (_short(dtype) for dtype in allowed)
            types = f"{', '.join(most)} or {last}" if most else last
            message = f"`{name}` is {_short(value.dtype)} where {types} is expected"
            refuse(pattern, "dtype", message, about=name, given=given)
        if value.device != given["q"].device:
            message = f"`{name}` is on {value.device} and `q` on {given['q'].device}"
            refuse(pattern, "device", message, about=name)
    q = given["q"]
    for name in ("k", "v"):
        if name in given and given[name].dtype != q.dtype:
            message = f"`{name}` is {_short(given[name].dtype)} and `q` is {_short(q.dtype)}: they must be the same"
            refuse(pattern, "dtype", message, about=name, given=given)
    if q.dtype == torch.float64 and q.device.type != "cpu":
        refuse(pattern, "dtype", "float64 runs on a CPU only", given=given, help="use .float(), or .cpu()")


def _attention_sizes(pattern: Pattern, given: Mapping[str, Any]) -> dict[str, int]:
    """Sizes that q, k and v fix, which must agree with one another."""
    for name in ("q", "k", "v"):
        if name in given and given[name].ndim != 4:
            message = f"`{name}` has {given[name].ndim} dimensions where batch, heads, tokens and width are expected"
            refuse(pattern, "shape", message, given=given)
    q, k = given["q"], given["k"]
    v = given.get("v")
    sizes = {"b": q.shape[0], "h": q.shape[1], "i": q.shape[2], "d": q.shape[3], "j": k.shape[2], "t": k.shape[2]}
    for axis, what in (("i", "queries"), ("j", "keys")):
        if sizes[axis] == 0:
            refuse(pattern, "shape", f"the sequence is empty: there are no {what}", given=given)
    axes = layouts(pattern)
    for name, value in (("q", q), ("k", k), ("v", v)):
        if value is None:
            continue
        if 0 in value.shape:
            refuse(pattern, "shape", f"`{name}` has an axis of length 0", given=given)
        _heads(pattern, name, axes[name][1], given)
        for at in (0, 2, 3):
            expected = sizes.setdefault(axes[name][at], value.shape[at])
            if value.shape[at] != expected:
                origin = "k" if at == 2 else "q"
                _conflict(pattern, axes[name][at], (origin, expected), (name, value.shape[at]), given)
        most = WIDEST if axes[name][3] in ("d", "e") else WIDEST_LATENT
        if value.shape[3] > most:
            message = f"axis {axes[name][3]} is {value.shape[3]} long in `{name}`, more than {most}"
            refuse(pattern, "shape", message, given=given)
    return sizes


def _heads(pattern: Pattern, name: str, axis: str, given: Mapping[str, Any]) -> None:
    """k and v have as many heads as each other, which the query heads share evenly; or 1, where declared so."""
    heads, found = given["q"].shape[1], given[name].shape[1]
    if axis == "1":
        if found != 1:
            _conflict(pattern, "1", (None, 1), (name, found), given)
        return
    if heads % found != 0:
        message = f"{heads} query heads cannot share the {found} heads of `{name}`: not a multiple"
        swapped = given[name].shape[2] == heads  # as other libraries have it
        help = f"heads stand before tokens: `{name}.transpose(1, 2)`" if swapped else None
        refuse(pattern, "shape", message, given=given, help=help)
    if name == "v" and found != given["k"].shape[1] and layouts(pattern)["k"][1] == "h":
        _conflict(pattern, "h", ("k", given["k"].shape[1]), ("v", found), given)


def fixed_sizes(pattern: Pattern, values: Mapping[str, Any], sizes: Mapping[str, int]) -> dict[str, int]:
    """Sizes of the axes that the text fixes by a number or by parameters."""
    found: dict[str, int] = {}
    for axis, size in pattern.sizes:
        value = of_term(size, flat(values), sizes)
        if isinstance(value, int):
            found[axis] = value
    return found


def _layout(pattern: Pattern, declared: Input, given: Mapping[str, Any], sizes: dict[str, int]) -> None:
    """The shape of an input agrees with its axes; axes not met before enter `sizes`."""
    value = given[declared.name]
    if value.ndim != len(declared.axes):
        message = f"`{declared.name}` has {value.ndim} dimensions where its declaration has {len(declared.axes)}"
        refuse(pattern, "shape", message, about=declared.name, given=given)
    for at, axis in enumerate(declared.axes):
        length = value.shape[at]
        if axis.isdigit():
            expected = int(axis)
        elif axis == "h" and length == given["k"].shape[1]:
            continue  # one for each key head
        elif axis not in sizes:
            sizes[axis] = length
            continue
        else:
            expected = sizes[axis]
        if length != expected:
            _conflict(pattern, axis, (_origin(pattern, declared, axis), expected), (declared.name, length), given)


def _origin(pattern: Pattern, declared: Input, axis: str) -> str | None:
    """Who fixed the size of an axis: a tensor before `declared`, or None for the text itself."""
    if axis.isdigit() or any(name == axis for name, _ in pattern.sizes):
        return None
    if axis in ("i", "d", "b", "h"):
        return "q"
    if axis in TOKENS:
        return "k"
    if axis == "e":
        return "v"
    for earlier in pattern.inputs:
        if axis in earlier.axes and earlier is not declared:
            return earlier.name
    return None


def _conflict(
    pattern: Pattern, axis: str, expected: tuple[str | None, int], found: tuple[str, int], given: Mapping[str, Any]
) -> None:
    name, length = found
    where = f"in `{expected[0]}`" if expected[0] else "by its declaration"
    message = f"axis {axis} is {length} long in `{name}` and {expected[1]} {where}"
    refuse(pattern, "shape", message, about=name, given=given)


def _parameter(pattern: Pattern, declared: Parameter, value: Any, sizes: Mapping[str, int]) -> Any:
    """The value of a parameter, of its declared type."""
    if value is None:
        value = declared.default
    if value is None and declared.name == "scale":
        return float(sizes["d"]) ** -0.5
    if declared.is_tuple:
        if not isinstance(value, (tuple, list)) or not value:
            _mistyped(pattern, declared, value, "a tuple of at least one int")
        return tuple(_element(pattern, declared, item) for item in value)
    return _element(pattern, declared, value)


def _element(pattern: Pattern, declared: Parameter, value: Any) -> Any:
    if declared.base is Base.BOOL:
        if not isinstance(value, bool):
            _mistyped(pattern, declared, value, "a bool")
        return value
    if isinstance(value, bool):
        _mistyped(pattern, declared, value, "an int" if declared.base is Base.INT else "a number")
    if declared.base is Base.INT:
        if not isinstance(value, (int, torch.SymInt)):
            _mistyped(pattern, declared, value, "an int")
        if not -(2**63) <= value < 2**63:
            refuse(pattern, "argument", f"parameter `{declared.name}` does not fit 64 bits", about=declared.name)
        return value
    if not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        _mistyped(pattern, declared, value, "a number")
    return float(value)


def _mistyped(pattern: Pattern, declared: Parameter, value: Any, expected: str) -> None:
    what = "every element of " if declared.is_tuple and not expected.startswith("a tuple") else ""
    found = "a tensor" if isinstance(value, Tensor) else repr(value)
    message = f"{what}parameter `{declared.name}` must be {expected}, not {found}"
    refuse(pattern, "argument", message, about=declared.name)


def _default(
    pattern: Pattern, declared: Input, q: Tensor, values: Mapping[str, Any], sizes: Mapping[str, int]
) -> Tensor:
    """The input that was not given: its default, on every position."""
    assert declared.default is not None
    value = of_term(declared.default, flat(values), sizes)
    shape = [int(axis) if axis.isdigit() else sizes.get(axis) for axis in declared.axes]
    if value is None or None in shape:
        message = f"the default of `{declared.name}` cannot be worked out from the parameters: give the input"
        refuse(pattern, "argument", message, about=declared.name)
    dtype = {Base.INT: torch.int64, Base.BOOL: torch.bool, Base.REAL: q.dtype}[declared.base]
    return torch.full([], value, dtype=dtype, device=q.device).expand(shape)  # type: ignore[arg-type]


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

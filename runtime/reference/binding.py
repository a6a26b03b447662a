"""What a call of the float64 reference binds: tensors, parameters, and the length of every index and axis."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from attnc.dsl.terms import Axis, Input, Parameter, Pattern, Scalar
from attnc.dsl.types import BUILT_IN_INDICES, Base

DTYPES = {Base.BOOL: torch.bool, Base.INT: torch.int64, Base.REAL: torch.float64}
BUILT_IN_LAYOUTS = {"q": ("b", "h", "i", "d"), "k": ("b", "h", "j", "d"), "v": ("b", "h", "j", "e")}


@dataclass
class Binding:
    """One call. `inputs` holds q, k, v (where given) and the declared inputs, converted to float64, int64 or bool.

    `offset` is the global position of the first query (M - N where N < M, else 0). `axis_sizes` grows as
    arrays with further vector axes are made.
    """

    pattern: Pattern
    device: torch.device
    parameters: dict[str, Scalar]
    inputs: dict[str, Tensor]
    layouts: dict[str, tuple[str, ...]]
    index_sizes: dict[str, int]
    offset: int
    group: int
    axes: dict[str, Axis]
    axis_sizes: dict[str, int] = field(default_factory=dict)
    members: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def origin(self, index: str) -> int:
        """Global position of the first element of a token index."""
        return self.offset if index == "i" else 0


def bind(
    pattern: Pattern,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    parameters: Mapping[str, object],
    inputs: Mapping[str, Tensor],
) -> Binding:
    """Check a call against the pattern and convert it. Raises ValueError or TypeError that name the conflict."""
    declared = {entry.name: entry for entry in pattern.inputs}
    layouts = BUILT_IN_LAYOUTS | {name: entry.axes for name, entry in declared.items()}
    given = {"q": q, "k": k, **({} if v is None else {"v": v}), **inputs}
    if v is None and pattern.uses_value:
        raise ValueError(f"{pattern.name}: v is needed")
    for name in inputs:
        if name not in declared:
            raise TypeError(f"{pattern.name}: unknown input `{name}`; it has {_listed(declared)}")
    for name, entry in declared.items():
        if name not in given and entry.default is None:
            raise TypeError(f"{pattern.name}: input `{name}` ({', '.join(entry.axes)}) is missing")
    for name, tensor in given.items():
        if tensor.dim() != len(layouts[name]):
            raise ValueError(
                f"{pattern.name}: {name} is declared [{', '.join(layouts[name])}] but has shape {tuple(tensor.shape)}"
            )
    batch, heads, rows, width = q.shape
    key_heads, keys = k.shape[1], k.shape[2]
    if key_heads == 0 or heads % key_heads:
        raise ValueError(f"{pattern.name}: q has {heads} heads, k has {key_heads}: not a multiple")
    binding = Binding(
        pattern=pattern,
        device=q.device,
        parameters=_parameters(pattern, parameters, width),
        inputs={name: _converted(pattern, name, declared.get(name), tensor) for name, tensor in given.items()},
        layouts=layouts,
        index_sizes={"b": batch, "h": heads, "i": rows, "j": keys, "t": keys},
        offset=max(0, keys - rows),
        group=heads // key_heads,
        axes={axis.name: axis for axis in pattern.axes},
    )
    for name in given:
        _check_shape(binding, name)
    return binding


def _listed(names: Mapping[str, object]) -> str:
    return ", ".join(f"`{name}`" for name in names) or "none"


def _parameters(pattern: Pattern, given: Mapping[str, object], width: int) -> dict[str, Scalar]:
    """Values by name; an element of a tuple is `name.0`."""
    declared = {parameter.name: parameter for parameter in pattern.parameters}
    values: dict[str, Scalar] = {}
    for name in given:
        if name not in declared and name != "scale":
            raise TypeError(f"{pattern.name}: unknown parameter `{name}`; it has {_listed(declared)} and `scale`")
    if "scale" not in declared or declared["scale"].default is None:
        scale = given.get("scale")
        values["scale"] = (float(width) ** -0.5 if width else 1.0) if scale is None else _scalar(Base.REAL, scale)
    for name, parameter in declared.items():
        value = given.get(name, parameter.default)
        if value is None and name == "scale":
            continue
        if value is None:
            raise TypeError(f"{pattern.name}: parameter `{name}` is missing")
        values |= _parameter(pattern, parameter, value)
    return values


def _parameter(pattern: Pattern, parameter: Parameter, value: object) -> dict[str, Scalar]:
    try:
        if not parameter.is_tuple:
            return {parameter.name: _scalar(parameter.base, value)}
        if not isinstance(value, tuple | list):
            raise TypeError("expected a tuple")
        length = len(parameter.default) if isinstance(parameter.default, tuple) else len(value)
        if len(value) != length:
            raise ValueError(f"expected {length} elements (the pattern was checked for that many)")
        return {f"{parameter.name}.{at}": _scalar(parameter.base, element) for at, element in enumerate(value)}
    except (TypeError, ValueError) as error:
        raise type(error)(f"{pattern.name}: parameter `{parameter.name}`: {error}, got {value!r}") from None


def _scalar(base: Base, value: object) -> Scalar:
    if base is Base.BOOL and isinstance(value, bool):
        return value
    if base is Base.INT and isinstance(value, int) and not isinstance(value, bool):
        return value
    if base is Base.REAL and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    raise TypeError(f"expected {base}")


def _converted(pattern: Pattern, name: str, declared: Input | None, tensor: Tensor) -> Tensor:
    base = declared.base if declared else Base.REAL
    is_real = tensor.dtype.is_floating_point
    if is_real != (base is Base.REAL) or (tensor.dtype is torch.bool) != (base is Base.BOOL):
        raise TypeError(f"{pattern.name}: {name} is declared {base} but is {tensor.dtype}")
    return tensor.to(DTYPES[base])


def _check_shape(binding: Binding, name: str) -> None:
    """Every axis of an input has its index's length (heads may be fewer) or the size first seen under its name."""
    tensor, names = binding.inputs[name], binding.layouts[name]
    for at, (axis, size) in enumerate(zip(names, tensor.shape, strict=True)):
        if axis in binding.axes:
            continue  # a declared axis: its length is known once its size is evaluated (see `input` rule)
        if axis in BUILT_IN_INDICES:
            expected = binding.index_sizes[axis]
            fits = size > 0 and expected % size == 0 if axis == "h" else size == expected
        else:
            expected = int(axis) if axis.isdigit() else binding.axis_sizes.setdefault(axis, size)
            fits = size == expected
        if not fits:
            raise ValueError(
                f"{binding.pattern.name}: {name} is declared [{', '.join(names)}] but has shape {tuple(tensor.shape)}: "
                f"axis {at} (`{axis}`) should be {expected}, not {size}"
            )

"""`Attention`: a multi-head attention layer whose attention is a pattern."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from attnc.dsl.diagnostics import did_you_mean
from attnc.dsl.terms import Input
from attnc.dsl.types import Base
from attnc.runtime.binding import fixed_sizes
from attnc.runtime.modules import AttnModule
from attnc.runtime.pattern import CompiledPattern
from attnc.runtime.refusal import extra_inputs, layouts, listed, refuse

VARYING = frozenset({"b", "i", "j", "t"})  # axes whose lengths are those of a call
SPREAD = 0.02  # standard deviation that a parameter without a start is drawn with


class Attention(nn.Module):
    """Self-attention of x (B, N, width): linear projections to q, k and v, a pattern, a linear projection back.

    pattern: one pattern of a file, or the file where it holds one. width: of x and of the result. heads: of q;
    key_heads: of k and v (heads). head_width: D (width // heads); value_width: E (D). bias: of the four projections.
    settings: parameters and inputs of the pattern. sizes: lengths of named axes that the text leaves open.

    The pattern's inputs:

    - A real input whose axes have fixed lengths (h, d, e, numbers, named axes) is a parameter, `input_NAME`. It starts
      at the tensor that `settings` has for it, else at its default, else at small normal numbers.
    - A bool or int input with such axes, if `settings` has it, is a buffer, `input_NAME`.
    - A real input over b, one of t and i, and fixed axes, such as a gate, is made from x by a linear layer,
      `input_NAME`, where `projected` names it.
    - Every other one is given to `forward`.

    state_dict, `copy.deepcopy`, `torch.compile` and AMP are as for torch's layers. Raises AttnError, located in the
    pattern, for what the pattern does not have or what a layer cannot make; ValueError for heads that do not divide.
    """

    def __init__(
        self,
        pattern: CompiledPattern | AttnModule,
        width: int,
        heads: int,
        key_heads: int | None = None,
        *,
        head_width: int | None = None,
        value_width: int | None = None,
        bias: bool = False,
        settings: Mapping[str, Any] | None = None,
        sizes: Mapping[str, int] | None = None,
        projected: Iterable[str] = (),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.pattern = _single(pattern)
        self.heads = heads
        self.key_heads = key_heads or heads
        if heads % self.key_heads:
            raise ValueError(f"{heads} query heads cannot share {self.key_heads} key heads: not a multiple")
        if head_width is None and width % heads:
            raise ValueError(f"{heads} heads do not divide a width of {width}: give head_width")
        inputs = {declared.name: declared for declared in extra_inputs(self.pattern.pattern)}
        given = dict(settings or {})
        self._require_known([*given, *projected], inputs)
        self.settings = {name: value for name, value in given.items() if name not in inputs}
        d = head_width or width // heads
        self.lengths = self._fixed_lengths({**(sizes or {}), "h": heads, "d": d, "e": value_width or d})
        self._make_projections(width, bias, device, dtype)
        for name, declared in inputs.items():
            if name in projected:
                self._make_projected(declared, width, device, dtype)
            else:
                self._make_held(declared, given.get(name), device, dtype)

    def forward(self, x: Tensor, /, **given: Any) -> Tensor:
        """x (B, N, width) to (B, N, width).

        given: inputs of the pattern that the layer does not hold, and parameters, which go before those in `settings`.
        Raises AttnError as a call of the pattern does, and for an input that the layer holds.
        """
        tensors = [self._split(name, x) for name in "qkv"]
        for declared in extra_inputs(self.pattern.pattern):
            held = getattr(self, f"input_{declared.name}", None)
            if held is None:
                continue
            if declared.name in given:
                self._refuse(f"`{declared.name}` is the layer's own: it cannot be given", declared.name)
            given[declared.name] = self._laid_out(declared, held(x)) if isinstance(held, nn.Module) else held
        out = self.pattern(*tensors, **{**self.settings, **given})  # type: ignore[arg-type]
        joined: Tensor = self.out_projection(out.transpose(1, 2).flatten(2))
        return joined

    def extra_repr(self) -> str:
        """What torch prints of the layer."""
        values = "".join(f", {name}={value}" for name, value in self.settings.items())
        return f"{self.pattern.__name__}, heads={self.heads}, key_heads={self.key_heads}{values}"

    # Lengths

    def _fixed_lengths(self, known: dict[str, int]) -> dict[str, int]:
        """Lengths of all axes that are known before a call: given, of the layer, or fixed by the text."""
        pattern = self.pattern.pattern
        values = {p.name: self.settings.get(p.name, p.default) for p in pattern.parameters}
        values = {name: value for name, value in values.items() if value is not None}
        return known | fixed_sizes(pattern, values, known)

    def _length(self, axis: str, of: str) -> int:
        if axis.isdigit():
            return int(axis)
        if axis not in self.lengths:
            self._refuse(f"how long is axis {axis} of `{of}`?", of, help=f'give it: `sizes={{"{axis}": ..}}`')
        return self.lengths[axis]

    # Parts

    def _make_projections(
        self, width: int, bias: bool, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        """q, k and v from x, and x's width from the result."""
        pattern = self.pattern.pattern
        if pattern.output_axes[:3] != ("b", "h", "i"):
            result = ", ".join(pattern.output_axes)
            self._refuse(f"a layer needs one vector a query, but the result is [{result}]", code="output")
        self.shapes: dict[str, tuple[int, int]] = {}
        for name, heads in (("q", self.heads), ("k", self.key_heads), ("v", self.key_heads)):
            axes = layouts(pattern)[name]
            self.shapes[name] = 1 if axes[1] == "1" else heads, self._length(axes[3], name)
            made = nn.Linear(width, math.prod(self.shapes[name]), bias, device=device, dtype=dtype)
            setattr(self, f"{name}_projection", made if name != "v" or pattern.uses_value else None)
        features = self.heads * self._length(pattern.output_axes[3], "out")
        self.out_projection = nn.Linear(features, width, bias, device=device, dtype=dtype)

    def _split(self, name: str, x: Tensor) -> Tensor | None:
        """(B, heads, N, head width) of q, k or v; None for a v that plays no part."""
        projection = getattr(self, f"{name}_projection")
        return None if projection is None else projection(x).unflatten(-1, self.shapes[name]).transpose(1, 2)

    def _make_held(
        self, declared: Input, start: Any, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        """A parameter or a buffer, where the axes have fixed lengths; else `forward` is given it."""
        name = declared.name
        if VARYING & set(declared.axes):
            if start is not None:
                self._refuse(f"`{name}` has the lengths of a call: give it to forward", name)
            return
        if declared.base is not Base.REAL and start is None:
            return
        if start is not None:
            start = torch.as_tensor(start)
            self.lengths = dict(zip(declared.axes, start.shape, strict=False)) | self.lengths
        shape = tuple(self._length(axis, name) for axis in declared.axes)
        if start is None:
            start = self._start(declared, shape)
        if start.shape != shape:
            self._refuse(f"`{name}` is {tuple(start.shape)} where the layer needs {shape}", name, code="shape")
        if declared.base is Base.REAL:
            start = start.detach().clone().to(device=device, dtype=dtype or torch.get_default_dtype())
            self.register_parameter(f"input_{name}", nn.Parameter(start))
        else:
            self.register_buffer(f"input_{name}", start.clone().to(device=device))

    def _start(self, declared: Input, shape: tuple[int, ...]) -> Tensor:
        """The default of an input, where it is a number; else small normal numbers."""
        default = declared.default
        if default is not None and default.form == "literal" and not isinstance(default.attribute, str | tuple):
            return torch.full(shape, float(default.attribute or 0))
        return torch.randn(shape) * SPREAD

    def _make_projected(
        self, declared: Input, width: int, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        """A linear layer whose output is an input: a number for every token and every place of the fixed axes."""
        varying = [axis for axis in declared.axes if axis in VARYING]
        if declared.base is not Base.REAL or sorted(varying) not in (["b", "i"], ["b", "t"]):
            axes = ", ".join(declared.axes)
            help = "a real input over b and one of t and i can be"
            self._refuse(
                f"`{declared.name}: {declared.base}[{axes}]` cannot be projected from x", declared.name, help=help
            )
        features = math.prod(self._length(axis, declared.name) for axis in self._fixed_axes(declared))
        self.add_module(f"input_{declared.name}", nn.Linear(width, features, device=device, dtype=dtype))

    @staticmethod
    def _fixed_axes(declared: Input) -> list[str]:
        return [axis for axis in declared.axes if axis not in VARYING]

    def _laid_out(self, declared: Input, made: Tensor) -> Tensor:
        """(B, N, features) in the declared layout."""
        fixed = self._fixed_axes(declared)
        token = next(axis for axis in declared.axes if axis in ("i", "t"))
        if fixed:
            made = made.unflatten(-1, [self._length(axis, declared.name) for axis in fixed])
        else:
            made = made.squeeze(-1)
        order = ["b", token, *fixed]
        return made.permute([order.index(axis) for axis in declared.axes])

    # Mistakes

    def _require_known(self, names: Iterable[str], inputs: Mapping[str, Input]) -> None:
        known = [*inputs, *(p.name for p in self.pattern.program.parameters)]
        for name in names:
            if name not in known:
                takes = f"it takes {listed(known)}"
                help = did_you_mean(name, known)
                self._refuse(f"there is no `{name}`", help=f"{help}\n{takes}" if help else takes)

    def _refuse(
        self, message: str, about: str | None = None, *, code: str = "argument", help: str | None = None
    ) -> NoReturn:
        refuse(self.pattern.pattern, code, message, about=about, help=help)


def _single(pattern: CompiledPattern | AttnModule) -> CompiledPattern:
    if isinstance(pattern, CompiledPattern):
        return pattern
    if pattern.main is None:
        raise ValueError(f"{pattern.__name__} holds several patterns, give one: {', '.join(pattern.patterns)}")
    return pattern.main

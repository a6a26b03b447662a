"""The weight that every key has in a row's result, of any mechanism that is linear in the values.

A softmax has its weights in the text; a scan, a feature map or a chain of low-rank products has them only in what it
does. As the result is linear in v, it is `out_i = sum_j weight_ij v_j`: with the identity as values, row i of the
result is the row of weights. Whether that holds is not assumed but computed: the weights must give the result of the
call's own values. Where it doesn't (a result that is normed), the parts below that are linear are taken, each by
itself; where v plays no part, the softmaxes over keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attnc.dsl.notation import given_name
from attnc.dsl.terms import Pattern, Term
from attnc.runtime.binding import Bound
from attnc.runtime.program import terms
from attnc.runtime.reference.meaning import reference
from attnc.runtime.refusal import layouts, refuse

if TYPE_CHECKING:
    from attnc.runtime.pattern import CompiledPattern

MOST_POSITIONS = 1024  # rows and keys: the weights are a matrix of both
EXACT = 1e-9  # relative difference, in float64, between the result and the weighted sum of values


@dataclass(frozen=True)
class Weights:
    """Weights of one part of a pattern. `values`: (H, rows, M) in float64, 0 where a key plays no part.

    `rows`: what the rows are, `i` or the name of an axis such as that of latents. `part`: the name that the text gives
    to the part, or its text; empty where it is the whole result.
    """

    values: Tensor
    rows: str
    part: str

    @property
    def live(self) -> Tensor:
        """(H, rows, M), bool: pairs whose weight is not exactly 0."""
        return self.values != 0


@dataclass(frozen=True)
class _Call:
    """One call of the reference, of a batch of 1."""

    q: Tensor
    k: Tensor
    v: Tensor
    parameters: dict[str, Any]
    inputs: dict[str, Tensor]

    def result(self, pattern: Pattern, v: Tensor | None = None) -> Tensor:
        with torch.no_grad():
            v = self.v if v is None else v
            return reference(pattern, self.q, self.k, v, self.parameters, self.inputs)


def weights(
    pattern: CompiledPattern, q: Tensor, k: Tensor, v: Tensor | None, settings: dict[str, Any]
) -> list[Weights]:
    """Weights of the first element of a batch: one entry, or one a part where the result is not linear in v.

    q (B, H, N, D), k (B, Hk, M, D), v (B, Hk, M, E) or None for values of attnc's own: the weights of a linear pattern
    don't depend on them. `settings`: parameters and inputs by name. Where an input has a number for each channel of the
    values, a weight is the mean over the channels. Raises AttnError as a call does, and for more than 1024 positions.
    """
    if max(q.shape[2], k.shape[2]) > MOST_POSITIONS:
        help = "take some of them: `q[:, :, -256:]`, `k[:, :, -256:]`"
        refuse(pattern.pattern, "shape", f"weights of more than {MOST_POSITIONS} positions", help=help)
    if v is None:
        v = _some_values(pattern.pattern, q, k, settings)
    checked, bound = pattern.bound_for_reference(q, k, v, settings)
    call = _first_of_batch(checked, bound, q, k, v)
    found = [
        Weights(_by_channel(call, part).mean(-1)[0], part.output_axes[2], given_name(part.out) or _text(part.out))
        for part in _value_parts(checked, call)
    ] or list(_softmaxes(checked, call))
    if not found:
        message = "there are no weights to show: v plays no part, and no softmax runs over keys"
        refuse(checked, "argument", message)
    return found if len(found) > 1 else [replace(found[0], part="")]


def _some_values(pattern: Pattern, q: Tensor, k: Tensor, settings: dict[str, Any]) -> Tensor:
    """Values of a call that has none."""
    widths = [
        settings[name].shape[axes.index("e")]
        for name, axes in layouts(pattern).items()
        if "e" in axes and isinstance(settings.get(name), Tensor)
    ]
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(*k.shape[:3], widths[0] if widths else q.shape[3], generator=generator)
    return drawn.to(q.device, q.dtype)


def _first_of_batch(pattern: Pattern, bound: Bound, q: Tensor, k: Tensor, v: Tensor) -> _Call:
    axes = layouts(pattern)

    def first(name: str, tensor: Tensor) -> Tensor:
        return tensor.narrow(axes[name].index("b"), 0, 1) if "b" in axes[name] else tensor

    inputs = {name: first(name, tensor) for name, tensor in bound.inputs.items()}
    return _Call(first("q", q), first("k", k), first("v", v), bound.parameters, inputs)


def _value_parts(pattern: Pattern, call: _Call) -> Iterator[Pattern]:
    """The largest parts that are linear in v, as patterns of their own; the whole where it is."""
    if not pattern.uses_value:
        return
    reads_value: set[Term] = set()
    for term in terms(pattern):
        inner = term.args + (tuple(step for _, step in term.block.steps) if term.block else ())
        if (term.form, term.attribute) == ("input", "v") or any(arg in reads_value for arg in inner):
            reads_value.add(term)
    stack, seen = [pattern.out], {pattern.out}
    while stack:
        term = stack.pop()
        part = _as_pattern(pattern, term)
        if part is not None and _is_linear(call, part):
            yield part
            continue
        below = [arg for arg in term.args if arg in reads_value and arg not in seen]
        seen.update(below)
        stack.extend(reversed(below))


def _as_pattern(pattern: Pattern, term: Term) -> Pattern | None:
    """A pattern whose result a term is; None where it is no sum of values: over tokens other than i, or no vector."""
    if term is pattern.out:
        return pattern
    if not term.type.axes or term.type.axes[-1] != "e" or not term.type.indices <= {"b", "h", "i"}:
        return None
    rows = ("i",) if len(term.type.axes) == 1 else ()
    return replace(pattern, out=term, output_axes=("b", "h", *rows, *term.type.axes))


def _is_linear(call: _Call, part: Pattern) -> bool:
    """Whether the weights give the result of the call's own values."""
    if len(part.output_axes) != 4:
        return False
    expected = call.result(part)
    if expected.shape[-1] != call.v.shape[-1]:
        return False
    v = call.v.to(torch.float64).repeat_interleave(call.q.shape[1] // call.v.shape[1], 1)
    found = torch.einsum("bhije,bhje->bhie", _by_channel(call, part), v)
    return bool((found - expected).abs().max() <= EXACT * max(float(expected.abs().max()), 1e-300))


def _by_channel(call: _Call, part: Pattern) -> Tensor:
    """(1, H, rows, M, E or 1): the weight of every key in every channel of the result."""
    heads, keys, width = call.v.shape[1:]
    if not _knows_width(part):
        identity = torch.eye(keys, dtype=torch.float64, device=call.v.device).expand(1, heads, keys, keys)
        return call.result(part, identity).unsqueeze(-1)
    columns = []  # an input over e has the width of the values, so that one key is asked for at a time
    for key in range(keys):
        one = torch.zeros(1, heads, keys, width, dtype=torch.float64, device=call.v.device)
        one[:, :, key] = 1
        columns.append(call.result(part, one))
    return torch.stack(columns, 3)


def _knows_width(part: Pattern) -> bool:
    """Whether anything but v itself has the width of the values, so that other values need that width too."""
    declared = any("e" in declared.axes for declared in part.inputs if declared.name != "v")
    return declared or any(term.form == "size" and term.attribute == "e" for term in terms(part))


def _softmaxes(pattern: Pattern, call: _Call) -> Iterator[Weights]:
    """The weights themselves, where they are a term over queries and keys."""
    for term in terms(pattern):
        along = term.attribute[0] if isinstance(term.attribute, tuple) else None
        rows = term.type.indices - {"b", "h", "j"}
        if term.form not in ("softmax", "normalize") or along != "j" or rows != {"i"} or term.type.axes:
            continue
        part = replace(pattern, out=term, output_axes=("b", "h", "i", "j"))
        yield Weights(call.result(part)[0], "i", given_name(term) or _text(term))


def _text(term: Term) -> str:
    return " ".join(term.span.text.split())

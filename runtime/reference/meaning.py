"""The float64 meaning of a pattern, straight from the checked tree: the oracle of every back end.

Written for truth, not for speed: every pair of positions is formed. It shares nothing with the compiler. Real
inputs become float64, ints int64; gradients flow to every real input. What the language leaves to arithmetic
is settled here:

- a reduction without a live member gives 0, with gradient 0 (no NaN), also where a dead value overflows;
- the last block of an axis stops at the end of the sequence, so `.stop` is never past it;
- a read outside an axis (`shift`, `take`) gives 0; `argmax` without a candidate gives -1;
- `normalize` with a denominator of exactly 0 gives 0;
- blocks and segments over `i` count global positions: where N < M those before the first query are empty.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from attnc.dsl.terms import Pattern
from attnc.runtime.reference.arrays import Array
from attnc.runtime.reference.binding import Binding, bind
from attnc.runtime.reference.blocks import BLOCKS, branch_with_lse
from attnc.runtime.reference.forms import POINTWISE, STRUCTURE
from attnc.runtime.reference.leaves import LEAVES
from attnc.runtime.reference.reductions import REDUCTIONS
from attnc.runtime.reference.scopes import Rule, Scope, facts
from attnc.runtime.reference.selections import SELECTIONS

# The rule of every form of the checked tree.
RULES: dict[str, Rule] = {**LEAVES, **POINTWISE, **STRUCTURE, **REDUCTIONS, **SELECTIONS, **BLOCKS}


def reference(
    pattern: Pattern,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    parameters: Mapping[str, object] | None = None,
    inputs: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Result of a pattern in float64, laid out as `pattern.output_axes`.

    `q` is (B, H, N, D), `k` (B, Hk, M, D) and `v` (B, Hk, M, E), of any real dtype and strides, H a multiple of
    Hk; `v` may be None where the pattern doesn't use it. `parameters` and `inputs` are by name; an input that
    varies over h may have fewer heads, each read by as many query heads in a row.

    Raises TypeError (unknown or missing name, wrong dtype) and ValueError (a shape or value that doesn't fit).
    """
    scope = _scope(pattern, bind(pattern, q, k, v, parameters or {}, inputs or {}))
    return _laid_out(scope, scope.value(pattern.out), pattern.output_axes)


def reference_with_lse(
    pattern: Pattern,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    parameters: Mapping[str, object] | None = None,
    inputs: Mapping[str, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """`reference`, and the natural logarithm of each row's sum of exponentials, sink included: (B, H, N) in float64.

    A row without a live key has -inf. For patterns whose result is `softmax[..](..) @ value` or a merge of such;
    ValueError for others.
    """
    scope = _scope(pattern, bind(pattern, q, k, v, parameters or {}, inputs or {}))
    out, lse = branch_with_lse(scope, pattern.out)
    rows = tuple(axis for axis in pattern.output_axes if axis not in out.axes)
    return _laid_out(scope, out, pattern.output_axes), _laid_out(scope, lse, rows)


def _scope(pattern: Pattern, binding: Binding) -> Scope:
    scope = Scope(binding, RULES, facts(pattern))
    for axis, term in pattern.sizes:
        fixed = scope.integer(term)
        given = binding.axis_sizes.setdefault(axis, fixed)
        if given != fixed:
            raise ValueError(f"{pattern.name}: axis `{axis}` should be {fixed}, but an input has {given}")
    return scope


def _laid_out(scope: Scope, result: Array, axes: tuple[str, ...]) -> Tensor:
    """The tensor over exactly these axes; an index that the result doesn't vary over is expanded."""
    for axis in axes:
        if axis not in result.axes:
            result = result.expand(axis, scope.index_size(axis))
    order = [*result.indices, *result.axes]
    return result.data.permute([order.index(axis) for axis in axes])

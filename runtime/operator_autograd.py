"""The operator `attnc::attention` where tensors ask for gradients: its own autograd function."""

from __future__ import annotations

import os
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from attnc.runtime.program import Program, program
from attnc.runtime.refusal import extra_inputs

# Whether a forward with gradients keeps its states of chunks. ATTNC_KEEP=0: never, backward makes them again.
keeps = os.environ.get("ATTNC_KEEP") != "0"


class _Attention(torch.autograd.Function):
    """The operator as autograd sees it, its lists flattened: torch's own way to register a gradient takes 0.2 ms."""

    @staticmethod
    def forward(ctx: Any, keys: Any, settings: tuple[Any, ...], *tensors: Tensor | None) -> Any:
        key, ints, floats, backend = settings
        q, k, v, *extra = tensors
        ctx.gradients = differentiable_tensors(program(key))  # raises, located, where there is no rule
        with torch._C._AutoDispatchBelowAutograd():
            out, lse, saved = torch.ops.attnc.attention.default.redispatch(
                keys, key, q, k, v, extra, ints, floats, backend, keeps
            )
        ctx.settings = settings
        ctx.optional = v is not None
        ctx.count = len(saved)
        ctx.save_for_backward(q, k, out, lse, *saved, *([] if v is None else [v]), *extra)
        ctx.set_materialize_grads(False)
        return out, lse, *saved

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None, *grad_saved: Any) -> Any:
        """What steps saved is nobody's to use, so it has no cotangent; but for what is handed to a later call."""
        key, ints, floats, backend = ctx.settings
        q, k, out, lse, *rest = ctx.saved_tensors
        saved, rest = rest[: ctx.count], rest[ctx.count :]
        v = rest.pop(0) if ctx.optional else None
        needed = [a and b for a, b in zip(ctx.needs_input_grad[2:], ctx.gradients, strict=True)]
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        of_states = [grad_saved[place] for place in handed_places(program(key))]
        given = torch.ops.attnc.attention_backward(
            key, grad_out, grad_lse, of_states, out, lse, saved, q, k, v, rest, ints, floats, backend, needed
        )
        made = iter(given)
        return None, None, *(next(made) if need else None for need in needed)


def autograd(
    keys: Any,
    plan: str,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    inputs: list[Tensor],
    ints: list[int],
    floats: list[float],
    backend: str,
    keep: bool = False,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The operator where tensors may ask for gradients; torch notices where one that is kept is changed in place."""
    below = keys & torch._C._after_autograd_keyset
    tensors = (q, k, v, *inputs)
    if torch.is_grad_enabled() and any(one is not None and one.requires_grad for one in tensors):
        settings = (plan, list(ints), list(floats), backend)
        out, lse, *saved = _Attention.apply(below, settings, *tensors)  # type: ignore[no-untyped-call]
        return out, lse, saved
    with torch._C._AutoDispatchBelowAutograd():
        result: tuple[Tensor, Tensor, list[Tensor]] = torch.ops.attnc.attention.default.redispatch(
            below, plan, q, k, v, inputs, ints, floats, backend, keep
        )
    return result


@lru_cache(maxsize=256)
def differentiable_tensors(found: Program) -> list[bool]:
    """Which of q, k, v and the extra inputs have a gradient: not those that steer conditions and selections only."""
    from attnc.runtime.steps import differentiable

    names = differentiable(found.composition)
    return [name in names for name in tensor_names(found)]


@lru_cache(maxsize=256)
def handed_places(found: Program) -> list[int]:
    """Where what is handed to a later call lies in what steps leave."""
    if found.composition.attention is not None:
        return []
    from attnc.runtime.steps import places_of

    places = places_of(found.composition)
    return [places[one.after] for one in found.composition.handed]


def tensor_names(found: Program) -> list[str]:
    """Names of the tensors that a call may ask gradients of, in the order of the arguments."""
    return ["q", "k", "v", *(declared.name for declared in extra_inputs(found.pattern))]

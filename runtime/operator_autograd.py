"""The operators where tensors ask for gradients: their own autograd functions."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

from attnc.runtime.program import Program, program
from attnc.runtime.refusal import extra_inputs, refuse

# Whether a forward with gradients keeps its states of chunks. ATTNC_KEEP=0: never, backward makes them again.
keeps = os.environ.get("ATTNC_KEEP") != "0"


class _Attention(_SingleLevelFunction):
    """The operator as autograd sees it, its lists flattened: torch's own way to register a gradient takes 0.2 ms.

    Of a single level, since the dispatcher has come to the level of one `torch.func` transform when it gets here.
    """

    @staticmethod
    def forward(ctx: Any, keys: Any, settings: tuple[Any, ...], *tensors: Tensor | None) -> Any:
        key, ints, floats, backend = settings
        q, k, v, *extra = tensors
        ctx.gradients = differentiable_tensors(program(key))  # raises, located, where there is no rule
        with _below():
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
    refuse_tangents(plan, tensors)
    if torch.is_grad_enabled() and any(one is not None and one.requires_grad for one in tensors):
        settings = (plan, list(ints), list(floats), backend)
        with _one_level():
            out, lse, *saved = _Attention.apply(below, settings, *tensors)  # type: ignore[attr-defined]
        return out, lse, saved
    with torch._C._AutoDispatchBelowAutograd():
        result: tuple[Tensor, Tensor, list[Tensor]] = torch.ops.attnc.attention.default.redispatch(
            below, plan, q, k, v, inputs, ints, floats, backend, keep
        )
    return result


class _Gradient(_SingleLevelFunction):
    """The gradient operator where a gradient of it may be asked for, which is refused then and not lost."""

    @staticmethod
    def forward(ctx: Any, keys: Any, arguments: tuple[Any, ...], *tensors: Tensor) -> Any:
        ctx.plan = arguments[0]
        with _below():
            return tuple(torch.ops.attnc.attention_backward.default.redispatch(keys, *arguments))

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> NoReturn:
        help = "`.reference(..)` of the pattern has them: float64, memory N x M"
        refuse(program(ctx.plan).pattern, "transform", "second derivatives are not supported", help=help)


def gradient_autograd(keys: Any, *arguments: Any) -> list[Tensor]:
    """The gradient operator where tensors may ask for gradients."""
    below = keys & torch._C._after_autograd_keyset
    parts = [part for given in arguments for part in (given if isinstance(given, list) else [given])]
    tensors = [part for part in parts if isinstance(part, Tensor)]
    if torch.is_grad_enabled() and any(one.requires_grad for one in tensors):
        with _one_level():
            return list(_Gradient.apply(below, arguments, *tensors))  # type: ignore[attr-defined]
    with torch._C._AutoDispatchBelowAutograd():
        result: list[Tensor] = torch.ops.attnc.attention_backward.default.redispatch(below, *arguments)
    return result


@contextmanager
def _below() -> Iterator[None]:
    """Below autograd of this level. A function's forward turns gradients off, which outer transforms still need."""
    with torch._C._AutoDispatchBelowAutograd(), torch.set_grad_enabled(torch._C._are_functorch_transforms_active()):
        yield


def _one_level() -> AbstractContextManager[None]:
    """Lets an autograd function of a single level run inside of a transform of torch.func."""
    active = torch._C._are_functorch_transforms_active()
    return enable_single_level_autograd_function() if active else nullcontext()


def refuse_tangents(plan: str, tensors: Sequence[Tensor | None]) -> None:
    """Below autograd nothing has tangents: forward mode would go on without them."""
    if forward_ad._current_level < 0:
        return
    if any(one is not None and forward_ad.unpack_dual(one).tangent is not None for one in tensors):
        help = "derivatives are taken in reverse: `torch.autograd.grad`, `torch.func.grad` or `vjp`"
        refuse(program(plan).pattern, "transform", "forward-mode derivatives are not supported", help=help)


@lru_cache(maxsize=256)
def differentiable_tensors(found: Program) -> list[bool]:
    """Which of q, k, v and the extra inputs have a gradient: not those that steer conditions and selections only."""
    from attnc.runtime.steps.gradients import differentiable

    names = differentiable(found.composition)
    return [name in names for name in tensor_names(found)]


@lru_cache(maxsize=256)
def handed_places(found: Program) -> list[int]:
    """Where what is handed to a later call lies in what steps leave."""
    if found.composition.attention is not None:
        return []
    from attnc.runtime.steps.composition import places_of

    places = places_of(found.composition)
    return [places[one.after] for one in found.composition.handed]


def tensor_names(found: Program) -> list[str]:
    """Names of the tensors that a call may ask gradients of, in the order of the arguments."""
    return ["q", "k", "v", *(declared.name for declared in extra_inputs(found.pattern))]

"""Torch's own functions for the operators of a recording: half the time of a call through the operator's schema."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map


class _Caught(Exception):  # noqa: N818
    """The operator that a function calls, and its arguments."""


class _Catcher(TorchDispatchMode):
    """Stops at the first operator."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise _Caught(func, args, kwargs or {})


def native(operator: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Callable[..., Any]:
    """A function that takes the arguments and calls this operator with them, itself if there is no other.

    `args` and `kwargs` hold tensors of the meta device in place of the call's; nothing is computed.
    """
    name = operator._schema.name.removeprefix("aten::")
    if name == "_to_copy" and {*kwargs} == {"dtype"} and args[0].dtype != kwargs["dtype"]:
        return _cast
    for home in (torch, torch.Tensor):
        function = getattr(home, name, None)
        if function is not None and _calls(function, operator, args, kwargs):
            return function  # type: ignore[no-any-return]
    return operator  # type: ignore[no-any-return]


def _calls(function: Callable[..., Any], operator: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a function's first operator is this one, with the arguments as they are."""
    try:
        with torch.no_grad(), _Catcher():  # type: ignore[no-untyped-call]
            function(*args, **kwargs)
    except _Caught as caught:
        found, given, named = caught.args
        return found is operator and _same((given, named), (args, kwargs))
    except (TypeError, RuntimeError, ValueError):
        return False
    return False


def _same(found: Any, expected: Any) -> bool:
    """Whether arguments are the same tensors and equal numbers of equal types."""
    leaves, form = tree_flatten(tree_map(_plain, found))
    others, other = tree_flatten(tree_map(_plain, (tuple(expected[0]), dict(expected[1]))))
    return form == other and all(
        one is two if isinstance(one, Tensor) else type(one) is type(two) and one == two
        for one, two in zip(leaves, others, strict=True)
    )


def _plain(leaf: Any) -> Any:
    return list(leaf) if isinstance(leaf, torch.Size) else leaf


def _cast(tensor: Tensor, *, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype)

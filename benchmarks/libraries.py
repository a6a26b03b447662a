"""Contenders from other libraries, where they are installed: flash-linear-attention (fla) and NATTEN.

Both keep tokens before heads; the tensors are laid out for them beforehand, outside of the timed call.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.ready import Ready, UnavailableError, first_line
from benchmarks.timing import seconds_of
from benchmarks.work import Problem

Arguments = dict[str, Any]


def tokens_first(tensor: Tensor) -> Tensor:
    """(B, H, T, ..) as (B, T, H, ..), contiguous."""
    return tensor.transpose(1, 2).contiguous()


def over_tokens(problem: Problem, *names: str) -> Arguments:
    """Inputs over (b, h, t, ..), by their names."""
    return {name: tokens_first(problem.inputs[name]) for name in names}


def constant_decay(problem: Problem) -> Arguments:
    """A decay of the head as the log decay of every token."""
    batch, _, tokens, _ = problem.q.shape
    return {"g": problem.inputs["gamma"].float().log().expand(batch, tokens, -1).contiguous()}


def bonus(problem: Problem) -> Arguments:
    return {"w": tokens_first(problem.inputs["g"]), "u": problem.inputs["u"], "scale": 1.0}


def removed(problem: Problem) -> Arguments:
    return {**over_tokens(problem, "a", "b"), "w": tokens_first(problem.inputs["g"]), "scale": 1.0}


# pattern: (module of fla, function, what it is called with besides q, k and v; names of q where it has another)
FLA: dict[str, tuple[str, str, Callable[[Problem], Arguments]]] = {
    "retention": ("fla.ops.simple_gla", "chunk_simple_gla", constant_decay),
    "simple_gla": ("fla.ops.simple_gla", "chunk_simple_gla", lambda problem: over_tokens(problem, "g")),
    "gla": ("fla.ops.gla", "chunk_gla", lambda problem: over_tokens(problem, "g")),
    "rwkv6": ("fla.ops.rwkv6", "chunk_rwkv6", bonus),
    "rwkv7": ("fla.ops.rwkv7", "chunk_rwkv7", removed),
    "delta": ("fla.ops.delta_rule", "chunk_delta_rule", lambda problem: over_tokens(problem, "beta")),
    "gated_delta": (
        "fla.ops.gated_delta_rule",
        "chunk_gated_delta_rule",
        lambda problem: over_tokens(problem, "g", "beta"),
    ),
    "kda": ("fla.ops.kda", "chunk_kda", lambda problem: over_tokens(problem, "g", "beta")),
    "forgetting": (
        "fla.ops.forgetting_attn",
        "parallel_forgetting_attn",
        lambda problem: {"g": tokens_first(problem.inputs["f"])},
    ),
}
RECEPTANCE = frozenset({"rwkv6", "rwkv7"})  # q is called r there


def library(name: str) -> Any:
    """A module, or why it is not there."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UnavailableError(f"not installed: {first_line(error)}") from error


def fla(problem: Problem) -> Ready:
    """flash-linear-attention's chunked kernel of the same recurrence."""
    if problem.work.pattern not in FLA:
        raise UnavailableError("no function of fla computes the same")
    if not problem.q.is_cuda:
        raise UnavailableError("fla needs a CUDA device")
    module, function, arguments = FLA[problem.work.pattern]
    run = getattr(library(module), function)
    given = arguments(problem)
    given["r" if problem.work.pattern in RECEPTANCE else "q"] = tokens_first(problem.q)
    given |= {"k": tokens_first(problem.k), "v": tokens_first(problem.v)}

    def call() -> Tensor:
        result = run(**given)
        out: Tensor = result[0] if isinstance(result, tuple) else result
        return out.transpose(1, 2)

    return Ready(call, seconds_of(call, problem.device))


def natten(problem: Problem) -> Ready:
    """NATTEN's two-dimensional neighborhood attention."""
    if problem.work.pattern != "neighborhood":
        raise UnavailableError("NATTEN computes neighborhoods")
    run = library("natten").na2d
    size = problem.size.parameters
    grid = (size["height"], size["width"])
    q, k, v = (tokens_first(tensor).unflatten(1, grid) for tensor in (problem.q, problem.k, problem.v))

    def call() -> Tensor:
        out: Tensor = run(q, k, v, kernel_size=size["kernel"], dilation=size.get("dilation", 1))
        return out.flatten(1, 2).transpose(1, 2)

    return Ready(call, seconds_of(call, problem.device))


def installed(name: str) -> bool:
    """Whether a library can be imported."""
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True


def versions() -> str:
    """What is installed of them, for the heading of a table."""
    found = [f"{name} {getattr(library(name), '__version__', '?')}" for name in ("fla", "natten") if installed(name)]
    return ", ".join(found) or f"neither fla nor natten beside torch {torch.__version__}"

"""The torch operator `attnc::attention`: one for all patterns, told apart by the key of a program.

Parameters travel as two lists, ints (bools among them) and floats, in the order of declaration with the elements
of tuples in place, so that a changed window or length is an ordinary argument and compiles nothing anew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from attnc.dsl.types import Base
from attnc.runtime.binding import fixed_sizes
from attnc.runtime.program import Program, program
from attnc.runtime.refusal import extra_inputs, refuse
from attnc.runtime.scalars import of_node, of_term

if TYPE_CHECKING:
    from attnc.compiler.plan import Plan
    from attnc.runtime.call import Call

SCHEMA = (
    "attention(str plan, Tensor q, Tensor k, Tensor? v, Tensor[] inputs, SymInt[] ints, float[] floats, str backend)"
    " -> (Tensor, Tensor)"
)
BACKENDS = ("auto", "executor", "triton")

library = torch.library.Library("attnc", "DEF")
library.define(SCHEMA)


def pack(program: Program, parameters: dict[str, Any]) -> tuple[list[int], list[float]]:
    """Values of parameters (tuples whole) as the operator takes them."""
    ints: list[int] = []
    floats: list[float] = []
    for declared in program.parameters:
        value = parameters[declared.name]
        into: list[Any] = floats if declared.base is Base.REAL else ints
        if declared.base is Base.BOOL:
            value = 1 if value else 0  # a list that holds a symbolic int takes no bool
        into.extend(value if declared.is_tuple else (value,))
    return ints, floats


def unpack(program: Program, ints: Sequence[int], floats: Sequence[float]) -> dict[str, Any]:
    """Inverse of `pack`, with the elements of tuples as `segments.0` .."""
    values: dict[str, Any] = {}
    reals: list[Any] = list(reversed(floats))
    others: list[Any] = list(reversed(ints))
    for declared in program.parameters:
        pool = reals if declared.base is Base.REAL else others
        count = program.lengths.get(declared.name)
        names = [declared.name] if count is None else [f"{declared.name}.{at}" for at in range(count)]
        for name in names:
            value = pool.pop()
            values[name] = bool(value) if declared.base is Base.BOOL else value
    return values


def sizes_of(
    program: Program, q: Tensor, k: Tensor, v: Tensor | None, inputs: Sequence[Tensor], parameters: dict[str, Any]
) -> dict[str, int]:
    """Length of every axis but the declared ones (blocks, segments)."""
    sizes: dict[str, int] = {"b": q.shape[0], "h": q.shape[1], "i": q.shape[2], "d": q.shape[3]}
    sizes |= {"j": k.shape[2], "t": k.shape[2]}
    if v is not None:
        sizes["e"] = v.shape[3]
    sizes |= fixed_sizes(program.pattern, parameters, sizes)
    for declared, value in zip(extra_inputs(program.pattern), inputs, strict=True):
        for axis, length in zip(declared.axes, value.shape, strict=True):
            sizes.setdefault(axis, length)
    return sizes


def require(program: Program, parameters: dict[str, Any], sizes: dict[str, int]) -> None:
    """What divides or sizes something in the text is positive. Raises AttnError at that place."""
    pattern = program.pattern
    if sizes["i"] > sizes["j"] and (read := program.token_read) is not None:
        help = "inputs over t have the length of the keys; with more queries than keys the last queries have no token"
        message = f"`{read.span.text}` reads {sizes['j']} tokens at {sizes['i']} queries"
        refuse(pattern, "shape", message, span=read.span, help=help)
    for term, span in program.divisors:
        value = of_term(term, parameters, sizes)
        if value is not None and value <= 0:
            name = str(term.attribute) if term.form == "parameter" else term.span.text
            help = "it divides or sizes something there, so it must be positive"
            refuse(pattern, "not-positive", f"`{name}` is {value} in this call", span=span, help=help)


def prepare(
    plan: str,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    inputs: Sequence[Tensor],
    ints: Sequence[int],
    floats: Sequence[float],
) -> tuple[Program, Call]:
    """The program and the call that the operator's arguments stand for, with what can only be checked on values."""
    from attnc.runtime.call import make_call  # late: it brings the compiler, which reading a file does not need

    found = program(plan)
    parameters = unpack(found, ints, floats)
    sizes = sizes_of(found, q, k, v, inputs, parameters)
    require(found, parameters, sizes)
    for need in found.plan.requirements:
        value = of_node(need.node, parameters, sizes)
        if value is not None and value <= 0:
            refuse(found.pattern, "not-positive", f"`{need.span.text}` is {value} in this call", span=need.span)
    given = dict(zip((declared.name for declared in extra_inputs(found.pattern)), inputs, strict=True))
    return found, make_call(found.plan, q, k, v, parameters, given)


def _run(
    plan: str,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    inputs: list[Tensor],
    ints: list[int],
    floats: list[float],
    backend: str,
) -> tuple[Tensor, Tensor]:
    """CPU and CUDA."""
    found, call = prepare(plan, q, k, v, inputs, ints, floats)
    return choose(backend, q.device)(found.plan, call)


def choose(backend: str, device: torch.device) -> Callable[[Plan, Call], tuple[Tensor, Tensor]]:
    """The `execute` of a back end. `auto`: Triton on CUDA, the executor on a CPU."""
    if backend not in BACKENDS:
        raise ValueError(f"no back end `{backend}`: {', '.join(BACKENDS)}")
    if backend == "triton" or (backend == "auto" and device.type == "cuda"):
        from attnc.runtime.launch import execute as launch

        return launch
    if device.type != "cpu":
        raise ValueError(f"the executor runs on a CPU, not on {device}")
    from attnc.runtime.executor import execute

    return execute


def _fake(
    plan: str,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    inputs: list[Tensor],
    ints: list[int],
    floats: list[float],
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Shapes and types of the results, for tracing."""
    found = program(plan)
    sizes = sizes_of(found, q, k, v, inputs, unpack(found, ints, floats))
    axes = found.pattern.output_axes
    out = q.new_empty([int(axis) if axis.isdigit() else sizes[axis] for axis in axes])
    statistics = torch.float64 if q.dtype == torch.float64 else torch.float32
    rows = [len(found.plan.branches), q.shape[0], q.shape[1], q.shape[2]]
    return out, q.new_empty(rows, dtype=statistics)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.plan = inputs[0]
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, gradient: Tensor, _: Tensor | None) -> NoReturn:
    _unsupported(
        ctx.plan,
        "gradients are not compiled yet",
        "`.reference(..)` of the pattern is differentiable: float64, memory N x M",
    )


def _batch(info: Any, dims: Any, plan: str, *arguments: Any) -> NoReturn:
    _unsupported(
        plan, "torch.vmap over a pattern is not supported", "the first axis of q, k and v is the batch: use it instead"
    )


def _unsupported(key: str, message: str, help: str) -> NoReturn:
    refuse(program(key).pattern, "transform", message, help=help)


library.impl("attention", _run, "CPU")
library.impl("attention", _run, "CUDA")
torch.library.register_fake("attnc::attention", _fake, lib=library)
# The one place that says what a gradient is.
torch.library.register_autograd("attnc::attention", _backward, setup_context=_setup, lib=library)
torch.library.register_vmap("attnc::attention", _batch, lib=library)

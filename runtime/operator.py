"""The torch operators `attnc::attention` and its gradient: one for all patterns, told apart by the key of a program.

Parameters travel as two lists, ints (bools among them) and floats, in the order of declaration with the elements
of tuples in place, so that a changed window or length is an ordinary argument and compiles nothing anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from attnc.runtime.binding import WIDEST, WIDEST_ATTENDED, fixed_sizes
from attnc.runtime.operator_autograd import autograd, gradient_autograd, tensor_names
from attnc.runtime.packing import unpack
from attnc.runtime.program import Program, program
from attnc.runtime.recording.repeated import repeated
from attnc.runtime.refusal import extra_inputs, refuse
from attnc.runtime.scalars import of_node, of_term

if TYPE_CHECKING:
    from attnc.compiler.composition import Composition
    from attnc.compiler.plan import Plan
    from attnc.runtime.backward import Engine
    from attnc.runtime.call import Call
    from attnc.runtime.compute.arrays import Frame

SCHEMA = (
    "attention(str plan, Tensor q, Tensor k, Tensor? v, Tensor[] inputs, SymInt[] ints, float[] floats, str backend,"
    " bool keep=False) -> (Tensor, Tensor, Tensor[])"
)
GRADIENT_SCHEMA = (
    "attention_backward(str plan, Tensor grad_out, Tensor? grad_lse, Tensor?[] grad_states, Tensor out, Tensor lse,"
    " Tensor[] saved, Tensor q, Tensor k, Tensor? v, Tensor[] inputs, SymInt[] ints, float[] floats, str backend,"
    " bool[] needed) -> Tensor[]"
)
FARTHEST = 2**30  # kernels count in 32 bits: positions, and what is added to them
WIDEST_STEP = 2**24  # a tile's keys lie up to 127 steps apart
BACKENDS = ("auto", "executor", "triton")

library = torch.library.Library("attnc", "DEF")
library.define(SCHEMA)
library.define(GRADIENT_SCHEMA)


def sizes_of(
    program: Program, q: Tensor, k: Tensor, v: Tensor | None, inputs: Sequence[Tensor], parameters: dict[str, Any]
) -> dict[str, int]:
    """Length of every axis but the declared ones (blocks, segments)."""
    sizes: dict[str, int] = {"b": q.shape[0], "h": q.shape[1], "i": q.shape[2], "d": q.shape[3]}
    sizes |= {"j": k.shape[2], "t": k.shape[2], "offset": max(k.shape[2] - q.shape[2], 0)}
    if v is not None:
        sizes["e"] = v.shape[3]
    sizes |= fixed_sizes(program.pattern, parameters, sizes)
    for declared, value in zip(extra_inputs(program.pattern), inputs, strict=True):
        for axis, length in zip(declared.axes, value.shape, strict=True):
            sizes.setdefault(axis, length)
    return sizes


def require(program: Program, parameters: dict[str, Any], sizes: dict[str, int]) -> None:
    """What divides or sizes something in the text is positive, ints are not too large. Raises AttnError, located."""
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
        if value is not None and value > WIDEST_STEP:
            name = str(term.attribute) if term.form == "parameter" else term.span.text
            help = "a block or a stride as long as the sequence does the same"
            message = (
                f"`{name}` is {value} in this call, where at most 2**24 can divide positions or size groups of them"
            )
            refuse(pattern, "argument", message, span=span, help=help)
    for name in program.counted:
        if abs(parameters[name]) > FARTHEST:
            help = "the same holds beyond the length of the sequence: a window of 2**30 sees every key"
            message = f"parameter `{name}` is {parameters[name]}, where at most 2**30 can be counted with"
            refuse(pattern, "argument", message, about=name.partition(".")[0], help=help)


def checked(
    plan: str,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    inputs: Sequence[Tensor],
    ints: Sequence[int],
    floats: Sequence[float],
) -> Prepared:
    """What the operator's arguments stand for, with what can only be checked on values."""
    found = program(plan)
    parameters = unpack(found, ints, floats)
    sizes = sizes_of(found, q, k, v, inputs, parameters)
    require(found, parameters, sizes)
    for need in found.composition.requirements:
        value = of_node(need.node, parameters, sizes)
        if value is not None and value <= 0:
            refuse(found.pattern, "not-positive", f"`{need.span.text}` is {value} in this call", span=need.span)
    given = dict(zip((declared.name for declared in extra_inputs(found.pattern)), inputs, strict=True))
    return Prepared(found, {"q": q, "k": k, "v": v}, given, parameters, sizes)


@dataclass(frozen=True)
class Prepared:
    """A call of the operator, unpacked: q, k and v, the declared inputs, parameters, and the length of every axis."""

    program: Program
    tensors: dict[str, Tensor | None]
    inputs: dict[str, Tensor]
    parameters: dict[str, Any]
    sizes: dict[str, int]

    @property
    def composition(self) -> Composition:
        return self.program.composition_for(self.sizes, WIDEST_ATTENDED if self.on_cuda else None)

    @property
    def differentiated(self) -> Composition:
        """The composition whose steps have gradients: the same, unless its vectors are too wide for their kernels."""
        return self.program.composition_for(self.sizes, WIDEST if self.on_cuda else None)

    @property
    def on_cuda(self) -> bool:
        q = self.tensors["q"]
        return q is not None and q.is_cuda

    def call(self, plan: Plan) -> Call:
        """The call of a plan over q, k and v as they are given."""
        from attnc.runtime.call import make_call  # late: it brings the compiler, which reading a file does not need

        q, k, v = (self.tensors[name] for name in "qkv")
        assert q is not None
        assert k is not None
        return make_call(plan, q, k, v, self.parameters, self.inputs)

    def frame(self, composition: Composition | None = None) -> Frame:
        """The frame of the steps of a composition, by default the one that the call runs."""
        from attnc.runtime.steps.composition import frame_of

        return frame_of(composition or self.composition, {**self.tensors, **self.inputs}, self.parameters, self.sizes)


def _run(
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
    """The result, lse (B, H, N) of a pattern that is one softmax (else empty), and what its heavy steps left.

    `keep`: beside them what their gradients would make again.
    """
    key = (plan, backend, keep, *ints, *floats)
    out, lse, *saved = repeated(
        f"`{program(plan).pattern.name}`",
        key,
        (q, k, v, *inputs),
        lambda: _forward(plan, q, k, v, inputs, ints, floats, backend, keep),
    )
    return out, lse, saved


def _forward(
    plan: str,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    inputs: list[Tensor],
    ints: list[int],
    floats: list[float],
    backend: str,
    keep: bool,
) -> list[Tensor]:
    """The result, lse, and what the heavy steps left."""
    prepared = checked(plan, q, k, v, inputs, ints, floats)
    engine = choose_engine(backend, q.device)
    step = prepared.composition.attention
    if step is not None:
        return list(engine.execute(step.plan, prepared.call(step.plan), q.dtype))
    from attnc.runtime.steps.composition import run
    from attnc.runtime.steps.results import own

    with torch.no_grad():
        made = run(prepared.composition, prepared.frame(), engine, keep)
    statistics = torch.float64 if q.dtype == torch.float64 else torch.float32
    lse = made.saved[-1].clone() if prepared.program.is_one_softmax else q.new_empty(0, dtype=statistics)
    kept = made.kept
    return [own(made.out.to(q.dtype), [q, k, v, *inputs, *kept]), lse, *kept]


def choose_engine(backend: str, device: torch.device) -> Engine:
    """What a back end does."""
    from attnc.runtime.backward import Engine

    if _on_triton(backend, device):
        from attnc.runtime.cuda.launch import execute as launch
        from attnc.runtime.cuda.launch_backward import branch_backward as launch_backward
        from attnc.runtime.cuda.launch_backward import row_products

        return Engine(launch, launch_backward, row_products, chunked=True)
    from attnc.runtime.cpu.dense import dense_gradients
    from attnc.runtime.cpu.executor import execute
    from attnc.runtime.cpu.executor_backward import branch_backward

    return Engine(execute, branch_backward, whole=dense_gradients)


def _on_triton(backend: str, device: torch.device) -> bool:
    """Whether Triton runs a call, else the executor. `auto`: Triton on CUDA, the executor on a CPU."""
    if backend not in BACKENDS:
        raise ValueError(f"no back end `{backend}`: {', '.join(BACKENDS)}")
    if backend == "triton" or (backend == "auto" and device.type == "cuda"):
        return True
    if device.type != "cpu":
        raise ValueError(f"the executor runs on a CPU, not on {device}")
    return False


def _fake(
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
    """Shapes and types of the results, for tracing."""
    found = program(plan)
    parameters = unpack(found, ints, floats)
    sizes = sizes_of(found, q, k, v, inputs, parameters)
    out = q.new_empty(_shape(found, sizes))
    statistics = torch.float64 if q.dtype == torch.float64 else torch.float32
    rows = [q.shape[0], q.shape[1], q.shape[2]] if found.is_one_softmax else [0]
    lse = q.new_empty(rows, dtype=statistics)
    if found.composition.attention is not None:
        return out, lse, []
    from attnc.runtime.steps.composition import run

    given = dict(zip((declared.name for declared in extra_inputs(found.pattern)), inputs, strict=True))
    prepared = Prepared(found, {"q": q, "k": k, "v": v}, given, parameters, sizes)
    keep = keep and _on_triton(backend, q.device)
    return out, lse, run(prepared.composition, prepared.frame(), None, keep).kept


def _shape(found: Program, sizes: dict[str, int]) -> list[int]:
    """Shape of the result."""
    return [int(axis) if axis.isdigit() else sizes[axis] for axis in found.pattern.output_axes]


def _run_backward(
    plan: str,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    grad_states: list[Tensor | None],
    out: Tensor,
    lse: Tensor,
    saved: list[Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    inputs: list[Tensor],
    ints: list[int],
    floats: list[float],
    backend: str,
    needed: list[bool],
) -> list[Tensor]:
    """The gradients that are needed, in the order of q, k, v and the inputs."""
    given = (grad_out, grad_lse, out, lse, q, k, v, *grad_states, *saved, *inputs)
    return repeated(
        f"the gradient of `{program(plan).pattern.name}`",
        (plan, backend, len(saved), *needed, *ints, *floats),
        given,
        lambda: _gradients(plan, given, (len(grad_states), len(saved)), ints, floats, backend, needed),
    )


def _gradients(
    plan: str,
    given: Sequence[Any],
    counts: tuple[int, int],
    ints: list[int],
    floats: list[float],
    backend: str,
    needed: list[bool],
) -> list[Tensor]:
    """The gradients that are needed. `given`: the operator's tensors; `counts`: states' cotangents, saved ones."""
    grad_out, grad_lse, out, lse, q, k, v, *rest = given
    of_states, rest = rest[: counts[0]], rest[counts[0] :]
    saved, inputs = rest[: counts[1]], rest[counts[1] :]
    prepared = checked(plan, q, k, v, inputs, ints, floats)
    wanted = [name for name, need in zip(tensor_names(prepared.program), needed, strict=True) if need]
    engine = choose_engine(backend, q.device)
    step = prepared.composition.attention
    if step is not None:
        from attnc.runtime.backward import Gradients

        made = Gradients(step.plan, prepared.call(step.plan), engine, wanted).of(out, lse, grad_out, grad_lse)
    else:
        from attnc.runtime.steps.composition import run, with_result
        from attnc.runtime.steps.gradients import gradients

        composition, frame = prepared.differentiated, prepared.frame(prepared.differentiated)
        if composition is not prepared.composition:
            saved = run(composition, frame, engine).saved
        saved = with_result(composition, saved, out)
        grad_lse = grad_lse if prepared.program.is_one_softmax else None  # else lse is empty
        cotangents = (grad_out, grad_lse, of_states)
        made = gradients(composition, frame, engine, saved, cotangents, wanted)
    return [made[name] for name in wanted]


def _fake_backward(
    plan: str,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    grad_states: list[Tensor | None],
    out: Tensor,
    lse: Tensor,
    saved: list[Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    inputs: list[Tensor],
    ints: list[int],
    floats: list[float],
    backend: str,
    needed: list[bool],
) -> list[Tensor]:
    """Shapes and types of the gradients."""
    wanted = [tensor for tensor, need in zip([q, k, v, *inputs], needed, strict=True) if need]
    return [tensor.new_empty(tensor.shape) for tensor in wanted if tensor is not None]


def _batch(info: Any, dims: Any, plan: str, *arguments: Any) -> NoReturn:
    help = "the first axis of q, k and v is the batch: use it instead"
    refuse(program(plan).pattern, "transform", "torch.vmap over a pattern is not supported", help=help)


for device in ("CPU", "CUDA"):
    library.impl("attention", _run, device)
    library.impl("attention_backward", _run_backward, device)
torch.library.register_fake("attnc::attention", _fake, lib=library)
torch.library.register_fake("attnc::attention_backward", _fake_backward, lib=library)
# The one place that says what a gradient is.
library.impl("attention", autograd, "Autograd", with_keyset=True)
library.impl("attention_backward", gradient_autograd, "Autograd", with_keyset=True)
torch.library.register_vmap("attnc::attention", _batch, lib=library)
torch.library.register_vmap("attnc::attention_backward", _batch, lib=library)

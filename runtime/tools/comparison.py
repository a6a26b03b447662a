"""Every back end against the float64 reference, on awkward shapes: what `attnc check` does."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnc.dsl.types import Base
from attnc.runtime.pattern import CompiledPattern
from attnc.runtime.tolerance import error, tolerance
from attnc.runtime.tools.inputs import Shape, made_inputs
from attnc.runtime.tools.rounding import moved
from attnc.runtime.tools.settings import Setting, Value

# One position; a length that no tile divides; fewer queries than keys (decoding) with shared key heads and E != D;
# many tiles; more queries than keys. No width but one is a power of two.
SHAPES = (
    Shape(1, 1, 1, 1, 1, 16, 16),
    Shape(2, 3, 1, 37, 37, 24, 40),
    Shape(1, 4, 2, 5, 131, 64, 20),
    Shape(1, 1, 1, 130, 130, 40, 40),
    Shape(1, 2, 1, 45, 19, 20, 36),
)
AGAIN = 3  # times that tensors of a case are drawn anew
SIGNS = 3  # cotangents that a gradient's magnitude is taken from
# Operands and cotangents are of size 1. A gradient below this is what terms of that size leave as they cancel (one key
# under a normaliser with eps 1e-6 leaves 1e-6): its rounding is theirs, so it is compared with 1.
NOTHING = 1e-5
ORDINARY = (
    8  # roundings of its own size that a gradient moves by where nothing cancels deep inside (`runtime.tools.rounding`)
)
REQUIRED: dict[Base, Value] = {Base.INT: 3, Base.REAL: 0.5, Base.BOOL: True}


@dataclass(frozen=True)
class Case:
    """One call to compare."""

    pattern: CompiledPattern
    shape: Shape
    setting: Setting


@dataclass(frozen=True)
class Target:
    """Where and in which type a case runs. `backend` as for `CompiledPattern.outputs`."""

    label: str
    backend: str
    device: str
    dtype: torch.dtype


@dataclass(frozen=True)
class Outcome:
    """Error of one case on one target, and how large it may be. `of`: `out`, `lse` or `gradient of q`.

    `moves`: of an error that is too large, how far the reference goes where its operations round as float32's do.
    """

    case: Case
    target: Target
    error: float
    allowed: float
    of: str
    moves: float = 0.0

    @property
    def is_gradient(self) -> bool:
        return self.of.startswith("gradient")

    @property
    def agrees(self) -> bool:
        return self.error <= self.allowed

    @property
    def at_a_jump(self) -> bool:
        """Whether the function itself jumps here, as a choice does between scores that float32 cannot tell apart."""
        return not self.agrees and self.moves > self.allowed


def targets(device: str | None, dtype: torch.dtype | None) -> list[Target]:
    """The back ends of this machine, or of one device; each in its element types, or in one.

    Without CUDA the kernels run in Triton's interpreter: TRITON_INTERPRET=1 must be set before triton is imported.
    """
    found = []
    if device in (None, "cpu"):
        found += [Target("executor", "executor", "cpu", t) for t in (torch.float64, torch.float32, torch.bfloat16)]
    if device in (None, "cpu") and not torch.cuda.is_available():
        found += [Target("interpreter", "triton", "cpu", torch.float32)]
    if device != "cpu" and torch.cuda.is_available():
        types = (torch.float32, torch.bfloat16, torch.float16)
        found += [Target("cuda", "triton", device or "cuda", t) for t in types]
    return [target for target in found if dtype in (None, target.dtype)]


def cases(pattern: CompiledPattern, chosen: Setting, lines: list[Setting]) -> Iterator[Case]:
    """What to try: every `# check:` line of the file, the defaults, and, where no line says better, ints small
    enough to matter at these lengths. `chosen` (from the command line) overrides all of them."""
    tried: list[dict[str, Value]] = []
    for line in lines:
        setting = Setting(line.parameters | chosen.parameters, line.sizes | chosen.sizes, line.ranges)
        yield from _over_shapes(pattern, setting)
        tried.append(setting.parameters)
    if any(set(line.parameters) >= required(pattern) and line.sizes for line in lines) and required(pattern):
        return  # what is required fits the sizes of its line only
    ranges = lines[0].ranges if lines else {}
    small, plain = shrunken(pattern) | chosen.parameters, filled(pattern) | chosen.parameters
    if small not in tried:
        yield from _over_shapes(pattern, Setting(small, chosen.sizes, ranges))
    if plain not in (small, *tried):
        # At these lengths a window of thousands is all keys: a shape of few and one of fewer queries than keys do.
        yield from list(_over_shapes(pattern, Setting(plain, chosen.sizes, ranges)))[:3]


def _over_shapes(pattern: CompiledPattern, setting: Setting) -> Iterator[Case]:
    shapes = dict.fromkeys(shape.updated(setting.sizes) for shape in SHAPES)
    ragged = pattern.program.token_read is None  # else there is no call with more queries than keys
    yield from (Case(pattern, shape, setting) for shape in shapes if ragged or shape.queries <= shape.keys)


def required(pattern: CompiledPattern) -> set[str]:
    """Parameters without a default."""
    return {p.name for p in pattern.pattern.parameters if p.default is None and p.name != "scale"}


def filled(pattern: CompiledPattern) -> dict[str, Value]:
    """A value for every parameter that has no default."""
    wanted = required(pattern)
    return {p.name: REQUIRED[p.base] for p in pattern.pattern.parameters if p.name in wanted}


def shrunken(pattern: CompiledPattern) -> dict[str, Value]:
    """Every int above 16 as a small odd one, so that a window of 4096 keys is one of some tokens here."""
    values = filled(pattern)
    for at, p in enumerate(pattern.pattern.parameters):
        if p.is_tuple and isinstance(p.default, tuple):
            values[p.name] = tuple(item if item <= 16 else 8 * place + 5 for place, item in enumerate(p.default, 1))
        elif p.base is Base.INT and isinstance(p.default, int) and p.default > 16:
            values[p.name] = 5 + 2 * at
    return values


def compare_all(
    tried: list[Case], target: Target, draws: int = 1, *, passed_over: list[Outcome] | None = None
) -> list[Outcome]:
    """Every case with its gradients; in the interpreter, which is slow, those of one case of several heads.

    `draws`: tensors of a case, one after the other: on CUDA, calls after the second do what was recorded of it. Tensors
    at which the function jumps say nothing; others are drawn, AGAIN times at most. `passed_over` takes what was off.
    """
    slow = target.label == "interpreter"
    chosen = next((case for case in tried if case.shape.heads > 1), None)
    outcomes = []
    for case, seed in ((case, seed) for case in tried for seed in range(draws)):
        found = compare(case, target, seed, gradients=not slow or case is chosen)
        for again in range(1, AGAIN + 1):
            off = [one for one in found if not one.agrees]
            if not off or not all(one.at_a_jump for one in off):
                break
            if passed_over is not None:
                passed_over += off
            found = compare(case, target, seed + again * draws, gradients=not slow or case is chosen)
        outcomes += found
    return outcomes


def compare(case: Case, target: Target, seed: int = 0, *, gradients: bool = True) -> list[Outcome]:
    """The result, its lse where there is one, and the gradients of every real tensor.

    Raises AttnError where the pattern cannot be compiled or refuses the call.
    """
    pattern = case.pattern
    made = made_inputs(
        pattern.pattern,
        case.shape,
        defaults(pattern) | case.setting.parameters,
        dtype=target.dtype,
        device=target.device,
        seed=seed,
        ranges=case.setting.ranges,
    )
    tensors = {"q": made.q, "k": made.k, "v": made.v, **made.inputs}
    real = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    exact = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
    exact |= {name: exact[name].double().requires_grad_(gradients) for name in real}
    for tensor in real.values():
        tensor.requires_grad_(gradients)
    expected = reference_results(pattern, {**exact, **case.setting.parameters})
    given = {name: tensor for name, tensor in tensors.items() if name not in ("q", "k", "v")}
    out, lse = pattern.outputs(made.q, made.k, made.v, {**case.setting.parameters, **given}, target.backend)
    results = [out, lse][: len(expected)]
    errors = {"out": error(out, expected[0])}
    if pattern.is_one_softmax:
        errors["lse"] = lse_error(lse, expected[1])
    allowed = tolerance(target.dtype, max(case.shape.queries, case.shape.keys))
    leaves = [exact[name] for name in real]

    def anew() -> list[Tensor]:
        made = reference_results(pattern, {**exact, **case.setting.parameters})
        if not gradients:
            return made
        drawn = drawn_cotangents(made, torch.Generator().manual_seed(seed + 1))
        return [*made, *gradients_of(made, leaves, drawn, retain_graph=False)]

    if gradients:
        again = (lambda: anew()[len(expected) :]) if target.dtype == torch.float64 else None
        found = gradient_errors(results, list(real.values()), expected, leaves, seed, Magnitudes(allowed, again))
        errors |= {f"gradient of {name}": value for name, value in zip(real, found, strict=True)}
    off = target.dtype != torch.float64 and any(value > allowed for value in errors.values())
    moves = float32_moves(anew) if off else [0.0] * len(errors)
    return [
        Outcome(case, target, value, allowed, of, move) for (of, value), move in zip(errors.items(), moves, strict=True)
    ]


def float32_moves(run: Callable[[], list[Tensor]]) -> list[float]:
    """How far each result of `run` (float64) goes over its size where operations round as those of float32."""
    unit = torch.finfo(torch.float32).eps / 2
    sizes = [float(one.detach().abs().nan_to_num(posinf=0.0).max()) if one.numel() else 0.0 for one in run()]
    return [unit * far / size if size else 0.0 for far, size in zip(moved(run, unit), sizes, strict=True)]


def reference_results(pattern: CompiledPattern, arguments: dict[str, Any]) -> list[Tensor]:
    """The float64 result, and its lse where it has one."""
    if pattern.is_one_softmax:
        return list(pattern.reference_with_lse(**arguments))
    return [pattern.reference(**arguments)]


def lse_error(lse: Tensor, expected: Tensor) -> float:
    """Error of a log-sum-exp, where rows without keys must be the same."""
    lse, expected = lse.detach().cpu(), expected.detach()
    empty = expected == -math.inf
    return error(lse[~empty], expected[~empty]) if torch.equal(empty, lse == -math.inf) else math.inf


@dataclass
class Magnitudes:
    """The size of what rounds in a gradient, where the gradient does not show it: asked for an error above `allowed`.

    A sum of branches may be small because what one of them adds is 0 but for rounding (of one key: p (dp - delta) with
    dp = delta); the rounding follows dp. `again` gives the reference's gradients anew, to see how rounding moves
    them; only float64 rounds as the reference does, so None for other types.
    """

    allowed: float
    again: Callable[[], list[Tensor]] | None
    moved: list[float] | None = None

    def of(self, number: int) -> float:
        """Of a gradient by its number."""
        if self.again is None:
            return 0.0
        if self.moved is None:
            self.moved = moved(self.again)
        return self.moved[number] / ORDINARY


def drawn_cotangents(results: list[Tensor], generator: torch.Generator) -> list[Tensor]:
    """Random cotangents of the results, on a CPU."""
    return [torch.randn(one.shape, generator=generator).to(one.dtype) for one in results]


def gradients_of(
    results: list[Tensor], leaves: list[Tensor], cotangents: list[Tensor], *, retain_graph: bool
) -> list[Tensor]:
    """Gradients of all leaves, zeros where nothing flows."""
    made = torch.autograd.grad(
        results, leaves, cotangents, retain_graph=retain_graph, allow_unused=True, materialize_grads=True
    )
    return list(made)


def gradient_errors(
    results: list[Tensor],
    tensors: list[Tensor],
    expected: list[Tensor],
    exact: list[Tensor],
    seed: int,
    known: Magnitudes,
) -> Iterator[float]:
    """Errors of the gradients of random cotangents, over the magnitude that gradients of their size have.

    A gradient that sums over rows may cancel to little, while its rounding does not: its magnitude is the largest for
    several signs of the rows, and of lse against the result. One that is 0 but for rounding (a softmax of one key) is
    compared with 1; `known` has the magnitude of one that is in part.
    """
    generator = torch.Generator().manual_seed(seed + 1)
    cotangents = drawn_cotangents(results, generator)
    placed = [cotangent.to(one.device) for cotangent, one in zip(cotangents, results, strict=True)]
    found = gradients_of(results, tensors, placed, retain_graph=False)
    rows = results[0].shape[:3]
    magnitudes = [0.0] * len(exact)
    wanted: list[Tensor] = []
    for number in range(SIGNS):
        signs = torch.randint(0, 2, rows, generator=generator).double() * 2 - 1 if number else torch.ones(())
        weights = [
            cotangents[0].double() * signs.unsqueeze(-1),
            *(one.double() * signs * (-1) ** number for one in cotangents[1:]),
        ]
        made = gradients_of(expected, exact, weights, retain_graph=True)
        wanted = wanted or made
        magnitudes = [max(held, float(x.abs().max())) for held, x in zip(magnitudes, made, strict=True)]
    for number, (result, gradient, magnitude) in enumerate(zip(found, wanted, magnitudes, strict=True)):
        magnitude = magnitude if magnitude > NOTHING else 1.0
        off = error(result.cpu(), gradient, magnitude)
        yield off if off <= known.allowed else error(result.cpu(), gradient, max(magnitude, known.of(number)))


def defaults(pattern: CompiledPattern) -> dict[str, Value]:
    """Default values of the parameters that have one."""
    return {p.name: p.default for p in pattern.pattern.parameters if p.default is not None}

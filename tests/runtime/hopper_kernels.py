"""Compiles every kernel of examples for a Hopper GPU, without one: `python -m tests.runtime.hopper_kernels NAME ..`.

`decode:NAME` compiles those of one token's decoding.

Triton's interpreter runs kernels in numpy and so misses what its compiler refuses: a loop variable whose type changes,
a product of two types. Launches are compiled up to machine code and dropped, so results mean nothing.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import attnc
from attnc.runtime.compute import rounds
from attnc.runtime.cuda import chunked_operands, kernel_call, launch, launch_backward, views
from attnc.runtime.tools.comparison import defaults, filled
from attnc.runtime.tools.inputs import Shape, made_inputs
from attnc.runtime.tools.settings import Setting, settings

EXAMPLES = Path(__file__).parents[2] / "examples"
SHAPE = Shape(1, 4, 2, 192, 192, 64, 64)
LONG = {"dsa": Shape(1, 4, 2, 320, 320, 64, 64)}  # more tokens than a selection takes from one tile


class Hopper:
    """A driver of a device that is not there."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return device


def compiled(function: Any, grid: Any) -> Any:
    """Instead of a launch."""

    def call(*arguments: Any, **options: Any) -> None:
        function.run(*arguments, grid=grid, warmup=True, **options)

    return call


def prepare() -> None:
    """Makes launches of tensors on a CPU compilations for the device."""
    hopper: Any = Hopper()
    driver.set_active(hopper)
    changed: list[tuple[Any, str, Any]] = [
        (JITFunction, "__getitem__", compiled),
        (views, "copies_tiles", lambda tensor: True),
        (rounds, "by_kernel", lambda at, kernels: True),
        (chunked_operands, "interpreting", lambda: True),
        *((module, "refuse_unfit", lambda call: None) for module in (kernel_call, launch, launch_backward)),
    ]
    for place, name, other in changed:
        setattr(place, name, other)


def compile_example(name: str) -> None:
    """Forward and gradients, bfloat16. Raises what Triton's compiler raises."""
    pattern = attnc.load(EXAMPLES / f"{name}.attn").patterns[name]
    setting = next(iter(settings(pattern.pattern, "check", pattern.known)), Setting())
    parameters = filled(pattern) | setting.parameters
    made = made_inputs(
        pattern.pattern,
        LONG.get(name, SHAPE).updated(setting.sizes),
        defaults(pattern) | parameters,
        dtype=torch.bfloat16,
        ranges=setting.ranges,
    )
    leaves = q, k, v = [tensor.requires_grad_() for tensor in (made.q, made.k, made.v)]
    out, _ = pattern.outputs(q, k, v, {**parameters, **made.inputs}, backend="triton")
    torch.autograd.grad(out, leaves, torch.zeros_like(out), allow_unused=True)


def compile_decoding(name: str) -> None:
    """One token behind a prompt, bfloat16."""
    pattern = attnc.load(EXAMPLES / f"{name}.attn").patterns[name]
    setting = next(iter(settings(pattern.pattern, "check", pattern.known)), Setting())
    parameters = filled(pattern) | setting.parameters
    values = defaults(pattern) | parameters
    cache = pattern.cache(192, pages=None, **parameters)
    for count in (3, 1):
        shape = replace(SHAPE, queries=count, keys=count).updated(setting.sizes)
        made = made_inputs(pattern.pattern, shape, values, dtype=torch.bfloat16, ranges=setting.ranges)
        pattern.decode(made.q, cache, made.k, made.v, **made.inputs)
        cache.backend = "triton"  # the prompt needs none
    if cache.memory is None or cache.memory.turn is None:
        raise LookupError("it has no turns")


def main(names: list[str]) -> int:
    """The number of examples with a kernel that does not compile, each told."""
    prepare()
    failed = 0
    for name in names:
        try:
            one, _, other = name.partition(":")
            compile_decoding(other) if one == "decode" else compile_example(name)
        except Exception as failure:
            failed += 1
            print(f"{name}: {type(failure).__name__}: {str(failure)[-600:]}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

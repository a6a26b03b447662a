"""Tokens a second of decoding at a long context: `python -m benchmarks.decoding` on a CPU.

Every pattern has the same q, k and v (batch 1, float32). The context enters in one call, which is timed, too; then
single tokens are decoded. The results are compared with a call on the whole sequence, and a wrong one exits with 1.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from torch import Tensor

import attnc
from attnc.runtime.inputs import Shape, made_inputs
from attnc.runtime.pattern import CompiledPattern
from attnc.runtime.tolerance import error, tolerance
from benchmarks.work import EXAMPLES

PATTERNS: dict[str, dict[str, Any]] = {
    "causal": {},
    "streaming": {"sinks": 4, "window": 1024},
    "strided": {"local": 128, "stride": 128},
    "linear": {},
    "gated_delta": {},
}
WARM = 5


def main() -> int:
    """Exit status: 0, or 1 where a result is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--context", type=int, default=16384)
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--width", type=int, default=64)
    options = parser.parse_args()
    wrong = 0
    print("| pattern | tokens/s | ms a token (median) | context, tokens/s | cache, MiB |\n|---|---|---|---|---|")
    for name, parameters in PATTERNS.items():
        pattern = attnc.load(EXAMPLES / f"{name}.attn").patterns[name]
        wrong += not measured(pattern, parameters, options)
    return 1 if wrong else 0


def measured(pattern: CompiledPattern, parameters: dict[str, Any], options: argparse.Namespace) -> bool:
    """Prints one row; whether the results are right."""
    context, last = options.context, options.context + WARM + options.tokens
    ranges = {"g": (-0.1, 0.0), "beta": (0.0, 0.02)}
    made = made_inputs(
        pattern.pattern,
        Shape.square(1, options.heads, last, options.width),
        parameters,
        dtype=torch.float32,
        ranges=ranges,
    )
    tensors = {"q": made.q, "k": made.k, "v": made.v, **made.inputs}
    cache = pattern.cache(last, **parameters)

    def decode(start: int, stop: int) -> Tensor:
        part = {name: None if one is None else one[:, :, start:stop] for name, one in tensors.items()}
        return pattern.decode(cache=cache, **part)  # type: ignore[arg-type]

    begin = time.perf_counter()
    decode(0, context)
    prefill = time.perf_counter() - begin
    results, times = [], []
    for at in range(context, last):
        begin = time.perf_counter()
        results.append(decode(at, at + 1))
        times.append(time.perf_counter() - begin)
    each = statistics.median(times[WARM:])
    speed, size = f"{1 / each:,.0f} | {1000 * each:.2f} | {context / prefill:,.0f}", cache.nbytes / 2**20
    print(f"| {pattern.__name__} | {speed} | {size:.2f} |")
    expected = pattern(made.q, made.k, made.v, **parameters, **made.inputs)[:, :, context:]
    off = error(torch.cat(results, 2), expected)
    if off > 2 * tolerance(torch.float32, last):
        print(f"{pattern.__name__}: decoded results are off by {off:.2e}")
        return False
    return True


if __name__ == "__main__":
    raise SystemExit(main())

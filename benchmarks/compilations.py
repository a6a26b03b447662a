"""One compilation serves all lengths and windows: `python -m benchmarks.compilations` counts, and fails if not.

Calls sliding_window on a CUDA device at 20 lengths by 5 windows, compares some of the results with the reference, and
looks how many variants of each kernel Triton's just-in-time compiler holds.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

LENGTHS = tuple(1024 + 1637 * step for step in range(20))  # 1024 to 32127, odd ones and multiples of 16 among them
WINDOWS = (1, 7, 64, 333, 4096)
HEADS, WIDTH = 2, 64
COMPARED = 5000  # the longest length that the float64 reference is asked for


def main() -> int:
    """Exit status: 0 for one compilation, 1 for more or a wrong result, 2 without a CUDA device."""
    import torch

    from attnc.runtime.cuda.launch import kernels_of
    from attnc.runtime.tolerance import error, tolerance
    from benchmarks.work import EXAMPLES

    if not torch.cuda.is_available():
        print("compilations: Triton compiles for a CUDA device only, and there is none", file=sys.stderr)
        return 2
    import attnc

    pattern = attnc.load(EXAMPLES / "sliding_window.attn").patterns["sliding_window"]
    wrong = 0
    for length in LENGTHS:
        q, k, v = (torch.randn(1, HEADS, length, WIDTH, device="cuda", dtype=torch.bfloat16) for _ in range(3))
        for window in WINDOWS:
            out = pattern(q, k, v, window=window)
            if length <= COMPARED:
                off = error(out, pattern.reference(q, k, v, window=window))
                if off > tolerance(q.dtype, length):
                    print(f"wrong: length {length}, window {window}, error {off:.1e}")
                    wrong += 1
    torch.cuda.synchronize()
    found = variants(kernels_of(pattern.program.plan).module)
    count = sum(len(keys) for keys in found.values())
    print(f"{len(LENGTHS)} lengths, {len(WINDOWS)} windows, {torch.cuda.get_device_name()}: {count} compilation(s)")
    if count != 1:
        for name, keys in found.items():
            print("\n".join([f"{name}:", *(f"  {key}" for key in keys)]))
    return 0 if count == 1 and not wrong else 1


def variants(module: ModuleType) -> dict[str, list[Any]]:
    """Keys of the variants of every kernel of a generated module that were compiled in this process, on all devices.

    Triton 3.5 to 3.7 keep a tuple a device in `JITFunction.device_caches`, whose first entry maps keys to compiled
    kernels. Raises RuntimeError where that is no longer so: a count of nothing must not pass.
    """
    from triton.runtime.jit import JITFunction

    found: dict[str, list[Any]] = {}
    for name, function in vars(module).items():
        if not isinstance(function, JITFunction):
            continue
        caches = getattr(function, "device_caches", None)
        if caches is None or not all(isinstance(cache[0], dict) for cache in caches.values()):
            raise RuntimeError(
                "this Triton keeps its compiled kernels elsewhere: benchmarks.compilations must learn it"
            )
        keys = [key for cache in caches.values() for key in cache[0]]
        if keys:
            found[name] = keys
    return found


if __name__ == "__main__":
    from benchmarks.run import fresh_caches

    with fresh_caches():
        status = main()
    sys.exit(status)

"""Tokens a second of decoding at a long context: `python -m benchmarks.decoding`.

Every pattern has the same q, k and v: on a CPU batch 1 and float32, on a GPU batch 32 and bfloat16. The context enters
in pieces, which is timed, too; then single tokens are decoded. The last results are compared with a call that has all
keys, and a wrong one exits with 1. On a GPU the table has, too, how long the host is busy with a token, the time of a
token in a graph of the caller's, and attention of one query to all keys by FlexAttention and torch.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import attnc
from attnc.runtime.decoding.decoding_cache import DecodingCache
from attnc.runtime.pattern import CompiledPattern
from attnc.runtime.tolerance import error, tolerance
from benchmarks.work import EXAMPLES

PATTERNS: dict[str, dict[str, Any]] = {
    "causal": {},
    "streaming": {"sinks": 4, "window": 1024},
    "strided": {"local": 128, "stride": 128},
    "linear": {},
    "retention": {},
    "gated_delta": {},
}
RANGES = {"g": (-0.1, 0.0), "beta": (0.0, 0.02), "gamma": (0.99, 1.0)}
STATES = frozenset({"linear", "retention", "gated_delta"})  # of every query head
WARM = 5
PIECE = 2048  # tokens that enter together
COMPARED = 4  # last tokens


@dataclass(frozen=True)
class Setting:
    """Sizes of a run."""

    device: str
    batch: int
    heads: int
    key_heads: int
    width: int
    context: int
    tokens: int

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device == "cuda" else torch.float32

    @property
    def last(self) -> int:
        return self.context + WARM + self.tokens


def main() -> int:
    """Exit status: 0, or 1 where a result is wrong."""
    setting, rows = read()
    wrong = 0
    print(heading(setting))
    for name, parameters in PATTERNS.items():
        if rows is None or any(row in name for row in rows):
            pattern = attnc.load(EXAMPLES / f"{name}.attn").patterns[name]
            wrong += not measured(pattern, parameters, setting)
    if setting.device == "cuda" and (rows is None or "peers" in rows):
        peers(setting)
    return 1 if wrong else 0


def read() -> tuple[Setting, list[str] | None]:
    """The arguments; what is not given depends on the device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for name in ("batch", "heads", "key-heads", "width", "context"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--row", action="append", metavar="TEXT", help="patterns whose name contains this, or `peers`")
    options = vars(parser.parse_args())
    gpu = options["device"] == "cuda"
    usual = {"batch": 32, "heads": 16, "key_heads": 4, "width": 128, "context": 65536 - WARM - options["tokens"]}
    if not gpu:
        usual = {"batch": 1, "heads": 8, "key_heads": 8, "width": 64, "context": 16384}
    sizes = {name: options[name] or size for name, size in usual.items()}
    return Setting(options["device"], tokens=options["tokens"], **sizes), options["row"]


def heading(setting: Setting) -> str:
    """The table's first lines."""
    place = torch.cuda.get_device_name() if setting.device == "cuda" else "CPU"
    sizes = f"B{setting.batch} H{setting.heads} Hk{setting.key_heads} D{setting.width}, context {setting.context}"
    columns = ["pattern", "tokens/s", "ms a token (median)", "context, tokens/s", "cache, MiB"]
    columns += ["host, us", "in a graph, us"] if setting.device == "cuda" else []
    rule = "|".join("---" for _ in columns)
    return f"{place}, {str(setting.dtype)[6:]}, {sizes}\n\n| {' | '.join(columns)} |\n|{rule}|"


def drawn(pattern: CompiledPattern, key_heads: int, setting: Setting) -> dict[str, Tensor]:
    """q, k, v and real inputs of one sequence, which all rows of the batch have, on the device."""
    generator = torch.Generator(setting.device).manual_seed(0)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, device=setting.device, dtype=setting.dtype, generator=generator)

    shape = setting.last, setting.width
    found = {"q": normal(1, setting.heads, *shape)} | {name: normal(1, key_heads, *shape) for name in "kv"}
    sizes = {"b": 1, "h": setting.heads, "t": setting.last}
    for one in pattern.pattern.inputs:
        if one.name in found:
            continue
        low, high = RANGES[one.name]
        values = torch.rand([sizes[axis] for axis in one.axes], device=setting.device, generator=generator)
        found[one.name] = (low + (high - low) * values).to(setting.dtype)
    return found


class Decoding:
    """A pattern with a cache and all tokens' tensors."""

    def __init__(self, pattern: CompiledPattern, parameters: dict[str, Any], setting: Setting) -> None:
        self.pattern, self.setting = pattern, setting
        heads = setting.heads if pattern.__name__ in STATES else setting.key_heads
        self.given = drawn(pattern, heads, setting)
        self.parameters = parameters
        self.cache: DecodingCache = pattern.cache(setting.last, pages=None, **parameters)
        self.axes = {one.name: one.axes for one in pattern.pattern.inputs} | dict.fromkeys("qkv", tuple("bhtd"))

    def part(self, start: int, stop: int) -> dict[str, Tensor]:
        """The tensors at some tokens, contiguous as a model's are."""
        found = {}
        for name, tensor in self.given.items():
            for at, axis in enumerate(self.axes[name]):
                tensor = tensor.narrow(at, start, stop - start) if axis in "ijt" else tensor
            if "b" in self.axes[name]:
                tensor = tensor.expand(self.setting.batch, *tensor.shape[1:])
            found[name] = tensor.contiguous()
        return found

    def decode(self, given: Mapping[str, Tensor]) -> Tensor:
        return self.pattern.decode(cache=self.cache, **given)  # type: ignore[arg-type]

    def expected(self) -> Tensor:
        """The last results of the sequence by one call with all keys."""
        given = dict(self.given)
        rows = [name for name in given if name == "q" or "i" in self.axes[name]]
        for name in rows:
            along = 2 if name == "q" else self.axes[name].index("i")
            given[name] = given[name].narrow(along, self.setting.last - COMPARED, COMPARED)
        q, k, v = given.pop("q"), given.pop("k"), given.pop("v", None)
        return self.pattern(q, k, v, **self.parameters, **given)


def measured(pattern: CompiledPattern, parameters: dict[str, Any], setting: Setting) -> bool:
    """Prints one row; whether the results are right."""
    decoding, device = Decoding(pattern, parameters, setting), setting.device
    begin = now(device)
    for start in range(0, setting.context, PIECE):
        decoding.decode(decoding.part(start, min(start + PIECE, setting.context)))
    prefill = now(device) - begin
    results, times, hosts = [], [], []
    for at in range(setting.context, setting.last):
        given = decoding.part(at, at + 1)
        begin = now(device)
        results.append(decoding.decode(given))
        hosts.append(time.perf_counter() - begin)
        times.append(now(device) - begin)
    each, size = statistics.median(times[WARM:]), decoding.cache.nbytes / 2**20
    cells = [pattern.__name__, f"{setting.batch / each:,.0f}", f"{1000 * each:.3f}"]
    cells += [f"{setting.batch * setting.context / prefill:,.0f}", f"{size:,.2f}"]
    off = error(torch.cat(results[-COMPARED:], 2), decoding.expected().expand(setting.batch, -1, -1, -1))
    right = off <= 2 * tolerance(setting.dtype, setting.last)
    if device == "cuda":
        cells += [f"{statistics.median(hosts[WARM:]) * 1e6:.0f}", in_a_graph(decoding)]
    print(f"| {' | '.join(cells)} |", flush=True)
    if not right:
        print(f"{pattern.__name__}: decoded results are off by {off:.2e}")
    return right


def now(device: str) -> float:
    """Seconds, when all that was started is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def in_a_graph(decoding: Decoding) -> str:
    """Microseconds of a token that the caller captured. The cache is full: the token overwrites none, and counts."""
    turn = decoding.cache.memory and decoding.cache.memory.turn
    if turn is None or decoding.cache.memory is None:
        return "-"
    given = decoding.part(decoding.setting.last - 1, decoding.setting.last)
    memory = decoding.cache.memory
    memory.tokens = decoding.setting.context
    turn.counter.tokens.fill_(memory.tokens)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decoding.decode(given)
    return f"{microseconds(graph.replay):.1f}"


def microseconds(call: Callable[[], object], samples: int = 15, together: int = 4) -> float:
    """Of a call on the GPU: the median of samples of some that are started back to back."""
    found = []
    for _ in range(samples):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        call()
        start.record()
        for _ in range(together):
            call()
        stop.record()
        torch.cuda.synchronize()
        found.append(start.elapsed_time(stop) / together * 1000)
    return statistics.median(found)


def peers(setting: Setting) -> None:
    """One query a row to all keys, by others: no cache is written."""
    from torch.nn.attention.flex_attention import flex_attention

    def normal(heads: int, length: int) -> Tensor:
        shape = (setting.batch, heads, length, setting.width)
        return torch.randn(shape, device=setting.device, dtype=setting.dtype)

    q, k, v = normal(setting.heads, 1), *(normal(setting.key_heads, setting.last) for _ in "kv")
    grouped, flex = setting.heads != setting.key_heads, torch.compile(flex_attention, dynamic=False)
    calls: dict[str, Callable[[], object]] = {
        "FlexAttention": lambda: flex(q, k, v, enable_gqa=grouped),
        "torch SDPA": lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=grouped),
    }
    for name, call in calls.items():
        each = microseconds(call)
        print(f"| {name}, all keys | {setting.batch / each * 1e6:,.0f} | {each / 1000:.3f} | - | - | - | - |")


if __name__ == "__main__":
    raise SystemExit(main())

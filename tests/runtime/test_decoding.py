"""Decoding against the float64 reference of the whole sequence: every causal example, token by token and in chunks."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import attnc
from attnc.compiler.causality import leaks
from attnc.dsl.diagnostics import AttnError
from attnc.runtime.decoding.decoded_attention import live_positions
from attnc.runtime.decoding.decoding_cache import DecodingCache
from attnc.runtime.decoding.kv_cache import Pages
from attnc.runtime.pattern import CompiledPattern
from attnc.runtime.tolerance import error, tolerance
from attnc.runtime.tools.comparison import defaults, filled, shrunken
from attnc.runtime.tools.inputs import Shape, made_inputs
from attnc.runtime.tools.settings import settings

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.attn"))
LENGTH, ROOM = 29, 31
SMALL = {
    "window": 7,
    "sinks": 2,
    "block": 6,
    "summary": 2,
    "local": 5,
    "dilation": 3,
    "segment": 8,
    "page": 5,
    "top": 2,
    "horizon": 64,
}
CHUNKS = ([LENGTH], [1] * LENGTH, [10, 1, 1, 9, 8])


@cache
def pattern_of(name: str) -> CompiledPattern:
    path = next(path for path in EXAMPLES if path.stem == name)
    found: CompiledPattern = getattr(attnc.load(path), name)
    return found


@dataclass(frozen=True)
class Sequences:
    """A pattern with whole sequences, and its parameters."""

    pattern: CompiledPattern
    parameters: dict[str, Any]
    tensors: dict[str, Tensor]

    @staticmethod
    def of(name: str, dtype: torch.dtype = torch.float32, batch: int = 2) -> Sequences:
        pattern = pattern_of(name)
        declared = {p.name for p in pattern.pattern.parameters}
        parameters = shrunken(pattern) | filled(pattern) | {n: v for n, v in SMALL.items() if n in declared}
        line = next(iter(settings(pattern.pattern, "check", pattern.known)), None)
        shape = Shape(batch, 4, 2, LENGTH, LENGTH, 8, 6)
        values = defaults(pattern) | parameters
        made = made_inputs(pattern.pattern, shape, values, dtype=dtype, ranges=line.ranges if line else None)
        given = {"q": made.q, "k": made.k, **({} if made.v is None else {"v": made.v}), **made.inputs}
        return Sequences(pattern, parameters, given)

    def cache(self, room: int = ROOM, **more: Any) -> DecodingCache:
        return self.pattern.cache(room, **self.parameters, **more)

    def axes(self, name: str) -> tuple[str, ...]:
        layouts = {"q": tuple("bhid"), "k": tuple("bhjd"), "v": tuple("bhje")}
        return next((one.axes for one in self.pattern.pattern.inputs if one.name == name), layouts.get(name, ()))

    def part(self, start: int, stop: int) -> dict[str, Tensor]:
        """The tensors at some tokens."""
        found = {}
        for name, tensor in self.tensors.items():
            for at, axis in enumerate(self.axes(name)):
                tensor = tensor.narrow(at, start, stop - start) if axis in "ijt" else tensor
            found[name] = tensor
        return found

    def decode(self, cache: DecodingCache, chunks: Sequence[int]) -> Tensor:
        bounds = [0, *itertools.accumulate(chunks)]
        parts = [self.pattern.decode(cache=cache, **self.part(a, b)) for a, b in itertools.pairwise(bounds)]
        return torch.cat(parts, 2)

    def reference(self) -> Tensor:
        return self.pattern.reference(**self.tensors, **self.parameters)


def decodable() -> list[str]:
    found = []
    for path in EXAMPLES:
        pattern = pattern_of(path.stem)
        if not leaks(pattern.pattern) or path.stem in ("half_and_half", "lolcats"):  # causal for windows of 0 and more
            found.append(path.stem)
    return found


@pytest.mark.parametrize("name", decodable())
def test_every_causal_example_token_by_token_and_in_chunks(name: str) -> None:
    sequences = Sequences.of(name)
    expected = sequences.reference()
    for chunks in CHUNKS:
        found = sequences.decode(sequences.cache(), chunks)
        assert error(found, expected) <= tolerance(torch.float32, LENGTH), chunks


@pytest.mark.parametrize(
    ("declared", "weight"),
    [
        ("input g: real[h]", "exp(g * (i - j)) * (q @ k)"),
        ("input g: real[b, h, t]\n    G = cumsum[t](g)", "exp(G[i] - G[j]) * (q @ k)"),
        ("input g: real[b, h, t, d]\n    G = cumsum[t](g)", "(q * exp(G[i] - G[j])) @ k"),
    ],
)
def test_states_that_are_read_behind_their_keys_decay(declared: str, weight: str) -> None:
    text = f"pattern p(lag: int = 3):\n    {declared}\n    out = sum[j]({weight} * v where i - j >= lag)\n"
    pattern = attnc.compile(text).p
    q, k, v = torch.randn(3, 2, 4, LENGTH, 8)
    g = -torch.rand(4) if "[h]" in declared else -torch.rand(2, 4, LENGTH, *([8] if ", d]" in declared else []))
    sequences = Sequences(pattern, {"lag": 3}, {"q": q, "k": k, "v": v, "g": g})
    for chunks in CHUNKS:
        found = sequences.decode(sequences.cache(), chunks)
        assert error(found, sequences.reference()) <= tolerance(torch.float32, LENGTH)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_other_example_says_why_it_is_not_decoded(path: Path) -> None:
    pattern = pattern_of(path.stem)
    if path.stem in decodable():
        return
    with pytest.raises(AttnError) as refused:
        pattern.cache(ROOM, pages=None, **filled(pattern))
    (diagnostic,) = refused.value.diagnostics
    assert diagnostic.code == "decoding"
    assert "depends on" in diagnostic.message


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["streaming", "mla", "compressed", "half_and_half", "gated_delta"])
def test_element_types(name: str, dtype: torch.dtype) -> None:
    sequences = Sequences.of(name, dtype)
    found = sequences.decode(sequences.cache(), CHUNKS[2])
    assert found.dtype == dtype
    assert error(found, sequences.reference()) <= tolerance(dtype, LENGTH)


def test_tensors_of_any_strides_and_one_key_head() -> None:
    pattern = pattern_of("streaming")
    q = torch.randn(LENGTH, 2, 3, 8).permute(1, 2, 0, 3)
    k, v = torch.randn(2, LENGTH, 2, 1, 8).permute(0, 2, 3, 1, 4)
    cache = pattern.cache(ROOM, window=7)
    parts = [pattern.decode(q[:, :, a:b], cache, k[:, :, a:b], v[:, :, a:b]) for a, b in ((0, 20), (20, 21), (21, 29))]
    expected = pattern.reference(q, k, v, window=7)
    assert error(torch.cat(parts, 2), expected) <= tolerance(torch.float32, LENGTH)


# Memory


@pytest.mark.parametrize(
    ("name", "places"),
    [
        ("causal", ROOM),
        ("streaming", 7 + 2),
        ("sliding_window", 7),
        ("block_local", 6),
        ("dilated_window", 21),
        ("sparse_fixed", 6 + 2 * (ROOM // 6)),
        ("half_and_half", 8),
    ],
)
def test_keys_take_the_places_stated(name: str, places: int) -> None:
    """B = 2, Hk = 2, D = 8, E = 6, float32; half_and_half keeps features of its keys, too."""
    sequences = Sequences.of(name)
    cache = sequences.cache()
    sequences.decode(cache, CHUNKS[2])
    assert cache.memory is not None
    (held,) = cache.memory.held.values()
    width = 8 + 6 + (8 if name == "half_and_half" else 0)
    assert held.nbytes == places * 2 * 2 * width * 4
    assert held.position_bytes == 2 * 2 * width * 4


def test_a_latent_is_kept_once_and_not_by_heads() -> None:
    sequences = Sequences.of("mla")
    cache = sequences.cache()
    sequences.decode(cache, CHUNKS[2])
    latent, rotated = (sequences.tensors[name].shape[-1] for name in ("k", "k_r"))
    assert cache.nbytes == 2 * ROOM * (latent + rotated) * 4


@pytest.mark.parametrize("name", ["gla", "delta", "based", "retention", "infini", "rwkv6", "compressed", "forgetting"])
def test_memory_is_that_of_the_first_token(name: str) -> None:
    """What a state or a pool takes does not become more; trailing values stay below what is said."""
    sequences = Sequences.of(name)
    cache = sequences.cache()
    sequences.pattern.decode(cache=cache, **sequences.part(0, 1))
    memory = cache.memory
    assert memory is not None
    fixed, most = cache.nbytes - memory.trail.nbytes, memory.trail_bytes
    for at in range(1, LENGTH):
        sequences.pattern.decode(cache=cache, **sequences.part(at, at + 1))
        assert cache.nbytes - memory.trail.nbytes == fixed
        assert memory.trail.nbytes <= most == memory.trail_bytes


def test_what_is_said_is_what_is_taken() -> None:
    sequences = Sequences.of("streaming")
    cache = sequences.cache()
    assert cache.describe() == ["k, v of j: the last window; the first sinks"]
    assert cache.nbytes == 0
    sequences.decode(cache, [LENGTH])
    assert cache.describe()[1] == "k, v: 224 bytes for each of 9 places, 2,016, however many tokens"
    assert cache.nbytes == 2016


# Rows of unequal lengths, and pages

RAGGED = ["causal", "streaming", "strided", "documents", "alibi", "duo", "dilated_window", "sink_logit", "mla"]
COUNTS = ([3, 12, 7], [1, 1, 1], [5, 0, 2], [1, 0, 1], [1, 1, 1], [2, 9, 3], [1, 1, 1])


def pages(batch: int = 3) -> Pages:
    """Pages of five places in a shuffled order; 24 of 30 in use."""
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))[: batch * 8]
    return Pages(5, 30, order.view(batch, 8).to(torch.int32))


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("name", RAGGED)
def test_rows_of_unequal_lengths(name: str, paged: bool) -> None:
    sequences = Sequences.of(name, batch=3)
    expected = sequences.reference()
    cache = sequences.cache(pages=pages() if paged else None)
    starts = torch.zeros(3, dtype=torch.int64)
    for counts in COUNTS:
        most = max(counts)
        given = {}
        for name_, tensor in sequences.tensors.items():
            for at, axis in enumerate(sequences.axes(name_)):
                if axis in "ijt":  # padding is other tokens: they must not matter
                    places = (starts[:, None] + torch.arange(most)).clamp(max=LENGTH - 1)
                    tensor = torch.stack([row.index_select(at - 1, to) for row, to in zip(tensor, places, strict=True)])
            given[name_] = tensor
        found = sequences.pattern.decode(cache=cache, counts=torch.tensor(counts), **given)
        for row, count in enumerate(counts):
            own = expected[row, :, starts[row] : starts[row] + count]
            off = error(found[row, :, :count], own, float(expected.abs().max()))
            assert off <= tolerance(torch.float32, LENGTH)
            assert not found[row, :, count:].any()
        starts += torch.tensor(counts)
        assert cache.lengths is not None
        assert cache.lengths.tolist() == starts.tolist()


@pytest.mark.parametrize("name", ["causal", "streaming", "strided", "documents", "mla"])
def test_pages(name: str) -> None:
    sequences = Sequences.of(name, batch=3)
    found = sequences.decode(sequences.cache(pages=pages()), CHUNKS[2])
    assert error(found, sequences.reference()) <= tolerance(torch.float32, LENGTH)


def test_rows_may_share_pages() -> None:
    """Two rows with the same beginning: its pages are there once."""
    pattern = pattern_of("causal")
    q, k, v = torch.randn(3, 2, 2, 12, 8)
    k[1, :, :5], v[1, :, :5] = k[0, :, :5], v[0, :, :5]
    for one in (k, v):
        one[1, :, :5] = one[0, :, :5]
    table = torch.tensor([[0, 1, 2], [0, 3, 4]], dtype=torch.int32)
    cache = pattern.cache(15, pages=Pages(5, 5, table))
    parts = [pattern.decode(q[:, :, a:b], cache, k[:, :, a:b], v[:, :, a:b]) for a, b in ((0, 5), (5, 9), (9, 12))]
    assert error(torch.cat(parts, 2), pattern.reference(q, k, v)) <= tolerance(torch.float32, 12)


@pytest.mark.parametrize("page", [30, -1, 2**31 - 1])
def test_a_page_that_is_not_there_is_refused(page: int) -> None:
    sequences, held = Sequences.of("causal", batch=3), pages()
    cache = sequences.cache(pages=held)
    sequences.pattern.decode(cache=cache, **sequences.part(0, 6))
    held.table[1, 1] = page
    with pytest.raises(ValueError, match=rf"the table names page {page} as number 1 of row 1, .* pages 0 to 29"):
        sequences.pattern.decode(cache=cache, **sequences.part(6, 9))


@pytest.mark.parametrize(
    ("size", "count", "table", "message"),
    [
        (0, 5, torch.zeros(1, 5, dtype=torch.int32), "at least one"),
        (5, 5, torch.zeros(1, 5, dtype=torch.int64), "int32"),
        (5, 5, torch.zeros(5, dtype=torch.int32), "int32"),
        (5, 5, torch.zeros(5, 1, dtype=torch.int32).T.expand(2, 5), "contiguous"),
        (5, 5, torch.zeros(2, 5, dtype=torch.int32), "2 rows of 5 pages of 5 do not hold 12 places for each of 1 rows"),
        (5, 5, torch.zeros(1, 2, dtype=torch.int32), "1 rows of 2 pages of 5 do not hold 12 places"),
    ],
)
def test_tables_of_another_form_are_refused(size: int, count: int, table: Tensor, message: str) -> None:
    q, k, v = torch.randn(3, 1, 2, 4, 8)
    with pytest.raises(ValueError, match=message):
        pattern_of("causal").decode(q, pattern_of("causal").cache(12, pages=Pages(size, count, table)), k, v)


def test_only_live_keys_are_gathered_from_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """A third document of four tokens: a tile of keys about it leaves their pages, out of 300."""
    found: list[Tensor] = []

    def noted(*args: Any) -> Tensor:
        found.append(live_positions(*args))
        return found[-1]

    monkeypatch.setattr("attnc.runtime.decoding.decoded_attention.live_positions", noted)
    pattern = pattern_of("documents")
    q, k, v = torch.randn(3, 1, 2, 300, 8)
    doc = torch.tensor([[0] * 148 + [1] * 148 + [2] * 4])
    table = torch.arange(60, dtype=torch.int32).view(1, 60)
    cache = pattern.cache(300, pages=Pages(5, 60, table))
    pattern.decode(q[:, :, :299], cache, k[:, :, :299], v[:, :, :299], doc=doc[:, :299])
    out = pattern.decode(q[:, :, 299:], cache, k[:, :, 299:], v[:, :, 299:], doc=doc[:, 299:])
    assert error(out, pattern.reference(q, k, v, doc=doc)[:, :, 299:]) <= tolerance(torch.float32, 300)
    (keys,) = found
    assert {296, 297, 298, 299} <= set(keys[0].tolist())
    assert keys.shape[1] <= 64  # the executor rounds a tile's keys up to what vector units take


@pytest.mark.parametrize("name", ["linear", "compressed", "moba", "forgetting"])
def test_what_cannot_be_ragged_says_so(name: str) -> None:
    sequences = Sequences.of(name)
    with pytest.raises(AttnError, match="nothing but keys"):
        sequences.pattern.decode(cache=sequences.cache(), counts=torch.tensor([1, 1]), **sequences.part(0, 1))


# Refused calls


def test_calls_that_do_not_fit_the_cache() -> None:
    sequences = Sequences.of("streaming")
    pattern, cache = sequences.pattern, sequences.cache(5)
    part = sequences.part(0, 6)
    with pytest.raises(AttnError, match="holds 0 of at most 5 tokens, and 6 are new"):
        pattern.decode(cache=cache, **part)
    with pytest.raises(AttnError, match="a query for every new key"):
        pattern.decode(part["q"][:, :, :1], cache, part["k"], part["v"])
    with pytest.raises(AttnError, match="`window` is fixed with the cache"):
        pattern.decode(cache=cache, window=3, **sequences.part(0, 1))
    pattern.decode(cache=cache, **sequences.part(0, 1))
    with pytest.raises(AttnError, match="those of the first call"):
        pattern.decode(cache=cache, **{name: tensor[:1] for name, tensor in sequences.part(1, 2).items()})
    with pytest.raises(AttnError, match="one int for each of the 2 rows"):
        pattern.decode(cache=cache, counts=torch.tensor([1]), **sequences.part(1, 2))
    with pytest.raises(AttnError, match="the cache is one of streaming"):
        pattern_of("causal").decode(cache=cache, **sequences.part(1, 2))
    with pytest.raises(AttnError, match="no parameter `windw`"):
        pattern.cache(5, windw=3)
    with pytest.raises(AttnError, match="at least one is needed"):
        pattern.cache(0)
    assert cache.tokens == 1


# The kernels, in Triton's interpreter


@pytest.mark.parametrize(
    ("name", "ragged"), [("causal", False), ("causal", True), ("streaming", True), ("documents", False)]
)
def test_kernels(name: str, ragged: bool) -> None:
    """A prompt, one token, two: the plan itself with N < M, or relocated to a ring and to rows that begin anywhere."""
    sequences = Sequences.of(name)
    cache = sequences.cache()
    cache.backend = "triton"
    parts = []
    for start, stop in ((0, 17), (17, 18), (18, 20)):
        counts = torch.tensor([stop - start] * 2) if ragged else None
        parts.append(sequences.pattern.decode(cache=cache, counts=counts, **sequences.part(start, stop)))
    expected = sequences.reference()[:, :, :20]
    assert error(torch.cat(parts, 2), expected) <= tolerance(torch.float32, LENGTH)

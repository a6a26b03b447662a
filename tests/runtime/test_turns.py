"""Lone tokens on generated kernels (`decoding.turn`) against the float64 reference, interpreted and on a GPU."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor

import attnc
from attnc.runtime.decoding import decoding_launch
from attnc.runtime.decoding.decoding_cache import DecodingCache
from attnc.runtime.decoding.kv_cache import Pages
from attnc.runtime.tolerance import error, tolerance
from tests.runtime.test_decoding import LENGTH, RAGGED, ROOM, Sequences, pages, pattern_of

PROMPT = 13
TURNS = [
    "alibi",
    "based",
    "causal",
    "dilated_window",
    "documents",
    "duo",
    "fading_past",
    "gated_delta",
    "gla",
    "half_and_half",
    "hymba",
    "infini",
    "linear",
    "lolcats",
    "mla",
    "retention",
    "rwkv7",
    "sink_logit",
    "sparse_fixed",
    "strided",
    "streaming",
]


def prompted(sequences: Sequences, length: int = PROMPT, **more: object) -> tuple[DecodingCache, Tensor]:
    """A cache that the executor filled, whose tokens come on kernels."""
    cache = sequences.cache(**more)  # type: ignore[arg-type]
    out = sequences.pattern.decode(cache=cache, **sequences.part(0, length))
    cache.backend = "triton"
    return cache, out


@pytest.mark.parametrize(
    "name",
    [
        name
        for name in TURNS
        if name
        not in ("linear", "hymba", "rwkv7", "based", "forgetting", "alibi", "sink_logit", "gla", "dilated_window")
    ],
)
def test_tokens_behind_a_prompt(name: str) -> None:
    sequences = Sequences.of(name)
    cache, first = prompted(sequences)
    found = [first] + [sequences.pattern.decode(cache=cache, **sequences.part(at, at + 1)) for at in range(PROMPT, 16)]
    assert cache.memory is not None
    assert cache.memory.no_turn is None
    assert cache.tokens == 16
    assert error(torch.cat(found, 2), sequences.reference()[:, :, :16]) <= tolerance(torch.float32, LENGTH)


def test_chunks_and_tokens_take_turns() -> None:
    for name in ("streaming", "gated_delta"):
        sequences = Sequences.of(name)
        cache, first = prompted(sequences)
        found = [first]
        for start, stop in ((13, 14), (14, 17), (17, 18), (18, 19), (19, 22), (22, 23)):
            cache.backend = "triton" if stop == start + 1 else "auto"
            found.append(sequences.pattern.decode(cache=cache, **sequences.part(start, stop)))
        assert error(torch.cat(found, 2), sequences.reference()[:, :, :23]) <= tolerance(torch.float32, LENGTH)


@pytest.mark.parametrize("page", [30, -1, 2**31 - 1])
def test_a_page_that_is_not_there_holds_no_key(page: int) -> None:
    """Neither the keys of the prompt that were in it nor the new one; all other places stay as they are."""
    sequences, held = Sequences.of("causal", batch=3), pages()
    cache = sequences.cache(pages=held)
    sequences.pattern.decode(cache=cache, **sequences.part(0, 12))
    assert cache.memory is not None
    before = {name: buffer.clone() for name, buffer in cache.memory.held["j"].buffers.items()}
    held.table[0, 1] = held.table[1, 2] = page  # positions 5 to 9, and 10 to 14
    cache.backend = "triton"
    found = sequences.pattern.decode(cache=cache, **sequences.part(12, 13))
    q, k, v = (one[:, :, :13] for one in (sequences.tensors[name] for name in "qkv"))
    gone = torch.zeros(3, 1, 1, 13, dtype=torch.bool)
    gone[0, ..., 5:10] = gone[1, ..., 10:] = True
    scores = (q[:, :, -1:] @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT / q.shape[3] ** 0.5).double()
    weights = scores.masked_fill(gone, float("-inf")).softmax(-1)
    expected = weights @ v.repeat_interleave(q.shape[1] // v.shape[1], 1).double()
    assert error(found, expected) <= tolerance(torch.float32, 13)
    for name, buffer in cache.memory.held["j"].buffers.items():
        changed = (buffer != before[name]).flatten(2).any(-1) if buffer.dim() > 2 else buffer != before[name]
        assert int(changed.any(1).sum()) <= 2, "pages of rows 0 and 2"


def rows_of_unequal_lengths(name: str, paged: bool, device: str) -> None:
    """Prompts of three lengths, then tokens of some rows."""
    given_sequences = Sequences.of(name, batch=3)
    expected = given_sequences.reference().to(device)
    sequences = given_sequences if device == "cpu" else on_gpu(given_sequences)
    cache = sequences.cache(pages=pages_on(device) if paged else None)
    starts = torch.zeros(3, dtype=torch.int64)
    for counts in ([3, 12, 7], [1, 1, 1], [1, 0, 1], [1, 1, 1], [0, 1, 1]):
        most = max(counts)
        given = {}
        for name_, tensor in sequences.tensors.items():
            for at, axis in enumerate(sequences.axes(name_)):
                if axis in "ijt":
                    places = (starts[:, None] + torch.arange(most)).clamp(max=LENGTH - 1).to(device)
                    tensor = torch.stack([row.index_select(at - 1, to) for row, to in zip(tensor, places, strict=True)])
            given[name_] = tensor
        own = None if counts == [1, 1, 1] else torch.tensor(counts, device=device)
        found = sequences.pattern.decode(cache=cache, counts=own, **given)
        cache.backend = "triton"
        for row, count in enumerate(counts):
            wanted = expected[row, :, starts[row] : starts[row] + count]
            off = error(found[row, :, :count], wanted, float(expected.abs().max()))
            assert off <= tolerance(torch.float32, LENGTH)
            assert not found[row, :, count:].any()
        starts += torch.tensor(counts)
        assert cache.lengths is not None
        assert cache.lengths.tolist() == starts.tolist()
    assert cache.memory is not None
    assert cache.memory.turn is not None


UNEQUAL = [("causal", True), ("streaming", True), ("strided", False), ("duo", True)]


@pytest.mark.parametrize(("name", "paged"), UNEQUAL)
def test_rows_of_unequal_lengths(name: str, paged: bool) -> None:
    rows_of_unequal_lengths(name, paged, "cpu")


def keys_are_shared_out(heads: int, key_heads: int, device: str) -> None:
    """Several parts of a row, some without a key; heads that fill more than a tile; D != E, strided tensors."""
    text = """pattern p(w: int = 30):
    input bias: real[h]
    out = softmax[j]((q @ k * scale + bias * (i - j)) where j <= i and (i - j < w or j % 3 == 1)) @ v
"""
    pattern = attnc.compile(text).p
    length = 100
    q = torch.randn(length, 2, heads, 9).permute(1, 2, 0, 3)
    k, v = torch.randn(2, key_heads, length, 9), torch.randn(2, length, key_heads, 5).transpose(1, 2)
    given = Sequences(pattern, {}, {"q": q, "k": k, "v": v, "bias": torch.randn(heads) / 50})
    sequences = given if device == "cpu" else on_gpu(given)
    cache, _ = prompted(sequences, length - 2, room=120)
    found = [sequences.pattern.decode(cache=cache, **sequences.part(at, at + 1)) for at in (length - 2, length - 1)]
    expected = given.reference()[:, :, length - 2 :]
    assert error(torch.cat(found, 2).cpu(), expected) <= tolerance(torch.float32, length)


SHARED_OUT = [(5, 3, 3), (2, 4, 1), (2, 36, 2)]


@pytest.mark.parametrize(("parts", "heads", "key_heads"), SHARED_OUT)
def test_keys_are_shared_out(parts: int, heads: int, key_heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding_launch, "parts_of", lambda *_: parts)
    keys_are_shared_out(heads, key_heads, "cpu")


def prompts_of_states(name: str, device: str) -> None:
    """By the chunked kernels, from a state or not."""
    given = Sequences.of(name)
    sequences = given if device == "cpu" else on_gpu(given)
    cache = sequences.cache()
    cache.backend = "triton"
    found = sequences.decode(cache, [13, 1, 9, 1, 5])
    assert error(found.cpu(), given.reference()) <= tolerance(torch.float32, LENGTH)


STATES = ["gla", "linear", "gated_delta"]


@pytest.mark.parametrize("name", STATES)
def test_prompts_of_states(name: str) -> None:
    prompts_of_states(name, "cpu")


def test_a_state_that_is_forgotten_is_0() -> None:
    pattern = pattern_of("gla")
    q, k, v = torch.randn(3, 1, 2, 9, 8)
    g = -torch.rand(1, 2, 9, 8)
    g[:, :, 4] = g[:, :, 7, ::2] = -torch.inf
    cache = pattern.cache(9)
    cache.backend = "triton"
    found = [pattern.decode(q[:, :, :3], cache, k[:, :, :3], v[:, :, :3], g=g[:, :, :3])]
    found += [pattern.decode(q[:, :, 3:], cache, k[:, :, 3:], v[:, :, 3:], g=g[:, :, 3:])]
    state, expected = torch.zeros(1, 2, 8, 8), []
    for at in range(9):
        state = g[:, :, at].exp().unsqueeze(-1) * state + k[:, :, at].unsqueeze(-1) * v[:, :, at].unsqueeze(-2)
        expected.append((q[:, :, at].unsqueeze(-2) @ state) * 8**-0.5)
    assert error(torch.cat(found, 2), torch.cat(expected, 2).double()) <= tolerance(torch.float32, 9)
    assert cache.memory is not None
    (kept,) = cache.memory.states.last.values()
    assert error(kept, state.double()) <= tolerance(torch.float32, 9)


def test_a_full_cache_says_so() -> None:
    sequences = Sequences.of("causal")
    cache, _ = prompted(sequences, 4, room=6)
    for at in (4, 5):
        sequences.pattern.decode(cache=cache, **sequences.part(at, at + 1))
    with pytest.raises(attnc.AttnError, match="holds 6 of at most 6 tokens"):
        sequences.pattern.decode(cache=cache, **sequences.part(6, 7))


@pytest.mark.parametrize("name", ["causal", "retention"])
def test_memory_goes_with_its_cache(name: str) -> None:
    """No cycle keeps gigabytes until it is collected."""
    sequences = Sequences.of(name)
    cache, _ = prompted(sequences)
    sequences.pattern.decode(cache=cache, **sequences.part(PROMPT, PROMPT + 1))
    memory = cache.memory
    assert memory is not None
    held = [buffer for one in memory.held.values() for buffer in one.buffers.values()]
    kept = [weakref.ref(one) for one in (*held, *memory.states.last.values())]
    gc.disable()
    try:
        del cache, memory, held
        assert all(one() is None for one in kept)
    finally:
        gc.enable()


# On a GPU


def on_gpu(sequences: Sequences) -> Sequences:
    return Sequences(sequences.pattern, sequences.parameters, {n: x.cuda() for n, x in sequences.tensors.items()})


def pages_on(device: str) -> Pages:
    table = pages()
    return Pages(table.size, table.count, table.table.to(device))


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "paged"), UNEQUAL)
def test_rows_of_unequal_lengths_on_a_gpu(name: str, paged: bool) -> None:
    rows_of_unequal_lengths(name, paged, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize(("parts", "heads", "key_heads"), SHARED_OUT)
def test_keys_are_shared_out_on_a_gpu(parts: int, heads: int, key_heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding_launch, "parts_of", lambda *_: parts)
    keys_are_shared_out(heads, key_heads, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("name", STATES)
def test_prompts_of_states_on_a_gpu(name: str) -> None:
    prompts_of_states(name, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("name", TURNS)
def test_tokens_on_a_gpu(name: str, graphs: bool, dtype: torch.dtype) -> None:
    given = Sequences.of(name, dtype)
    sequences = on_gpu(given)
    cache = sequences.cache()
    cache.graphs = graphs
    found = sequences.decode(cache, [1] * LENGTH)
    assert cache.memory is not None
    assert cache.memory.no_turn is None
    assert error(found.cpu(), given.reference()) <= tolerance(dtype, LENGTH)


@pytest.mark.gpu
@pytest.mark.parametrize("name", TURNS)
@pytest.mark.parametrize("paged", [False, True])
def test_a_captured_token_goes_on(name: str, paged: bool) -> None:
    """The caller's own graph: one token is captured, the others are replays."""
    if paged and name not in RAGGED:
        pytest.skip("it keeps more than keys")
    given = Sequences.of(name, torch.bfloat16, batch=3)
    sequences = on_gpu(given)
    cache = sequences.cache(ROOM, pages=pages_on("cuda") if paged else None)
    for at in range(3):
        sequences.pattern.decode(cache=cache, **sequences.part(at, at + 1))
    token = {name: one.clone() for name, one in sequences.part(3, 4).items()}
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = sequences.pattern.decode(cache=cache, **token)
    found = []
    for at in range(3, LENGTH):
        for name_, one in sequences.part(at, at + 1).items():
            token[name_].copy_(one)
        graph.replay()
        found.append(out.clone())
    assert cache.tokens == LENGTH
    off = error(torch.cat(found, 2).cpu(), given.reference()[:, :, 3:])
    assert off <= tolerance(torch.bfloat16, LENGTH)

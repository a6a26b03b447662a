"""Family 1 of the zoo: fixed patterns, against masks written out pair by pair from the papers' definitions."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

Live = Callable[[int, int, int], bool]
Agrees = Callable[..., Tensor]
HEADS, LENGTH = 3, 24


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def qkv(length: int = LENGTH) -> tuple[Tensor, Tensor, Tensor]:
    return tokens(2, HEADS, length, 4), tokens(2, HEADS, length, 4, seed=1), tokens(2, HEADS, length, 3, seed=2)


def mask(live: Live, length: int = LENGTH) -> Tensor:
    """(H, N, N) from a condition on (h, i, j)."""
    return torch.tensor([[[live(h, i, j) for j in range(length)] for i in range(length)] for h in range(HEADS)])


def softmax(score: Tensor, live: Tensor, v: Tensor) -> Tensor:
    """Softmax over the live keys; rows without any give 0."""
    some = live.any(-1, keepdim=True)
    filled = score.masked_fill(~live & some, -torch.inf)
    return torch.where(some, torch.softmax(filled, -1), 0.0) @ v


def masked(live: Tensor) -> Callable[..., Tensor]:
    def plain(q: Tensor, k: Tensor, v: Tensor, **settings: object) -> Tensor:
        return softmax(q @ k.mT / 2, live, v)

    return plain


def longnet_key(segment: int, rate: int) -> Live:
    def live(h: int, i: int, j: int) -> bool:
        phase = h // math.ceil(HEADS / rate)
        return i // segment == j // segment and (i % segment) % rate == phase and (j % segment) % rate == phase

    return live


FIXED: list[tuple[str, dict[str, int], Live]] = [
    ("full", {}, lambda h, i, j: True),
    ("causal", {}, lambda h, i, j: j <= i),
    ("sliding_window", {"window": 5}, lambda h, i, j: j in range(i - 4, i + 1)),
    ("local_window", {"radius": 3}, lambda h, i, j: j in range(i - 3, i + 4)),
    ("dilated_window", {"window": 4, "dilation": 3}, lambda h, i, j: j in (i, i - 3, i - 6, i - 9)),
    ("strided", {"local": 3, "stride": 5}, lambda h, i, j: j <= i and (j > i - 3 or j in (4, 9, 14, 19))),
    ("sparse_fixed", {"block": 6, "summary": 2}, lambda h, i, j: j <= i and (i // 6 == j // 6 or j % 6 in (4, 5))),
    ("longformer", {"radius": 2, "globals": 3}, lambda h, i, j: abs(i - j) <= 2 or min(i, j) < 3),
    ("streaming", {"sinks": 2, "window": 4}, lambda h, i, j: j <= i and (j < 2 or j > i - 4)),
    ("block_local", {"block": 7}, lambda h, i, j: j <= i and j // 7 == i // 7),
]


@pytest.mark.parametrize(("name", "settings", "live"), FIXED, ids=[name for name, _, _ in FIXED])
def test_condition(agrees: Agrees, name: str, settings: dict[str, int], live: Live) -> None:
    agrees(name, masked(mask(live)), *qkv(), **settings)


def test_causal_is_torchs_own(agrees: Agrees) -> None:
    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    agrees("causal", plain, *qkv())


def test_duo_chooses_by_head(agrees: Agrees) -> None:
    live = mask(lambda h, i, j: j <= i and (h == 1 or j < 2 or i - j < 3))
    agrees("duo", masked(live), *qkv(), window=3, sinks=2, dense=torch.tensor([0, 1, 0]))


def test_prefix_and_documents(agrees: Agrees) -> None:
    causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    prefix = torch.tensor([3, 10])
    live = causal | (torch.arange(LENGTH) < prefix[:, None, None, None])
    agrees("prefix_lm", masked(live.expand(2, 1, LENGTH, LENGTH)), *qkv(), prefix=prefix)
    doc = torch.randint(0, 3, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    live = causal & (doc[:, None, :, None] == doc[:, None, None, :])
    agrees("documents", masked(live), *qkv(), doc=doc)


def test_vertical_slash(agrees: Agrees) -> None:
    columns = torch.tensor([[0, 7, -1], [-1, -1, -1], [20, 3, 5]])
    offsets = torch.tensor([[0, -1], [2, -1], [-1, -1]])
    picked, slash = columns.tolist(), offsets.tolist()
    live = mask(lambda h, i, j: j <= i and (j in picked[h] or i - j in [x for x in slash[h] if x >= 0]))
    out = agrees("vertical_slash", masked(live), *qkv(), columns=columns, offsets=offsets)
    assert not out[:, 1, :2].any()


def test_bigbird_draws_distinct_blocks_outside_the_others(agrees: Agrees, zoo: Agrees) -> None:
    """The drawn blocks are read off where values name their keys; how many there are, and where, is the paper's."""
    length, block, randoms = 42, 4, 3
    zeros = torch.zeros(1, 1, length, 2, dtype=torch.float64)
    names = torch.eye(length, dtype=torch.float64)[None, None]
    settings = {"block": block, "randoms": randoms}
    found = [zoo("bigbird", zeros, zeros, names, seed=seed, **settings)[0, 0] > 0 for seed in range(3)]
    last = (length - 1) // block
    for seed in range(3):
        for i in range(length):
            row = i // block
            fixed = {0, last, row - 1, row, row + 1} if 0 < row < last else set(range(last + 1))
            blocks = {j // block for j in range(length) if found[seed][i, j]}
            left = set(range(last + 1)) - fixed
            assert fixed & set(range(last + 1)) <= blocks
            assert len(blocks - fixed) == min(randoms, len(left))
            assert torch.equal(found[seed][i], found[seed][row * block])
            assert all(found[seed][i, j] == (j // block in blocks) for j in range(length))
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[1], found[2])
    agrees("bigbird", masked(found[1].expand(HEADS, length, length)), *qkv(length), seed=1, **settings)


def test_alibi_and_softcap(agrees: Agrees) -> None:
    live = mask(lambda h, i, j: j <= i)
    distance = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)

    def alibi(q: Tensor, k: Tensor, v: Tensor, slope: Tensor) -> Tensor:
        return softmax(q @ k.mT / 2 - slope[:, None, None] * distance, live, v)

    def softcap(q: Tensor, k: Tensor, v: Tensor, cap: float) -> Tensor:
        return softmax(cap * torch.tanh(q @ k.mT / 2 / cap), live, v)

    agrees("alibi", alibi, *qkv(), slope=tokens(HEADS))
    agrees("softcap", softcap, *qkv(), cap=1.5)


def t5_bucket(distance: int, buckets: int, longest: int) -> int:
    """Bidirectional buckets of T5: half for each direction, single up to a quarter, then logarithmic."""
    half = buckets // 2
    single = half // 2
    n = abs(distance)
    if n >= single:
        n = min(single + math.floor(math.log(n / single) / math.log(longest / single) * (half - single)), half - 1)
    return n + (half if distance > 0 else 0)


def test_relative_bias(agrees: Agrees) -> None:
    bucket = torch.tensor([[t5_bucket(j - i, 8, 12) for j in range(LENGTH)] for i in range(LENGTH)])

    def plain(q: Tensor, k: Tensor, v: Tensor, table: Tensor, **settings: int) -> Tensor:
        return torch.softmax(q @ k.mT + table[:, bucket], -1) @ v

    agrees("relative_bias", plain, *qkv(), table=tokens(HEADS, 8), buckets=8, distance=12)


def test_t5_buckets_of_the_usual_size() -> None:
    """Values of T5's own table (32 buckets, 128 positions)."""
    assert [t5_bucket(x, 32, 128) for x in (0, -1, -7, -8, -11, -12, -16, -64, -128, 1, 8, 200)] == [
        *(0, 1, 7, 8, 8, 9, 10, 14, 15, 17, 24, 31)
    ]


def test_sink_logit(agrees: Agrees) -> None:
    live = mask(lambda h, i, j: j <= i)

    def plain(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> Tensor:
        score = (q @ k.mT / 2).masked_fill(~live, -torch.inf)
        with_sink = torch.cat([score, sink[:, None, None].expand(2, HEADS, LENGTH, 1)], -1)
        return torch.softmax(with_sink, -1)[..., :-1] @ v

    agrees("sink_logit", plain, *qkv(), sink=tokens(HEADS))


def natten_axis(x: int, length: int, kernel: int, dilation: int) -> set[int]:
    """NATTEN's neighbours on one axis: the `kernel` nearest members of the residue class, shifted in at the edges."""
    members = range(x % dilation, length, dilation)
    start = min(max(x // dilation - kernel // 2, 0), len(members) - kernel)
    return {members[at] for at in range(start, start + kernel)}


@pytest.mark.parametrize(("height", "width", "kernel", "dilation"), [(4, 6, 3, 1), (6, 7, 3, 2), (5, 5, 4, 1)])
def test_neighborhood(agrees: Agrees, height: int, width: int, kernel: int, dilation: int) -> None:
    def live(h: int, i: int, j: int) -> bool:
        rows = natten_axis(i // width, height, kernel, dilation)
        columns = natten_axis(i % width, width, kernel, dilation)
        return j // width in rows and j % width in columns

    length = height * width
    settings = {"height": height, "width": width, "kernel": kernel, "dilation": dilation}
    pairs = mask(live, length)
    assert (pairs.sum(-1) == kernel**2).all()
    agrees("neighborhood", masked(pairs), *qkv(length), **settings)


def test_swin_equals_rolled_windows(agrees: Agrees) -> None:
    """Cells after a shift are the windows of the rolled grid, without the pairs that wrap around."""
    height, width, window, shift = 6, 6, 3, 1
    grid = torch.arange(36).view(height, width).roll((-shift, -shift), (0, 1))
    live = torch.zeros(36, 36, dtype=torch.bool)
    for row in range(0, height, window):
        for column in range(0, width, window):
            cell = grid[row : row + window, column : column + window].flatten().tolist()
            for i in cell:
                for j in cell:
                    near = abs(i // width - j // width) < window and abs(i % width - j % width) < window
                    live[i, j] = near
    settings = {"height": height, "width": width, "window": window, "shift": shift}
    agrees("swin", masked(live.expand(HEADS, 36, 36)), *qkv(36), **settings)


def test_longnet_weighs_keys_by_their_branches(agrees: Agrees) -> None:
    segments, rates = (6, 12), (1, 2)
    times = sum(mask(longnet_key(s, r)).double() for s, r in zip(segments, rates, strict=True))

    def plain(q: Tensor, k: Tensor, v: Tensor, **settings: object) -> Tensor:
        weight = times * torch.exp(q @ k.mT / 2)
        return weight / weight.sum(-1, keepdim=True) @ v

    agrees("longnet", plain, *qkv(), segments=segments, rates=rates)

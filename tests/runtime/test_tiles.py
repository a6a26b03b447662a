"""Row tiles, pieces of keys and batches of them."""

from __future__ import annotations

from itertools import pairwise
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import attnc
from attnc.compiler.ir import Graph, Node
from attnc.runtime.cpu.batches import Gathered, Shifted, batches
from attnc.runtime.cpu.executor import BranchRun
from attnc.runtime.cpu.masks import drift
from attnc.runtime.cpu.pieces import Piece, Tile, gaps, union
from attnc.runtime.cpu.rows import Grouping, Progression, compact, row_tiles
from attnc.runtime.cpu.tiles import shares

intervals = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), max_size=6).map(sorted)


def members(spans: list[tuple[int, int]]) -> set[int]:
    return {at for start, stop in spans for at in range(start, stop)}


@given(intervals)
def test_union_keeps_each_member_once(given: list[tuple[int, int]]) -> None:
    merged = union(given)
    assert members(merged) == members(given)
    assert all(before[1] < after[0] for before, after in pairwise(merged))


@given(st.integers(0, 10), st.integers(1, 12), intervals)
def test_gaps_are_what_nothing_covers(start: int, length: int, covered: list[tuple[int, int]]) -> None:
    found = gaps(start, start + length, covered)
    expected = set(range(start, start + length)) - members(covered)
    assert [at + start for low, high in found for at in range(low, high)] == sorted(expected)


@given(st.lists(st.integers(0, 50), min_size=1, max_size=8, unique=True).map(sorted))
def test_compact_keeps_the_numbers(numbers: list[int]) -> None:
    found = compact(np.array(numbers))
    assert (found.numbers() if isinstance(found, Progression) else found).tolist() == numbers
    if len(numbers) < 3:
        assert isinstance(found, Progression)


groupings = st.one_of(
    st.builds(Grouping, step=st.integers(1, 90)),
    st.builds(
        Grouping,
        period=st.integers(1, 40),
        high_step=st.integers(1, 5),
        low_step=st.integers(1, 50),
        square=st.booleans(),
    ),
)


@given(groupings, st.integers(0, 80), st.integers(0, 40), st.integers(1, 20))
def test_row_tiles_cover_each_row_once(grouping: Grouping, rows: int, offset: int, size: int) -> None:
    tiles = [
        (tile.numbers() if isinstance(tile, Progression) else tile) for tile in row_tiles(grouping, rows, offset, size)
    ]
    assert sorted(at for tile in tiles for at in tile.tolist()) == list(range(rows))
    for tile in tiles:
        position = tile + offset
        assert 0 < len(tile) <= size
        if grouping.period is None:
            assert len(set((position % grouping.step).tolist())) == 1
            continue
        high, low = position // grouping.period, position % grouping.period
        assert len(set((low % grouping.low_step).tolist())) == 1
        assert len(set((high % grouping.high_step).tolist())) == 1
        assert grouping.square or len(set(high.tolist())) == 1


def lists_of_kinds(shared: int) -> st.SearchStrategy[list[list[int]]]:
    return st.lists(st.lists(st.integers(0, 2), min_size=shared, max_size=shared), min_size=1)


@given(st.integers(1, 4).flatmap(lists_of_kinds))
def test_shares_hold_each_head_once_and_one_kind(rows: list[list[int]]) -> None:
    kinds = np.array(rows, dtype=np.int64)
    heads = np.arange(kinds.size).reshape(kinds.shape)
    found = shares(kinds)
    assert sorted(head for share in found for head in heads[share].ravel().tolist()) == heads.ravel().tolist()
    assert all(len(np.unique(kinds[share])) == 1 for share in found)


@pytest.mark.parametrize(("batch", "heads", "key_heads", "groups"), [(1, 16, 16, 2), (1, 9, 3, 4), (2, 16, 16, 4)])
def test_heads_that_see_the_same_keys_run_together(batch: int, heads: int, key_heads: int, groups: int) -> None:
    """Every other head: one group a kind and batch row, not one a head. Their results and gradients are views."""
    text = "pattern p:\n    out = softmax[j](q @ k where j <= i and (i - j < 3 or h % 2 == 1 and j % 4 == 3)) @ v"
    pattern = attnc.compile(text).p
    draw = torch.Generator().manual_seed(heads)
    shapes = [(batch, count, 21, 8) for count in (heads, key_heads, key_heads)]
    given = [torch.randn(shape, dtype=torch.float64, generator=draw).requires_grad_() for shape in shapes]
    with mock.patch.object(BranchRun, "works", autospec=True, side_effect=BranchRun.works) as works:
        out = pattern(*given)
    assert works.call_count == groups
    expected = pattern.reference(*given)
    torch.testing.assert_close(out, expected)
    found, wanted = (torch.autograd.grad(one.square().sum(), given) for one in (out, expected))
    torch.testing.assert_close(found, wanted)


def test_row_tiles_of_a_grid_are_square() -> None:
    tiles = row_tiles(Grouping(period=32, square=True), 32 * 32, 0, 64)
    assert len(tiles) == 16
    for tile in tiles:
        assert not isinstance(tile, Progression)
        assert np.ptp(tile // 32) == np.ptp(tile % 32) == 7


def window_tiles(rows: int, width: int, size: int) -> list[Tile]:
    tiles = []
    for start in range(0, rows, size):
        low, high = max(0, start - width + 1), min(rows, start + size)
        piece = Piece(0, Progression(low, 1, high - low), ((0, high - low),))
        tiles.append(Tile(Progression(start, 1, high - start), (piece,)))
    return tiles


@given(st.integers(1, 200), st.integers(1, 60), st.integers(1, 20), st.integers(0, 4000))
def test_batches_hold_the_same_tiles(rows: int, width: int, size: int, elements: int) -> None:
    tiles = window_tiles(rows, width, size)
    found = list(batches(tiles, elements))
    assert sum(batch.tiles for batch in found) == len(tiles)
    at = 0
    for batch in found:
        assert batch.tiles == 1 or batch.tiles * batch.rows.count * batch.widest <= elements
        for n in range(batch.tiles):
            tile = tiles[at]
            assert isinstance(tile.rows, Progression)
            keys = tile.pieces[0].keys
            assert isinstance(keys, Progression)
            assert batch.rows.numbers()[n].tolist() == tile.rows.numbers().tolist()
            assert batch.steps[0].keys.numbers()[n].tolist() == keys.numbers().tolist()
            at += 1


def test_batches_of_a_window_are_few() -> None:
    """All tiles but the first ones (shorter rows of keys) have one shape."""
    assert len(list(batches(window_tiles(6400, 128, 64), 10**9))) == 3


def test_places_read_what_they_number() -> None:
    tensor = torch.randn(3, 2, 40, 5).transpose(0, 1)
    shifted = Shifted(start=3, shift=4, step=2, tiles=5, count=6)
    gathered = Gathered(shifted.numbers())
    expected = tensor[:, :, shifted.numbers()]
    assert torch.equal(shifted.of(tensor), expected)
    assert shifted.of(tensor).untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
    assert torch.equal(gathered.of(tensor), expected)


def test_drift_of_masks() -> None:
    """Only what stays the same when i and j grow together may be reused along a diagonal."""
    graph = Graph()
    i, j, two = graph.index("i"), graph.index("j"), graph.literal(2)

    def make(op: str, *args: Node) -> Node:
        return graph.make(op, *args)

    distance = make("sub", i, j)
    still = [
        make("le", j, i),
        make("lt", distance, graph.size("j")),
        make("eq", make("mod", distance, two), two),
        make("le", make("minimum", i, j), make("add", j, two)),
        make("lt", make("neg", i), make("neg", j)),
        make("lt", make("mul", distance, two), graph.literal(9)),
    ]
    moving = [
        make("lt", i, two),
        make("eq", make("floordiv", i, two), make("floordiv", j, two)),
        make("lt", make("add", i, j), two),
        make("le", make("mul", i, two), j),
        make("lt", make("neg", i), j),
    ]
    assert [drift(node) for node in still] == [0] * len(still)
    assert [drift(node) for node in moving] == [None] * len(moving)

"""Tile shapes are there for every width and type; cut tiles share out all of their keys."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnc.compiler.schedule import PARTS_PER_PROCESSOR, SMALLEST_PART, backward_shape, split_rows, tile_shape

KINDS = ["long", "local", "sparse"]
SHARED_MEMORY = 227 * 1024  # bytes of one block on an H100 or H200


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("itemsize", [2, 4])
def test_every_width_has_a_shape(itemsize: int, kind: str) -> None:
    for width in range(1, 257):
        padded = max(16, 1 << (width - 1).bit_length())
        # Joined vectors are two blocks of columns, beside values of at most 128
        columns = (192, 128) if 128 < width <= 192 else (padded, padded)
        for shape, (query, value) in (
            (tile_shape(width, itemsize, kind), columns),
            (tile_shape(padded, itemsize, kind), (padded, padded)),
        ):
            assert shape.warps in (4, 8)
            for side in (shape.block_m, shape.block_n):
                assert side >= 16
                assert side & (side - 1) == 0
            streamed = (query + value) * shape.block_n * itemsize * shape.stages
            assert shape.block_m * query * itemsize + streamed <= SHARED_MEMORY


@pytest.mark.parametrize("side", ["rows", "keys"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("itemsize", [2, 4])
def test_every_width_has_a_shape_backward(itemsize: int, kind: str, side: str) -> None:
    for width in range(1, 257):
        shape = backward_shape(width, itemsize, side, kind)
        assert shape.warps in (4, 8)
        assert shape.block_m % 16 == shape.block_n % 16 == 0


@given(
    work=st.lists(st.integers(0, 400) | st.just(5000), max_size=40),
    heads=st.integers(1, 64),
    processors=st.sampled_from([1, 2, 16, 132]),
)
def test_a_split_covers_every_tile_once(work: list[int], heads: int, processors: int) -> None:
    split = split_rows(work, heads, processors)
    if split is None:
        return
    by_tile: dict[int, list[tuple[int, int, int]]] = {tile: [] for tile in range(len(work))}
    for tile, part, parts, slot in split.entries:
        by_tile[tile].append((part, parts, slot))
    used: list[int] = []
    for tile, given_parts in by_tile.items():
        given_parts.sort()
        count = len(given_parts)
        assert [part for part, _, _ in given_parts] == list(range(count)), "each part once"
        assert {parts for _, parts, _ in given_parts} == {count}
        seen = [
            key for part in range(count) for key in range(work[tile] * part // count, work[tile] * (part + 1) // count)
        ]
        assert seen == list(range(work[tile])), "the parts are all of the keys"
        slots = [slot for _, _, slot in given_parts]
        if count == 1:
            assert slots == [-1]
        else:
            used += slots
            assert (tile, slots[0], count) in split.long_tiles
            assert slots == list(range(slots[0], slots[0] + count)), "slots in a row, as the join reads them"
    assert sorted(used) == list(range(split.slots)), "no slot is shared"
    assert len(split.long_tiles) == sum(len(parts) > 1 for parts in by_tile.values())


@given(work=st.lists(st.integers(0, 3000), min_size=1, max_size=40), heads=st.integers(1, 8))
def test_no_program_outlasts_the_others(work: list[int], heads: int) -> None:
    processors = 16
    limit = max(sum(work) * heads / (processors * PARTS_PER_PROCESSOR), 1.0, SMALLEST_PART)
    split = split_rows(work, heads, processors)
    longest = max(work) if split is None else max(-(-work[tile] // parts) for tile, _, parts, _ in split.entries)
    assert longest <= 2 * limit


def test_long_programs_go_first() -> None:
    split = split_rows([1, 900, 30, 2], 1, 4)
    assert split is not None
    lengths = [[1, 900, 30, 2][tile] // parts for tile, _, parts, _ in split.entries]
    assert lengths == sorted(lengths, reverse=True)


def test_even_work_is_not_split() -> None:
    assert split_rows([8] * 64, 16, 132) is None
    assert split_rows([], 1, 132) is None
    assert split_rows([2 * SMALLEST_PART], 1, 132) is None

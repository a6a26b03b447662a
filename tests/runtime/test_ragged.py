"""Tiles that tensors bound, rounded to few shapes: the same rows, no key lost, none twice."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from attnc.runtime.cpu.batches import batches
from attnc.runtime.cpu.pieces import Piece, Tile
from attnc.runtime.cpu.ragged import ROUND, WIDEST, aligned
from attnc.runtime.cpu.rows import Progression, numbers


def tile(row: int, *runs: tuple[int, int, int]) -> Tile:
    """Eight rows from `row` on; runs are (key set, first key, number of keys)."""
    pieces = (Piece(key_set, Progression(first, 1, count), ((0, count),)) for key_set, first, count in runs)
    return Tile(Progression(row, 1, 8), tuple(pieces))


RUNS = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 400), st.integers(1, 900)), max_size=3)


@given(st.lists(RUNS, min_size=1, max_size=6), st.integers(1300, 1400))
def test_no_key_is_lost_and_none_is_visited_twice_by_one_set(runs: list[list[tuple[int, int, int]]], keys: int) -> None:
    made = [tile(8 * n, *one) for n, one in enumerate(runs)]
    found = {int(numbers(one.rows)[0]): one for one in aligned(made, keys, range(9))}
    assert sorted(found) == [8 * n for n in range(len(made))]
    for n, before in enumerate(made):
        after = found[8 * n]
        assert np.array_equal(numbers(before.rows), numbers(after.rows))
        assert len(before.pieces) == len(after.pieces)
        sets = [piece.key_set for piece in before.pieces]
        for old, new in zip(before.pieces, after.pieces, strict=True):
            assert set(numbers(old.keys)) <= set(numbers(new.keys)) <= set(range(keys))
            if new is not old:
                assert sets.count(new.key_set) == 1
                assert new.masked == ((0, new.count),)  # the mask decides on what was added


def test_narrow_tiles_get_few_shapes_and_are_worked_on_together() -> None:
    generator = np.random.default_rng(0)
    made = [tile(8 * n, (0, int(generator.integers(0, 700)), int(generator.integers(1, 200)))) for n in range(40)]
    shaped = list(aligned(made, 1000, range(9)))
    assert {one.pieces[0].count % ROUND for one in shaped} == {0}
    assert len(list(batches(shaped, 2**20))) <= 4 < len(list(batches(made, 2**20)))


def test_wide_tiles_and_short_sequences_stay_within_the_keys() -> None:
    wide = tile(0, (0, 3, WIDEST + 1))
    assert list(aligned([wide], 5000, range(9))) == [wide]
    (short,) = aligned([tile(0, (0, 2, 5))], 10, range(9))
    assert numbers(short.pieces[0].keys).tolist() == list(range(10))


def test_keys_that_a_walk_decides_are_left_alone() -> None:
    listed = tile(0, (0, 2, 5))
    assert list(aligned([listed], 10, ())) == [listed]

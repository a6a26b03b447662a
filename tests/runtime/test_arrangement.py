"""Orders of positions by group: what every slot holds, where intervals of positions lie, gradients, equal bits."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from attnc.runtime.steps.arrangement import (
    NOBODY,
    NOWHERE,
    Arrangement,
    arrange,
    gathered,
    interval,
    placed,
    read,
    share,
)

LENGTHS = (0, 1, 2, 17, 64)


def groups(length: int, kinds: int, dead: float = 0.0, seed: int = 0) -> Tensor:
    """Random groups (2, 3, length) of `kinds`; a share `dead` of the positions has none."""
    generator = torch.Generator().manual_seed(seed)
    group = torch.randint(0, max(kinds, 1), (2, 3, length), generator=generator)
    return torch.where(torch.rand(2, 3, length, generator=generator) < dead, -1, group)


def some(group: Tensor) -> Arrangement:
    """Those that have a group."""
    return arrange(group, group >= 0)


def lines(order: Arrangement) -> Iterator[tuple[int, int]]:
    for batch in range(order.places.shape[0]):
        for head in range(order.places.shape[1]):
            yield batch, head


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(("kinds", "dead"), [(1, 0.0), (4, 0.0), (4, 0.4), (100, 0.1), (1, 1.0)])
def test_slots_hold_the_groups_in_order_with_positions_ascending(length: int, kinds: int, dead: float) -> None:
    group = groups(length, kinds, dead)
    order = some(group)
    for at in lines(order):
        expected = sorted((g, n) for n, g in enumerate(group[at].tolist()) if g >= 0)
        taken = len(expected)
        assert order.places[at].tolist()[:taken] == [n for _, n in expected]
        assert order.group[at].tolist()[:taken] == [g for g, _ in expected]
        assert set(order.places[at].tolist()[taken:]) <= {-1}
        assert set(order.group[at].tolist()[taken:]) <= {NOBODY}
        slots = {n: slot for slot, (_, n) in enumerate(expected)}
        assert order.slots[at].tolist() == [slots.get(n, -1) for n in range(length)]


@pytest.mark.parametrize("length", LENGTHS)
def test_as_many_slots_as_the_longest_list_and_no_more(length: int) -> None:
    live = torch.zeros(2, 3, length, dtype=torch.bool)
    live[1, 2, : length // 2] = True
    assert arrange(None, live).places.shape[-1] == min(max(length // 2, 1), length)
    assert share(arrange(None, live)) == pytest.approx(length // 2 / (6 * length) if length else 0.0)


@pytest.mark.parametrize(("rows", "keys"), [(17, 17), (5, 23), (1, 9), (9, 1), (6, 0), (0, 6)])
@pytest.mark.parametrize(("kinds", "dead"), [(1, 0.0), (4, 0.0), (4, 0.4), (50, 0.0), (3, 1.0)])
def test_an_interval_of_positions_in_a_group_is_an_interval_of_slots(
    rows: int, keys: int, kinds: int, dead: float
) -> None:
    own, other = groups(rows, kinds, seed=1), groups(keys, kinds, dead, seed=2)
    order = some(other)
    position = torch.arange(rows) + max(keys - rows, 0)
    for low, high in ((None, None), (None, position + 1), (position - 3, position + 1), (2, None), (position, 3)):
        first, last = interval(own, order, low, high)
        for at in lines(order):
            for row in range(rows):
                start = 0 if low is None else int(torch.as_tensor(low).expand(rows)[row])
                stop = keys if high is None else int(torch.as_tensor(high).expand(rows)[row])
                live = [n for n in range(keys) if other[at][n] == own[at][row] and start <= n < stop]
                found = order.places[at][int(first[at][row]) : int(last[at][row])].tolist()
                assert found == live


def test_groups_that_are_far_apart_do_not_overflow() -> None:
    own = torch.tensor([[[2**62, -(2**62), 7, 2**61]]])
    order = arrange(torch.tensor([[[7, 2**62, 7, -(2**62)]]]), torch.tensor([[[True, True, True, False]]]))
    assert order.places.tolist() == [[[0, 2, 1]]]
    first, last = interval(own, order, 0, 2)
    assert first.tolist() == [[[2, 0, 0, 2]]]
    assert (last - first).tolist() == [[[1, 0, 1, 0]]]


def test_one_order_serves_every_head_and_one_head_every_order() -> None:
    tensor = torch.randn(2, 4, 9, 3)
    shared = arrange(groups(9, 3)[:, :1], None)
    assert torch.equal(read(gathered(tensor, shared), shared.slots), tensor)
    order = arrange(groups(9, 3), None)
    made = gathered(tensor[:, :1], order)
    for at in lines(order):
        assert torch.equal(made[at], tensor[at[0], 0][order.places[at]])


@pytest.mark.parametrize("shape", [(2, 3, 11, 2), (2, 1, 11), (1, 3, 11, 2), (1, 1, 11, 2, 2)])
def test_gradients(shape: tuple[int, ...]) -> None:
    order = some(groups(11, 3, dead=0.3))
    tensor = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: gathered(x, order), tensor)


def test_equal_inputs_give_equal_bits() -> None:
    order = some(groups(64, 5, dead=0.2))
    tensor = torch.randn(2, 1, 64, 8, requires_grad=True)

    def run() -> Tensor:
        (gradient,) = torch.autograd.grad(gathered(tensor, order).sin().sum(), tensor)
        return gradient

    assert torch.equal(run(), run())


def test_empty_slots_read_as_what_is_asked() -> None:
    order = arrange(None, torch.tensor([[[True, False, True], [False, False, True]]]))
    assert read(torch.tensor([[[4, 5, 6]]]), order.places, NOWHERE).tolist() == [[[4, 6], [6, NOWHERE]]]
    assert order.positions.tolist() == [[[0, 2], [2, NOWHERE]]]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(("kinds", "dead"), [(1, 0.0), (4, 0.4), (1, 1.0)])
@pytest.mark.parametrize("grouped", [True, False])
def test_rows_that_take_part_lie_first_and_every_row_once(length: int, kinds: int, dead: float, grouped: bool) -> None:
    group = groups(length, kinds, dead)
    order = placed(group if grouped else None, group >= 0)
    for batch in range(2):
        for head in range(3):
            line = group[batch, head].tolist()
            expected = sorted((g if grouped else 0, n) for n, g in enumerate(line) if g >= 0)
            found = order.places[batch, head].tolist()
            assert int(order.count[batch, head]) == len(expected)
            assert found[: len(expected)] == [n for _, n in expected]
            assert sorted(found) == [*range(length)]


def test_no_number_that_is_none_flows_back_to_a_row_that_takes_no_part() -> None:
    order = placed(None, torch.tensor([[[True, False, True, False]]]))
    tensor = torch.ones(1, 1, 4, requires_grad=True)
    cotangent = torch.tensor([[[1.0, 2.0, torch.nan, 3.0]]])  # of positions 0, 2, 1, 3
    (gradient,) = torch.autograd.grad(gathered(tensor, order), tensor, cotangent)
    assert gradient.tolist() == [[[1, 0, 2, 3]]]


def test_no_more_slots_than_what_may_take_part() -> None:
    live = torch.arange(9) % 4 == 0
    assert arrange(None, live.expand(1, 2, 9), 5).places.shape[-1] == 3  # on a CPU as many as there are
    assert arrange(None, live.expand(1, 2, 9), 2).places.tolist() == [[[0, 4]] * 2]

"""Listed branches against dense softmax, forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from attnc.compiler import schedule_listed
from attnc.compiler.plan import Plan
from attnc.compiler.schedule import rows_stay
from attnc.runtime.backward import Engine, Gradients, differentiable
from attnc.runtime.call import Call
from attnc.runtime.cpu import listed_executor, listed_tiles
from attnc.runtime.cpu.executor import execute
from attnc.runtime.cpu.executor_backward import branch_backward
from attnc.runtime.cuda import launch, launch_backward, launch_listed, launch_listed_backward, listed_work
from tests.runtime.listed_cases import Case, Made, listed_plan, sources

Execute = Callable[[Plan, Call], tuple[Tensor, Tensor]]

CASES = {
    "own_heads": Case(1, 4, 2, 7, 9, 5, 3, 4, 1, 3, 4),
    "group": Case(2, 4, 2, 5, 9, 4, 4, 4, 1, 2, 2),
    "all_heads": Case(2, 2, 1, 5, 30, 4, 6, 1, 1, 7, 1),
    "wide": Case(1, 2, 1, 13, 40, 4, 4, 16, 1, 2, 2),
    "wide_group": Case(1, 4, 2, 41, 50, 4, 4, 16, 1, 2, 2),
    "row_blocks": Case(1, 2, 1, 21, 30, 4, 4, 4, 4, 2, 2),
    "wide_rows": Case(1, 2, 1, 21, 40, 4, 4, 16, 4, 2, 2),
    "wide_lines": Case(2, 16, 1, 21, 150, 4, 4, 32, 1, 3, 1),  # two lines a tile, and one left over
    "short_row_blocks": Case(1, 2, 2, 37, 100, 4, 4, 32, 16, 2, 2),  # rows before the first in their line
    "more_rows": Case(1, 1, 1, 20, 9, 4, 4, 2, 1, 2, 1),
    "one": Case(1, 1, 1, 1, 1, 1, 1, 4, 1, 1, 1),
}
TEXTS = {
    "plain": dict(condition="PICKED", score="q @ k * scale"),
    "causal": dict(condition="PICKED and j <= i", score="q @ k * scale"),
    "union": dict(condition="PICKED and j <= i", score="q @ k * scale", near="0 <= i - j and i - j < 3"),
    "leaves": dict(
        condition="PICKED and j <= i",
        score="2 * tanh(q @ k * scale * r[h] + x[j] - slope * (i - j) / 16) + table[min(abs(i - j), 4)]",
        inputs="    input r: real[h]\n    input slope: real[b, h, i]\n    input x: real[b, h, t]\n"
        "    input table: real[h, y]\n",
    ),
}


def extras(text: str, case: Case) -> dict[str, Tensor]:
    """The inputs of a text."""
    if text != "leaves":
        return {}
    generator = torch.Generator().manual_seed(7)
    b, h = case.batch, case.heads
    shapes = {"r": (h,), "slope": (b, h, case.rows), "x": (b, h, case.keys), "table": (h, 5)}
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


def made(name: str, text: str) -> Made:
    case = CASES[name]
    dense, pattern = sources(**TEXTS[text])
    plan = listed_plan(pattern, blocks=case.block > 1, lines=case.lines > 1)
    return Made(case, dense, plan, case.members(3), {**case.tensors(), **extras(text, case)})


def check(one: Made, run: Execute, engine: Engine, dtype: torch.dtype) -> None:
    """Result and gradients against the reference."""
    case, call = one.case, one.call(dtype)
    shape = (case.batch, case.heads, case.rows, case.value)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected, gradients = one.expected(weight.double())
    out, lse = run(one.plan, call)
    close(out, expected)
    assert set(gradients) == set(differentiable(one.plan))
    found = Gradients(one.plan, call, engine, list(gradients)).of(out, lse, weight, None)
    for name, gradient in gradients.items():
        close(found[name], gradient)


def close(found: Tensor, expected: Tensor) -> None:
    if found.dtype == torch.float64:
        torch.testing.assert_close(found, expected)
    else:
        torch.testing.assert_close(found.double(), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", CASES)
def test_executor(name: str, text: str) -> None:
    check(made(name, text), execute, Engine(execute, branch_backward), torch.float64)


@pytest.mark.parametrize("name", CASES)
def test_executor_in_small_steps(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listed_tiles, "ELEMENTS", 64)
    monkeypatch.setattr(listed_executor, "CHUNK", 500)
    check(made(name, "leaves"), execute, Engine(execute, branch_backward), torch.float64)


KERNELS = Engine(launch.execute, launch_backward.branch_backward)


# The interpreter is slow: each case with one text, each text with both ways of gathering.
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("own_heads", "plain"),
        ("group", "leaves"),
        ("all_heads", "causal"),
        ("wide", "leaves"),
        ("wide_group", "union"),
        ("row_blocks", "union"),
        ("wide_rows", "leaves"),
        ("more_rows", "plain"),
        ("wide_lines", "union"),
        ("wide_lines", "leaves"),
        ("short_row_blocks", "causal"),
        ("one", "union"),
    ],
)
def test_kernels(name: str, text: str) -> None:
    check(made(name, text), launch.execute, KERNELS, torch.float32)


def test_kernels_in_small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_listed, "PARTS", 500)
    monkeypatch.setattr(launch_listed, "extent", lambda tensor: 2**31)  # rows lie too far apart for 32 bits
    check(made("wide_rows", "union"), launch.execute, KERNELS, torch.float32)


@pytest.mark.parametrize(("name", "text"), [("wide_group", "leaves"), ("row_blocks", "union"), ("group", "plain")])
def test_kernels_with_blocks_cut_into_pieces(name: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule_listed, "SHORTEST_PIECE", 1)
    monkeypatch.setattr(schedule_listed, "PIECES_PER_PROCESSOR", 1000)
    check(made(name, text), launch.execute, KERNELS, torch.float32)


@pytest.mark.parametrize(("name", "text"), [("wide", "causal"), ("wide_group", "union"), ("wide_rows", "plain")])
def test_all_gradients_of_a_block_at_once(name: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_listed_backward, "TOGETHER", True)
    check(made(name, text), launch.execute, KERNELS, torch.float32)


@given(st.data())
def test_pieces_cover_every_group_once(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(0, 40), min_size=1, max_size=8))
    piece, least, spare = data.draw(st.integers(1, 9)), data.draw(st.integers(0, 1)), data.draw(st.integers(0, 3))
    programs = 2 * sum(lengths) // piece + len(lengths) + spare
    starts = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    pieces = listed_work.cut(starts, 2, piece, programs, least=least)
    found = list(zip(pieces.group.tolist(), pieces.first.tolist(), strict=True))
    number = [max(-(-2 * length // piece), least) for length in lengths]
    expected = [(group, one * piece) for group, count in enumerate(number) for one in range(count)]
    assert found[: len(expected)] == expected
    assert all(first >= 2 * lengths[group] and (first > 0 or not least) for group, first in found[len(expected) :])
    assert pieces.named.tolist() == [2 * lengths[group] for group, _ in found]
    assert pieces.begin.tolist() == [int(starts[group]) for group, _ in found]


@given(st.data())
def test_turned_lists_name_every_entry_once(data: st.DataObject) -> None:
    lanes, lines, entries, blocks = (data.draw(st.integers(1, 4)) for _ in range(4))
    numbers = data.draw(st.lists(st.integers(-1, blocks - 1), min_size=0, max_size=lanes * lines * entries))
    numbers += [-1] * (lanes * lines * entries - len(numbers))
    members = torch.tensor(numbers, dtype=torch.int32).view(lanes, lines, entries)
    order, starts = listed_tiles.turned(members, blocks)
    assert len(starts) == lanes * blocks + 1
    for group in range(lanes * blocks):
        found = order[starts[group] : starts[group + 1]].tolist()
        lane, block = divmod(group, blocks)
        expected = [at for at, name in enumerate(numbers) if name == block and at // (lines * entries) == lane]
        assert found == expected


@pytest.mark.parametrize("name", ["group", "wide", "wide_rows"])
def test_equal_inputs_give_equal_bits(name: str) -> None:
    one = made(name, "leaves")
    call = one.call(torch.float32)
    engine, names = Engine(execute, branch_backward), ["q", "k", "v", "slope", "table"]
    results = []
    for _ in range(2):
        out, lse = execute(one.plan, call)
        made_gradients = Gradients(one.plan, call, engine, names).of(out, lse, torch.ones_like(out), None)
        results.append([out, lse, *(made_gradients[key] for key in names)])
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def test_slots_are_bounded_by_chunks_of_rows() -> None:
    case = Case(1, 2, 1, 200, 200, 8, 8, 16, 1, 4, 2)
    lines = listed_tiles.Lines((case.members(0).flatten(0, 1),) * 2, 1, 16, 1, 0, rows_stay(1, 16))
    chunks = list(lines.chunks(8, 1000))
    assert not lines.rows_stay
    assert all((last - first) * 2 * 4 * 8 <= 1000 for _, first, last in chunks)
    assert [(first, last) for member, first, last in chunks if member == 0][-1][1] == 200


@pytest.mark.parametrize(
    ("rows", "width", "stay"), [(1, 1, True), (1, 15, True), (1, 16, False), (15, 64, False), (16, 64, True)]
)
def test_the_rule_of_what_stays(rows: int, width: int, stay: bool) -> None:
    assert rows_stay(rows, width) is stay


def test_what_lines_name_in_common_is_visited_once() -> None:
    one = made("wide_lines", "causal")
    branch = one.plan.branches[-1]
    line = launch_listed.Launch.of(one.plan, branch, one.call(torch.float32))
    lists = line.members.flatten(1, 2)
    together = line.together("forward", one.tensors["v"])
    assert together == 2
    united = line.united(lists, lists.shape[1], together, launch.kernels_of(one.plan))
    groups = -(-lists.shape[1] // together)
    for group in range(lists.shape[0] * groups):
        lines = lists[group // groups, group % groups * together :][:together].tolist()
        named = {member: sum(1 << n for n, own in enumerate(lines) if member in own) for own in lines for member in own}
        named.pop(-1, None)
        count = int(united["counts"][group])
        found = zip(united["members"][group, :count].tolist(), united["named_by"][group, :count].tolist(), strict=True)
        assert dict(found) == named
        assert count == len(named)

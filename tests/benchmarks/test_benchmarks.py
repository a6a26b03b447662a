"""The benchmarks run, measure what they say, and tell wrong results; no time is asserted."""

import importlib.util
import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

import attnc
from benchmarks import bench, compilations, contenders, plot, report
from benchmarks.ceilings import Ceilings
from benchmarks.compiling import suite_module
from benchmarks.measuring import Effort, error_in_bands, measure
from benchmarks.ready import Ready, UnavailableError
from benchmarks.run import main
from benchmarks.suites import fixed
from benchmarks.timing import order, side_by_side
from benchmarks.work import EXAMPLES, Problem, Work

WORKS = fixed.gpu_works() + fixed.cpu_works()
EFFORT = Effort(2, 0.0)


def window() -> Work:
    return fixed.cpu_works()[0].quick()


def test_quick_run_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["fixed", "--quick", "--device", "cpu", "--json", str(tmp_path / "out.json"), "--remark", "Noted."]) == 0
    )
    found = json.loads((tmp_path / "out.json").read_text())
    assert [row["pattern"] for row in found["rows"]] == [work.pattern for work in fixed.cpu_works()]
    for row in found["rows"]:
        assert row["right"]
        assert set(row["contenders"]) == {"attnc", "dense"}
        assert all(entry["times"]["median"] > 0 for entry in row["contenders"].values())
        assert len(row["contenders"]["attnc"]["times"]["samples"]) == len(
            row["contenders"]["dense"]["times"]["samples"]
        )
    text = (tmp_path / "out.md").read_text()
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert "Noted." in text
    assert len(table) == 2 + len(fixed.cpu_works())
    assert len({line.count("|") for line in table}) == 1
    assert "dilated 256x8, small" in capsys.readouterr().out


def test_a_row_is_chosen_by_its_name() -> None:
    assert main(["fixed", "--quick", "--device", "cpu", "--row", "no such row"]) == 2


@pytest.mark.parametrize("work", WORKS, ids=lambda work: work.name)
def test_the_mask_written_by_hand_is_the_pattern(work: Work) -> None:
    problem = Problem(work, work.small, "cpu", torch.float64)
    shape = work.small.shape
    i, j = torch.arange(shape.queries)[:, None], torch.arange(shape.keys)
    mask = problem.mask
    assert mask is not None
    masks = [mask(b, 0, i, j).expand(shape.queries, shape.keys) for b in range(shape.batch)]
    live = torch.stack(masks)[:, None]
    scores = (problem.q @ problem.k.mT * shape.width**-0.5).masked_fill(~live, -torch.inf)
    expected = torch.softmax(scores, -1) @ problem.v
    result = problem.pattern.reference(problem.q, problem.k, problem.v, **problem.settings)
    assert torch.allclose(result, expected, atol=1e-12)
    assert problem.live_pairs() == int(live.sum()) * shape.heads


@pytest.mark.parametrize("work", WORKS, ids=lambda work: work.name)
def test_a_row_times_a_larger_problem_than_it_compares(work: Work) -> None:
    assert work.timed.shape.keys > work.small.shape.keys
    assert set(work.peers) <= set(contenders.CONTENDERS)
    assert work.aim is None or work.aim.peer in work.peers
    assert set(work.timed.parameters) == set(work.small.parameters)


def test_a_wrong_result_is_told_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = replace(window(), peers=("other",))

    def other(problem: Problem) -> Ready:
        return Ready(lambda: torch.zeros_like(problem.q), 0.0)

    monkeypatch.setitem(contenders.CONTENDERS, "other", other)
    row = measure(wrong, "cpu", torch.float32, EFFORT)
    assert not row.right
    assert not row.entries
    assert [check.against for check in row.checks if not check.agrees] == ["other"]


def test_an_error_counts_by_its_own_rows() -> None:
    expected = torch.full((1, 2, 300, 4), 0.01)
    expected[:, :, :10] = 5.0
    result = expected.clone()
    result[0, 1, 299, 3] = 0.02
    assert error_in_bands(result, expected) == pytest.approx(1.0)
    result[0, 0, 0, 0] = torch.nan
    assert error_in_bands(result, expected) == torch.inf


def test_a_failing_row_is_told() -> None:
    row = measure(replace(window(), pattern="absent"), "cpu", torch.float32, EFFORT)
    assert not row.right
    assert row.failure is not None
    assert "cannot read the file" in row.failure
    assert "cannot read the file" in report.line(row, [row])[-1]


def test_a_figure_stands_beside_its_floor() -> None:
    row = measure(window(), "cpu", torch.float32, EFFORT)
    failed = measure(replace(window(), pattern="absent"), "cpu", torch.float32, EFFORT)
    for bytes_, rate, limit in ((1e9, 1e18, "memory"), (1e18, 1e9, "products")):
        ceilings = Ceilings(bytes_, rate)
        names, cells = report.headers([row], ceilings), report.line(row, [row], ceilings)
        assert len(names) == len(cells) == len(report.line(failed, [row], ceilings))
        floor = max(row.least_bytes / bytes_, (row.operations or 0) / rate) * 1e3
        assert cells[names.index("floor")] == f"{floor:.3f} ({limit})"
        assert cells[names.index("of it")] == f"{floor / row.entries['attnc'].times.median:.0%}"
        assert "1 TB/s" not in report.markdown("fixed", [row], report.Place.here("cpu"), [])
        assert str(ceilings) in report.markdown("fixed", [row], report.Place.here("cpu"), [], ceilings)


def test_a_contender_that_cannot_take_part_is_named() -> None:
    row = measure(replace(window(), peers=("dense", "cudnn")), "cpu", torch.float32, EFFORT)
    assert row.right
    assert set(row.entries) == {"attnc", "dense"}
    assert row.absent == {"cudnn": "cuDNN needs a CUDA device"}
    assert any("cuDNN needs a CUDA device" in remark for remark in report.remarks_of([row]))


def test_flex_attention_is_left_to_the_gpu() -> None:
    problem = Problem(window(), window().timed, "cpu", torch.float32)
    with pytest.raises(UnavailableError, match="on a GPU"):
        contenders.flex(problem)


@pytest.mark.parametrize("count", range(1, 6))
def test_contenders_take_turns(count: int) -> None:
    rounds = [order(count, turn) for turn in range(2 * count)]
    assert all(sorted(turn) == list(range(count)) for turn in rounds)
    for place in range(count):
        assert sorted(turn[place] for turn in rounds) == sorted(2 * list(range(count)))
    behind = [pair for turn in rounds for pair in pairwise(turn)]
    assert all(behind.count((a, b)) == 2 for a in range(count) for b in range(count) if a != b)


def test_side_by_side_samples_everyone_alike() -> None:
    called: list[str] = []

    def caller(name: str) -> Tensor:
        called.append(name)
        return torch.zeros(1)

    times = side_by_side({"a": lambda: caller("a"), "b": lambda: caller("b")}, "cpu", least=5, seconds=0.0)
    assert {name: len(found.samples) for name, found in times.items()} == {"a": 6, "b": 6}
    assert called.count("a") == called.count("b") == 7


def test_compilations_need_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert compilations.main() == 2


KERNELS = """
from triton.runtime.jit import JITFunction

def first(x):
    pass

def second(x):
    pass

first, second = JITFunction(first), JITFunction(second)  # triton.jit makes another type in the interpreter
"""


def test_compilations_are_counted(tmp_path: Path) -> None:
    (tmp_path / "kernels.py").write_text(KERNELS)
    spec = importlib.util.spec_from_file_location("kernels", tmp_path / "kernels.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert compilations.variants(module) == {}
    module.first.device_caches[0] = ({"one": object(), "two": object()}, {}, None, None, None)
    assert compilations.variants(module) == {"first": ["one", "two"]}
    module.second.device_caches[0] = ((), {})
    with pytest.raises(RuntimeError, match="keeps its compiled kernels elsewhere"):
        compilations.variants(module)


SUITE_ROWS = [
    (suite, device, work)
    for suite in ("lowrank", "states", "routing", "hybrids")
    for device in ("cuda", "cpu")
    for work in suite_module(suite).works(device)
]


@pytest.mark.parametrize(("suite", "device", "work"), SUITE_ROWS, ids=lambda given: getattr(given, "name", str(given)))
def test_every_suite_can_make_its_rows(suite: str, device: str, work: Work) -> None:
    """Its tensors at the small size, as the pattern takes them."""
    if not (EXAMPLES / f"{work.pattern}.attn").exists():
        pytest.skip("an example that is not there yet")
    problem = Problem(work, work.small, "cpu", torch.float32)
    assert work.timed.shape.keys > work.small.shape.keys
    assert set(work.peers) <= set(contenders.CONTENDERS)
    result = problem.pattern.reference(problem.q, problem.k, problem.v, **problem.settings)
    assert torch.isfinite(result).all()


def test_a_file_of_ones_own_is_timed(tmp_path: Path) -> None:
    file = tmp_path / "mine.attn"
    file.write_text(
        "# run: N=300 D=16 w=8\n# check: w=3\n"
        "pattern mine(w: int = 5):\n    out = softmax[j](q @ k * scale where 0 <= i - j < w) @ v\n"
    )
    out = tmp_path / "mine.json"
    arguments = [str(file), "--device", "cpu", "--quick", "--against", "dense,fla", "--json", str(out)]
    assert bench.main(arguments) == 0
    (row,) = json.loads(out.read_text())["rows"]
    assert set(row["contenders"]) == {"attnc", "dense"}
    assert row["absent"] == {"fla": "no function of fla computes the same"}
    assert row["operations"] is None


def test_lengths_are_drawn_with_their_floors(tmp_path: Path) -> None:
    rows = [window().at(length) for length in (256, 512)]
    made = [measure(row, "cpu", torch.float32, EFFORT) for row in rows]
    assert [row.work.timed.shape.queries for row in made] == [256, 512]
    place = report.Place.here("cpu")
    data = json.loads(report.data("fixed", made, place, Ceilings(1e9, 1e12)))
    (curve,) = plot.curves(data).values()
    assert set(curve) == {"attnc", "dense SDPA", "bandwidth floor", "matrix-rate floor"}
    tokens = 4 * made[0].work.timed.shape.heads * 64 * 4 / 1e9 * 1e3  # ms a token: q, k, v and the result
    assert [time for _, time in curve["bandwidth floor"]] == pytest.approx([256 * tokens, 512 * tokens])
    plot.draw(data, tmp_path / "out.svg")
    assert "bandwidth floor" in (tmp_path / "out.svg").read_text() or (tmp_path / "out.svg").stat().st_size > 1000


def test_whole_calls_name_what_examples_have() -> None:
    from benchmarks.calls import CALLS

    for name, (pattern, _, parameters, _) in CALLS.items():
        declared = attnc.load(EXAMPLES / f"{pattern}.attn").patterns[pattern].pattern.parameters
        assert set(parameters) <= {one.name for one in declared}, name

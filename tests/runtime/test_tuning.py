"""The tuner: right results only, the fastest of them kept; entries on disk are refused where something is off."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

import attnc
from attnc.compiler.schedule import TileShape, backward_shape, tile_shape
from attnc.compiler.schedule_candidates import candidates
from attnc.runtime import clock, tuned
from attnc.runtime.recording import repeated
from attnc.runtime.tools import tuning
from attnc.runtime.tuned import Choice, Session, Site

CAUSAL = "pattern causal:\n    out = softmax[j](q @ k * scale where j <= i) @ v\n"
SMALL, LARGE = TileShape(32, 32, 1, 1), TileShape(64, 16, 1, 1)
SITE = Site("forward_0", "text", "device", "float32", (("N", 64),))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("ATTNC_CACHE_DIR", str(tmp_path / "kernels"))
    tuned.forget()
    yield tmp_path / "kernels"
    tuned.forget()


def tensors(rows: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(1, 1, rows, 16), torch.randn(1, 1, rows, 16), torch.randn(1, 1, rows, 16)


def entries(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.txt"))


def test_the_fastest_shape_is_kept_and_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = tensors()
    pattern = attnc.compile(CAUSAL).causal
    times = iter([3.0, 2.0, 1.0] * 3)  # of each kernel's shapes
    monkeypatch.setattr(tuning, "milliseconds", lambda run: next(times))
    outcomes = pattern.tune(q, k, v, most=3)
    assert [outcome.site.kernel for outcome in outcomes] == ["forward_0", "backward_rows_0", "backward_keys_0_0"]
    assert all(outcome.winner == outcome.trials[2] and outcome.gain == 3.0 for outcome in outcomes)
    tuned.forget()  # as another process
    out, _ = pattern.outputs(q, k, v, {}, "triton")
    torch.testing.assert_close(out.double(), pattern.reference(q, k, v), rtol=1e-5, atol=1e-5)
    assert tuned._known[outcomes[0].site] == outcomes[0].winner.shape != outcomes[0].trials[0].shape


def test_what_a_call_takes_without_a_tuner_is_the_rules(folder: Path) -> None:
    q, k, v = tensors()
    attnc.compile(CAUSAL).causal.outputs(q, k, v, {}, "triton")
    assert set(tuned._known.values()) == {None}
    assert not folder.exists() or not entries(folder)


class Kernel:
    """A pass with one kernel, whose result and time follow from its shape."""

    def __init__(self, session: Session, results: dict[TileShape, float], times: dict[TileShape, float]) -> None:
        self.session, self.results, self.times = session, results, times

    def __call__(self) -> Sequence[Tensor]:
        shape = tuned.tile_of(SITE, Choice((SMALL, LARGE)))
        if shape not in self.results:
            raise RuntimeError("out of resource: shared memory")
        return [torch.full((2, 2), self.results[shape])]

    def milliseconds(self, run: object) -> float:
        return self.times[self.session.chosen[SITE]]


@pytest.mark.parametrize(
    ("results", "times", "winner", "said"),
    [
        ({SMALL: 1.0, LARGE: 1.0}, {SMALL: 2.0, LARGE: 1.0}, LARGE, ""),
        ({SMALL: 1.0, LARGE: 1.0}, {SMALL: 1.01, LARGE: 1.0}, SMALL, ""),  # less than noise
        ({SMALL: 1.0, LARGE: 1.5}, {SMALL: 2.0, LARGE: 1.0}, SMALL, "wrong"),
        ({SMALL: 1.0, LARGE: torch.nan}, {SMALL: 2.0, LARGE: 1.0}, SMALL, "wrong"),
        ({SMALL: 1.0}, {SMALL: 2.0}, SMALL, "out of resource"),
    ],
)
def test_a_winner_is_right_and_clearly_faster(
    results: dict[TileShape, float],
    times: dict[TileShape, float],
    winner: TileShape,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with tuned.session() as session:
        run = Kernel(session, results, times)
        monkeypatch.setattr(tuning, "milliseconds", run.milliseconds)
        (outcome,) = tuning.tune_pass(session, run, 1e-3, 6, lambda text: None)
        assert session.chosen[SITE] == outcome.winner.shape == winner
    assert said in outcome.trials[1].reason
    assert (outcome.trials[1].milliseconds is None) == bool(said)


def test_entries_come_back(folder: Path) -> None:
    tuned.settle(SITE, LARGE)
    tuned.forget()
    assert tuned.tile_of(SITE, Choice((SMALL, LARGE))) == LARGE
    assert len(entries(folder)) == 1


def test_only_shapes_that_would_be_tried_are_taken() -> None:
    tuned.settle(SITE, TileShape(1024, 1024, 32, 9))
    tuned.forget()
    assert tuned.tile_of(SITE, Choice((SMALL, LARGE))) == SMALL


def test_torn_entries_are_refused(folder: Path) -> None:
    tuned.settle(SITE, LARGE)
    (entry,) = entries(folder)
    for content in (entry.read_text()[:-3], "", entry.read_text().replace("64", "32"), "[]"):
        entry.write_text(content)
        tuned.forget()
        assert tuned.tile_of(SITE, Choice((SMALL, LARGE))) == SMALL


def test_entries_can_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    tuned.settle(SITE, LARGE)
    tuned.forget()
    monkeypatch.setenv("ATTNC_TUNED", "0")
    assert tuned.tile_of(SITE, Choice((SMALL, LARGE))) == SMALL


def test_calls_share_a_winner_by_class(monkeypatch: pytest.MonkeyPatch) -> None:
    window = attnc.compile(
        "pattern w(window: int = 4):\n    out = softmax[j](q @ k * scale where 0 <= i - j < window) @ v\n"
    ).w

    def site(rows: int, **settings: int) -> Site:
        with tuned.session() as session:
            window.outputs(*tensors(rows), settings, "triton")
        (found,) = session.sites
        return found

    assert site(33) == site(64) != site(65)
    assert site(33, window=5) == site(33, window=8) != site(33, window=9)


def test_the_rule_comes_first() -> None:
    for width in (64, 128, 256):
        for itemsize in (2, 4):
            rules = {"forward": tile_shape(width, itemsize, "long")}
            rules |= {side: backward_shape(width, itemsize, side, "long") for side in ("rows", "keys")}
            for role, rule in rules.items():
                found = candidates(role, width, itemsize, rule)
                assert found[0] == rule
                assert len(set(found)) == len(found) > 4


def test_the_cost_model_says_what_is_measured() -> None:
    times = {SMALL: 3.0, LARGE: 2.0, TileShape(16, 16, 1, 1): 1.0}
    choice = Choice(tuple(times), times.__getitem__)
    assert choice.likely(2) == [SMALL, TileShape(16, 16, 1, 1)]
    assert choice.likely(9) == [SMALL, TileShape(16, 16, 1, 1), LARGE]


def test_tiles_cost_by_what_they_visit() -> None:
    """A window of 4 keys: tall tiles of many keys visit pairs in vain, and of narrow ones there are as many as rows."""
    window = attnc.compile("pattern w:\n    out = softmax[j](q @ k where 0 <= i - j < 4) @ v\n").w
    with tuned.session() as session:
        window.outputs(*tensors(200), {}, "triton")
    (choice,) = session.sites.values()
    wide, tall, small = (TileShape(m, n, 4, 2) for m, n in ((128, 128), (128, 16), (32, 16)))
    assert choice.seconds(wide) > choice.seconds(tall) > choice.seconds(small) > 0


def test_a_clock_hears_every_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repeated, "devices", {"cpu"})
    repeated.forget()
    q, k, v = tensors()
    pattern = attnc.compile(CAUSAL).causal
    with clock.clock() as running:
        for _ in range(3):  # a third call would be done as recorded
            pattern.outputs(q, k, v, {}, "triton")
        launches = running.taken()
        assert running.taken() == []
    assert [launch.kernel for launch in launches] == ["forward_0"] * 3
    assert all(launch.milliseconds > 0 for launch in launches)
    assert not repeated._kinds
    assert clock.running() is None

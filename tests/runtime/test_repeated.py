"""Repeated calls do what was recorded: the same results as ever, of other contents, with nothing decided again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sympy
import torch
from torch import Tensor

import attnc
from attnc.runtime import binding, derived, operator, pattern
from attnc.runtime.compute.arrays import Arrays
from attnc.runtime.cuda import launch
from attnc.runtime.cuda.direct_launch import Direct, tensors_of
from attnc.runtime.pattern import CompiledPattern
from attnc.runtime.recording import repeated
from attnc.runtime.recording.repeated import CaptureError
from attnc.runtime.recording.tape import Recorder
from attnc.runtime.tools.comparison import defaults
from attnc.runtime.tools.inputs import Shape, made_inputs
from attnc.runtime.tools.settings import settings

EXAMPLES = Path(__file__).parents[2] / "examples"
SHAPE = Shape(1, 4, 2, 9, 9, 4, 4)
RECORDED = ("documents", "half_and_half", "moh")
SOME_KEYS = """pattern some(least: real = 0.0):  # on a CPU as many slots as the longest list of keys
    input worth: real[b, h, t]
    out = softmax[j](q @ k * scale where j in threshold[t](worth, least)) @ v
"""


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Calls are recorded on a CPU too, and nothing is known of any."""
    monkeypatch.setattr(repeated, "devices", {"cpu", "cuda"})
    repeated.forget()
    yield
    repeated.forget()


class Calls:
    """Calls of an example with other contents each, forward and backward."""

    def __init__(self, name: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        self.pattern: CompiledPattern = attnc.load(EXAMPLES / f"{name}.attn").patterns[name]
        setting = next(iter(settings(self.pattern.pattern, "check", self.pattern.known)), None)
        self.parameters = defaults(self.pattern) | (dict(setting.parameters) if setting else {})
        self.ranges = setting.ranges if setting else {}
        self.device, self.dtype = device, dtype

    def made(self, seed: int, shape: Shape = SHAPE) -> dict[str, Tensor]:
        made = made_inputs(
            self.pattern.pattern,
            shape,
            self.parameters,
            dtype=self.dtype,
            device=self.device,
            seed=seed,
            ranges=self.ranges,
        )
        given = {"q": made.q, "k": made.k, **({} if made.v is None else {"v": made.v}), **made.inputs}
        return {name: one.requires_grad_(one.is_floating_point()) for name, one in given.items()}

    def run(self, given: dict[str, Tensor]) -> list[Tensor]:
        """The result and every gradient."""
        rest = {**self.parameters, **{name: one for name, one in given.items() if name not in "qkv"}}
        out, _ = self.pattern.outputs(given["q"], given["k"], given.get("v"), rest, "triton")
        weight = torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape).to(out.dtype)
        leaves = [one for one in given.values() if one.requires_grad]
        return [out, *torch.autograd.grad(out, leaves, weight, allow_unused=True, materialize_grads=True)]


def plainly(run: Callable[[], list[Tensor]]) -> list[Tensor]:
    """What a call gives that is not recorded."""
    found = repeated.devices
    repeated.devices = set()
    try:
        return run()
    finally:
        repeated.devices = found


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", RECORDED)
def test_a_repeated_call_gives_the_same_bits(name: str) -> None:
    calls = Calls(name)
    for seed in range(2):
        calls.run(calls.made(seed))
    given = calls.made(2)
    assert same(calls.run(given), plainly(lambda: calls.run(given)))
    kinds = list(repeated._kinds.values())
    assert [len(kind.tapes) for kind in kinds] == [1, 1]
    assert not any(tape.reads for kind in kinds for tape in kind.tapes)


def test_a_call_whose_sizes_tensors_decide_is_recorded_for_what_was_read() -> None:
    calls = Calls("moh")
    calls.pattern = attnc.compile(SOME_KEYS).some
    calls.parameters = defaults(calls.pattern)
    for seed in range(5):
        given = calls.made(seed)
        found = forward(calls, given)
        assert same(found, plainly(lambda given=given: forward(calls, given))), seed  # type: ignore[misc]
    (kind,) = repeated._kinds.values()
    assert 1 < len(kind.tapes) <= repeated.VARIANTS
    assert all(tape.reads for tape in kind.tapes)


def test_a_repeated_call_decides_nothing_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.interpreter import InterpretedFunction

    counts: dict[str, int] = {}
    monkeypatch.setattr(InterpretedFunction, "__getitem__", lambda function, grid: lambda *values, **constants: None)

    def count(owner: Any, name: str) -> None:
        inner = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            counts[name] = counts.get(name, 0) + 1
            return inner(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)

    for owner, name in (
        (pattern, "bind"),
        (operator, "checked"),
        (operator, "require"),
        (derived, "derive"),
        (launch, "program_list"),
        (binding, "of_term"),
        (Arrays, "value"),
        (sympy.Basic, "__new__"),
    ):
        count(owner, name)
    for name in ("documents", "half_and_half", "nystrom"):
        calls = Calls(name)
        for seed in range(3):
            calls.run(calls.made(seed))
        assert counts
        given = calls.made(3)
        counts.clear()
        calls.run(given)
        assert counts == {}


def test_what_a_call_gives_belongs_to_its_caller() -> None:
    calls = Calls("agent")
    given = calls.made(0)
    expected = plainly(lambda: calls.run(given))
    for _ in range(3):
        found = calls.run(given)
        assert same(found, expected)
        for one in found:
            one.detach().fill_(torch.nan)


def test_tensors_that_were_one_may_be_two() -> None:
    causal = Calls("causal")
    q, k = (torch.randn(1, 4, 5, 8) for _ in range(2))
    for keys, values in ((k, k), (k, k), (k, k), (k, q), (q, q), (q, k), (k, q), (q, k)):
        given = {"q": q, "k": keys, "v": values}
        found = causal.pattern.outputs(q, keys, values, causal.parameters, "triton")[0]
        assert torch.equal(found, plainly(lambda given=given: forward(causal, given))[0])  # type: ignore[misc]


def forward(calls: Calls, given: dict[str, Tensor]) -> list[Tensor]:
    rest = {**calls.parameters, **{name: one for name, one in given.items() if name not in "qkv"}}
    with torch.no_grad():
        return [calls.pattern.outputs(given["q"], given["k"], given["v"], rest, "triton")[0]]


def test_views_of_another_memory_are_read_where_they_lie() -> None:
    causal = Calls("causal")
    for seed in range(5):
        packed = torch.randn(1, 5, 3, 4, 8, generator=torch.Generator().manual_seed(seed))
        more = torch.randn(1, 5, 4, 4, 8, generator=torch.Generator().manual_seed(seed))
        more[:, :, 1:] = packed
        for held in (packed, more):
            q, k, v = held.transpose(1, 3).unbind(2)[-3:]
            given = {"q": q, "k": k, "v": v}
            expected = plainly(lambda given=given: forward(causal, given))  # type: ignore[misc]
            assert same(forward(causal, given), expected)


# What cannot be recorded


def outcome(run: Callable[[Tensor], Tensor], x: Tensor) -> str | None:
    """Why a computation is not recorded, if it is not; checked with other contents where it is."""
    for _ in range(2):
        repeated.repeated("test", ("key",), (x,), lambda: [run(x)])
    (kind,) = repeated._kinds.values()
    for kept in kind.tapes:
        assert torch.equal(kept.run(x + 1)[0], run(x + 1))
    repeated.forget()
    return kind.reason


@torch.no_grad()
def test_what_varies_without_a_call_saying_so_is_not_recorded() -> None:
    x, kept = torch.randn(6), torch.zeros(6)

    def unseen(x: Tensor) -> Tensor:
        made = torch.empty(6)
        made.numpy()[:] = x.numpy()  # as a kernel would that is not launched by a launcher
        return made + 1

    def into(x: Tensor) -> Tensor:
        return kept.copy_(x)

    def draws(x: Tensor) -> Tensor:
        return x + torch.rand_like(x)

    def picks(x: Tensor) -> Tensor:
        return x[x > 0]

    def overwrites(x: Tensor) -> Tensor:
        return x.mul_(1)

    assert outcome(unseen, x) == "a kernel was launched unseen"
    assert "writes a tensor" in (outcome(into, x) or "")
    assert "draws numbers" in (outcome(draws, x) or "")
    assert "decide the size" in (outcome(picks, x) or "")
    assert "writes a tensor" in (outcome(overwrites, x) or "")


@torch.no_grad()
def test_constants_are_kept_and_buffers_are_made_anew() -> None:
    def run(x: Tensor) -> Tensor:
        places = torch.arange(5, -1, -1)
        total = torch.zeros(6)
        total[:3] = x[places][:3]
        total += torch.ones_like(x) * 2
        return total.view(2, 3).t().contiguous() + torch.tensor(0.5)

    x = torch.randn(6)
    assert outcome(run, x) is None
    for _ in range(2):
        repeated.repeated("test", ("key",), (x,), lambda: [run(x)])
    (tape,) = next(iter(repeated._kinds.values())).tapes
    assert "arange" not in str(tape.names)
    assert "ones_like" not in str(tape.names)
    assert "zeros" in str(tape.names)


def test_recordings_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repeated, "REMEMBERED", 3)
    for length in range(1, 9):
        x = torch.randn(length)
        for _ in range(3):
            (found,) = repeated.repeated("test", (), (x,), lambda x=x: [x * 2])  # type: ignore[misc]
            assert torch.equal(found, x * 2)
    assert len(repeated._kinds) == 3
    monkeypatch.setattr(repeated, "HELD", 100)
    table = torch.arange(64.0)
    for length in (64, 64, 64, 1, 1, 1):
        x = torch.randn(length)
        repeated.repeated("test", ("held",), (x,), lambda x=x: [x * table])  # type: ignore[misc]
    assert [len(kind.tapes) for kind in repeated._kinds.values()][-2:] == [0, 1]


def test_a_recording_notices_that_what_it_lacks_is_not_its_own() -> None:
    x = torch.randn(4)
    recorder = Recorder([x])
    with recorder:
        made = x + 1
    assert recorder.place(made).root == 1
    assert not recorder.failed()


# Launches by address


class Compiled:
    """What Triton's compiled kernel and launcher look like; `seen` holds the rows that the launch in C got."""

    packed_metadata, function = (4, 1, 0), 77

    def __init__(self, seen: list[Any], newer: bool) -> None:
        def launch(*row: Any) -> None:
            seen.append(row)

        self.run = SimpleNamespace(
            launch=launch_with(launch), launch_cooperative_grid=False, launch_pdl=False, global_scratch_size=0
        )
        self.run.profile_scratch_size = 0
        if newer:
            self.run.arg_annotations, self.run.kernel_signature = "annotations", b"signature"

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *values: None


def launch_with(launcher: Any) -> Any:
    tensordesc_indices, tensordesc_meta = {1}, [None]

    def inner(*args: Any) -> Any:
        return launcher, tensordesc_indices, tensordesc_meta

    return inner


@pytest.mark.parametrize("newer", [False, True])
def test_a_launch_puts_addresses_in_their_places(newer: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    import triton.runtime
    from triton.tools.tensor_descriptor import TensorDescriptor

    active = SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda device: 5)
    monkeypatch.setattr(triton.runtime, "driver", SimpleNamespace(active=active))
    x, y, z = (torch.randn(16, 16) for _ in range(3))
    seen: list[Any] = []
    values = [x, TensorDescriptor(y, [16, 16], [16, 1], [8, 8]), 3, True]
    direct = Direct(Compiled(seen, newer), (6, 2), values)
    assert [one.data_ptr() for one in tensors_of(values)] == [x.data_ptr(), y.data_ptr()]
    direct(z, x)
    direct(x, y)
    for row, (first, second) in zip(seen, ((z, x), (x, y)), strict=True):
        assert row[:7] == (6, 2, 1, 5, 77, False, False)
        given = row[-1] if newer else row[13:]
        assert given[0] == first.data_ptr()
        assert given[1] == second.data_ptr()
        assert list(given[2:6]) == [16, 16, 16, 1]
        assert list(given[-2:]) == [3, True]


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize(
    "name", [*RECORDED, "agent", "nystrom", "gated_delta", "bigbird", "linear", "hymba", "nsa", "retention"]
)
def test_a_captured_call_equals_an_eager_one(name: str) -> None:
    if not (EXAMPLES / f"{name}.attn").exists():
        pytest.skip("no such example")
    calls = Calls(name, "cuda", torch.bfloat16)
    shape = Shape(2, 4, 2, 200, 200, 64, 64)
    given = calls.made(0, shape)
    side = torch.cuda.Stream()  # of the calls before and of the capture: autograd remembers where leaves were used
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            calls.run(given)
    torch.cuda.synchronize()
    if any(tape.reads for kind in repeated._kinds.values() for tape in kind.tapes):
        with pytest.raises(CaptureError, match="tensors decide"), torch.cuda.graph(torch.cuda.CUDAGraph()):
            calls.run(given)
        return
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        found = calls.run(given)
    others = calls.made(1, shape)
    with torch.no_grad():
        for one, other in zip(given.values(), others.values(), strict=True):
            one.copy_(other)
    graph.replay()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        expected = plainly(lambda: calls.run(given))
    torch.cuda.synchronize()
    assert same(found, expected)


@pytest.mark.gpu
def test_a_capture_without_calls_before_says_what_to_do() -> None:
    calls = Calls("causal", "cuda", torch.bfloat16)
    given = calls.made(0)
    with pytest.raises(CaptureError, match="three times"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        calls.run(given)

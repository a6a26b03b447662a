"""The torch operator under opcheck, torch.compile, torch.export, autocast, autograd and vmap."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import attnc
from attnc.runtime.operator import choose_engine
from attnc.runtime.packing import pack, unpack
from attnc.runtime.program import PROGRAMS, program
from attnc.runtime.tolerance import error, tolerance

TEXT = """
pattern packed(window: int = 4, strict: bool = false):
    input doc: int[b, t]
    inside = if strict then 0 < i - j < window else 0 <= i - j < window
    out = softmax[j](q @ k * scale where inside and doc[i] == doc[j]) @ v
pattern dilated(segments: ints = (4, 8), rates: ints = (1, 2)):
    out = merge(softmax[j](q @ k * scale where i // segment == j // segment and i % rate == j % rate) @ v
                for segment, rate in segments, rates)
"""


@pytest.fixture(scope="module")
def patterns() -> Any:
    return attnc.compile(TEXT, name="patterns.attn")


def tensors(rows: int = 9, keys: int = 9, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows + keys)
    q = torch.randn(2, 4, rows, 16, generator=generator).to(dtype)
    k = torch.randn(2, 2, keys, 16, generator=generator).to(dtype)
    v = torch.randn(2, 2, keys, 12, generator=generator).to(dtype)
    return q, k, v, (torch.arange(keys) // 5).expand(2, keys).contiguous()


def agrees(out: Tensor, expected: Tensor, keys: int) -> bool:
    return error(out, expected) <= tolerance(out.dtype, keys)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_as_one_graph(patterns: Any, backend: str) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, doc: Tensor) -> Tensor:
        return 2 * patterns.packed(q, k, v, doc=doc, window=3)  # type: ignore[no-any-return]

    q, k, v, doc = tensors()
    expected = 2 * patterns.packed.reference(q, k, v, doc=doc, window=3)
    torch._dynamo.reset()
    assert agrees(torch.compile(attend, fullgraph=True, backend=backend)(q, k, v, doc), expected, 9)


def test_one_graph_serves_all_lengths_and_windows(patterns: Any) -> None:
    graphs: list[int] = []

    def count(module: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(len(inputs))
        return module.forward

    def attend(q: Tensor, k: Tensor, v: Tensor, doc: Tensor, window: int) -> Tensor:
        return patterns.packed(q, k, v, doc=doc, window=window)  # type: ignore[no-any-return]

    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, backend=count, dynamic=True)
    for rows, window in ((9, 4), (14, 2), (33, 7), (27, 4)):
        q, k, v, doc = tensors(rows, rows)
        expected = patterns.packed.reference(q, k, v, doc=doc, window=window)
        assert agrees(compiled(q, k, v, doc, window), expected, rows)
    assert len(graphs) == 1


def test_tuples_of_another_length_compile(patterns: Any) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return patterns.dilated(q, k, v, segments=(2, 4, 8), rates=(1, 2, 3))  # type: ignore[no-any-return]

    q, k, v, _ = tensors()
    expected = patterns.dilated.reference(q, k, v, segments=(2, 4, 8), rates=(1, 2, 3))
    assert agrees(attend(q, k, v), expected, 9)
    torch._dynamo.reset()
    assert agrees(torch.compile(attend, fullgraph=True, backend="eager")(q, k, v), expected, 9)


def test_a_module_of_one_pattern_compiles() -> None:
    causal = attnc.compile("pattern causal:\n    out = softmax[j](q @ k * scale where j <= i) @ v\n")
    q, k, v, _ = tensors()
    torch._dynamo.reset()
    compiled = torch.compile(lambda q, k, v: causal(q, k, v), fullgraph=True, backend="eager")
    assert agrees(compiled(q, k, v), causal.reference(q, k, v), 9)


def test_exports(patterns: Any) -> None:
    class Layer(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, doc: Tensor) -> Tensor:
            return patterns.packed(q, k, v, doc=doc)  # type: ignore[no-any-return]

    length = torch.export.Dim("length", min=2)
    axis = {2: length}
    exported = torch.export.export(Layer(), tensors(), dynamic_shapes=(axis, axis, axis, {1: length}))
    q, k, v, doc = tensors(14, 14)
    assert agrees(exported.module()(q, k, v, doc), patterns.packed.reference(q, k, v, doc=doc), 14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("rows", [9, 3])
def test_opcheck(patterns: Any, dtype: torch.dtype, rows: int) -> None:
    q, k, v, doc = tensors(rows, 9, dtype)
    arguments = (patterns.packed.program.key, q, k, v, [doc], [4, 0], [0.25], "auto")
    checked = torch.library.opcheck(torch.ops.attnc.attention.default, arguments)
    assert set(checked.values()) == {"SUCCESS"}


def test_autocast_runs_in_its_type(patterns: Any) -> None:
    q, k, v, doc = tensors()
    with torch.autocast("cpu", torch.bfloat16):
        out = patterns.packed(q, k, v, doc=doc)
        assert patterns.packed(q.double(), k.double(), v.double(), doc=doc).dtype == torch.float64
    assert out.dtype == torch.bfloat16
    assert error(out, patterns.packed.reference(q, k, v, doc=doc)) < 0.05


def test_a_second_derivative_is_refused_not_lost(patterns: Any) -> None:
    q, k, v, doc = tensors()
    out = patterns.packed(q.requires_grad_(), k, v, doc=doc)
    (gradient,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    assert gradient.requires_grad
    with pytest.raises(attnc.AttnError, match=r"packed: second derivatives are not supported"):
        gradient.sum().backward()


def test_vmap_is_refused(patterns: Any) -> None:
    q, k, v, doc = tensors()
    with pytest.raises(attnc.AttnError, match=r"torch\.vmap over a pattern is not supported"):
        torch.vmap(lambda x: patterns.packed(x, k, v, doc=doc))(q[None])


def test_meta_tensors_give_shapes(patterns: Any) -> None:
    q, k, v, doc = (x.to("meta") for x in tensors())
    out = patterns.packed(q, k, v, doc=doc)
    assert (out.device.type, out.shape, out.dtype) == ("meta", (2, 4, 9, 12), torch.float32)
    with pytest.raises(attnc.AttnError, match="meta"):
        patterns.packed(q, k, tensors()[2], doc=doc)


def test_statistics_are_log_sums(patterns: Any) -> None:
    q, k, v, doc = tensors()
    _, statistics = patterns.packed.outputs(q, k, v, {"doc": doc, "strict": True}, "executor")
    assert statistics.shape == (2, 4, 9)
    assert statistics[:, :, 0].isneginf().all(), "the first row has no key"
    scores = (q.double() @ k.double().repeat_interleave(2, 1).mT) / 4
    position = torch.arange(9)
    gap = position[:, None] - position
    live = (gap > 0) & (gap < 4) & (doc[:, None, :, None] == doc[:, None, None, :])
    expected = scores.masked_fill(~live, float("-inf")).logsumexp(-1)
    torch.testing.assert_close(statistics.double(), expected, atol=1e-5, rtol=1e-5)


def test_parameters_survive_packing(patterns: Any) -> None:
    held = patterns.dilated.program
    values = {"segments": (3, 5), "rates": (1, 7), "scale": 0.5}
    ints, floats = pack(held, values)
    flat = {"segments.0": 3, "segments.1": 5, "rates.0": 1, "rates.1": 7, "scale": 0.5}
    assert (ints, floats, unpack(held, ints, floats)) == ([3, 5, 1, 7], [0.5], flat)


def test_a_key_that_is_not_loaded_says_so() -> None:
    with pytest.raises(LookupError, match=r"no pattern of key `gone-123 of gone\.attn` is loaded"):
        program("gone-123 of gone.attn")


def test_a_key_from_elsewhere_finds_the_same_text() -> None:
    text = "pattern moved:\n    out = softmax[j](q @ k where j < 3) @ v\n"
    here, there = (attnc.compile(text, name=name).moved.program for name in ("here.attn", "there.attn"))
    assert program(here.key) is here
    assert program(there.key) is there
    assert program(here.key.replace("here.attn", "/another/machine/here.attn")) is there


def test_keys_tell_meanings_apart() -> None:
    def key(text: str) -> str:
        return str(attnc.compile(text).x.program.key)

    text = "pattern x(w: int = 3):\n    out = softmax[j](q @ k where i - j < w) @ v\n"
    assert key(text) == key(text)
    others = [text.replace("3", "4"), text.replace("<", "<="), text.replace("k ", "k * 2 ")]
    assert len({key(other) for other in (text, *others)}) == 4
    assert key(text) in PROGRAMS


def test_back_ends_are_known_by_name() -> None:
    with pytest.raises(ValueError, match="no back end `fast`"):
        choose_engine("fast", torch.device("cpu"))
    with pytest.raises(ValueError, match="runs on a CPU, not on cuda"):
        choose_engine("executor", torch.device("cuda"))

"""Calling a pattern: what it takes, what it gives, and what every refused call says."""

from __future__ import annotations

import inspect
import pickle
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import attnc
from attnc.runtime.tolerance import error, tolerance

TEXT = """# Patterns to call.
pattern banded(window: int, step: int = 1, soft: real = 1.0, strict: bool = false):
    input slope: real[h]
    input doc: int[b, t]
    input table: real[h, step]
    near = 0 <= i - j < window and (i - j) % step == 0
    out = softmax[j](q @ k * scale * soft - slope * (i - j) where near and doc[i] == doc[j]) @ v
pattern listed(sizes: ints = (4, 8)):
    input columns: int[h, x]
    input rates: int[h, x]
    out = merge(softmax[j](q @ k * scale where i // size == j // size and j in columns[h]) @ v for size in sizes)
pattern biased(cap: real = 5.0):
    input shift: real[h] = 0.5
    out = softmax[j](cap * tanh(q @ k * scale / cap) - shift * abs(i - j)) @ v
"""


@pytest.fixture(scope="module")
def patterns() -> Any:
    return attnc.compile(TEXT, name="patterns.attn")


def call(rows: int = 9, keys: int = 9, **changes: Any) -> dict[str, Any]:
    """Arguments of `banded` with some of them changed; None leaves one out."""
    generator = torch.Generator().manual_seed(0)
    arguments: dict[str, Any] = {
        "q": torch.randn(2, 4, rows, 16, generator=generator),
        "k": torch.randn(2, 2, keys, 16, generator=generator),
        "v": torch.randn(2, 2, keys, 12, generator=generator),
        "slope": torch.rand(4, generator=generator),
        "doc": torch.zeros(2, keys, dtype=torch.int64),
        "table": torch.zeros(4, changes.get("step") or 1),
        "window": 3,
    }
    arguments |= changes
    return {name: value for name, value in arguments.items() if value is not None}


def agrees(out: Tensor, expected: Tensor, keys: int) -> bool:
    return error(out, expected) <= tolerance(out.dtype, keys)


def test_a_call_agrees_with_the_reference(patterns: Any) -> None:
    for arguments in (call(), call(rows=1), call(rows=4, step=2, soft=2, scale=0.5)):
        out = patterns.banded(**arguments)
        assert out.shape == (2, 4, arguments["q"].shape[2], 12)
        assert agrees(out, patterns.banded.reference(**arguments), 9)


def test_parameters_change_the_result(patterns: Any) -> None:
    plain = patterns.banded(**call(window=9))
    for changes in ({"window": 3}, {"step": 2}, {"soft": 3.0}, {"scale": 1.0}, {"slope": torch.full((4,), 3.0)}):
        assert not torch.allclose(patterns.banded(**call(**({"window": 9} | changes))), plain)


@pytest.mark.parametrize("make", [
    lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    lambda x: x.repeat(1, 1, 2, 1)[:, :, : x.shape[2]],
    lambda x: torch.stack([x, x], -1)[..., 0],
    lambda x: x.flip(2).flip(2)[:, :, :, :],
    lambda x: x[:1].expand(2, -1, -1, -1),
], ids=["BNHD", "slice", "strided-width", "copy", "expanded-batch"])  # fmt: skip
def test_any_strides(patterns: Any, make: Callable[[Tensor], Tensor]) -> None:
    arguments = call()
    arguments |= {name: make(arguments[name]) for name in "qkv"}
    assert agrees(patterns.banded(**arguments), patterns.banded.reference(**arguments), 9)


def test_inputs_may_have_the_key_heads(patterns: Any) -> None:
    arguments = call(slope=torch.tensor([0.1, 0.7]))
    whole = call(slope=torch.tensor([0.1, 0.1, 0.7, 0.7]))
    torch.testing.assert_close(patterns.banded(**arguments), patterns.banded(**whole))


def test_a_default_input_stands_for_every_head(patterns: Any) -> None:
    q = torch.randn(1, 4, 6, 16)
    torch.testing.assert_close(patterns.biased(q, q, q), patterns.biased(q, q, q, shift=torch.full((4,), 0.5)))


def test_tuples_of_any_length(patterns: Any) -> None:
    q = torch.randn(1, 2, 12, 16)
    columns = torch.tensor([[0, 3, -1], [5, 8, 9]])
    for sizes in ((4, 8), (3,), [2, 4, 6]):
        settings = {"sizes": sizes, "columns": columns, "rates": columns}
        assert agrees(patterns.listed(q, q, q, **settings), patterns.listed.reference(q, q, q, **settings), 12)


REFUSED: dict[str, Callable[[], dict[str, Any]]] = {
    "unknown keyword": lambda: call(windw=3),
    "missing parameter": lambda: call(window=None),
    "missing input": lambda: call(doc=None),
    "missing v": lambda: call(v=None),
    "not a tensor": lambda: call(k=[1.0]),
    "int for real": lambda: call(window=2.5),
    "bool for int": lambda: call(window=True),
    "tensor for int": lambda: call(window=torch.tensor(3)),
    "int for bool": lambda: call(strict=1),
    "text for real": lambda: call(scale="big"),
    "too large": lambda: call(window=2**63),
    "real input as int": lambda: call(doc=torch.zeros(2, 9)),
    "small ints": lambda: call(doc=torch.zeros(2, 9, dtype=torch.int16)),
    "mixed types": lambda: call(k=torch.zeros(2, 2, 9, 16, dtype=torch.bfloat16)),
    "complex": lambda: call(q=torch.zeros(2, 4, 9, 16, dtype=torch.complex64)),
    "other device": lambda: call(doc=torch.zeros(2, 9, dtype=torch.int64, device="meta")),
    "three dimensions": lambda: call(q=torch.zeros(4, 9, 16)),
    "dimensions of an input": lambda: call(slope=torch.zeros(2, 4)),
    "batch": lambda: call(v=torch.zeros(3, 2, 9, 12)),
    "length of v": lambda: call(v=torch.zeros(2, 2, 8, 12)),
    "width of k": lambda: call(k=torch.zeros(2, 2, 9, 8)),
    "heads do not divide": lambda: call(k=torch.zeros(2, 3, 9, 16), v=torch.zeros(2, 3, 9, 12)),
    "heads and tokens swapped": lambda: call(k=torch.zeros(2, 9, 4, 16), v=torch.zeros(2, 9, 4, 12)),
    "heads of v": lambda: call(v=torch.zeros(2, 4, 9, 12)),
    "tokens of an input": lambda: call(doc=torch.zeros(2, 5, dtype=torch.int64)),
    "heads of an input": lambda: call(slope=torch.zeros(3)),
    "axis of a parameter": lambda: call(step=3, table=torch.zeros(4, 5)),
    "no queries": lambda: call(rows=0),
    "no keys": lambda: call(keys=0),
    "no width": lambda: call(q=torch.zeros(2, 4, 9, 0), k=torch.zeros(2, 2, 9, 0)),
    "no key heads": lambda: call(k=torch.zeros(2, 0, 9, 16), v=torch.zeros(2, 0, 9, 12)),
    "too wide": lambda: call(q=torch.zeros(2, 4, 9, 257), k=torch.zeros(2, 2, 9, 257)),
    "too wide values": lambda: call(v=torch.zeros(2, 2, 9, 300)),
    "divides by zero": lambda: call(step=0, table=torch.zeros(4, 0)),
    "more queries than tokens": lambda: call(rows=12),
}  # fmt: skip


@pytest.mark.parametrize("name", list(REFUSED))
def test_refused(patterns: Any, golden: Callable[[str], None], name: str) -> None:
    said = []
    for run in (patterns.banded, patterns.banded.reference):
        arguments = REFUSED[name]()
        with pytest.raises(attnc.AttnError) as caught:
            run(**arguments)
        said.append(str(caught.value))
    golden(said[0])
    assert said[0] == said[1], "the reference refuses the same calls"


@pytest.mark.parametrize("sizes", [(), 4, (4, 2.5), (4, True), (4, 0), (-4, 8)])
def test_refused_tuples(patterns: Any, golden: Callable[[str], None], sizes: Any) -> None:
    q, columns = torch.zeros(1, 2, 6, 16), torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(attnc.AttnError) as caught:
        patterns.listed(q, q, q, sizes=sizes, columns=columns, rates=columns)
    golden(str(caught.value))


def test_inputs_that_share_an_axis_agree(patterns: Any, golden: Callable[[str], None]) -> None:
    q = torch.zeros(1, 2, 6, 16)
    with pytest.raises(attnc.AttnError) as caught:
        patterns.listed(
            q, q, q, columns=torch.zeros(2, 3, dtype=torch.int64), rates=torch.zeros(2, 4, dtype=torch.int64)
        )
    golden(str(caught.value))


def test_a_form_without_a_kernel_still_has_a_meaning() -> None:
    l1 = attnc.compile("pattern l1:\n    out = softmax[j](-sum[d](abs(q - k)) where j <= i) @ v\n").l1
    q = torch.rand(1, 1, 5, 16) + 1
    assert l1.reference(q, q, q).shape == (1, 1, 5, 16)
    with pytest.raises(attnc.AttnError, match=r"error\[not-lowered\]"):
        l1(q, q, q)


def test_live_fraction(patterns: Any) -> None:
    arguments = call(window=3)
    assert patterns.banded.live_fraction(**arguments) == pytest.approx((1 + 2 + 7 * 3) / 81)
    arguments = call(rows=2, window=3)
    assert patterns.banded.live_fraction(**arguments) == pytest.approx(3 / 9)


def test_explain_counts_what_live_fraction_counts(patterns: Any) -> None:
    text = patterns.banded.explain(**call(window=3))
    assert "192 of B*H*N*M = 648: 29.6296%" in text
    assert "FLOPs = 2*(D + E) * live" in text
    assert "FLOPs         10,752" in text
    assert len(patterns.banded.explain(**call(), verbose=True)) > len(text)


def test_kernels_are_python_and_show_their_text(patterns: Any) -> None:
    (text,) = patterns.biased.kernels.values()
    compile(text, "kernel", "exec")
    assert "tl.dot" in text
    assert "# pattern biased(cap: real = 5.0):" in text


def test_what_a_pattern_says_of_itself(patterns: Any) -> None:
    signature = inspect.signature(patterns.banded)
    assert str(signature).startswith("(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, slope: torch.Tensor")
    assert signature.parameters["window"].default is inspect.Parameter.empty
    assert signature.parameters["step"].default == 1
    assert signature.parameters["scale"].default is None
    assert patterns.banded.__name__ == "banded"
    assert patterns.banded.source.startswith("pattern banded(")
    assert patterns.banded.source.rstrip().endswith("@ v")
    assert "slope: real[h]" in patterns.banded.__doc__
    assert "shift: real[h] = 0.5" in patterns.biased.__doc__
    assert repr(patterns.biased).startswith("<pattern biased(q: torch.Tensor")
    assert repr(patterns) == "<patterns banded, listed, biased of patterns.attn>"


def test_names_that_are_words_of_python() -> None:
    text = "pattern p(class: int = 3):\n    input lambda: real[h]\n"
    pattern = attnc.compile(text + "    out = softmax[j](q @ k - lambda * abs(i - j) where abs(i - j) < class) @ v\n").p
    assert [*pattern.__signature__.parameters] == ["q", "k", "v", "scale", "others"]
    q, k, v = torch.randn(3, 1, 2, 7, 4)
    given = {"lambda": torch.rand(2), "class": 2}
    assert agrees(pattern(q, k, v, **given), pattern.reference(q, k, v, **given), 7)


def test_patterns_are_not_pickled(patterns: Any) -> None:
    with pytest.raises(TypeError, match="pattern banded is not pickled"):
        pickle.dumps(patterns.banded)


def test_load_reads_a_file_and_what_it_uses(tmp_path: Path) -> None:
    (tmp_path / "near.attn").write_text("near(w) = 0 <= i - j < w\n")
    (tmp_path / "local.attn").write_text(
        'use "near.attn"\npattern local:\n    out = softmax[j](q @ k * scale where near(3)) @ v\n'
    )
    q = torch.randn(1, 2, 9, 16)
    arguments = call(window=3, q=q, k=q, v=q, slope=torch.zeros(2), doc=torch.zeros(1, 9, dtype=torch.int64))
    banded = attnc.compile(TEXT).banded(**(arguments | {"table": torch.zeros(2, 1)}))
    torch.testing.assert_close(attnc.load(tmp_path / "local.attn").local(q, q, q), banded)


def test_loading_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(attnc.AttnError, match=r"error\[unreadable\]"):
        attnc.load(tmp_path / "nothing.attn")
    (tmp_path / "latin.attn").write_bytes("# Größe\n".encode("latin-1"))
    with pytest.raises(attnc.AttnError, match=r"error\[encoding\]"):
        attnc.load(tmp_path / "latin.attn")


def test_a_path_and_a_text_are_told_apart() -> None:
    with pytest.raises(ValueError, match=r"a file is loaded by `attnc\.load\('examples/causal\.attn'\)`"):
        attnc.compile("examples/causal.attn")
    with pytest.raises(ValueError, match=r"a text is compiled by `attnc\.compile`"):
        attnc.load("pattern p:\n    out = softmax[j](q @ k) @ v\n")


def test_the_version_is_the_package_s() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    assert project["project"]["version"] == attnc.__version__
    assert set(attnc.__all__) <= {*dir(attnc), *attnc._HOMES, "nn"}
    for name in attnc.__all__:
        assert getattr(attnc, name) is not None

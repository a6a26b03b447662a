"""Products of 16-bit operands: against float64, in every arrangement of shared, batched and absent dimensions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import attnc
from attnc.compiler.composition import Attend, Composition
from attnc.compiler.pipeline import compose
from attnc.runtime.compute import array_structure
from attnc.runtime.compute.computing import rounded_names
from attnc.runtime.compute.products import Spelling, product
from attnc.runtime.steps import composition as steps
from attnc.runtime.tolerance import error, tolerance
from attnc.runtime.tools.inputs import Shape, made_inputs

EXAMPLES = Path(__file__).parents[2] / "examples"
SIZES = {"b": 2, "h": 3, "j": 37, "i": 5, "d": 7, "r": 4, "c": 6}
SPELLINGS = [
    ("rj", "bhjd", "bhrd"),  # a projection of the keys
    ("hdc", "bjc", "bhjd"),  # heads expanded from a latent
    ("hdc", "bhic", "bhid"),
    ("bhia", "bhad", "bhid"),
    ("jd", "jd", "d"),
    ("bhd", "bhd", "bh"),
    ("bhij", "bhdj", "hbdi"),
    ("rd", "bhjd", "brhj"),
]


def drawn(labels: str, seed: int, short: str = "") -> Tensor:
    shape = [1 if name in short else SIZES.get(name, 3) for name in labels]
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(torch.bfloat16)


@pytest.mark.parametrize("short", ["", "b", "bh", "j"])
@pytest.mark.parametrize(("x", "y", "out"), SPELLINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_and_their_gradients(x: str, y: str, out: str, short: str, dtype: torch.dtype) -> None:
    left, right = drawn(x, 0, short).requires_grad_(), drawn(y, 1).requires_grad_()
    found = product(left, right, Spelling(tuple(x), tuple(y), tuple(out)), dtype)
    exact = [one.detach().double().requires_grad_() for one in (left, right)]
    expected = torch.einsum(f"{x},{y}->{out}", *exact)
    assert found.dtype == dtype
    allowed = tolerance(dtype, 64)
    assert error(found, expected) <= allowed
    cotangent = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    made = torch.autograd.grad(found, [left, right], cotangent)
    wanted = torch.autograd.grad(expected, exact, cotangent.double())
    for one, other, operand in zip(made, wanted, (left, right), strict=True):
        assert one.shape == operand.shape
        assert error(one, other) <= tolerance(torch.bfloat16, 64)


def test_strided_operands_and_empty_sums() -> None:
    spelling = Spelling(tuple("rj"), tuple("bhjd"), tuple("bhrd"))
    wide = drawn("bjhd", 1).transpose(1, 2)
    expected = torch.einsum("rj,bhjd->bhrd", drawn("rj", 0).double(), wide.double())
    assert error(product(drawn("rj", 0), wide, spelling, torch.float32), expected) < 1e-6
    empty = product(drawn("rj", 0)[:, :0], wide[:, :, :0], spelling, torch.float32)
    assert empty.shape == expected.shape
    assert not empty.any()


ROUNDED = [
    ("linformer", {"0_value", "1_value", "2_attention"}),
    ("mla", {"1_value", "2_value"}),
    ("agent", {"0_attention", "1_attention"}),
    ("nsa", {"2_attention", "4_attention", "5_attention"}),
]


@pytest.mark.parametrize(("name", "rounded"), ROUNDED)
def test_patterns_round_what_attention_rounds(name: str, rounded: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: products of 16-bit operands stay in their type, and what only attention reads is rounded."""
    pattern = attnc.load(EXAMPLES / f"{name}.attn").patterns[name]
    seen: set[str] = set()

    def forced(composition: Composition, q: Tensor) -> frozenset[str]:
        seen.update(rounded)
        return frozenset(rounded)

    monkeypatch.setattr(array_structure, "taken_as_held", lambda x, y, real: x.dtype == y.dtype)
    monkeypatch.setattr(steps, "rounded_arrays", forced)
    made = made_inputs(pattern.pattern, Shape(2, 4, 4, 33, 33, 16, 16), {}, dtype=torch.bfloat16, axes={"c": 24})
    leaves = [made.q, made.k, *([] if name == "mla" else [made.v]), *made.inputs.values()]
    for leaf in leaves:
        leaf.requires_grad_()
    settings = made.inputs
    out = pattern(made.q, made.k, made.v, **settings)
    expected = pattern.reference(made.q, made.k, made.v, **settings)
    allowed = tolerance(torch.bfloat16, 33)
    assert seen
    assert error(out, expected) <= allowed
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out.dtype)
    found = torch.autograd.grad(out, leaves, cotangent)
    wanted = torch.autograd.grad(expected, leaves, cotangent.double())
    assert all(error(one, other) <= allowed for one, other in zip(found, wanted, strict=True))


@pytest.mark.parametrize(
    ("name", "rounded"),
    [
        ("nsa", {"2_attention", "4_attention", "5_attention"}),
        ("hymba", set()),
        ("agent", {"0_attention", "1_attention"}),
    ],
)
def test_outputs_are_rounded_where_they_are_summed_and_nothing_else(name: str, rounded: set[str]) -> None:
    """A norm would make much of a rounding; a gate and a sum do not."""
    composition = compose(attnc.load(EXAMPLES / f"{name}.attn").patterns[name].pattern)
    outputs = {step.name for step in composition.steps if isinstance(step, Attend)}
    assert rounded_names(composition, torch.device("cuda")) & outputs == rounded

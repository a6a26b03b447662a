"""Projections of the keys are taken over where that is cheaper, and mean the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import attnc
from attnc.compiler.absorb import Projection, saves
from attnc.compiler.composition import Attend
from attnc.runtime.tools.comparison import Case, Target, compare
from attnc.runtime.tools.inputs import Shape
from attnc.runtime.tools.settings import Setting

MLA = attnc.load(Path(__file__).parents[2] / "examples" / "mla.attn").patterns["mla"]


def test_both_projections_are_found() -> None:
    assert set(MLA.program.composition.projections) == {Projection("d", "c"), Projection("e", "c")}
    # One head of keys as wide as the latent, instead of one for each query head.
    (attend,) = (step for step in MLA.program.absorbed.steps if isinstance(step, Attend))
    assert attend.value == "k"


def test_few_queries_take_the_projections_over() -> None:
    """DeepSeek's sizes: the break-even is near 512 * 256 / (2 * 512 - 256) = 171 queries."""
    both = (Projection("d", "c"), Projection("e", "c"))
    sizes = {"j": 65536, "d": 128, "e": 128, "c": 512}
    assert saves(both, sizes | {"i": 1})
    assert saves(both, sizes | {"i": 150})
    assert not saves(both, sizes | {"i": 200})
    assert not saves(both, sizes | {"i": 65536})


@pytest.mark.parametrize("queries", [1, 3, 40])
def test_both_ways_agree_with_the_reference(queries: int) -> None:
    shape = Shape(2, 4, 1, queries, 40, 8, 6)
    for setting in (Setting({}, {"C": 20}), Setting({}, {"C": 5})):
        for outcome in compare(Case(MLA, shape, setting), Target("executor", "executor", "cpu", torch.float64)):
            assert outcome.agrees, (outcome.of, outcome.error)


def test_texts_without_a_shared_latent_are_left_alone() -> None:
    own = attnc.compile("pattern p:\n    input w: real[h, f, d]\n    out = softmax[j]((w @ q) @ (w @ k)) @ v\n").p
    assert own.program.composition.projections == ()

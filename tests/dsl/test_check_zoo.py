"""Every mechanism of the zoo, written in the language."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from attnc.dsl.check import check
from attnc.dsl.format import format_source
from attnc.dsl.parse import read_source
from attnc.dsl.terms import FORMS, Pattern, Term
from attnc.dsl.types import Base

REPOSITORY = Path(__file__).parents[2]
ZOO = sorted([*(REPOSITORY / "examples").glob("*.attn"), *(REPOSITORY / "tests" / "zoo").glob("*.attn")])


def terms(pattern: Pattern) -> Iterator[Term]:
    """Every term of a pattern once."""
    seen: set[Term] = set()
    stack = [pattern.out]
    while stack:
        term = stack.pop()
        if term in seen:
            continue
        seen.add(term)
        yield term
        stack += term.args
        stack += [step for _, step in term.block.steps] if term.block else []


@pytest.mark.parametrize("path", ZOO, ids=lambda path: path.stem)
def test_every_mechanism_of_the_zoo_checks(path: Path) -> None:
    patterns = check(read_source(path))
    assert list(patterns) == [path.stem]
    pattern = patterns[path.stem]
    row = ("m", "e") if path.stem == "latent" else ("i", "e")
    assert pattern.output_axes == ("b", "h", *row)
    assert pattern.out.type.base is Base.REAL
    assert pattern.out.type.indices <= {"b", "h", "i"}
    assert pattern.uses_value is (path.stem != "mla")
    for term in terms(pattern):
        assert term.form in FORMS
        assert "?" not in term.type.axes
        assert term.span.text
        assert len(term.type.indices & {"i", "j"}) == 0 or "t" not in term.type.indices


@pytest.mark.parametrize("path", ZOO, ids=lambda path: path.stem)
def test_the_zoo_is_formatted(path: Path) -> None:
    source = read_source(path)
    assert format_source(source) == source.text


def test_the_zoo_is_complete() -> None:
    family_one = """
        full causal sliding_window local_window dilated_window strided sparse_fixed longformer bigbird streaming
        block_local prefix_lm documents alibi softcap relative_bias sink_logit neighborhood swin duo vertical_slash
        longnet"""
    others = """
        linformer nystrom compressed agent latent mla linear linear_full performer cosformer hedgehog based power
        retention simple_gla gla rwkv6 rwkv7 mlstm forgetting delta gated_delta kda moba nsa quest seer dsa xattention
        routing reformer moh mosa mixture_of_attentions based_window lolcats infini hymba half_and_half
        window_plus_blocks"""
    assert {path.stem for path in ZOO} >= {*family_one.split(), *others.split()}

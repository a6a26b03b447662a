"""Selections by scores: what the compiler makes of them, edge cases of a call, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import attnc
from attnc.compiler.composition import Attend, Choose
from attnc.compiler.pipeline import compose
from attnc.dsl.diagnostics import AttnError
from attnc.runtime.cpu import listed_executor, listed_tiles
from attnc.runtime.pattern import CompiledPattern
from attnc.runtime.steps import choose
from attnc.runtime.steps.choices import choose_topk
from attnc.runtime.tools.comparison import Case, Target, compare
from attnc.runtime.tools.inputs import Shape
from attnc.runtime.tools.settings import Setting

EXAMPLES = Path(__file__).parents[2] / "examples"
TEXT = """
pattern own(block: int = 4, top: int = 2):      # the whole condition is a selection, a sink beside it
    input sink: real[h]
    axis s = blocks(j, block)
    picked = topk[s](q @ mean[j in s](k), top where s.start <= i)
    out = softmax[j](q @ k * scale where j in picked and j <= i, sink = sink) @ v
pattern counted(block: int = 4):                # a count for each row, a score of inputs
    input wanted: int[b, i]
    input worth: real[b, h, t]
    axis s = blocks(j, block)
    picked = topk[s](max[j in s](worth[j]) + 0 * (q @ q), wanted where s.stop <= i, force = s.index == 1)
    out = softmax[j](q @ k * scale - (i - j) / 8 where j <= i and (j in picked or i - j < 3)) @ v
pattern bounded(block: int = 4):                # a bound for each head, scores of each query
    input bound: real[h]
    axis s = blocks(j, block)
    picked = threshold[s](q @ mean[j in s](k), bound where s.stop <= i)
    out = softmax[j](q @ k * scale where j <= i and (j in picked or i - j < 2)) @ v
pattern massive(block: int = 4, share: real = 0.6):
    axis s = blocks(j, block)
    near = softmax[s](q @ mean[j in s](k) where s.stop <= i)
    picked = mass[s](near, share where s.stop <= i, force = s.index == 0)
    out = softmax[j](q @ k * scale where j <= i and (j in picked or i - j < 2)) @ v
pattern tokens(top: int = 5):                   # single keys, of each head, both ways in time
    picked = topk[j](q @ k, top)
    out = softmax[j](tanh(q @ k * scale) where j in picked) @ v
pattern two(block: int = 4, top: int = 2):      # two softmaxes with one selection
    axis s = blocks(j, block)
    picked = topk[s](q @ mean[j in s](k), top where s.stop <= i)
    first  = softmax[j](q @ k * scale where j in picked) @ v
    second = softmax[j](q @ k * 0.5 where j in picked or j == i) @ v
    out = first - 2 * second
pattern rows(block: int = 4, top: int = 2):     # one choice for a block of queries
    axis a = blocks(i, block)
    axis s = blocks(j, block)
    score  = mean[i in a](q) @ mean[j in s](k)
    own    = i // block
    picked = topk[s](score[own], top where s.index <= own, force = s.index == own)
    out = softmax[j](q @ k * scale where j <= i and j in picked) @ v
pattern shared(top: int = 4):                   # the same for all rows of a head
    input worth: real[h, j]
    picked = topk[j](worth, top)
    out = softmax[j](q @ k * scale where j <= i and (j in picked or i - j < 2)) @ v
pattern heads(width: int = 3):                  # a selection for some heads only, of blocks of an expression's size
    axis s = blocks(j, 2 * width)
    picked = topk[s](unit(q) @ mean[j in s](unit(k)), 2 where s.stop <= i)
    seen = (h % 2 == 0 and j in picked) or (h % 2 == 1 and i - j < width)
    out = softmax[j](q @ k * scale where j <= i and seen) @ v
pattern merged:                                 # keys that both have count twice
    axis s = blocks(j, 4)
    picked = topk[s](q @ mean[j in s](k), 2 where s.stop <= i)
    out = merge(softmax[j](q @ k * scale where j in picked) @ v, softmax[j](q @ k where 0 <= i - j < 9) @ v)
pattern packed(block: int = 4):                 # documents, a slope, a table
    input doc: int[b, t]
    input slope: real[h]
    input table: real[h, y]
    axis s = blocks(j, block)
    picked = topk[s](q @ max[j in s](k), 3 where s.start <= i, force = s.index == 0)
    score = q @ k * scale - slope * (i - j) + table[min(i - j, 5)]
    out = softmax[j](score where j <= i and doc[i] == doc[j] and (j in picked or i - j < 2)) @ v
"""
NAMES = ("own", "counted", "bounded", "massive", "tokens", "two", "rows", "shared", "heads", "merged", "packed")
EXECUTOR = Target("executor", "executor", "cpu", torch.float64)


@pytest.fixture(scope="module")
def patterns() -> object:
    return attnc.compile(TEXT)


def agrees(pattern: CompiledPattern, shape: Shape, **ranges: tuple[float, float]) -> None:
    outcomes = compare(Case(pattern, shape, Setting({}, {}, ranges)), EXECUTOR)
    assert not [outcome for outcome in outcomes if not outcome.agrees]


SHAPES = {
    "plain": Shape(2, 2, 2, 19, 19, 5, 3),
    "groups": Shape(1, 4, 2, 21, 21, 4, 4),
    "last queries": Shape(1, 2, 1, 7, 26, 4, 4),
    "one": Shape(1, 1, 1, 1, 1, 3, 3),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_agrees_with_the_reference(patterns: object, name: str, shape: str) -> None:
    agrees(getattr(patterns, name), SHAPES[shape], wanted=(0, 3))


@pytest.mark.parametrize("name", NAMES)
def test_chunks_change_nothing(patterns: object, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "ELEMENTS", {"cpu": 150})
    monkeypatch.setattr(listed_tiles, "ELEMENTS", 100)
    monkeypatch.setattr(listed_executor, "CHUNK", 300)
    agrees(getattr(patterns, name), SHAPES["groups"], wanted=(0, 3))
    agrees(getattr(patterns, name), SHAPES["last queries"], wanted=(0, 3))


def test_more_queries_than_keys(patterns: object) -> None:
    for name in ("own", "tokens", "rows"):
        agrees(getattr(patterns, name), Shape(1, 2, 1, 23, 10, 4, 4))


def steps(name: str) -> tuple[Choose, list[Attend]]:
    found = compose(attnc.load(EXAMPLES / f"{name}.attn").patterns[name].pattern).steps
    (choice,) = (step for step in found if isinstance(step, Choose))
    return choice, [step for step in found if isinstance(step, Attend)]


@pytest.mark.parametrize(
    ("name", "rows", "heads", "axis"),
    [
        ("moba", "i", "each", "s"),
        ("quest", "i", "each", "s"),
        ("nsa", "i", "group", "s"),
        ("dsa", "i", "one", "j"),
        ("seer", "a", "each", "s"),
        ("xattention", "a", "each", "s"),
        ("window_plus_blocks", "i", "each", "s"),
    ],
)
def test_a_choice_is_made_as_often_as_it_differs(name: str, rows: str, heads: str, axis: str) -> None:
    choice, _ = steps(name)
    assert (choice.rows, choice.heads, choice.axis) == (rows, heads, axis)


def test_the_closed_part_of_a_condition_streams() -> None:
    _, (attend,) = steps("window_plus_blocks")
    window, blocks = attend.plan.branches
    assert window.selected is None
    assert window.domain.key_sets[0].walk is None
    assert blocks.selected is not None
    assert attend.plan.merged


def test_two_softmaxes_share_one_choice(patterns: object) -> None:
    found = compose(patterns.two.pattern).steps  # type: ignore[attr-defined]
    assert sum(isinstance(step, Choose) for step in found) == 1


def test_memory_of_a_choice_is_that_of_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def watched(scores: Tensor, *others: object) -> Tensor:
        seen.append(scores.numel())
        return choose_topk(scores, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(choose, "choose_topk", watched)
    monkeypatch.setattr(choose, "ELEMENTS", {"cpu": 2000})
    q, k, v = torch.randn(3, 1, 2, 400, 4)
    attnc.load(EXAMPLES / "moba.attn").moba(q, k, v, block=10)
    assert len(seen) > 10
    assert max(seen) <= 2000


def draw(heads: int = 2, length: int = 20) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    q, k, v = torch.randn(3, 1, heads, length, 4, generator=generator, dtype=torch.float64)
    return q, k, v


def test_more_blocks_asked_than_there_are() -> None:
    moba = attnc.load(EXAMPLES / "moba.attn").moba
    causal = attnc.load(EXAMPLES / "causal.attn").causal
    torch.testing.assert_close(moba(*draw(), block=4, top=99), causal(*draw()))


def test_none_asked() -> None:
    moba = attnc.load(EXAMPLES / "moba.attn").moba
    own = attnc.load(EXAMPLES / "block_local.attn").block_local
    torch.testing.assert_close(moba(*draw(), block=4, top=1), own(*draw(), block=4))
    torch.testing.assert_close(moba(*draw(), block=4, top=0), own(*draw(), block=4))


def test_rows_without_a_candidate_give_0(patterns: object) -> None:
    text = """
pattern past(block: int = 8):
    axis s = blocks(j, block)
    picked = topk[s](q @ mean[j in s](k), 2 where s.stop <= i)
    out = softmax[j](q @ k * scale where j in picked) @ v
"""
    past = attnc.compile(text).past
    q, k, v = (x.requires_grad_() for x in draw())
    out = past(q, k, v)
    assert torch.equal(out[:, :, :8], torch.zeros_like(out[:, :, :8]))
    (gradient,) = torch.autograd.grad(out.sum(), q)
    assert torch.equal(gradient[:, :, :8], torch.zeros_like(gradient[:, :, :8]))
    torch.testing.assert_close(out, past.reference(q, k, v))


def test_scores_that_are_no_numbers_come_last() -> None:
    text = """
pattern scored(top: int = 2):
    input worth: real[j]
    picked = topk[j](worth + 0 * i, top where j <= i)
    out = softmax[j](q @ k * scale where j in picked) @ v
"""
    scored = attnc.compile(text).scored
    worth = torch.tensor([1.0, float("nan"), 3.0, 2.0, float("nan"), -float("inf")] + [0.0] * 14, dtype=torch.float64)
    out = scored(*draw(), worth=worth, top=3)
    assert not out.isnan().any()
    torch.testing.assert_close(out, scored.reference(*draw(), worth=worth, top=3))


def test_a_selection_has_no_gradient() -> None:
    dsa = attnc.load(EXAMPLES / "dsa.attn").dsa
    q, k, v = draw()
    generator = torch.Generator().manual_seed(0)
    drawn = {"iq": (1, 3, 20, 5), "ik": (1, 20, 5), "iw": (1, 3, 20)}
    given = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in drawn.items()}
    for tensor in given.values():
        tensor.requires_grad_()
    out = dsa(q.requires_grad_(), k, v, **given, top=4)
    found = torch.autograd.grad(out.sum(), [q, *given.values()], allow_unused=True)
    assert found[0].abs().max() > 0
    assert all(gradient is None or not gradient.any() for gradient in found[1:])


def test_an_input_of_the_wrong_shape_is_refused() -> None:
    dsa = attnc.load(EXAMPLES / "dsa.attn").dsa
    with pytest.raises(AttnError, match="ik"):
        dsa(*draw(), iq=torch.randn(1, 3, 20, 5), ik=torch.randn(1, 19, 5), iw=torch.randn(1, 3, 20), top=4)


def test_a_block_of_no_tokens_is_refused() -> None:
    with pytest.raises(AttnError, match="positive"):
        attnc.load(EXAMPLES / "moba.attn").moba(*draw(), block=0)


@pytest.mark.parametrize(
    ("condition", "told"),
    [
        ("j not in picked", "denied"),
        ("j in picked and j in other", "second selection"),
        ("j in picked or j in other", "second selection"),
        ("i // 4 in picked", "all pairs of i and s"),
        ("j in strided", "stride"),
    ],
)
def test_what_is_not_lowered_is_told_at_its_place(condition: str, told: str) -> None:
    text = f"""
pattern p:
    axis s = blocks(j, 4)
    axis c = blocks(j, 4, 2)
    picked = topk[s](q @ mean[j in s](k), 2)
    other = topk[s](q @ max[j in s](k), 2)
    strided = topk[c](q @ mean[j in c](k), 2)
    out = softmax[j](q @ k * scale where {condition}) @ v
"""
    with pytest.raises(AttnError, match=told) as caught:
        attnc.compile(text).p(*draw())
    assert caught.value.diagnostics[0].code == "not-lowered"


def test_compiles_into_one_graph() -> None:
    for name, settings in (("moba", {"block": 4}), ("xattention", {"block": 8, "stride": 4, "mass": 0.6})):
        pattern = attnc.load(EXAMPLES / f"{name}.attn").patterns[name]
        compiled = torch.compile(
            lambda q, k, v, p=pattern, s=settings: p(q, k, v, **s), fullgraph=True, backend="eager"
        )
        q, k, v = (x.float() for x in draw())
        torch.testing.assert_close(compiled(q, k, v), pattern(q, k, v, **settings))


def test_a_selection_among_pairs_that_are_live_anyway_decides_nothing() -> None:
    text = """pattern covered(top: int = 2):
    axis s = blocks(j, 2)
    picked = topk[s](q @ mean[j in s](k), top where s.stop <= i)
    out = softmax[j](q @ k * scale where j <= i or (j <= i and j in picked)) @ v
"""
    covered = attnc.compile(text).patterns["covered"]
    case = Case(covered, Shape(1, 2, 2, 9, 9, 8, 8), Setting())
    assert all(outcome.agrees for outcome in compare(case, Target("executor", "executor", "cpu", torch.float64)))

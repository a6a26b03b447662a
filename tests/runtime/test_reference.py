"""The float64 reference, form by form: small cases with values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from attnc.dsl.check import check
from attnc.dsl.source import Source
from attnc.dsl.terms import FORMS, Pattern
from attnc.runtime.compute.gaussian import orthogonal_gaussian
from attnc.runtime.compute.hashing import uniform
from attnc.runtime.reference.meaning import RULES, reference


def made(body: str, parameters: str = "") -> Pattern:
    """A pattern with this body."""
    lines = "\n".join("    " + line for line in body.strip("\n").split("\n"))
    return check(Source("<test>", f"pattern made{parameters}:\n{lines}\n"))["made"]


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def evaluated(expression: str, before: str = "", heads: int = 1, rows: int = 4, **inputs: Tensor) -> Tensor:
    """(heads, rows): the values of an expression over h and i, as the factor of a vector of ones."""
    body = f"input ones: real[o]\n{before}\nout = ({expression}) * ones"
    x = tokens(1, heads, rows, 2)
    return reference(made(body), x, x, x, {}, {"ones": numbers(1), **inputs})[0, :, :, 0]


def row(expression: str, before: str = "", rows: int = 4, **inputs: Tensor) -> list[float]:
    """The values of an expression at the queries of one head."""
    return [float(value) for value in evaluated(expression, before, 1, rows, **inputs)[0]]


def test_every_form_has_a_rule() -> None:
    assert set(RULES) == set(FORMS)


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("i", [0, 1, 2, 3]),
        ("-i // 2", [0, -1, -1, -2]),
        ("(i - 3) // 2", [-2, -1, -1, 0]),
        ("(i - 3) % 2", [1, 0, 1, 0]),
        ("(3 - i) % (1 - 3)", [-1, 0, -1, 0]),
        ("abs(i - 2)", [2, 1, 0, 1]),
        ("i / 2", [0, 0.5, 1, 1.5]),
        ("2 ** i", [1, 2, 4, 8]),
        ("-i ** 2", [0, -1, -4, -9]),
        ("floor(i / 2 - 1)", [-1, -1, 0, 0]),
        ("min(i, 2) + max(i, 2)", [2, 3, 4, 5]),
        ("clamp(i, 1, 2)", [1, 1, 2, 2]),
        ("real(1 <= i < 3)", [0, 1, 1, 0]),
        ("real(not i == 2 and i != 0)", [0, 1, 0, 1]),
        ("real(i < 1 or i > 2)", [1, 0, 0, 1]),
        ("if i < 2 then 10 else i", [10, 10, 2, 3]),
        ("relu(i - 2)", [0, 0, 0, 1]),
        ("elu(i - 1)", [math.expm1(-1), 0, 1, 2]),
        ("softplus(i)", [math.log1p(math.exp(x)) for x in range(4)]),
        ("silu(i)", [x / (1 + math.exp(-x)) for x in range(4)]),
        ("sigmoid(i) + tanh(i)", [1 / (1 + math.exp(-x)) + math.tanh(x) for x in range(4)]),
        ("sin(i) ** 2 + cos(i)", [math.sin(x) ** 2 + math.cos(x) for x in range(4)]),
        ("exp(log(i + 1))", [1, 2, 3, 4]),
        ("sqrt(i)", [math.sqrt(x) for x in range(4)]),
        ("B * 100 + H * 10 + N + M + D", [120, 120, 120, 120]),
    ],
)
def test_pointwise(expression: str, expected: list[float]) -> None:
    assert row(expression) == pytest.approx(expected, abs=1e-14)


def test_uniform_hashes_its_ints() -> None:
    expected = [uniform([torch.tensor(7), torch.tensor(i)]).item() for i in range(4)]
    assert row("uniform(7, i)") == expected


def test_reads_outside_are_zero() -> None:
    g = numbers(1, 2, 4, 8)[None, None]
    assert row("g[i - 1]", "input g: real[b, h, t]", g=g) == [0, 1, 2, 4]
    assert row("g[2 * i]", "input g: real[b, h, t]", g=g) == [1, 4, 0, 0]
    assert row("table[i - 1]", "input table: real[x]", table=numbers(5, 6)) == [0, 5, 6, 0]


def test_products_of_vectors_and_matrices() -> None:
    x, y, m = numbers(1, 2, 3), numbers(5, 7), tokens(3, 2)
    before = "input x: real[x]\ninput y: real[y]"
    assert row("sum[y](outer(x, y) @ x)", before, x=x, y=y) == [12 * 14] * 4
    assert row("concat(x, y) @ concat(x, y)", before, x=x, y=y) == [14 + 74] * 4
    matrix = "input m: real[x, y]\ninput y: real[y]"
    assert row("sum[x](m @ y)", matrix, m=m, y=y) == pytest.approx([float((m @ y).sum())] * 4)
    # With (x, y) twice the product is of matrices: the left's last axis with the right's first.
    assert row("sum[x](m @ transpose(m) @ m @ y)", matrix, m=m, y=y) == pytest.approx(
        [float((m @ m.T @ m @ y).sum())] * 4
    )


def test_projection_is_the_public_function() -> None:
    q = tokens(1, 1, 4, 2)
    out = reference(made("W = orthogonal_gaussian(5, D, 3)\nout = W @ q"), q, q, None, {}, {})
    torch.testing.assert_close(out[0, 0], q[0, 0] @ orthogonal_gaussian(5, 2, 3).T)


# Reductions


def test_reductions_over_an_index() -> None:
    g = numbers(3, -1, 4, 1)[None, None]
    before = "input g: real[b, h, t]"
    assert row("sum[j](g[j] where j < i)", before, g=g) == [0, 3, 2, 6]
    assert row("mean[j](g[j] where j < i)", before, g=g) == [0, 3, 1, 2]
    assert row("max[j](g[j] where j < i)", before, g=g) == [0, 3, 3, 4]
    assert row("min[j](g[j] where j < i)", before, g=g) == [0, 3, -1, -1]
    assert row("max[j](j where j < i)", before, g=g) == [0, 0, 1, 2]
    assert row("sum[j](1 where j <= i)", before, g=g) == [1, 2, 3, 4]
    cumsum = "input g: real[b, h, t]\nG = cumsum[t](g)"
    assert row("G[i]", cumsum, g=g) == [3, 2, 6, 7]
    assert row("sum[j](G[j] where j == i)", cumsum, g=g) == [3, 2, 6, 7]


def test_softmax_over_indices_axes_and_sinks() -> None:
    g = numbers(math.log(1), math.log(2), math.log(3), math.log(4))[None, None]
    before = "input g: real[b, h, t]\ninput s: real[h]"
    s = numbers(math.log(5))
    assert row("sum[j](softmax[j](g[j] where j < i) * j)", before, g=g, s=s) == pytest.approx([0, 0, 2 / 3, 8 / 6])
    sunk = "sum[j](softmax[j](g[j] where j < i, sink = s) * j)"
    assert row(sunk, before, g=g, s=s) == pytest.approx([0, 0, 2 / 8, 8 / 11])
    two = "sum[j](softmax[j](0.0 where j < i, sink = s))"
    assert evaluated(two, "input s: real[h]", heads=2, s=numbers(0, math.log(3)))[:, 2].tolist() == pytest.approx(
        [2 / 3, 2 / 5]
    )
    x = numbers(math.log(1), math.log(3))
    assert row("softmax[x](x)[1]", "input x: real[x]", x=x) == pytest.approx([0.75] * 4)


def test_normalize_eps_and_floor() -> None:
    g = numbers(1, 2, -4, 8)[None, None]
    before = "input g: real[b, h, t]"
    assert row("sum[j](normalize[j](g[j] where j < i) * j)", before, g=g) == pytest.approx([0, 0, 2 / 3, 6])
    assert row("sum[j](normalize[j](g[j] where j < i, eps = 1) * j)", before, g=g) == pytest.approx([0, 0, 0.5, 0])
    assert row("sum[j](normalize[j](g[j] where j < i, floor = 2) * j)", before, g=g) == pytest.approx([0, 0, 2 / 3, -3])


def test_members_of_blocks_and_segments() -> None:
    """Five positions: the last tiled block is short, a strided one exists only whole, segments may be empty."""
    g = numbers(1, 2, 4, 8, 16)[None, None]
    before = "input g: real[b, h, t]\n"
    tiled, strided = "axis s = blocks(j, 2)\n", "axis c = blocks(j, 3, 2)\n"

    def at(expression: str, axes: str) -> list[float]:
        return row(expression, before + axes, rows=5, g=g)

    assert at("sum[s](mean[j in s](g[j]) where s.index == i)", tiled) == [1.5, 6, 16, 0, 0]
    assert at("sum[s](s.stop where s.index == i)", tiled) == [2, 4, 5, 0, 0]
    assert at("sum[c](max[j in c](g[j]) where c.index == i)", strided) == [4, 16, 0, 0, 0]
    assert at("sum[c](sum[j in c](g[j] where j != i) where c.start == i)", strided) == [6, 0, 24, 0, 0]
    # Blocks 0:3 and 2:5 overlap 0:2 (the first), 2:4 (both) and 4:5 (the second).
    pooled = tiled + strided + "w = sum[c in s](mean[j in c](g[j]))"
    assert at("sum[s](w where s.index == i)", pooled) == pytest.approx([7 / 3, 35 / 3, 28 / 3, 0, 0])
    # Four segments of ceil(5 / 4) = 2: the third is short, the fourth empty.
    segments = "axis m = segments(j, 4)\n"
    assert at("sum[m](sum[j in m](g[j]) + 100 * m.start where m.index == i)", segments) == [3, 212, 416, 500, 0]


def test_group_sum_adds_query_heads_of_a_key_head() -> None:
    q, k = tokens(1, 4, 3, 2), tokens(1, 2, 3, 2, seed=1)
    out = reference(made("out = group_sum(h + i) * q / q"), q, k, None, {}, {})
    assert out[0, :, 2, 0].tolist() == pytest.approx([5, 5, 9, 9])


# Selections


def chosen(selection: str, before: str, rows: int = 4, **inputs: Tensor) -> list[float]:
    """Bit mask of the chosen of each row, over j."""
    text = f"{before}\npicked = {selection}"
    return row("sum[j](2 ** j where j in picked)", text, rows, **inputs)


def test_topk_takes_forced_first_then_the_best_then_the_lowest() -> None:
    g, before = numbers(1, 5, 5, 7)[None, None], "input g: real[b, h, t]"
    assert chosen("topk[j](g[j], 2 where j <= i)", before, g=g) == [1, 3, 6, 10]
    assert chosen("topk[j](g[j], 2 where j <= i, force = j == 0)", before, g=g) == [1, 3, 3, 9]
    assert chosen("topk[j](g[j], 1 where j <= i, force = j <= 1)", before, g=g) == [1, 2, 2, 2]
    assert chosen("topk[j](g[j], i where j != 3)", before, g=g) == [0, 2, 6, 7]
    assert chosen("topk[j](g[j], 9 where j > i)", before, g=g) == [14, 12, 8, 0]


def test_ties_go_to_the_lowest_however_long_the_row() -> None:
    q, k = torch.zeros(1, 1, 1, 2, dtype=torch.float64), torch.zeros(1, 1, 3000, 2, dtype=torch.float64)
    body = "p = topk[j](q @ k + real(j == 2000), 4 where j >= 500)\nout = sum[j](j * v where j in p)"
    out = reference(made(body), q, k, torch.ones_like(k))
    assert out[0, 0, 0, 0] == 2000 + 500 + 501 + 502


def test_threshold_and_mass() -> None:
    g, before = numbers(1, 4, 3, 2)[None, None], "input g: real[b, h, t]"
    assert chosen("threshold[j](g[j], 3 where j <= i, force = j == 0)", before, g=g) == [1, 3, 7, 7]
    # Totals 1, 5, 8, 10: half of each is covered by the largest members.
    assert chosen("mass[j](g[j], 0.5 where j <= i)", before, g=g) == [1, 2, 2, 6]
    assert chosen("mass[j](g[j], 0.5 where j <= i, force = j == 0)", before, g=g) == [1, 3, 3, 3]
    assert chosen("mass[j](g[j], 0 where j <= i, force = j < 2)", before, g=g) == [1, 3, 3, 3]


def test_selected_blocks_cover_their_positions() -> None:
    before = "axis s = blocks(j, 2)\naxis c = blocks(j, 2, 1)"
    assert chosen("topk[s](s.index, 1 where s.start <= i)", before, rows=5) == [3, 3, 12, 12, 16]
    assert chosen("topk[c](c.index, 2 where c.start <= i)", before, rows=5) == [3, 7, 14, 28, 28]
    blocks = f"{before}\npicked = topk[s](s.index, 1 where s.start <= i)"
    assert evaluated("real(i // 2 in picked)", blocks, rows=5)[0].tolist() == [1, 1, 1, 1, 1]
    assert evaluated("sum[s](s.index where s.index in picked)", blocks, rows=5)[0].tolist() == [0, 0, 1, 1, 2]


def test_selection_over_heads_and_tokens() -> None:
    router = numbers(1, 3, 2, 3)[None, :, None]
    heads = "input router: real[b, h, t]\npicked = topk[h](router[i], 2)"
    assert evaluated("real(h in picked)", heads, heads=4, rows=1, router=router)[:, 0].tolist() == [0, 1, 0, 1]
    best = "input router: real[b, h, t]\npicked = topk[t](router, 2)"
    router = numbers(5, 1, 5, 9)[None, None]
    assert row("real(i in picked)", best, router=router) == [1, 0, 0, 1]
    assert row("sum[j](1 where j in picked)", best, router=router) == [2, 2, 2, 2]


def test_argmax_gives_the_lowest_of_the_largest_or_minus_one() -> None:
    g, before = numbers(5, 1, 5, 9)[None, None], "input g: real[b, h, t]"
    assert row("argmax[j](g[j] where j < i)", before, g=g) == [-1, 0, 0, 0]
    x = "input x: real[x]\n"
    assert row("argmax[x](x)", x, x=numbers(1, 7, 7)) == [1] * 4
    axis = "axis s = blocks(j, 2)\ninput g: real[b, h, t]"
    assert row("argmax[s](sum[j in s](g[j]))", axis, g=g) == [1] * 4


def test_membership_in_a_vector_of_ints_ignores_padding() -> None:
    columns = torch.tensor([[2, -1], [-1, 0]])
    before = "input columns: int[h, x]"
    expression = "sum[j](2 ** j where j in columns[h] or j - i in columns[h])"
    assert evaluated(expression, before, heads=2, columns=columns).tolist() == [[4, 12, 4, 4], [1, 3, 5, 9]]


def test_selections_have_no_gradient() -> None:
    q, k, v = (tokens(1, 1, 4, 2, seed=seed).requires_grad_() for seed in range(3))
    body = "axis s = blocks(j, 2)\np = topk[s](q @ mean[j in s](k), 1)\nout = softmax[j](1.0 where j in p) @ v"
    reference(made(body), q, k, v, {}, {}).sum().backward()
    assert q.grad is None or not q.grad.any()
    assert v.grad is not None
    assert v.grad.any()


# Blocks


def test_scan_runs_its_steps_in_order() -> None:
    g = numbers(1, 2, 4, 8)[None, None]
    body = (
        "input g: real[b, h, t]\nscan t:\n    seen = S + 0\n    S = S / 2 + g\n    S = S + 1\n    both = seen + 10 * S"
    )
    # S: 2, 4, 7, 12.5
    assert row("seen[i]", body, g=g) == [0, 2, 4, 7]
    assert row("both[i]", body, g=g) == [20, 42, 74, 132]


def test_scan_reads_the_sequence_that_ends_with_the_queries() -> None:
    q, k, v = tokens(1, 2, 6, 3), tokens(1, 2, 6, 3, seed=1), tokens(1, 2, 6, 2, seed=2)
    scan = made("scan t:\n    S = S + outer(k, v)\n    out = q @ S")
    whole = reference(scan, q, k, v, {}, {})
    torch.testing.assert_close(whole, torch.einsum("bhid,bhjd->bhij", q, k).tril() @ v)
    torch.testing.assert_close(reference(scan, q[:, :, 4:], k, v, {}, {}), whole[:, :, 4:])


def test_repeat_iterates_from_the_value_before() -> None:
    text = "input c: real[h]\nx = c\nrepeat 30:\n    x = (x + c / x) / 2"
    assert row("x", text, c=numbers(2)) == pytest.approx([math.sqrt(2)] * 4, abs=1e-15)
    text = "input c: real[h]\nx = c\nrepeat 0:\n    x = x + 1"
    assert row("x", text, c=numbers(2)) == [2] * 4


def test_merge_counts_a_key_once_a_branch() -> None:
    q, k, v = (tokens(1, 2, 5, 3, seed=seed) for seed in range(3))
    near, far = "softmax[j](q @ k where i - j < 2) @ v", "softmax[j](q @ k where i > j) @ v"
    out = reference(made(f"out = merge({near}, {far})"), q, k, v, {}, {})
    i, j = torch.arange(5)[:, None], torch.arange(5)
    weight = (q @ k.mT).exp() * ((i - j < 2).double() + (i > j).double())
    torch.testing.assert_close(out, weight / weight.sum(-1, keepdim=True) @ v)


def test_tuple_parameters_unroll() -> None:
    q = tokens(1, 1, 6, 2)
    unrolled = made("out = merge(softmax[j](0.0 where j % r == 0) @ v for r in rates)", "(rates: ints = (1, 2))")
    weight = numbers(2, 1, 2, 1, 2, 1)
    expected = (weight[:, None] * q[0, 0]).sum(0) / weight.sum()
    torch.testing.assert_close(reference(unrolled, q, q, q, {}, {})[0, 0, 3], expected)
    weight = numbers(*[(j % 3 == 0) + (j % 4 == 0) for j in range(6)])
    expected = (weight[:, None] * q[0, 0]).sum(0) / weight.sum()
    torch.testing.assert_close(reference(unrolled, q, q, q, {"rates": (3, 4)}, {})[0, 0, 3], expected)

"""What a user reads after a mistake of meaning: one golden text for each."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from attnc.dsl.check import check
from attnc.dsl.codes import CODES
from attnc.dsl.diagnostics import AttnError
from attnc.dsl.source import Source

# A pattern `p` with this body; names of the form `whole_..` hold the whole text.
WRONG: dict[str, str] = {
    # names
    "unknown_name": "out = softmax[j](q @ k where i - j < windo) @ v",
    "unknown_name_near_parameter": "window = 3\nout = softmax[j](q @ k where i - j < windw) @ v",
    "whole_query_in_outer_function": "f() = q @ k\npattern p:\n    out = softmax[j](f()) @ v\n",
    "function_as_value": "phi(x) = exp(x)\nout = softmax[j](phi @ k) @ v",
    "axis_as_value": "axis s = blocks(j, 4)\nout = softmax[s](q @ mean[j in s](k) where s <= i) @ mean[j in s](v)",
    "unknown_function": "out = softmx(q @ k) @ v",
    "unknown_reduction": "out = softmx[j](q @ k) @ v",
    "reduction_without_index": "out = softmax(q @ k) @ v",
    "value_called": "x = q @ k\nout = softmax[j](x(2)) @ v",
    "duplicate_equation": "x = q @ k\nx = x * scale\nout = softmax[j](x) @ v",
    "duplicate_function": "phi(x) = exp(x)\nphi(x) = x\nout = softmax[j](phi(q) @ k) @ v",
    "duplicate_function_parameter": "f(x, x) = x\nout = softmax[j](q @ k) @ v",
    "duplicate_axis": "axis s = blocks(j, 4)\naxis s = blocks(j, 8)\nout = q",
    "reserved_query": "q = 3\nout = softmax[j](q @ k) @ v",
    "reserved_index": "j = 3\nout = softmax[j](q @ k) @ v",
    "reserved_function": "exp(x) = x\nout = softmax[j](exp(q @ k)) @ v",
    "reserved_in_function": "f(q) = q\nout = softmax[j](q @ k) @ v",
    "recursive_function": "f(x) = g(x)\ng(x) = f(x) + 1\nout = softmax[j](f(q @ k)) @ v",
    # base types
    "condition_is_number": "out = softmax[j](q @ k where i - j) @ v",
    "condition_in_logic": "out = softmax[j](q @ k where i and j <= i) @ v",
    "condition_in_if": "out = softmax[j](if i then q @ k else 0) @ v",
    "bool_in_arithmetic": "out = softmax[j](q @ k + (j <= i)) @ v",
    "bool_body": "out = softmax[j](j <= i) @ v",
    "branches_differ": "out = softmax[j](if j <= i then q @ k else j < i) @ v",
    "floor_division_of_real": "out = softmax[j](q @ k where scale // 2 == j) @ v",
    "remainder_of_real": "out = softmax[j](q @ k where scale % 2 == j) @ v",
    "negative_power_of_int": "out = softmax[j](q @ k * 2 ** -1) @ v",
    "selection_as_number": "p = topk[j](q @ k, 4)\nout = softmax[j](q @ k + p) @ v",
    "number_not_selection": "out = softmax[j](q @ k where j in q) @ v",
    "real_in_selection": "p = topk[j](q @ k, 4)\nout = softmax[j](q @ k where scale in p) @ v",
    "tuple_as_value": "out = (1, 2)",
    "count_is_real": "p = topk[j](q @ k, 0.5)\nout = softmax[j](q @ k where j in p) @ v",
    # division
    "division_by_zero": "out = softmax[j](q @ k / 0) @ v",
    "floor_division_by_zero": "out = softmax[j](q @ k where j // 0 == i) @ v",
    "remainder_by_zero_in_function": "every(n) = j % n == 0\nout = softmax[j](q @ k where every(0)) @ v",
    "remainder_by_negative": "out = softmax[j](q @ k where j % (-2) == 0) @ v",
    "block_of_negative": "axis s = blocks(j, -4)\nout = q",
    "block_of_zero": "axis s = blocks(j, 0)\nout = q",
    "stride_of_zero": "axis s = blocks(j, 4, 0)\nout = q",
    # axes
    "vector_axes_differ": "out = softmax[j](q * v) @ v",
    "second_axis_of_matrix": "scan t:\n    S = S * v + outer(k, v)\n    out = q @ S",
    "nothing_to_contract": "out = softmax[j](q @ v) @ k",
    "scalar_contracted": "out = softmax[j](q @ k * scale) @ scale",
    "index_and_axis": "axis c = blocks(j, 4)\nA = matrix[c](softmax[c](q @ mean[j in c](k)))\n"
    "out = A @ mean[j in c](v)",
    "two_axes_shared": "input x: real[r, d]\ninput y: real[r, d]\nout = x @ y * q",
    "unknown_index": "out = softmax[m](q @ k) @ v",
    "index_not_in_body": "out = softmax[j](q @ q) @ v",
    "index_only_in_t": "input g: real[b, h, t]\nout = sum[j](g) * v",
    "sink_over_keys": "input sink: real[b, h, j]\nout = softmax[j](q @ k, sink = sink) @ v",
    "count_over_keys": "p = topk[j](q @ k, j)\nout = softmax[j](q @ k where j in p) @ v",
    "within_unknown_axis": "out = softmax[j](q @ mean[j in c](k)) @ v",
    "within_axis_of_queries": "axis a = blocks(i, 4)\nout = softmax[j](q @ mean[j in a](k)) @ v",
    "softmax_within": "axis c = blocks(j, 4)\nout = softmax[j in c](q @ k) @ v",
    "vector_axis_within": "axis c = blocks(j, 4)\nout = v * sum[d in c](q)",
    "head_in_block_selection": "axis s = blocks(j, 4)\np = topk[s](q @ mean[j in s](k), 2)\n"
    "out = softmax[j](q @ k where h in p) @ v",
    "matrix_of_missing_index": "out = q @ matrix[j](q)",
    "transpose_of_vector": "out = transpose(q)",
    "outer_of_scalar": "out = q @ outer(k, scale)",
    "outer_of_one_axis": "out = q @ outer(k, k)",
    "concat_of_scalar": "out = concat(q, scale)",
    "axis_made_twice": "x = concat[n](q, q)\ny = concat[n](q, concat(q, q))\nout = x @ y * v",
    "identity_of_number": "out = q @ identity[3]",
    "group_sum_without_heads": "input x: real[b, i]\nout = group_sum(x) * q",
    # reading
    "unread_position": "input g: real[b, h, t]\nout = softmax[j](q @ k + g) @ v",
    "unread_position_of_expression": "input g: real[b, h, t]\nout = softmax[j](q @ k + exp(g)) @ v",
    "read_at_missing_index": "input slope: real[h]\nout = softmax[j](q @ k + slope[i]) @ v",
    "read_at_missing_axis": "axis s = blocks(j, 4)\ninput g: real[h]\nout = softmax[j](q @ k + g[s]) @ v",
    "read_at_real": "input table: real[h, m]\nout = softmax[j](q @ k + table[scale]) @ v",
    "read_twice": "input table: real[h, m]\nout = softmax[j](q @ k + table[0, 1]) @ v",
    "unread_position_twice": "input d: int[b, t]\nout = softmax[j](q @ k where d == d) @ v",
    "transposed_keys": "out = softmax[j](q @ k.T) @ v",
    "attribute_of_value": "out = softmax[j](q @ k where j < q.stop) @ v",
    "unknown_attribute": "axis s = blocks(j, 4)\n"
    "out = softmax[s](q @ mean[j in s](k) where s.end <= i) @ mean[j in s](v)",
    # calls
    "function_argument_missing": "f(x, y) = x + y\nout = softmax[j](f(q @ k)) @ v",
    "builtin_argument_missing": "out = softmax[j](max(q @ k)) @ v",
    "function_keyword": "f(x) = x\nout = softmax[j](f(x = q @ k)) @ v",
    "function_where": "f(x) = x\nout = softmax[j](f(q @ k where j <= i)) @ v",
    "unknown_keyword": "out = softmax[j](q @ k, snk = 1) @ v",
    "keyword_twice": "out = softmax[j](q @ k, sink = 1, sink = 2) @ v",
    "reduction_of_two": "out = softmax[j](q @ k, 3) @ v",
    "selection_without_count": "p = topk[j](q @ k)\nout = softmax[j](q @ k where j in p) @ v",
    "eps_and_floor": "out = normalize[j](q @ k, eps = 1, floor = 1) @ v",
    "two_indices": "out = softmax[i, j](q @ k) @ v",
    "matrix_where": "out = matrix[j](k where j <= i)",
    "concat_of_three": "out = concat[n](q, q, q)",
    "uniform_of_real": "out = softmax[j](uniform(0, scale) * (q @ k)) @ v",
    "gaussian_over_heads": "W = orthogonal_gaussian(h, D, 0)\nout = W @ q",
    "error_in_function": "f(x) = x + nothing\nout = softmax[j](f(q @ k)) @ v",
    "error_in_function_not_called": "f(x) = x + nothing + g(x) + sm[j](x) + sum[j](H * d2)\nout = q",
    "error_in_prelude": "out = softmax[j](q @ k where window(scale > 0)) @ v",
    # merge and for
    "merge_of_value": "out = merge(softmax[j](q @ k) @ v, v)",
    "merge_of_scaled_branch": "out = merge(2 * (softmax[j](q @ k) @ v), softmax[j](q @ k) @ v)",
    "merge_of_nothing": "out = merge()",
    "for_in_function": "f(x) = x\nout = f(q for n in (1, 2))",
    "for_over_number": "out = merge(softmax[j](q @ k * n) @ v for n in 3)",
    "for_of_two_lengths": "out = merge(softmax[j](q @ k * n / m) @ v for n, m in (1, 2), (3, 4, 5))",
    "for_with_names_missing": "out = merge(softmax[j](q @ k * n) @ v for n in (1, 2), (3, 4))",
    "for_too_long": f"out = merge(softmax[j](q @ k * n) @ v for n in ({', '.join(map(str, range(65)))}))",
    # scans
    "scan_over_keys": "scan j:\n    S = S + outer(k, v)\nout = q",
    "scan_of_pairs": "s = q @ k\nscan t:\n    S = S + s * v\n    out = S",
    "scan_stays_zero": "input g: real[b, h, t]\nscan t:\n    S = exp(g) * S\n    out = q @ S",
    "scan_of_defined_name": "S = q @ k\nscan t:\n    S = S + outer(k, v)\n    out = q @ S",
    "scan_state_changes_axes": "scan t:\n    S = S + k\n    S = outer(k, v)\n    out = q @ S",
    "scan_reduction_over_t": "input g: real[b, h, t]\nscan t:\n    S = S + cumsum[t](g) * v\n    out = S",
    "scan_result_unread": "scan t:\n    S = S + outer(k, v)\n    o = q @ S\nout = o + softmax[j](q @ k) @ v",
    "repeat_without_start": "repeat 3:\n    Z = Z * 2\nout = q",
    "repeat_real_times": "Z = q\nrepeat scale:\n    Z = Z * 2\nout = Z",
    "repeat_by_head": "Z = q\nrepeat h:\n    Z = Z * 2\nout = Z",
    # declarations
    "axis_of_heads": "axis s = blocks(h, 4)\nout = q",
    "axis_of_nothing_known": "axis s = chunks(j, 4)\nout = q",
    "axis_size_varies": "axis s = blocks(j, h + 1)\nout = q",
    "axis_without_size": "axis s = blocks(j)\nout = q",
    "input_of_unknown_type": "input x: complex[h]\nout = q",
    "input_axis_twice": "input x: real[h, h]\nout = q",
    "input_over_t_and_i": "input x: real[t, i]\nout = q",
    "input_with_no_length": "input x: real[h, 0]\nout = q",
    "input_default_too_wide": "input x: real[h] = scale * i\nout = q",
    "input_named_query": "input q: real[h, d]\nout = q",
    "whole_input_sized_by_real": "pattern p(m: real = 3.0):\n    input x: real[h, m]\n    out = x @ x * q\n",
    "whole_parameter_of_unknown_type": "pattern p(x: complex):\n    out = q\n",
    "whole_parameter_with_axes": "pattern p(n: int = 3.5):\n    out = q\n",
    "whole_parameter_default_computed": "pattern p(n: int = 3 + 4):\n    out = q\n",
    "whole_parameter_default_not_tuple": "pattern p(n: ints = (1, 2.5)):\n    out = q\n",
    "whole_parameter_without_length": "pattern p(n: ints):\n    out = q\n",
    "whole_parameter_named_index": "pattern p(h: int = 3):\n    out = q\n",
    "whole_scale_is_int": "pattern p(scale: int = 3):\n    out = q\n",
    "whole_duplicate_pattern": "pattern p:\n    out = q\npattern p:\n    out = q\n",
    "whole_pattern_named_softmax": "pattern softmax:\n    out = q\n",
    "whole_function_and_pattern": "p(x) = x\npattern p:\n    out = q\n",
    "whole_tuple_in_arithmetic": "pattern p(n: ints = (1, 2)):\n    out = q * n\n",
    # the result
    "no_output": "x = softmax[j](q @ k) @ v",
    "output_over_keys": "out = q @ k * v",
    "output_is_scalar": "out = sum[j](q @ k)",
    "output_is_condition": "out = i < 3",
    "output_is_matrix": "out = outer(q, sum[j](v))",
    # calls of patterns
    "whole_pattern_argument_missing": "pattern a:\n    out = q\npattern p:\n    out = a(q, k)\n",
    "whole_pattern_keyword_unknown": "pattern a(window: int = 3):\n    out = q\npattern p:\n"
    "    out = a(q, k, v, windw = 3)\n",
    "whole_pattern_parameter_missing": "pattern a(window: int):\n    out = q * window\n"
    "pattern p:\n    out = a(q, k, v)\n",
    "whole_pattern_parameter_wrong": "pattern a(window: int):\n    out = q * window\npattern p:\n"
    "    out = a(q, k, v, window = scale)\n",
    "whole_pattern_input_missing": "pattern a:\n    input g: real[h]\n    out = q * g\n"
    "pattern p:\n    out = a(q, k, v)\n",
    "whole_pattern_input_wrong": "pattern a:\n    input g: real[h]\n    out = q * g\npattern p:\n"
    "    out = a(q, k, v, g = q @ q)\n",
    "whole_pattern_swapped": "pattern a:\n    out = softmax[j](q @ k) @ v\npattern p:\n    out = a(k, q, v)\n",
    "whole_pattern_keyword_twice": "pattern a(n: int = 3):\n    out = q\npattern p:\n"
    "    out = a(q, k, v, n = 3, n = 4)\n",
    "whole_pattern_where": "pattern a:\n    out = q\npattern p:\n    out = a(q, k, v where j <= i)\n",
    "whole_pattern_tuple_missing": "pattern a(n: ints):\n    out = q\n",
    "whole_pattern_tuple_is_int": "pattern a(n: ints = (1, 2)):\n    out = q\npattern p:\n"
    "    out = a(q, k, v, n = 3)\n",
    "whole_pattern_axis_mismatch": "pattern a:\n    input x: real[h, d]\n    out = q * x\npattern p:\n"
    "    input y: real[h, m]\n    out = a(q, k, v, x = y)\n",
    "whole_pattern_in_scan": "pattern a:\n    out = q\npattern p:\n    scan t:\n"
    "        S = S + a(q, k, v)\n        out = S\n",
    "whole_pattern_later": "pattern p:\n    out = a(q, k, v)\npattern a:\n    out = q\n",
    "whole_pattern_division_by_zero": "pattern a(block: int = 4):\n"
    "    out = softmax[j](q @ k where j // block == 0) @ v\n"
    "pattern p:\n    out = a(q, k, v, block = 0)\n",
    # several at once, and no consequences
    "all_errors": "a = nothing\nb2 = a + 1\nc = softmax[j](q @ v)\nd2 = exp(1, 2)\nout = softmax[j](a * c) @ v",
    "whole_use_from_text": 'use "other.attn"\npattern p:\n    out = q\n',
}


def _text(name: str) -> str:
    body = WRONG[name]
    return body if name.startswith("whole_") else "pattern p:\n    " + body.replace("\n", "\n    ") + "\n"


TEXTS = {name: _text(name) for name in WRONG}


def errors(text: str) -> AttnError:
    with pytest.raises(AttnError) as caught:
        check(Source("wrong.attn", text))
    return caught.value


@pytest.mark.parametrize("name", TEXTS)
def test_error(name: str, golden: Callable[[str], None]) -> None:
    golden(str(errors(TEXTS[name])))


def test_an_error_in_a_value_is_reported_once() -> None:
    codes = [diagnostic.code for diagnostic in errors(TEXTS["all_errors"]).diagnostics]
    assert codes == ["unknown-name", "contraction", "argument"]


def test_an_error_in_a_function_is_reported_once_for_all_its_calls() -> None:
    text = "f(x) = x + nothing\npattern p:\n    out = f(q)\npattern r:\n    out = f(k) @ v\n"
    assert [diagnostic.code for diagnostic in errors(text).diagnostics] == ["unknown-name"]


def test_a_call_of_a_wrong_pattern_adds_no_error() -> None:
    text = "pattern a:\n    out = nothing\npattern p:\n    out = a(q, k, v)\n"
    assert len(errors(text).diagnostics) == 1


# Codes of the checker: those of other stages have their own tests.
CHECKED = {
    "argument", "axis-mismatch", "contraction", "division-by-zero", "duplicate-name", "loop", "merge", "missing-output",
    "not-a-condition", "not-positive", "output", "parameter", "recursion", "reserved-name", "scan", "too-large",
    "type-mismatch", "unknown-attribute", "unknown-axis", "unknown-function", "unknown-name", "unread-position", "use",
}  # fmt: skip


def test_every_code_of_the_checker_has_an_example() -> None:
    shown = {diagnostic.code for text in TEXTS.values() for diagnostic in errors(text).diagnostics}
    assert shown >= CHECKED
    assert CODES.keys() >= CHECKED

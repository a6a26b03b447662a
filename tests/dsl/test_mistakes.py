"""What a user reads after a slip: one golden text for each."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter

import pytest

from attnc.dsl.diagnostics import AttnError
from attnc.dsl.mistakes import _AFTER_EXPRESSION, _EXPRESSION, _ITEM, _OPERATOR, _SPELLED, _STATEMENT, WORDS
from attnc.dsl.parse import MOST_MISTAKES, _parser, parse
from attnc.dsl.source import Source

BROKEN: dict[str, str] = {
    "word_as_equation": "pattern p:\n    where = j <= i\n    out = q\n",
    "word_as_statement": "pattern p:\n    input = 3\n",
    "word_as_pattern": "pattern scan:\n    out = q\n",
    "word_as_attribute": "pattern p:\n    out = s.in + 1\n",
    "equation_outside": "window = 3\n",
    "input_outside": "input g: real[b, t]\n",
    "pattern_inside": "pattern p:\n    out = q\n    pattern r:\n        out = q\n",
    "use_inside": 'pattern p:\n    use "x.attn"\n    out = q\n',
    "use_without_quotes": "use std.attn\n",
    "python_def": "pattern p:\n    def phi(x): return x\n    out = q\n",
    "python_let": "pattern p:\n    let x = 3\n    out = q\n",
    "python_return": "pattern p:\n    return softmax[j](q @ k) @ v\n",
    "python_import": "import std\n",
    "augmented": "pattern p:\n    scan t:\n        S += outer(k, v)\n    out = q\n",
    "at_most_reversed": "pattern p:\n    out = softmax[j](q @ k where j =< i) @ v\n",
    "at_least_reversed": "pattern p:\n    out = softmax[j](q @ k where i => j) @ v\n",
    "unlike_as_in_sql": "pattern p:\n    out = softmax[j](q @ k where i <> j) @ v\n",
    "parameter_without_type": "pattern p(window = 3):\n    out = q\n",
    "input_without_type": "pattern p:\n    input gate\n    out = q\n",
    "axis_with_colon": "pattern p:\n    axis s: blocks(j, 3)\n    out = q\n",
    "axis_of_nothing": "pattern p:\n    axis s = 3\n    out = q\n",
    "typed_equation": "pattern p:\n    x: int = 3\n    out = q\n",
    "if_with_colon": "pattern p:\n    out = if h < 2: q else v\n",
    "if_without_else": "pattern p:\n    out = if h < 2 then q\n",
    "if_after_value": "pattern p:\n    out = q if h < 2 else v\n",
    "if_as_operand": "pattern p:\n    out = 1 + if h < 2 then q else v\n",
    "where_outside": "pattern p:\n    out = q @ k where j <= i\n",
    "where_twice": "pattern p:\n    out = sum[j](v where j <= i where j > 3)\n",
    "where_after_keyword": "pattern p:\n    out = softmax[j](q @ k, sink = 1 where j <= i) @ v\n",
    "where_before_argument": "pattern p:\n    out = topk[s](q where j <= i, 3)\n",
    "plain_after_named": "pattern p:\n    out = f(x = 1, q)\n",
    "for_among_arguments": "pattern p:\n    out = merge(q, q for r in rates)\n",
    "operator_at_line_end": "pattern p:\n    out = q +\n        k\n",
    "operator_at_line_start": "pattern p:\n    out = q\n        + k\n",
    "digit_before_name": "pattern p:\n    out = 2x * q\n",
    "slice": "pattern p:\n    out = q[0:3]\n",
    "assignment_in_condition": "pattern p:\n    out = softmax[j](q @ k where i = j) @ v\n",
    "missing_comma": "pattern p:\n    out = min(q k)\n",
    "missing_colon": "pattern p\n    out = q\n",
    "missing_operand": "pattern p:\n    out = (q @ ) * k\n",
    "missing_value": "pattern p:\n    out =\n",
    "missing_block": "pattern p:\nout = q\n",
    "missing_block_at_end": "pattern p:\n",
    "missing_name": "pattern (x: int):\n    out = q\n",
    "function_in_scan": "pattern p:\n    scan t:\n        f(x) = x\n    out = q\n",
    "input_in_scan": "pattern p:\n    scan t:\n        input g: real[t]\n    out = q\n",
    "one_line_scan": "pattern p:\n    scan t: S = S + 1\n    out = q\n",
    "reduction_over_sum": "pattern p:\n    out = softmax[i + 1](q @ k) @ v\n",
    "reduction_over_three": "pattern p:\n    out = matrix[a, b, c](k)\n",
    "called_value": "pattern p:\n    out = (q + k)(v)\n",
    "unrolled_value": "pattern p:\n    out = s.f(x for x in y)\n",
    "unclosed": "pattern p:\n    out = softmax[j](q @ k\n",
    "unopened": "pattern p:\n    out = q @ k)\n",
    "mismatched": "pattern p:\n    out = softmax[j(q @ k]\n",
    "bracket_in_comment": "pattern p:  # (\n    out = q)\n",
    "unindent": "pattern p:\n        x = q\n    out = x\n",
    "first_line_indented": "   pattern p:\n    out = q\n",
    "tab_among_spaces": "pattern p:\n    x = q\n\tout = x\n",
    "unclosed_text": 'use "x.attn\n',
    "braces": "pattern p {\n    out = q }\n",
    "semicolon": "pattern p:\n    x = 1; out = q\n",
    "backslash": "pattern p:\n    out = q + \\\n        k\n",
    "caret": "pattern p:\n    out = q ^ 2\n",
    "ampersands": "pattern p:\n    out = softmax[j](q @ k where i < 3 && j < 3) @ v\n",
    "exclamation": "pattern p:\n    out = softmax[j](q @ k where !x) @ v\n",
    "at_most_typeset": "pattern p:\n    out = softmax[j](q @ k where j ≤ i) @ v\n",
    "minus_typeset": "pattern p:\n    out = q − k\n",
    "greek": "pattern p:\n    γ = 3\n    out = q\n",
    "no_break_space": "pattern p:\n    out =\u00a0q\n",
    "control_character": "pattern p:\n    out = q\x00\n",
    "huge_integer": "pattern p:\n    out = q * 9223372036854775808\n",
    "huge_real": "pattern p:\n    out = q * 1e999\n",
    "several": "pattern p:\n    x = = 3\n    y = q +\n    z = min(q k)\n    out = q ^ 2\n",
}


@pytest.mark.parametrize("slip", BROKEN)
def test_slip(slip: str, golden: Callable[[str], None]) -> None:
    with pytest.raises(AttnError) as caught:
        parse(Source(f"{slip}.attn", BROKEN[slip]))
    golden(str(caught.value))


def test_no_message_shows_a_terminal_name() -> None:
    terminals = {terminal.name for terminal in _parser().terminals if not terminal.name.startswith("__IGNORE")}
    grouped = _EXPRESSION | _STATEMENT | _ITEM | _OPERATOR | _AFTER_EXPRESSION
    assert terminals <= grouped | set(_SPELLED) | {word.upper() for word in WORDS} | {"_DEDENT"}


def test_every_word_of_the_language_is_reserved() -> None:
    keywords = {terminal.name.lower() for terminal in _parser().terminals if terminal.pattern.value.isalpha()}
    assert keywords - {"name"} == WORDS


def test_errors_on_several_lines_are_reported_together() -> None:
    with pytest.raises(AttnError) as caught:
        parse(Source("several.attn", BROKEN["several"]))
    assert [d.span.source.position(d.span.start)[0] for d in caught.value.diagnostics] == [2, 3, 4, 5]


def test_errors_are_limited_in_number() -> None:
    with pytest.raises(AttnError) as caught:
        parse(Source("many.attn", "pattern p:\n" + "    x = (1\n         +) \n" * (3 * MOST_MISTAKES)))
    assert len(caught.value.diagnostics) == MOST_MISTAKES


def test_a_line_that_opens_a_block_is_not_skipped() -> None:
    text = "pattern p:\n    scan t t:\n        S = S + 1\n    out = q\n"
    with pytest.raises(AttnError) as caught:
        parse(Source("header.attn", text))
    assert len(caught.value.diagnostics) == 1


@pytest.mark.parametrize("words", ["if a then b else ", "if ", "x[0] ", "x**", "1: "])
def test_a_long_line_with_an_error_is_explained_quickly(words: str) -> None:
    text = "pattern p:\n    out = (" + words * 10_000 + "= )\n"
    start = perf_counter()
    with pytest.raises(AttnError):
        parse(Source("long.attn", text))
    assert perf_counter() - start < 20

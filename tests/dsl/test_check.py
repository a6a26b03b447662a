"""What the checker makes of a text: types, layouts, shared terms, spans, blocks, calls, files and limits."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from attnc.dsl.check import check, predefine
from attnc.dsl.diagnostics import AttnError
from attnc.dsl.expressions import Context, Expressions
from attnc.dsl.inlining import inline
from attnc.dsl.modules import prelude
from attnc.dsl.parse import parse
from attnc.dsl.scopes import Scope
from attnc.dsl.source import Source
from attnc.dsl.syntax import Equation, PatternDeclaration
from attnc.dsl.terms import Pattern, Repeat, Scan, Term
from attnc.dsl.types import Base


def one(body: str, parameters: str = "") -> Pattern:
    """The pattern `p(parameters)` with a body."""
    text = f"pattern p{f'({parameters})' if parameters else ''}:\n    " + body.replace("\n", "\n    ") + "\n"
    return check(Source("p.attn", text))["p"]


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


def forms(pattern: Pattern) -> list[str]:
    return sorted(term.form for term in terms(pattern))


# Types


@pytest.mark.parametrize(
    ("expression", "type"),
    [
        ("i - j", "int[i, j]"),
        ("i / 2", "real[i]"),
        ("i // 2 % 3", "int[i]"),
        ("i * scale", "real[i]"),
        ("2 ** h", "int[h]"),
        ("D ** -0.5", "real"),
        ("floor(scale)", "int"),
        ("floor(i)", "int[i]"),
        ("abs(i - j)", "int[i, j]"),
        ("max(i, 3)", "int[i]"),
        ("max(i, 3.0)", "real[i]"),
        ("clamp(i, 0, 5)", "int[i]"),
        ("exp(i)", "real[i]"),
        ("real(i < j)", "real[i, j]"),
        ("if i < j then 1 else 2.5", "real[i, j]"),
        ("if i < j then 1 else 2", "int[i, j]"),
        ("q @ k", "real[b, h, i, j]"),
        ("q * q", "real[b, h, i; d]"),
        ("q @ q", "real[b, h, i]"),
        ("outer(k, v)", "real[b, h, j; d, e]"),
        ("k @ outer(k, v)", "real[b, h, j; e]"),
        ("transpose(outer(k, v))", "real[b, h, j; e, d]"),
        ("concat(q, q)", "real[b, h, i; d+d]"),
        ("concat[n](q, q)", "real[b, h, i; n]"),
        ("softmax[j](q @ k)", "real[b, h, i, j]"),
        ("softmax[j](q @ k) @ v", "real[b, h, i; e]"),
        ("sum[j](v where j <= i)", "real[b, h, i; e]"),
        ("sum[d](q)", "real[b, h, i]"),
        ("max[j](q @ k)", "real[b, h, i]"),
        ("sum[j](j)", "int"),
        ("mean[j](j)", "real"),
        ("topk[j](q @ k, 3)", "set of j[b, h, i]"),
        ("argmax[j](q @ k)", "int[b, h, i]"),
        ("uniform(0, i, j)", "real[i, j]"),
        ("orthogonal_gaussian(8, D, 0) @ q", "real[b, h, i; 8]"),
        ("identity[d]", "real[d, d]"),
        ("identity[d] @ identity[d]", "real[d, d]"),
        ("matrix[j](q @ k)", "real[b, h, i; j]"),
    ],
)
def test_type(expression: str, type: str) -> None:
    (declaration,) = parse(Source("p.attn", f"pattern p:\n    x = {expression}\n")).items
    assert isinstance(declaration, PatternDeclaration)
    (equation,) = declaration.body
    assert isinstance(equation, Equation)
    at = Expressions(Context(inline), Scope(prelude()))
    predefine(at, equation.span)
    assert str(at.term(equation.value).type) == type


def test_ints_become_reals_beside_reals() -> None:
    pattern = one("out = q * (i * scale + 2)")
    assert "to_real" in forms(pattern)
    assert [term.attribute for term in terms(pattern) if term.form == "literal"] == [2.0]


def test_greater_is_less_the_other_way_round() -> None:
    pattern = one("out = if i > 3 then q else 2 * q")
    (comparison,) = [term for term in terms(pattern) if term.form == "lt"]
    assert [arg.form for arg in comparison.args] == ["literal", "index"]


def test_a_chain_of_comparisons_is_their_conjunction() -> None:
    pattern = one("out = sum[j](v where 0 <= i - j < 3)")
    (both,) = [term for term in terms(pattern) if term.form == "and"]
    assert [arg.form for arg in both.args] == ["le", "lt"]
    assert both.args[0].args[1] is both.args[1].args[0]  # i - j is one term


def test_without_where_the_condition_is_true() -> None:
    pattern = one("out = softmax[j](q @ k) @ v")
    assert pattern.out.args[0].args[1].attribute is True


def test_a_name_used_twice_is_one_term() -> None:
    pattern = one("s = q @ k\nout = softmax[j](s) @ v + softmax[j](s where j <= i) @ v")
    assert forms(pattern).count("input") == 3
    assert sum(term.form == "dot" and term.attribute == "d" for term in terms(pattern)) == 1


def test_a_function_called_twice_alike_is_one_term() -> None:
    pattern = one("phi(x) = exp(x)\nout = phi(q) + phi(q)")
    assert forms(pattern).count("exp") == 1


def test_every_term_points_at_its_text() -> None:
    pattern = one("s = q @ k * scale\nout = softmax[j](s where 0 <= i - j) @ v")
    texts = {term.form: term.span.text for term in terms(pattern)}
    assert texts["softmax"] == "softmax[j](s where 0 <= i - j)"
    assert texts["le"] == "0 <= i - j"
    assert texts["sub"] == "i - j"
    assert texts["mul"] == "q @ k * scale"


def test_a_term_of_a_function_points_at_its_body() -> None:
    pattern = one("out = softmax[j](q @ k where causal()) @ v")
    (condition,) = [term for term in terms(pattern) if term.form == "le"]
    assert (condition.span.source.name, condition.span.text) == ("std.attn", "j <= i")


# Declarations


def test_scale_is_a_parameter_that_may_be_given_another_default() -> None:
    assert one("out = q * scale").parameters == ()
    (scale,) = one("out = q * scale", "scale: real = 1.0").parameters
    assert (scale.name, scale.base, scale.default) == ("scale", Base.REAL, 1.0)


def test_parameters() -> None:
    pattern = one("out = q", "n: int, x: real = 2, y: float = -1.5, on: bool = true, sizes: ints = (4, 8)")
    found = [(entry.name, str(entry.base), entry.default, entry.is_tuple) for entry in pattern.parameters]
    assert found == [
        ("n", "int", None, False),
        ("x", "real", 2.0, False),
        ("y", "real", -1.5, False),
        ("on", "bool", True, False),
        ("sizes", "int", (4, 8), True),
    ]


def test_a_tuple_may_be_given_another_length() -> None:
    text = "pattern p(n: ints = (4, 8)):\n    out = merge(softmax[j](q @ k where j < s) @ v for s in n)\n"
    assert len(check(Source("p.attn", text))["p"].out.args) == 2
    pattern = check(Source("p.attn", text), lengths={"n": 3})["p"]
    assert [term.args[0].args[1].args[1].attribute for term in pattern.out.args] == ["n.0", "n.1", "n.2"]
    assert pattern.parameters[0].default == (4, 8, 8)
    assert check(Source("p.attn", text), lengths={"n": 1})["p"].parameters[0].default == (4,)
    with pytest.raises(ValueError, match="`m`"):
        check(Source("p.attn", text), lengths={"m": 3})


def test_inputs_and_their_sizes() -> None:
    pattern = one(
        "input table: real[h, buckets]\ninput gate: real[b, h, i, 3] = 1\ninput kr: real[b, 1, j, x]\n"
        "input doc: int[b, t]\ninput on: bool[h]\n"
        "out = table[0] * gate[2] * (if on then q else q * X) + sum[j](kr @ kr where doc[i] == doc[j]) * q",
        "buckets: int = 8",
    )
    assert [(entry.name, entry.axes, str(entry.base)) for entry in pattern.inputs] == [
        ("table", ("h", "buckets"), "real"),
        ("gate", ("b", "h", "i", "3"), "real"),
        ("kr", ("b", "1", "j", "x"), "real"),
        ("doc", ("b", "t"), "int"),
        ("on", ("h",), "bool"),
    ]
    assert [(name, term.form, term.attribute) for name, term in pattern.sizes] == [
        ("buckets", "parameter", "buckets"),
        ("3", "literal", 3),
    ]
    types = {term.attribute: str(term.type) for term in terms(pattern) if term.form == "input"}
    assert types["kr"] == "real[b, j; x]"
    default = pattern.inputs[1].default
    assert default is not None
    assert default.attribute == 1.0


def test_user_names_come_before_sizes_and_the_prelude() -> None:
    pattern = one("input E: real[r, j]\ncausal() = j < i\nout = sum[j](v where causal()) + sum[r](E @ v)")
    assert {term.attribute for term in terms(pattern) if term.form == "input"} == {"v", "E"}
    assert "lt" in forms(pattern)
    assert "le" not in forms(pattern)


def test_keys_may_be_declared_with_another_width() -> None:
    pattern = one("input k: real[b, 1, j, c]\ninput w: real[h, d, c]\nout = softmax[j](q @ (w @ k)) @ v")
    assert str(next(term for term in terms(pattern) if term.attribute == "k").type) == "real[b, j; c]"
    assert [entry.name for entry in pattern.inputs] == ["k", "w"]


def test_declared_axes() -> None:
    pattern = one(
        "axis s = blocks(j, n)\naxis c = blocks(j, n, 2)\naxis a = segments(i, 4)\n"
        "out = softmax[s](q @ mean[j in s](k) where s.stop <= i and s.index < S) @ mean[j in s](v)",
        "n: int = 8",
    )
    found = [(a.name, a.kind, a.over, a.size.attribute, a.stride and a.stride.attribute) for a in pattern.axes]
    assert found == [("s", "blocks", "j", "n", None), ("c", "blocks", "j", "n", 2), ("a", "segments", "i", 4, None)]
    assert {"stop", "index", "size"} <= set(forms(pattern))


# Reading


@pytest.mark.parametrize(
    ("read", "form", "attribute"),
    [
        ("g[i]", "rename", ("t", "i")),
        ("g[i - 1]", "shift", "t"),
        ("table[i % 4]", "take", "m"),
        ("table[0]", "take", "m"),
        ("q[0]", "take", "d"),
        ("sum[j](q @ k)[i - 1]", "shift", "i"),
        ("mean[i in a](x)[i // 4]", "shift", "a"),
    ],
)
def test_reading(read: str, form: str, attribute: object) -> None:
    inputs = "axis a = blocks(i, 4)\ninput g: real[b, h, t]\ninput table: real[h, m]\ninput x: real[b, i]\n"
    pattern = one(f"{inputs}out = {read} * q")
    assert [term.attribute for term in terms(pattern) if term.form == form] == [attribute]


def test_reading_at_an_index_that_a_value_has_changes_nothing() -> None:
    pattern = one("input slope: real[h]\nout = slope[h] * q")
    assert forms(pattern) == ["input", "input", "mul"]


# Blocks


def block(term: Term) -> Scan | Repeat:
    assert term.block is not None
    return term.block


def test_a_scan_finds_its_states_and_their_types() -> None:
    pattern = one(
        "input g: real[b, h, t]\nscan t:\n    S = exp(g) * S\n    e2 = v - k @ S\n    S = S + outer(k, e2)\n"
        "    n = n + 1\n    out = q @ S / n"
    )
    assert pattern.out.form == "rename"
    (scan,) = pattern.out.args
    assert str(scan.type) == "real[b, h, t; e]"
    states = {name: str(type) for name, type in block(scan).states}
    assert states == {"S": "real[b, h; d, e]", "n": "int"}
    assert [name for name, _ in block(scan).steps] == ["S", "e2", "S", "n", "out"]
    assert block(scan).result == "out"


def test_a_state_that_is_read_before_and_after_its_step_is_two_terms() -> None:
    pattern = one("scan t:\n    before = q @ S\n    S = S + outer(k, v)\n    out = before + q @ S")
    (scan,) = pattern.out.args
    steps = dict(block(scan).steps)
    (before,) = (arg for arg in steps["before"].args if arg.form == "state")
    (after,) = (arg for arg in steps["out"].args[1].args if arg.form == "state")
    assert before is not after


def test_a_scan_reads_queries_and_keys_at_its_position() -> None:
    pattern = one("kn = k / sqrt(k @ k)\nscan t:\n    S = S + outer(kn, v) * (t - i + j)\n    o = q @ S\nout = o[i]")
    assert pattern.out.form == "rename"
    indices = {index for term in terms(pattern) for index in term.type.indices if term.form == "index"}
    assert indices == {"t"}
    assert {term.attribute for term in terms(pattern) if term.form == "rename"} == {("i", "t"), ("j", "t"), ("t", "i")}


def test_a_repeat_starts_at_the_values_before_it() -> None:
    pattern = one(
        "Z = q\nn = 0\nrepeat steps:\n    half = Z / 2\n    Z = half + Z * n\n    n = n + 1\nout = Z", "steps: int = 3"
    )
    repeat = pattern.out
    assert repeat.form == "repeat"
    assert [(arg.form, arg.attribute) for arg in repeat.args] == [
        ("parameter", "steps"),
        ("input", "q"),
        ("literal", 0),
    ]
    assert [(name, str(type)) for name, type in block(repeat).states] == [("Z", "real[b, h, i; d]"), ("n", "int")]


# Calls of patterns


def test_a_called_pattern_is_inlined() -> None:
    text = """
pattern a(window: int = 4, block: int = 8):
    input slope: real[h]
    axis s = blocks(j, block)
    near = 0 <= i - j < window
    out = slope * (softmax[j](q @ k * scale where near and j in topk[s](q @ mean[j in s](k), 1)) @ v)
pattern p(block: int = 2):
    input m: real[h]
    axis s = blocks(j, block)
    out = a(q, k, v, slope = m, window = 3) + a(q, k, v, slope = 1, block = block, scale = scale)
"""
    pattern = check(Source("p.attn", text))["p"]
    assert [(axis.name, axis.size.attribute) for axis in pattern.axes] == [
        ("s", "block"),
        ("a_s", 8),
        ("a_s2", "block"),
    ]
    assert [entry.name for entry in pattern.inputs] == ["m"]
    assert [entry.name for entry in pattern.parameters] == ["block"]
    # One call has the default scale, D ** -0.5; the other the caller's.
    assert sum(term.form == "pow" for term in terms(pattern)) == 1
    assert ("parameter", "scale") in {(term.form, term.attribute) for term in terms(pattern)}


def test_a_called_pattern_works_on_the_callers_axes() -> None:
    text = """
pattern a:
    input w: real[f, d]
    out = softmax[j](softmax[f](w @ q) @ softmax[f](w @ k)) @ v + softmax[d](q) @ q * mean[e](v @ v) * sum[j](v)
pattern p:
    input m: real[x, d]
    input u: real[y, x]
    out = a(m @ q, m @ k, v, w = u)
"""
    with pytest.raises(AttnError, match="varies over `e`"):
        check(Source("p.attn", text))
    pattern = check(Source("p.attn", text.replace(" * mean[e](v @ v)", "")))["p"]
    assert {term.attribute for term in terms(pattern) if term.form == "softmax"} == {
        ("j", None),
        ("y", None),
        ("x", None),
    }


def test_a_pattern_comes_before_a_function_of_the_prelude() -> None:
    text = "pattern window(n: int = 3):\n    out = softmax[j](q @ k where j < n) @ v\n"
    text += "pattern p:\n    out = window(q, k, v, n = 5)\n"
    assert 5 in {term.attribute for term in terms(check(Source("p.attn", text))["p"])}


def test_a_function_that_is_not_called_may_use_all_that_there_is() -> None:
    text = "f(x) = merge(causal() * n for n in (1, 2)) + later(H)\npattern p:\n"
    text += "    g(x) = x[i] + W + X + identity[m] + s.stop + f(1) + scale + exp(w) + sum[j](x)\n"
    text += "    input w: real[h, x]\n    axis s = blocks(j, 4)\n    W = w\n    out = q\nlater(x) = x + N\n"
    assert check(Source("p.attn", text))

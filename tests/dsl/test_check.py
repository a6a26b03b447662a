"""What the checker makes of a text: types, layouts, shared terms, spans, blocks, calls, files and limits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from attnc.dsl.builder import MAX_DEPTH, MAX_TERMS
from attnc.dsl.builtins import FUNCTIONS
from attnc.dsl.check import check, predefine
from attnc.dsl.diagnostics import AttnError
from attnc.dsl.expressions import Context, Expressions
from attnc.dsl.format import format_source
from attnc.dsl.inlining import inline
from attnc.dsl.modules import prelude
from attnc.dsl.parse import parse, read_source
from attnc.dsl.scopes import Scope
from attnc.dsl.source import Source
from attnc.dsl.syntax import Equation, PatternDeclaration
from attnc.dsl.terms import FORMS, Pattern, Repeat, Scan, Term
from attnc.dsl.types import Base

REPOSITORY = Path(__file__).parents[2]
ZOO = sorted([*(REPOSITORY / "examples").glob("*.attn"), *(REPOSITORY / "tests" / "zoo").glob("*.attn")])


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


# The zoo


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


# Files


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        path = folder / f"{name}.attn"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


WINDOW = "near(n) = i - j < n\npattern slide(n: int = 4):\n    out = softmax[j](q @ k where near(n)) @ v\n"


def used(folder: Path, use: str, root: Path | None = None) -> dict[str, Pattern]:
    text = f'use "{use}"\npattern p:\n    out = slide(q, k, v, n = 3) + softmax[j](q @ k where near(2)) @ v\n'
    write(folder, main=text)
    return check(read_source(folder / "main.attn"), root=root)


def test_use_shows_patterns_and_functions(tmp_path: Path) -> None:
    write(tmp_path, window=WINDOW)
    assert list(used(tmp_path, "window.attn")) == ["p"]


def test_use_of_a_used_file_is_relative_to_that_file(tmp_path: Path) -> None:
    write(tmp_path / "parts", window='use "deep/n.attn"\n' + WINDOW)
    write(tmp_path / "parts" / "deep", n="nothing() = 1\n")
    assert list(used(tmp_path, "parts/window.attn")) == ["p"]


def test_what_a_used_file_uses_stays_its_own(tmp_path: Path) -> None:
    write(tmp_path, window=WINDOW, other='use "window.attn"\n')
    with pytest.raises(AttnError, match="no function or pattern `slide`"):
        used(tmp_path, "other.attn")


def test_use_above_the_root_is_refused(tmp_path: Path) -> None:
    write(tmp_path, window=WINDOW)
    inner = tmp_path / "inner"
    inner.mkdir()
    with pytest.raises(AttnError, match="outside of the folder `inner`"):
        used(inner, "../window.attn")
    assert list(used(inner, "../window.attn", root=tmp_path)) == ["p"]


def test_use_through_a_link_out_of_the_root_is_refused(tmp_path: Path) -> None:
    write(tmp_path, window=WINDOW)
    inner = tmp_path / "inner"
    inner.mkdir()
    (inner / "window.attn").symlink_to(tmp_path / "window.attn")
    with pytest.raises(AttnError, match="outside of the folder `inner`"):
        used(inner, "window.attn")


@pytest.mark.parametrize("use", ["/etc/passwd.attn", "C:\\\\x.attn", "windw.attn", "main.py", "."])
def test_use_of_what_is_no_file_of_the_tree(tmp_path: Path, use: str) -> None:
    write(tmp_path, window=WINDOW)
    with pytest.raises(AttnError) as caught:
        used(tmp_path, use)
    first = caught.value.diagnostics[0]
    assert first.code == "use"
    assert ("`window.attn`" in (first.help or "")) is (use == "windw.attn")


def test_files_that_use_one_another(tmp_path: Path) -> None:
    write(tmp_path, a='use "c.attn"\n', c='use "a.attn"\n')
    with pytest.raises(AttnError, match=r"`a\.attn` uses itself: a\.attn -> c\.attn -> a\.attn"):
        used(tmp_path, "a.attn")


def test_a_file_that_uses_itself(tmp_path: Path) -> None:
    with pytest.raises(AttnError, match="uses itself"):
        used(tmp_path, "main.attn")


def test_errors_of_a_used_file_are_shown_in_it(tmp_path: Path) -> None:
    write(tmp_path, window="pattern slide:\n    out = (q\n")
    with pytest.raises(AttnError) as caught:
        used(tmp_path, "window.attn")
    (error,) = caught.value.diagnostics
    assert error.span.source.name.endswith("window.attn")
    write(tmp_path, window=WINDOW.replace("near(n)) @", "far(n)) @"))
    with pytest.raises(AttnError) as caught:
        used(tmp_path, "window.attn")
    (error,) = caught.value.diagnostics
    assert error.code == "unknown-function"
    assert [(span.source.name[-9:], span.text) for span, _ in error.labels] == [("main.attn", "slide(q, k, v, n = 3)")]


def test_patterns_that_call_one_another_through_a_used_file(tmp_path: Path) -> None:
    text = "pattern slide(n: int = 4):\n    out = other(q, k, v)\nnear(n) = j < n\n"
    text += "pattern other:\n    out = slide(q, k, v)\n"
    write(tmp_path, window=text)
    with pytest.raises(AttnError, match="calls itself"):
        used(tmp_path, "window.attn")


@pytest.mark.parametrize("name", ["<text>", "x" * 5000, "a\0b", ""])
def test_a_source_may_have_any_name(name: str) -> None:
    assert list(check(Source(name, "pattern p:\n    out = q\n"))) == ["p"]


# Limits


def test_functions_that_double_are_linear() -> None:
    functions = "\n".join(f"f{n}(x) = f{n - 1}(x) + f{n - 1}(x)" for n in range(1, 30))
    assert forms(one(f"f0(x) = x\n{functions}\nout = f29(q)")).count("add") == 29


def test_too_many_operations() -> None:
    functions = "\n".join(f"f{n}(x) = f{n - 1}(x + 1) + f{n - 1}(x + 2)" for n in range(1, 20))
    with pytest.raises(AttnError, match=f"more than {MAX_TERMS} operations"):
        one(f"f0(x) = x\n{functions}\nout = f19(q)")


def test_too_long_a_chain() -> None:
    steps = "\n".join(f"x{n} = x{n - 1} + 1" for n in range(1, MAX_DEPTH + 1))
    with pytest.raises(AttnError, match=f"chain of more than {MAX_DEPTH}"):
        one(f"x0 = q\n{steps}\nout = x{MAX_DEPTH}")


def test_a_long_sum_is_no_deep_nesting() -> None:
    assert forms(one("out = q" + " + q" * 150)).count("add") == 150


def test_too_deep_a_call() -> None:
    functions = "\n".join(f"f{n}(x) = -(-f{n - 1}(x))" for n in range(1, 60))
    with pytest.raises(AttnError, match="inside one another"):
        one(f"f0(x) = x\n{functions}\nout = f59(q)")


# The prelude


def test_the_prelude_checks() -> None:
    calls = {
        "causal": "causal()", "window": "window(3)", "near": "near(3)", "dilated": "dilated(3, 2)",
        "block_local": "block_local(3)", "same": "same(doc)", "unit": "unit(q) @ unit(k) > 0",
        "rms_norm": "mean[e](rms_norm(v, 1e-6)) > 0", "pi": "pi() > 3",
    }  # fmt: skip
    assert calls.keys() == prelude().functions.keys()
    for call in calls.values():
        one(f"input doc: int[b, t]\nout = softmax[j](q @ k where {call}) @ v")


def test_the_prelude_redefines_no_function_of_the_language() -> None:
    assert not FUNCTIONS.keys() & prelude().functions.keys()

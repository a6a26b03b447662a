"""Text to syntax tree: precedence (Python's own parser is the oracle), spans, limits and files."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnc.dsl import syntax
from attnc.dsl.diagnostics import AttnError, Diagnostic, render
from attnc.dsl.layout import DEEPEST_NESTING
from attnc.dsl.mistakes import WORDS
from attnc.dsl.parse import LONGEST_FILE, parse, read_source
from attnc.dsl.source import Source, Span
from attnc.dsl.tree import DEEPEST_EXPRESSION

EXAMPLES = sorted(Path(__file__).parents[2].glob("examples/*.attn"))


def body(*lines: str) -> tuple[syntax.Statement, ...]:
    text = "pattern p:\n" + "".join(f"    {line}\n" for line in lines)
    (pattern,) = parse(Source("body.attn", text)).items
    assert isinstance(pattern, syntax.PatternDeclaration)
    return pattern.body


def expression(text: str) -> syntax.Expression:
    (equation,) = body(f"out = {text}")
    assert isinstance(equation, syntax.Equation)
    return equation.value


def codes(text: str) -> list[str]:
    with pytest.raises(AttnError) as caught:
        parse(Source("wrong.attn", text))
    return [diagnostic.code for diagnostic in caught.value.diagnostics]


def spelled(node: Any) -> Any:
    """A tree without its spans, comparable by `==`."""
    if isinstance(node, tuple):
        return tuple(spelled(item) for item in node)
    if not isinstance(node, syntax.Syntax):
        return type(node), node
    names = [item.name for item in fields(node) if item.name not in ("span", "source")]
    return type(node), tuple(spelled(getattr(node, name)) for name in names)


def expressions(node: Any) -> Iterator[syntax.Expression]:
    """All expressions of a tree that stand in it as expressions."""
    if isinstance(node, syntax.Expression):
        yield node
    if isinstance(node, tuple):
        for item in node:
            yield from expressions(item)
    elif isinstance(node, syntax.Syntax):
        for item in fields(node):
            yield from expressions(getattr(node, item.name))


# Precedence and associativity

PYTHON_OPERATORS: dict[type[ast.AST], str] = {
    ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.MatMult: "@", ast.Div: "/", ast.FloorDiv: "//", ast.Mod: "%",
    ast.Pow: "**", ast.USub: "-", ast.Not: "not", ast.And: "and", ast.Or: "or", ast.Lt: "<", ast.LtE: "<=",
    ast.Gt: ">", ast.GtE: ">=", ast.Eq: "==", ast.NotEq: "!=", ast.In: "in", ast.NotIn: "not in",
}  # fmt: skip


def python_shape(node: ast.AST) -> Any:
    match node:
        case ast.BinOp(left=left, op=op, right=right):
            return PYTHON_OPERATORS[type(op)], python_shape(left), python_shape(right)
        case ast.UnaryOp(op=op, operand=operand):
            return PYTHON_OPERATORS[type(op)], python_shape(operand)
        case ast.BoolOp(op=op, values=[first, *rest]):
            shape = python_shape(first)
            for value in rest:
                shape = (PYTHON_OPERATORS[type(op)], shape, python_shape(value))
            return shape
        case ast.Compare(left=left, ops=ops, comparators=rest):
            return [PYTHON_OPERATORS[type(op)] for op in ops], [python_shape(value) for value in (left, *rest)]
        case ast.Name(id=name):
            return name
        case ast.Constant(value=value):
            return value
        case ast.Attribute(value=value, attr=name):
            return ".", python_shape(value), name
        case ast.Subscript(value=value, slice=ast.Tuple(elts=items)):
            return "[]", python_shape(value), [python_shape(item) for item in items]
        case ast.Subscript(value=value, slice=item):
            return "[]", python_shape(value), [python_shape(item)]
        case ast.Call(func=ast.Name(id=name), args=arguments):
            return "()", name, [python_shape(argument) for argument in arguments]
    raise AssertionError(ast.dump(node))


def shape(node: syntax.Expression) -> Any:
    match node:
        case syntax.Binary(operator=operator, left=left, right=right):
            return operator, shape(left), shape(right)
        case syntax.Unary(operator=operator, operand=operand):
            return operator, shape(operand)
        case syntax.Comparison(operators=operators, operands=operands):
            return list(operators), [shape(operand) for operand in operands]
        case syntax.Name(identifier=name):
            return name
        case syntax.Literal(value=value):
            return value
        case syntax.Attribute(value=value, name=name):
            return ".", shape(value), name
        case syntax.Read(value=value, items=items):
            return "[]", shape(value), [shape(item) for item in items]
        case syntax.Call(function=name, arguments=arguments):
            return "()", name, [shape(argument.value) for argument in arguments]
    raise AssertionError(node)


BINARY = ["+", "-", "*", "@", "/", "//", "%", "**", "and", "or", "<", "<=", ">", ">=", "==", "!=", "in", "not in"]
atoms = st.sampled_from(["q", "k", "block", "inner", "3", "0.5", "1e-6", "2.", ".5e3"])


def combine(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.one_of(
        st.builds(lambda a, op, b: f"{a} {op} {b}", inner, st.sampled_from(BINARY), inner),
        st.builds("-{}".format, inner),
        st.builds("not {}".format, inner),
        st.builds("({})".format, inner),
        st.builds("s[{}]".format, inner),
        st.builds("s[{}, {}].stop".format, inner, inner),
        st.builds("f({}, {})".format, inner, inner),
    )


@settings(max_examples=300, deadline=None)
@given(st.recursive(atoms, combine, max_leaves=12))
def test_operators_bind_as_in_python(text: str) -> None:
    try:
        expected = python_shape(ast.parse(text, mode="eval").body)
    except SyntaxError:  # such as `1 + not x`: an error here as well
        assert set(codes(f"pattern p:\n    out = {text}\n")) == {"syntax"}
    else:
        assert shape(expression(text)) == expected


def test_power_binds_tighter_than_minus() -> None:
    assert shape(expression("-x**2")) == ("-", ("**", "x", 2))
    assert shape(expression("x**-y**2")) == ("**", "x", ("-", ("**", "y", 2)))


def test_if_takes_the_whole_else_branch() -> None:
    node = expression("if h < 2 then a else b + (if i < j then c else d) * 2")
    assert isinstance(node, syntax.Conditional)
    assert isinstance(node.otherwise, syntax.Binary)


# The forms


def test_reduction_has_index_where_and_named_arguments() -> None:
    node = expression("topk[s](q @ kc, top - 1 where s.stop <= i, force = s.index == 0)")
    assert isinstance(node, syntax.Reduction)
    assert (node.function, node.index, node.within, node.second) == ("topk", "s", None, None)
    assert [argument.name for argument in node.arguments] == [None, None, "force"]
    assert node.where is not None
    assert node.where.span.text == "s.stop <= i"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("mean[j in c](k)", ("j", "c", None)),
        ("matrix[m, n](k)", ("m", None, "n")),
        ("sum[3](k)", ("3", None, None)),
    ],
)
def test_brackets_of_a_reduction(text: str, found: tuple[str, str | None, str | None]) -> None:
    node = expression(text)
    assert isinstance(node, syntax.Reduction)
    assert (node.index, node.within, node.second) == found


def test_merge_over_tuples() -> None:
    node = expression("merge(f(a, b) for a, b in segments, (1, 4))")
    assert isinstance(node, syntax.Call)
    assert node.loop is not None
    assert node.loop.names == ("a", "b")
    assert [type(item) for item in node.loop.iterables] == [syntax.Name, syntax.Tuple]


def test_tuple_of_one_and_group() -> None:
    assert spelled(expression("(1,)")) == spelled(syntax.Tuple((syntax.Literal(1, span=ANY),), span=ANY))
    assert isinstance(expression("(1)"), syntax.Literal)


ANY = Span(source=Source("", ""), start=0, stop=0)


def test_literals_keep_their_type() -> None:
    values = [node.value for node in map(expression, ["1", "1.0", "true", "1e0"]) if isinstance(node, syntax.Literal)]
    assert [(type(value), value) for value in values] == [(int, 1), (float, 1.0), (bool, True), (float, 1.0)]


def test_statements() -> None:
    text = (
        'use "other.attn"\n'
        "causal() = j <= i\n"
        "pattern p(a: int, b: real = 0.5, c: ints = (1, 2),):\n"
        "    input gate: real[b, h, i, 3] = 1\n"
        "    axis s = blocks(j, 4)\n"
        "    repeat steps + 1:\n"
        "        x = 2 * x\n"
        "    scan t:\n"
        "        S = S + k\n"
        "    out = q\n"
    )
    use, function, pattern = parse(Source("all.attn", text)).items
    assert isinstance(use, syntax.Use)
    assert use.path == "other.attn"
    assert isinstance(function, syntax.Function)
    assert (function.name, function.parameters) == ("causal", ())
    assert isinstance(pattern, syntax.PatternDeclaration)
    assert [(p.name, p.type.base, p.default is None) for p in pattern.parameters] == [
        ("a", "int", True),
        ("b", "real", False),
        ("c", "ints", False),
    ]
    gate = pattern.body[0]
    assert isinstance(gate, syntax.InputDeclaration)
    assert gate.type.axes == ("b", "h", "i", "3")
    kinds = [type(statement).__name__ for statement in pattern.body]
    assert kinds == ["InputDeclaration", "AxisDeclaration", "RepeatBlock", "ScanBlock", "Equation"]
    assert pattern.span.text.endswith("out = q")
    assert pattern.body[3].span.text == "scan t:\n        S = S + k"


def test_a_file_without_a_final_newline_or_without_anything() -> None:
    assert parse(Source("empty", "")).items == ()
    assert parse(Source("comment", "# nothing")).items == ()
    assert len(parse(Source("short", "f(x) = x # last")).items) == 1


def test_line_ends_of_other_systems() -> None:
    text = "pattern p:\n    # why\n\n    x = (q\n    @ k)\n    out = x\n"
    assert spelled(parse(Source("a", text.replace("\n", "\r\n")))) == spelled(parse(Source("b", text)))


# Spans


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_span_of_every_expression_reads_as_that_expression(path: Path) -> None:
    seen = 0
    for node in expressions(parse(read_source(path)).items):
        assert spelled(expression(f"({node.span.text}\n    )")) == spelled(node)
        seen += 1
    assert seen > 3


def test_parentheses_belong_to_the_span() -> None:
    node = expression("(a + b) * c")
    assert node.span.text == "(a + b) * c"


# Limits


def test_nesting_is_limited() -> None:
    assert isinstance(expression("(" * DEEPEST_NESTING + "q" + ")" * DEEPEST_NESTING), syntax.Name)
    assert codes("pattern p:\n    out = " + "(" * (DEEPEST_NESTING + 1) + "q" + ")" * (DEEPEST_NESTING + 1)) == [
        "nesting"
    ]


@pytest.mark.parametrize("operator", [" + ", " ** ", " and "])
def test_chains_are_limited(operator: str) -> None:
    expression(operator.join(["q"] * DEEPEST_EXPRESSION))
    assert codes("pattern p:\n    out = " + operator.join(["q"] * 20 * DEEPEST_EXPRESSION)) == ["nesting"]


@pytest.mark.parametrize("prefix", ["-", "not ", "if a then b else "])
def test_prefixes_are_limited(prefix: str) -> None:
    assert codes("pattern p:\n    out = " + prefix * 5000 + "q") == ["nesting"]


@pytest.mark.parametrize("text", ["(" * 10**6, "[{(" * 300_000, "-" * 10**6, "# " * 10**6, "x" * (LONGEST_FILE + 1)])
def test_a_megabyte_is_refused_at_once(text: str) -> None:
    start = perf_counter()
    assert codes(text) == ["file-size"]
    assert perf_counter() - start < 1


def test_size_is_counted_in_bytes() -> None:
    assert codes("# " + "é" * (LONGEST_FILE // 2)) == ["file-size"]


def test_deep_blocks_are_refused() -> None:
    assert codes("".join(" " * depth + "scan t:\n" for depth in range(700))) == ["syntax"]


def test_integers_are_limited() -> None:
    assert shape(expression(str(2**63 - 1))) == 2**63 - 1
    assert codes(f"pattern p:\n    out = {2**63}") == ["number"]
    assert codes("pattern p:\n    out = " + "9" * 10_000) == ["number"]


# Anything else

signs = ["(", ")", "[", "]", ":", "=", "==", "<=", "+", "-", "**", "@", ",", ".", "\n", "\n    ", "\n\t", "softmax[j]("]
others = ["p", "t", "out", "q", "3", "1e9", '"', "#", "{", ";", "é", "\x00"]
words = st.sampled_from([*sorted(WORDS), *signs, *others])


@settings(max_examples=300, deadline=None)
@given(st.lists(words, max_size=30).map(" ".join) | st.text(max_size=60))
def test_any_text_parses_or_is_refused_with_a_located_error(text: str) -> None:
    found: tuple[Diagnostic, ...] = ()
    try:
        parse(Source("any.attn", text))
    except AttnError as error:
        found = error.diagnostics
    for diagnostic in found:
        assert 0 <= diagnostic.span.start <= diagnostic.span.stop <= len(text)
        assert "any.attn:" in render(diagnostic)


def test_threads_share_the_parser() -> None:
    texts = ["pattern p:\n" + "    x = (q @ k)\n" * n + "    out = x\n" for n in range(1, 40)]
    with ThreadPoolExecutor(8) as pool:
        files = list(pool.map(lambda text: parse(Source("t", text)), texts * 4))
    assert [len(file.items[0].body) for file in files if isinstance(file.items[0], syntax.PatternDeclaration)] == [
        n + 1 for n in range(1, 40)
    ] * 4


def test_importing_the_parser_is_light() -> None:
    heavy = "import sys, attnc.dsl.parse; print([m for m in ('sympy', 'torch', 'numpy', 'triton') if m in sys.modules])"
    root = Path(__file__).parents[2]
    result = subprocess.run([sys.executable, "-c", heavy], cwd=root, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


# Files


def test_a_file_is_named_by_its_path(tmp_path: Path) -> None:
    path = tmp_path / "a.attn"
    path.write_bytes(b"\xef\xbb\xbff(x) = x\r\n")
    source = read_source(path)
    assert (source.name, source.text) == (str(path), "f(x) = x\r\n")
    assert len(parse(source).items) == 1


@pytest.mark.parametrize(
    ("content", "code"),
    [(b"f(x) = x\ng(x) = \xff x\n", "encoding"), (b"(" * 10**6, "file-size"), (b"caf\xc3", "encoding")],
)
def test_unreadable_contents(tmp_path: Path, content: bytes, code: str) -> None:
    path = tmp_path / "a.attn"
    path.write_bytes(content)
    with pytest.raises(AttnError) as caught:
        read_source(path)
    assert [diagnostic.code for diagnostic in caught.value.diagnostics] == [code]


def test_the_byte_that_is_not_utf8_is_located(tmp_path: Path) -> None:
    path = tmp_path / "a.attn"
    path.write_bytes(b"\xef\xbb\xbff(x) = x\ng(x) = \xff x\n")
    with pytest.raises(AttnError, match="byte 0xff") as caught:
        read_source(path)
    span = caught.value.diagnostics[0].span
    assert span.source.position(span.start) == (2, 8)


@pytest.mark.parametrize("name", ["missing.attn", "."])
def test_a_file_that_cannot_be_opened(tmp_path: Path, name: str) -> None:
    with pytest.raises(AttnError) as caught:
        read_source(tmp_path / name)
    assert caught.value.diagnostics[0].code == "unreadable"

"""The formatter: same meaning, all comments, one result."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnc.dsl import syntax
from attnc.dsl.diagnostics import AttnError
from attnc.dsl.format import format_source
from attnc.dsl.parse import parse, read_source
from attnc.dsl.source import Source

ROOT = Path(__file__).parents[2]
FILES = [ROOT / "dsl" / "std.attn", *sorted(ROOT.glob("examples/*.attn"))]


def formatted(text: str) -> str:
    return format_source(Source("text.attn", text))


def spelled(node: Any) -> Any:
    """A tree without its spans, comparable by `==`."""
    if isinstance(node, tuple):
        return tuple(spelled(item) for item in node)
    if not isinstance(node, syntax.Syntax):
        return type(node), node
    names = [item.name for item in fields(node) if item.name not in ("span", "source")]
    return type(node), tuple(spelled(getattr(node, name)) for name in names)


def tree(text: str) -> Any:
    return spelled(parse(Source("text.attn", text)))


def comments(text: str) -> list[str]:
    """What the comments say, in order."""
    found = [match for match in re.findall(r'"[^"\n]*"|#[^\n]*', text) if match.startswith("#")]
    return [re.sub(r"\s", "", comment) for comment in found]


def assert_formats_well(text: str) -> None:
    result = formatted(text)
    assert tree(result) == tree(text)
    assert formatted(result) == result
    assert comments(result) == comments(text)
    assert "\n\n\n" not in result
    assert all(line == line.rstrip() and "\t" not in line.split("#")[0] for line in result.splitlines())
    assert result == "" or (result.endswith("\n") and not result.startswith("\n"))


UNTIDY = """

use "a.attn"  #c#
f ( x )=x**2+x . y**-z [1]**-0.5 - -2 ** f ( 1 )
g( )=not(f(1)) and(true)or a not  in ( 1,2 )



#!doc
# about p

# more about p
pattern p( a:int=3 ,
 b : ints=(1,2,) # tail
   ):

  #first

  x=( q@k # in

     # own
     +-v*(
 3,
))


  y=if a<b then - b else softmax [ j ](q @k*scale where i-j<3,sink=x)@v
  input  gate:real[ b,h ,i,3 ]
  scan t:

      S=S+outer( k,v)
      #in scan
    #between scan and p
  # in p
# top
h(x) = x
pattern r:
\tout=q
\t# in r

#end"""


def test_untidy_text(golden: Callable[[str], None]) -> None:
    assert_formats_well(UNTIDY)
    golden(formatted(UNTIDY))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_files_of_the_project(path: Path) -> None:
    assert_formats_well(read_source(path).text)


@pytest.mark.parametrize("text", ["", "\n\n", "# only\n", "  # only", "f(x) = x", "f(x) = x\r\n# y\r\ng(x) = x\r\n"])
def test_small_texts(text: str) -> None:
    assert_formats_well(text)


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ("D**-0.25", "D**-0.25"),
        ("gamma**(i-j)", "gamma ** (i - j)"),
        ("x [0]**2", "x[0] ** 2"),
        ("x**y[0]", "x ** y[0]"),
        ("2 ** 3 ** n", "2**3**n"),
        ("-x", "-x"),
        ("a- -b", "a - -b"),
        ("(-b)", "(-b)"),
        ("f(-b,x=-1)", "f(-b, x = -1)"),
        ("if-a<b then-a else-b", "if -a < b then -a else -b"),
        ("not(a)", "not (a)"),
        ("a in(1,2)", "a in (1, 2)"),
        ("s . stop", "s.stop"),
    ],
)
def test_spaces(text: str, result: str) -> None:
    assert formatted(f"y(x) = {text}") == f"y(x) = {result}\n"


def test_columns_of_neighbours_are_kept() -> None:
    lines = ["a    =1     #x", "bcd  = q*2  #y", "e =  f(x=1)", "", "g =2     # alone", "hi   =3"]
    wanted = ["a   = 1      # x", "bcd = q * 2  # y", "e = f(x = 1)", "", "g = 2  # alone", "hi = 3"]

    def text(body: list[str]) -> str:
        return "pattern p:\n" + "".join(f"    {line}\n" if line else "\n" for line in body)

    assert formatted(text(lines)) == text(wanted)
    assert_formats_well(text(lines))


def test_a_text_that_does_not_parse_is_refused() -> None:
    with pytest.raises(AttnError):
        formatted("f(x) = ")


def test_a_file_of_comments_is_formatted_quickly() -> None:
    start = perf_counter()
    formatted("pattern p:\n    out = q\n" + "    #\n" * 30_000)
    assert perf_counter() - start < 5


# Texts of every form, with odd spaces, line breaks in brackets, and comments

space = st.sampled_from([" ", " ", " ", "  ", "\t"])
inner_space = st.sampled_from([" ", "", "  ", "\n", " # why\n", "\n\n   #why  \n  "])
names = st.sampled_from(["q", "k", "v", "x", "near"])
operators = st.sampled_from(
    ["+", "-", "*", "@", "/", "//", "%", "**", " and ", " or ", "<", "<=", "==", " in ", " not in "]
)


def bracketed(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    """Expressions whose brackets may hold line breaks and comments."""
    open_brackets = st.sampled_from(["(", "f(", "softmax[j](", "mean[j in c](", "x[", "matrix[m, n]("])

    def close(opened: str, before: str, body: list[str], comma: str, where: str, after: str) -> str:
        end = "]" if opened.endswith("[") else ")"
        reduction = opened.endswith("](")
        condition = f" where{before} {where}" if reduction and len(body) == 1 else ""
        return (
            f"{opened}{before}{f'{after},{before}'.join(body)}{condition}{comma if len(body) > 1 else ''}{after}{end}"
        )

    return st.builds(
        close, open_brackets, inner_space, st.lists(inner, min_size=1, max_size=3), st.sampled_from(["", ","]), inner,
        inner_space,
    )  # fmt: skip


def compound(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.one_of(
        bracketed(inner),
        st.builds(lambda a, s, o, b: f"({a}){s}{o}{s}({b})", inner, space, operators, inner),
        st.builds(lambda a, o, b: f"{a}{o}{b}", names, operators, names),
        st.builds(lambda a: f"(-{a})", inner),
        st.builds(lambda a: f"(not {a})", inner),
        st.builds(lambda c, a, b: f"(if {c} then {a} else {b})", inner, inner, inner),
    )


expressions = st.recursive(names | st.sampled_from(["3", "1e-6", "true", "s.stop"]), compound, max_leaves=8)
remarks = st.sampled_from(["", "", "# why", " #why  ", "  # a (", '# "'])
equations = st.builds(
    lambda name, s, value, remark: f"{name}{s}={s}{value} {remark}", names, space, expressions, remarks
)
loose = st.lists(st.sampled_from(["", "   ", "#left", "  # two", "    # four", "         # far"]), max_size=3)


def statement(indent: str, kind: str, lines: list[str], before: list[str]) -> str:
    deeper = indent + "  "
    body = "\n".join(deeper + line for line in lines)
    head = {"equation": indent + lines[0], "scan": f"{indent}scan t :\n{body}", "repeat": f"{indent}repeat 3 :\n{body}"}
    return "\n".join([*before, head[kind]])


kinds = st.sampled_from(["equation", "equation", "scan", "repeat"])


@st.composite
def texts(draw: st.DrawFn) -> str:
    parts: list[str] = []
    for _ in range(draw(st.integers(1, 3))):
        parts += draw(loose)
        if draw(st.booleans()):
            parts.append(f"g(x) = {draw(expressions)} {draw(remarks)}")
            continue
        indent = draw(st.sampled_from(["  ", "    ", "\t"]))
        parts.append(f"pattern p( a:int = 3 ) : {draw(remarks)}")
        for _ in range(draw(st.integers(1, 3))):
            lines = draw(st.lists(equations, min_size=1, max_size=2))
            parts.append(statement(indent, draw(kinds), lines, draw(loose)))
    return "\n".join(parts + draw(loose)) + draw(st.sampled_from(["", "\n", "\n\n"]))


@settings(max_examples=200, deadline=None)
@given(texts())
def test_formatting_keeps_meaning_and_comments_and_is_settled(text: str) -> None:
    assert_formats_well(text)

"""The generated modules: three of them as reviewed text, properties of all."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Callable, Iterator
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnc.compiler.emit.backward import backward_kernels
from attnc.compiler.emit.expressions import is_natural
from attnc.compiler.emit.module import emit_module
from attnc.compiler.emit.streamed import forward_kernels
from attnc.compiler.ir import Graph, Node
from attnc.compiler.pipeline import lower, transpose
from attnc.compiler.plan import Plan
from attnc.dsl.check import check
from attnc.dsl.source import Source
from tests.compiler.graphs import At, graphs, places, value
from tests.compiler.pairs import example, names

TEXT = "pattern p(w: int = 3):\n    out = softmax[j](q @ k * scale where 0 <= i - j < w) @ v\n"
HOSTILE = [
    '"""', "'''", "\\", "\\N{BULLET}", "\\u0000", "\f", "\v", "\x1c\x1d", "\x85", "\u2028import os", "\u202e\u2066",
    "${PATH} {0} %s", "import os; os.abort()", "\t# x", "𝓪𝓽𝓽𝓷", "\ufeff",
]  # fmt: skip


@cache
def plan(name: str) -> Plan:
    return transpose(lower(example(name)))


@cache
def modules(name: str) -> tuple[str, ...]:
    """The forward and the backward modules of an example."""
    made = plan(name)
    backward = [backward_kernels(made, branch, number) for number, branch in enumerate(made.branches)]
    return emit_module(made, forward_kernels(made)), *(emit_module(made, kernels) for kernels in backward)


@pytest.mark.parametrize("name", ["causal", "documents", "strided"])
def test_kernel(name: str, golden: Callable[[str], None]) -> None:
    golden("\n\n".join(kernel.text for kernel in forward_kernels(plan(name))))


def calls(text: str, function: str) -> Iterator[ast.Call]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == function:
            yield node


@pytest.mark.parametrize("name", names())
def test_every_product_says_its_precision(name: str) -> None:
    for module in modules(name):
        products = list(calls(module, "tl.dot"))
        assert products
        for call in products:
            assert [ast.unparse(word.value) for word in call.keywords if word.arg == "input_precision"] == ["PRECISION"]


@pytest.mark.parametrize("name", names())
def test_guards_stand_where_a_tensor_may_end(name: str) -> None:
    """What is stored is stored under a mask; only parts, whose buffers are whole tiles, are not."""
    for module in modules(name):
        for call in calls(module, "tl.store"):
            stored = ast.unparse(call.args[0])
            masked = any(word.arg == "mask" for word in call.keywords)
            assert masked or re.match(r"part_(out|lse|q|k|v)|leaf_\d+ \+ program", stored), ast.unparse(call)


@pytest.mark.parametrize("name", names())
def test_names_are_defined_before_they_are_read(name: str) -> None:
    """Python would only say so when the kernel runs."""
    for module in modules(name):
        tree = ast.parse(module)
        known = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)} | {"float", "range", "tl"}
        known |= {"FLOOR", "FAR", "LOG2E", "ALIGNED"}
        for function in tree.body:
            if isinstance(function, ast.FunctionDef):
                defined = known | {one.arg for one in function.args.args}
                for node in in_order(function):
                    if isinstance(node.ctx, ast.Store):
                        defined.add(node.id)
                    else:
                        assert node.id in defined, f"{function.name} reads {node.id}"


def in_order(function: ast.FunctionDef) -> Iterator[ast.Name]:
    """The names of a body; those read by an assignment come before the one that it sets."""

    scheduled = any(one.arg == "schedule" for one in function.args.args)

    def of(node: ast.AST) -> Iterator[ast.Name]:
        if isinstance(node, ast.Name):
            yield node
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "SPLIT" and not scheduled:
            for statement in node.orelse:  # a kernel without a schedule is never split
                yield from of(statement)
        elif isinstance(node, ast.Assign):
            yield from of(node.value)
            yield from (name for target in node.targets for name in of(target))
        elif isinstance(node, ast.For):
            yield from of(node.iter)
            yield from of(node.target)
            for statement in node.body:
                yield from of(statement)
        else:
            for child in ast.iter_child_nodes(node):
                yield from of(child)

    for statement in function.body:
        yield from of(statement)


@pytest.mark.parametrize("name", names())
def test_a_module_shows_its_text_and_the_lines_that_code_comes_from(name: str) -> None:
    pattern = example(name)
    lines = pattern.source.text.splitlines()
    for module in modules(name):
        tokens = tokenize.generate_tokens(io.StringIO(module).readline)
        comments = [token.string for token in tokens if token.type == tokenize.COMMENT]
        assert comments[: len(lines)] == [f"# {line}".rstrip() for line in lines]
        places = [int(found[1]) for one in comments if (found := re.fullmatch(rf"# {name}\.attn:(\d+)", one))]
        assert places
        assert all(re.match(r"pattern|    \w", lines[at - 1]) for at in places), "a line of the pattern"
        assert any("softmax" in lines[at - 1] or " = " in lines[at - 1] for at in places)


def module_of(text: str, name: str = "p.attn") -> str:
    (pattern,) = check(Source(name, text)).values()
    made = lower(pattern)
    return emit_module(made, forward_kernels(made))


def code(module: str) -> list[str]:
    """The tokens that Python runs."""
    skipped = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    tokens = tokenize.generate_tokens(io.StringIO(module).readline)
    return [token.string for token in tokens if token.type not in skipped]


@pytest.mark.parametrize("comment", HOSTILE, ids=ascii)
@pytest.mark.parametrize("name", ["p.attn", "a\nb.attn", "x'''\\.attn", 'é"\u2028.attn', "..\\evil\\p.attn"], ids=ascii)
def test_hostile_text_stays_a_comment(comment: str, name: str) -> None:
    """The code is the same whatever the comments and the file's name hold."""
    module = module_of(f"# {comment}\n{TEXT}# {comment}", name)
    assert code(module) == code(module_of(TEXT))
    compile(module, "module.py", "exec")


@settings(max_examples=60, deadline=None)
@given(comment=st.text(), name=st.text())
def test_any_comment_stays_a_comment(comment: str, name: str) -> None:
    comment = comment.replace("\r", " ").replace("\n", "\n# ")
    assert code(module_of(f"# {comment}\n{TEXT}", name)) == code(module_of(TEXT))


@settings(max_examples=150, deadline=None)
@given(made=graphs("integer"), at=st.lists(places(), min_size=6, max_size=10))
def test_naturals_are_not_negative(made: tuple[Graph, Node], at: list[At]) -> None:
    """Where both operands are natural, // and % are those of the machine, which round towards 0."""
    if is_natural(made[1]):
        assert all(value(made[1], one) >= 0 for one in at)


def test_a_remainder_by_what_varies_may_be_negative() -> None:
    graph = Graph()
    divisor = graph.make("sub", graph.index("j"), graph.literal(3))
    assert not is_natural(graph.make("mod", graph.index("i"), divisor))
    assert is_natural(graph.make("mod", graph.make("neg", graph.index("i")), graph.literal(3)))


NAMED = """
pattern {pattern}({n}: int = 3, rates: ints = (1, 4), {m}: int = 2):
    input {x}: real[h, {axis}]
    input {y}: real[b, t]
    branch(rate) = softmax[j](q @ k * scale + {x}[min(i - j, {n})] - {y}[j] where 0 <= i - j < {n} * rate + {m}) @ v
    out = merge(branch(rate) for rate in rates)
"""
USUAL = {"pattern": "p", "n": "n", "m": "m", "x": "x", "y": "y", "axis": "a"}
SPELT = [
    *({"pattern": name} for name in ("triton", "tl", "import", "class", "def", "None", "_floor_div", "__name__")),
    *({"x": name} for name in ("tl", "class", "s", "acc", "lse", "schedule", "q_sb", "size_a", "i_ok", "lambda", "r0")),
    *({"n": name} for name in ("tl", "class", "s", "acc", "N_", "e0", "lambda", "q_sb", "n_n")),
    *({"axis": name} for name in ("tl", "class", "lambda", "n0")),
    {"x": "g", "y": "g_n0"}, {"x": "g", "y": "g_s1"}, {"x": "g", "y": "g_group"}, {"x": "g_n0", "y": "g_n0_"},
    {"n": "rates_0"}, {"n": "rates_0", "m": "rates_0_"}, {"n": "rates_1_", "m": "rates_1"},
]  # fmt: skip


@cache
def spelt_modules(*spelt: str) -> tuple[tuple[str, ...], ...]:
    """The arguments of every kernel of NAMED, then the tokens of every module."""
    words = dict(zip(USUAL, spelt, strict=True))
    made = transpose(lower(check(Source("p.attn", NAMED.format(**words)))[words["pattern"]]))
    backward = [backward_kernels(made, branch, number) for number, branch in enumerate(made.branches)]
    several = [forward_kernels(made), *backward]
    arguments = [tuple(argument.name for argument in kernel.arguments) for kernels in several for kernel in kernels]
    return *arguments, *(tuple(code(emit_module(made, kernels))) for kernels in several)


@pytest.mark.parametrize("names", SPELT, ids=lambda names: "-".join(names.values()))
def test_names_of_the_text_do_not_meet_those_of_the_kernel(names: dict[str, str]) -> None:
    found, usual = spelt_modules(*(USUAL | names).values()), spelt_modules(*USUAL.values())
    assert [len(part) for part in found] == [len(part) for part in usual]
    *arguments, _, _, _ = found
    assert all(len(set(part)) == len(part) for part in arguments)
    for module in found[-3:]:
        assert all(word.isidentifier() for word in module if word.startswith(("x_", "n_", "size_", "t_")))

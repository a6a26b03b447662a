"""From lark's parse tree to the syntax tree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import isinf
from typing import Any

from lark import Token, Transformer_NonRecursive, v_args
from lark.tree import Meta

from attnc.dsl import syntax
from attnc.dsl.diagnostics import Diagnostic
from attnc.dsl.source import Source, Span

# Deepest expression tree: a chain `a + b + ..` is as deep as it is long. Passes over the tree may recurse.
DEEPEST_EXPRESSION = 200
LARGEST_INTEGER = 2**63 - 1

# A method per rule or alias of attn.lark, called with the children already transformed.
Children = list[Any]


@v_args(meta=True)
class TreeBuilder(Transformer_NonRecursive[Token, syntax.File]):
    """Builds the syntax tree of one source, bottom up and without recursion.

    `offset` is added to lark's positions. Mistakes that the grammar lets through are gathered in `mistakes`.
    """

    def __init__(self, source: Source, offset: int) -> None:
        super().__init__()
        self.source = source
        self.offset = offset
        self.mistakes: list[Diagnostic] = []
        self._depths: dict[syntax.Expression, int] = {}

    # Top level

    def file(self, meta: Meta, children: Children) -> syntax.File:
        whole = Span(source=self.source, start=0, stop=len(self.source.text))
        return syntax.File(self.source, tuple(children), span=whole)

    def use(self, meta: Meta, children: Children) -> syntax.Use:
        return syntax.Use(children[0].value[1:-1], span=self._span(meta))

    def pattern(self, meta: Meta, children: Children) -> syntax.PatternDeclaration:
        name, parameters, *body = children
        span = self._through(meta, body[-1])
        return syntax.PatternDeclaration(name.value, parameters or (), tuple(body), span=span)

    def parameters(self, meta: Meta, children: Children) -> tuple[syntax.ParameterDeclaration, ...]:
        return tuple(child for child in children if child is not None)

    def parameter(self, meta: Meta, children: Children) -> syntax.ParameterDeclaration:
        name, kind, default = children
        declared = syntax.TypeSyntax(kind.value, (), span=self._token_span(kind))
        return syntax.ParameterDeclaration(name.value, declared, default, span=self._span(meta))

    # Statements

    def equation(self, meta: Meta, children: Children) -> syntax.Equation:
        return syntax.Equation(children[0].value, children[1], span=self._span(meta))

    def function(self, meta: Meta, children: Children) -> syntax.Function:
        name, parameters, value = children
        return syntax.Function(name.value, parameters or (), value, span=self._span(meta))

    def names(self, meta: Meta, children: Children) -> tuple[str, ...]:
        return tuple(child.value for child in children)

    def input(self, meta: Meta, children: Children) -> syntax.InputDeclaration:
        name, kind, default = children
        return syntax.InputDeclaration(name.value, kind, default, span=self._span(meta))

    def type(self, meta: Meta, children: Children) -> syntax.TypeSyntax:
        base, *axes = children
        return syntax.TypeSyntax(base.value, tuple(axis.value for axis in axes if axis), span=self._span(meta))

    def axis(self, meta: Meta, children: Children) -> syntax.AxisDeclaration:
        name, value = children
        if not isinstance(value, syntax.Call):
            help = "write `blocks(j, size)`, `blocks(j, size, stride)` or `segments(j, count)`"
            self._mistake("an axis is made by `blocks(..)` or `segments(..)`", value.span, help)
            value = syntax.Call("blocks", (), span=value.span)
        return syntax.AxisDeclaration(name.value, value, span=self._span(meta))

    def scan(self, meta: Meta, children: Children) -> syntax.ScanBlock:
        index, *body = children
        return syntax.ScanBlock(index.value, tuple(body), span=self._through(meta, body[-1]))

    def repeat(self, meta: Meta, children: Children) -> syntax.RepeatBlock:
        count, *body = children
        return syntax.RepeatBlock(count, tuple(body), span=self._through(meta, body[-1]))

    # Expressions

    def conditional(self, meta: Meta, children: Children) -> syntax.Expression:
        condition, accepted, otherwise = children
        return self._made(syntax.Conditional(condition, accepted, otherwise, span=self._span(meta)), children)

    def binary(self, meta: Meta, children: Children) -> syntax.Expression:
        left, operator, right = children
        return self._made(syntax.Binary(operator.value, left, right, span=self._span(meta)), (left, right))

    def unary(self, meta: Meta, children: Children) -> syntax.Expression:
        operator, operand = children
        return self._made(syntax.Unary(operator.value, operand, span=self._span(meta)), (operand,))

    def comparison(self, meta: Meta, children: Children) -> syntax.Expression:
        operands = children[::2]
        comparison = syntax.Comparison(tuple(operands), tuple(children[1::2]), span=self._span(meta))
        return self._made(comparison, operands)

    def comparator(self, meta: Meta, children: Children) -> str:
        return " ".join(child.value for child in children)

    def attribute(self, meta: Meta, children: Children) -> syntax.Expression:
        value, name = children
        return self._made(syntax.Attribute(value, name.value, span=self._span(meta)), (value,))

    def read(self, meta: Meta, children: Children) -> syntax.Expression:
        value, *items = children
        return self._made(syntax.Read(value, tuple(items), span=self._span(meta)), children)

    def call(self, meta: Meta, children: Children) -> syntax.Expression:
        callee, arguments = children
        given, where = arguments or ((), None)
        operands = [argument.value for argument in given] + ([where] if where else [])
        span = self._span(meta)
        match callee:
            case syntax.Name():
                made: syntax.Expression = syntax.Call(callee.identifier, given, where, span=span)
            case syntax.Read(value=syntax.Name(identifier=function)):
                index, within, second = self._reduced(callee)
                made = syntax.Reduction(function, index, within, given, where, second, span=span)
            case _:
                self._mistake("only a function can be called, by its name", callee.span)
                made = syntax.Call("", given, where, span=span)
        return self._made(made, operands)

    def unrolled(self, meta: Meta, children: Children) -> syntax.Expression:
        callee, value, loop = children
        name = callee.identifier if isinstance(callee, syntax.Name) else ""
        if not name:
            self._mistake("`for` unrolls the arguments of a function, such as `merge(.. for r in rates)`", callee.span)
        argument = syntax.Argument(value, span=value.span)
        made = syntax.Call(name, (argument,), None, loop, span=self._span(meta))
        return self._made(made, (value, *loop.iterables))

    def loop(self, meta: Meta, children: Children) -> syntax.Loop:
        names, *iterables = children
        return syntax.Loop(names, tuple(iterables), span=self._span(meta))

    def arguments(self, meta: Meta, children: Children) -> tuple[tuple[syntax.Argument, ...], syntax.Expression | None]:
        """Arguments, and the `where` after the last plain one."""
        given = tuple(argument for argument, _ in children)
        plain = [argument for argument in given if argument.name is None]
        where: syntax.Expression | None = None
        for at, (argument, condition) in enumerate(children):
            if argument.name is None and at >= len(plain):
                self._mistake("a plain argument stands after a named one", argument.span)
            if condition is None:
                continue
            if argument is not plain[-1]:
                help = "write it once, after the last plain argument: `topk[s](score, count where condition)`"
                self._mistake("`where` stands before another plain argument", condition.span, help)
            where = condition
        return given, where

    def plain(self, meta: Meta, children: Children) -> tuple[syntax.Argument, syntax.Expression | None]:
        value, where = children
        return syntax.Argument(value, span=value.span), where

    def named(self, meta: Meta, children: Children) -> tuple[syntax.Argument, None]:
        name, value = children
        return syntax.Argument(value, name.value, span=self._span(meta)), None

    def group(self, meta: Meta, children: Children) -> syntax.Expression:
        """The expression between parentheses, which then belong to its span."""
        inner: syntax.Expression = children[0]
        return self._made(replace(inner, span=self._span(meta)), (inner,))

    def sequence(self, meta: Meta, children: Children) -> syntax.Expression:
        items = [child for child in children if child is not None]
        return self._made(syntax.Tuple(tuple(items), span=self._span(meta)), items)

    def name(self, meta: Meta, children: Children) -> syntax.Expression:
        return syntax.Name(children[0].value, span=self._span(meta))

    def integer(self, meta: Meta, children: Children) -> syntax.Expression:
        digits = children[0].value.lstrip("0") or "0"
        # The length first: Python refuses to convert thousands of digits.
        value = int(digits) if len(digits) <= len(str(LARGEST_INTEGER)) else LARGEST_INTEGER + 1
        if value > LARGEST_INTEGER:
            self._mistake("this integer is not below 2**63", self._span(meta), code="number")
        return syntax.Literal(value, span=self._span(meta))

    def real(self, meta: Meta, children: Children) -> syntax.Expression:
        value = float(children[0].value)
        if isinf(value):
            self._mistake("this number is above the largest float64", self._span(meta), code="number")
        return syntax.Literal(value, span=self._span(meta))

    def boolean(self, meta: Meta, children: Children) -> syntax.Expression:
        return syntax.Literal(children[0].value == "true", span=self._span(meta))

    # What the methods above share

    def _reduced(self, callee: syntax.Read) -> tuple[str, str | None, str | None]:
        """Index, `in` axis and second index of `softmax[j]`, `mean[j in c]`, `matrix[m, n]`."""
        match callee.items:
            case (syntax.Name(identifier=index),):
                return index, None, None
            case (syntax.Literal(value=int() as length),) if not isinstance(length, bool):  # an axis such as `3`
                return str(length), None, None
            case (
                syntax.Comparison(
                    operands=(syntax.Name(identifier=index), syntax.Name(identifier=within)), operators=("in",)
                ),
            ):
                return index, within, None
            case (syntax.Name(identifier=index), syntax.Name(identifier=second)):
                return index, None, second
        help = "write `softmax[j](..)`, `mean[j in c](..)` or `matrix[m, n](..)`"
        self._mistake("between the brackets of a reduction stands an index", callee.span, help)
        return "", None, None

    def _made(self, made: syntax.Expression, operands: Sequence[syntax.Expression]) -> syntax.Expression:
        """Keep count of how deep the tree is; the first expression that is too deep is a mistake."""
        depth = 1 + max((self._depths.get(operand, 0) for operand in operands), default=0)
        if depth == DEEPEST_EXPRESSION:
            message = f"this expression is more than {DEEPEST_EXPRESSION - 1} operations deep"
            self._mistake(message, made.span, "give names to its parts", code="nesting")
        self._depths[made] = depth
        return made

    def _span(self, meta: Meta) -> Span:
        return Span(source=self.source, start=meta.start_pos + self.offset, stop=meta.end_pos + self.offset)

    def _through(self, meta: Meta, last: syntax.Syntax) -> Span:
        """Span of a block: up to its last statement, without the line ends after it."""
        return Span(source=self.source, start=meta.start_pos + self.offset, stop=last.span.stop)

    def _token_span(self, token: Token) -> Span:
        start = (token.start_pos or 0) + self.offset
        return Span(source=self.source, start=start, stop=start + len(token.value))

    def _mistake(self, message: str, span: Span, help: str | None = None, code: str = "syntax") -> None:
        self.mistakes.append(Diagnostic(code, message, span, help=help))

"""What every name of a file stands for and where it is visible, from the syntax tree alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from attnc.dsl.blocks import nodes
from attnc.dsl.source import Span
from attnc.dsl.syntax import (
    AxisDeclaration,
    Call,
    Equation,
    File,
    Function,
    InputDeclaration,
    PatternDeclaration,
    RepeatBlock,
    ScanBlock,
    Statement,
)


@dataclass(frozen=True)
class Definition:
    """A name. `kind`: pattern, function, parameter, input, axis, name, argument or element (of a `for`).

    `span`: where it is defined; `visible`: where it can be used (from its definition on). `text`: how it is declared.
    """

    name: str
    kind: str
    span: Span
    visible: Span
    text: str


def definitions(file: File) -> Iterator[Definition]:
    """All of a file, outer ones first."""
    whole = Span(source=file.source, start=0, stop=len(file.source.text))
    for item in file.items:
        if isinstance(item, Function):
            yield from _function(item, whole)
        elif isinstance(item, PatternDeclaration):
            yield Definition(item.name, "pattern", _head(item.span), whole, pattern_heading(item))
            yield from _of_pattern(item)
    for node in nodes(file):
        if isinstance(node, Call) and node.loop is not None:
            for name in node.loop.names:
                yield Definition(name, "element", node.loop.span, node.span, node.loop.span.text)


def pattern_heading(pattern: PatternDeclaration) -> str:
    """`pattern name(parameters)` on one line."""
    given = ", ".join(" ".join(parameter.span.text.split()) for parameter in pattern.parameters)
    return f"pattern {pattern.name}({given})" if given else f"pattern {pattern.name}"


def function_heading(function: Function) -> str:
    """`name(parameters) = body` on one line."""
    return " ".join(function.span.text.split())


def _of_pattern(pattern: PatternDeclaration) -> Iterator[Definition]:
    for parameter in pattern.parameters:
        text = " ".join(parameter.span.text.split())
        yield Definition(parameter.name, "parameter", parameter.span, pattern.span, text)
    for statement in pattern.body:
        yield from _of_statement(statement, pattern.span)


def _of_statement(statement: Statement, visible: Span) -> Iterator[Definition]:
    text = " ".join(statement.span.text.split())
    match statement:
        case Equation(name):
            yield Definition(name, "name", _head(statement.span), visible, text)
        case InputDeclaration(name):
            yield Definition(name, "input", statement.span, visible, text)
        case AxisDeclaration(name):
            yield Definition(name, "axis", statement.span, visible, text)
        case Function():
            yield from _function(statement, visible)
        case ScanBlock(_, body) | RepeatBlock(_, body):
            for equation in body:
                yield from _of_statement(equation, visible)


def _function(function: Function, visible: Span) -> Iterator[Definition]:
    text = function_heading(function)
    yield Definition(function.name, "function", _head(function.span), visible, text)
    for name in function.parameters:
        yield Definition(name, "argument", _head(function.span), function.span, text)


def _head(span: Span) -> Span:
    """The first line of a span."""
    return Span(source=span.source, start=span.start, stop=span.start + len(span.text.split("\n", 1)[0].rstrip()))

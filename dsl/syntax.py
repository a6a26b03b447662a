"""The syntax tree of a `.attn` file: what the text says, before names and types are looked up.

Every node carries the span of its text. The checker (`check.py`) turns a tree into terms (`terms.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from attnc.dsl.source import Source, Span


@dataclass(frozen=True, eq=False)
class Syntax:
    span: Span = field(kw_only=True, repr=False)


# Expressions


@dataclass(frozen=True, eq=False)
class Expression(Syntax):
    pass


@dataclass(frozen=True, eq=False)
class Literal(Expression):
    """`3`, `1e-6`, `true`, `false`."""

    value: int | float | bool


@dataclass(frozen=True, eq=False)
class Name(Expression):
    identifier: str


@dataclass(frozen=True, eq=False)
class Unary(Expression):
    """`-x`, `not x`."""

    operator: str
    operand: Expression


@dataclass(frozen=True, eq=False)
class Binary(Expression):
    """`+ - * @ / // % **`, `and`, `or`."""

    operator: str
    left: Expression
    right: Expression


@dataclass(frozen=True, eq=False)
class Comparison(Expression):
    """A chain such as `0 <= i - j < window` or `j in picked`; one operator between two neighbours.

    Operators: `< <= > >= == != in` and `not in`.
    """

    operands: tuple[Expression, ...]
    operators: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Conditional(Expression):
    """`if condition then accepted else otherwise`."""

    condition: Expression
    accepted: Expression
    otherwise: Expression


@dataclass(frozen=True, eq=False)
class Tuple(Expression):
    """`(2048, 8192)`: the default of a parameter, or what a `for` runs over."""

    items: tuple[Expression, ...]


@dataclass(frozen=True, eq=False)
class Attribute(Expression):
    """`s.stop`."""

    value: Expression
    name: str


@dataclass(frozen=True, eq=False)
class Read(Expression):
    """`doc[i]`, `table[bucket(j - i)]`, `gate[0]`."""

    value: Expression
    items: tuple[Expression, ...]


@dataclass(frozen=True, eq=False)
class Argument(Syntax):
    """`value` or `name = value`."""

    value: Expression
    name: str | None = None


@dataclass(frozen=True, eq=False)
class Loop(Syntax):
    """`for segment, rate in segments, rates`: one value per element, all of the same static length."""

    names: tuple[str, ...]
    iterables: tuple[Expression, ...]


@dataclass(frozen=True, eq=False)
class Call(Expression):
    """`phi(x)`, `merge(a, b)`, `merge(a for r in rates)`, `sliding_window(q, k, v, window=3)`."""

    function: str
    arguments: tuple[Argument, ...]
    where: Expression | None = None
    loop: Loop | None = None


@dataclass(frozen=True, eq=False)
class Reduction(Expression):
    """`softmax[j](body where condition, sink = x)`, `mean[j in c](k)`, `topk[s](score, n where .., force = ..)`.

    `second` is the `n` of `matrix[m, n](x)`.
    """

    function: str
    index: str
    within: str | None
    arguments: tuple[Argument, ...]
    where: Expression | None = None
    second: str | None = None


# Statements


@dataclass(frozen=True, eq=False)
class Statement(Syntax):
    pass


@dataclass(frozen=True, eq=False)
class TypeSyntax(Syntax):
    """`real[b, h, t]`, `int`. An axis is a name or a number."""

    base: str
    axes: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Equation(Statement):
    """`name = value`."""

    name: str
    value: Expression


@dataclass(frozen=True, eq=False)
class Function(Statement):
    """`name(parameters) = value`."""

    name: str
    parameters: tuple[str, ...]
    value: Expression


@dataclass(frozen=True, eq=False)
class InputDeclaration(Statement):
    """`input name: type (= default)`."""

    name: str
    type: TypeSyntax
    default: Expression | None


@dataclass(frozen=True, eq=False)
class AxisDeclaration(Statement):
    """`axis name = blocks(j, size, stride)` or `segments(j, count)`."""

    name: str
    value: Call


@dataclass(frozen=True, eq=False)
class ScanBlock(Statement):
    """`scan t:` and its equations, run once a position in order."""

    index: str
    body: tuple[Equation, ...]


@dataclass(frozen=True, eq=False)
class RepeatBlock(Statement):
    """`repeat count:` and its equations, run `count` times."""

    count: Expression
    body: tuple[Equation, ...]


# Top level


@dataclass(frozen=True, eq=False)
class ParameterDeclaration(Syntax):
    """`name: int = 4`; types `int`, `real` (or `float`), `bool`, `ints`."""

    name: str
    type: TypeSyntax
    default: Expression | None


@dataclass(frozen=True, eq=False)
class PatternDeclaration(Syntax):
    name: str
    parameters: tuple[ParameterDeclaration, ...]
    body: tuple[Statement, ...]


@dataclass(frozen=True, eq=False)
class Use(Syntax):
    """`use "file.attn"`."""

    path: str


@dataclass(frozen=True, eq=False)
class File(Syntax):
    """A parsed file: its items in order; functions at the top level are shared by all patterns."""

    source: Source
    items: tuple[Use | Function | PatternDeclaration, ...]

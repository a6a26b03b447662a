"""Expressions: syntax to terms. Names are looked up, functions inlined, and the rule of each form applied."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from attnc.dsl import builtins, reading
from attnc.dsl.builder import Builder
from attnc.dsl.diagnostics import Diagnostic, InternalError, did_you_mean
from attnc.dsl.pointwise import Operand, arithmetic, chosen, comparison, logic, negated
from attnc.dsl.products import contract
from attnc.dsl.reductions import REDUCTIONS, SELECTIONS, member
from attnc.dsl.rejection import PoisonedError, RejectionError, rejection
from attnc.dsl.scopes import PREDEFINED, Bad, FunctionDefinition, PatternDefinition, Scope, Value
from attnc.dsl.source import Span
from attnc.dsl.syntax import (
    Attribute,
    Binary,
    Call,
    Comparison,
    Conditional,
    Expression,
    Literal,
    Name,
    Read,
    Reduction,
    Tuple,
    Unary,
)
from attnc.dsl.terms import Axis, Term
from attnc.dsl.types import BUILT_IN_INDICES, Base, Type

MAX_NESTING = 100


@dataclass(eq=False)
class Context:
    """What all expressions of one checked pattern share, those of the functions and patterns it calls included.

    `inline` makes the value of a call of another pattern; `scanning` is true inside `scan t:`, where t stands
    for i and j.
    """

    inline: Callable[[Expressions, PatternDefinition, Call], Term]
    build: Builder = field(default_factory=Builder)
    axes: dict[str, Axis] = field(default_factory=dict)
    sizes: dict[str, Term] = field(default_factory=dict)
    scanning: bool = False
    nesting: int = 0
    active: list[FunctionDefinition | PatternDefinition] = field(default_factory=list)
    inlined: dict[tuple[object, ...], Term] = field(default_factory=dict)


class Expressions:
    """Makes the terms of expressions whose names are those of `scope`."""

    def __init__(self, context: Context, scope: Scope) -> None:
        self.context = context
        self.scope = scope
        self.build = context.build

    def inside(self, scope: Scope) -> Expressions:
        return Expressions(self.context, scope)

    def binding(self, values: dict[str, Term]) -> Expressions:
        """Expressions that see some more names, such as those of a `for`."""
        return self.inside(Scope(self.scope, values=dict(values)))

    def index(self, name: str) -> str:
        """The index or vector axis that a name between brackets means."""
        return "t" if self.context.scanning and name in ("i", "j") else self.scope.axis(name) or name

    def elements(self, syntax: Expression) -> tuple[Term, ...]:
        """The elements of a tuple: of a parameter, or written out."""
        if isinstance(syntax, Tuple):
            return tuple(self.term(item) for item in syntax.items)
        value = self.value(syntax.identifier, syntax.span) if isinstance(syntax, Name) else None
        if isinstance(value, tuple):
            return value
        help = "declare the parameter as `ints`, or write a tuple: `(1, 2)`"
        raise rejection("type-mismatch", f"`{syntax.span.text}` is no tuple", syntax.span, help=help)

    def operand(self, syntax: Expression) -> Operand:
        return Operand(self.term(syntax), syntax.span)

    def term(self, syntax: Expression) -> Term:
        """The value of an expression; raises `RejectionError` or `PoisonedError`."""
        if self.context.nesting >= MAX_NESTING:
            raise rejection("too-large", f"more than {MAX_NESTING} operations inside one another", syntax.span)
        self.context.nesting += 1
        try:
            return self._term(syntax)
        finally:
            self.context.nesting -= 1

    def _term(self, syntax: Expression) -> Term:
        match syntax:
            case Literal(value):
                return self.build.literal(value, syntax.span)
            case Name(identifier):
                return self._name(identifier, syntax.span)
            case Unary("not", operand):
                return logic(self.build, "not", [self.operand(operand)], syntax.span)
            case Unary(_, operand):
                return negated(self.build, self.operand(operand), syntax.span)
            case Binary():
                return self._binary(syntax)
            case Comparison():
                return self._comparison(syntax)
            case Conditional(condition, accepted, otherwise):
                parts = (self.operand(condition), self.operand(accepted), self.operand(otherwise))
                return chosen(self.build, *parts, syntax.span)
            case Attribute(value, name):
                return reading.attribute(self, value, name, syntax.span)
            case Read():
                return reading.read(self, syntax)
            case Call():
                return self._call(syntax)
            case Reduction():
                return builtins.reduced(self, syntax)
            case Tuple():
                raise rejection("type-mismatch", "a tuple is only for parameters and what `for` runs over", syntax.span)
        raise InternalError(f"no rule for the expression {type(syntax).__name__}")

    def value(self, name: str, span: Span) -> Value | None:
        """What a name stands for, inside a scan read at its position; raises `PoisonedError` for a rejected one."""
        value = self.scope.value(name)
        if value is Bad.VALUE:
            raise PoisonedError
        if isinstance(value, Term) and self.context.scanning:
            return self._at_scan_position(value, name, span)
        return value

    def _at_scan_position(self, value: Term, name: str, span: Span) -> Term:
        positions = sorted(value.type.indices & {"i", "j"})
        if len(positions) > 1 or (positions and "t" in value.type.indices):
            raise rejection("scan", f"`{name}` varies over pairs of positions, and a scan sees one position", span)
        return self.build.rename(value, positions[0], "t", span) if positions else value

    def _name(self, name: str, span: Span) -> Term:
        value = self.value(name, span)
        if isinstance(value, tuple):
            raise rejection("type-mismatch", f"`{name}` is a tuple: run over it with `for`", span)
        if isinstance(value, Term):
            return value
        if name in BUILT_IN_INDICES:
            index = "t" if self.context.scanning and name in ("i", "j") else name
            return self.build.make("index", (), Type(Base.INT, frozenset({index})), span, index)
        axis = self.scope.size(name)
        if axis is not None:
            return self.build.size(axis, span)
        if self.scope.axis(name) in self.context.axes:
            raise rejection(
                "type-mismatch", f"`{name}` is an axis", span, help=f"its position along the axis is `{name}.index`"
            )
        if self.scope.callee(name) or name in builtins.FUNCTIONS:
            raise rejection("unknown-name", f"`{name}` is a function", span, help=f"call it: `{name}(..)`")
        help = did_you_mean(name, self.scope.value_names())
        if name in PREDEFINED:
            help = f"a function outside of the patterns takes it as an argument: `f({name})`"
        raise rejection("unknown-name", f"`{name}` is not defined", span, help=help)

    def _binary(self, syntax: Binary) -> Term:
        """A chain such as `a + b - c` is walked from its left end, so that a long one is not deeply nested."""
        spine = [syntax]
        while isinstance(spine[-1].left, Binary):
            spine.append(spine[-1].left)
        left = self.operand(spine[-1].left)
        for node in reversed(spine):
            right = self.operand(node.right)
            if node.operator == "@":
                term = contract(self.build, left, right, node.span)
            elif node.operator in ("and", "or"):
                term = logic(self.build, node.operator, [left, right], node.span)
            else:
                term = arithmetic(self.build, node.operator, left, right, node.span)
            left = Operand(term, node.span)
        return left.term

    def _comparison(self, syntax: Comparison) -> Term:
        operands = [self.operand(operand) for operand in syntax.operands]
        whole: Operand | None = None
        for left, operator, right in zip(operands, syntax.operators, operands[1:], strict=False):
            span = Span(source=syntax.span.source, start=left.span.start, stop=right.span.stop)
            if operator in ("in", "not in"):
                term = member(self.build, left, right, self.context.axes, span)
                if operator == "not in":
                    term = logic(self.build, "not", [Operand(term, span)], span)
            else:
                term = comparison(self.build, operator, left, right, span)
            link = Operand(term, span)
            whole = (
                link if whole is None else Operand(logic(self.build, "and", [whole, link], syntax.span), syntax.span)
            )
        assert whole is not None
        return whole.term

    def _call(self, syntax: Call) -> Term:
        callee = self.scope.callee(syntax.function)
        if isinstance(callee, FunctionDefinition):
            return self._inlined(callee, syntax)
        if callee is not None:
            return self.context.inline(self, callee, syntax)
        if syntax.function in builtins.FUNCTIONS:
            return builtins.FUNCTIONS[syntax.function](self, syntax)
        raise self._no_function(syntax)

    def _no_function(self, syntax: Call) -> RejectionError:
        name = syntax.function
        if name in REDUCTIONS | SELECTIONS:
            help = f"name the index that it runs along: `{name}[j](..)`"
            return rejection("unknown-function", f"`{name}` runs along an index", syntax.span, help=help)
        if self.scope.value(name) is not None or name in BUILT_IN_INDICES:
            help = f"`*` multiplies: `{name} * (..)`"
            return rejection("unknown-function", f"`{name}` is a value, not a function", syntax.span, help=help)
        known = {known for scope in self.scope.chain() for known in (*scope.functions, *scope.patterns)}
        help_close = did_you_mean(name, known | set(builtins.FUNCTIONS) | REDUCTIONS | SELECTIONS)
        return rejection("unknown-function", f"there is no function or pattern `{name}`", syntax.span, help=help_close)

    def arguments(self, syntax: Call, names: tuple[str, ...], place: Span | None = None) -> list[Expression]:
        """The positional arguments of a call, one for each of `names`."""
        call = f"`{syntax.function}({', '.join(names)})`"
        labels = () if place is None else ((place, "defined here"),)
        if syntax.where is not None:
            raise rejection(
                "argument", f"{call} takes no `where`", syntax.where.span, help="only reductions and selections do"
            )
        if syntax.loop is not None:
            raise rejection("argument", f"{call} takes no `for`", syntax.loop.span, help="only `merge` does")
        for argument in syntax.arguments:
            if argument.name is not None:
                raise rejection("argument", f"{call} has no keyword `{argument.name}`", argument.span, *labels)
        if len(syntax.arguments) != len(names):
            count = len(syntax.arguments)
            plural = "" if len(names) == 1 else "s"
            message = f"{call} takes {len(names)} argument{plural}, found {count}"
            raise rejection("argument", message, syntax.span, *labels)
        return [argument.value for argument in syntax.arguments]

    def _inlined(self, function: FunctionDefinition, syntax: Call) -> Term:
        """The body of a function with its parameters bound; the same call made twice gives one term."""
        definition = function.syntax
        if function in self.context.active:
            raise rejection(
                "recursion",
                f"`{syntax.function}` calls itself",
                syntax.span,
                (definition.span, "defined here"),
                help="functions are inlined; `repeat n:` and `scan t:` repeat",
            )
        arguments = self.arguments(syntax, definition.parameters, definition.span)
        values = [self.term(argument) for argument in arguments]
        key = (function, self.context.scanning, *values)
        if key in self.context.inlined:
            return self.context.inlined[key]
        scope = Scope(function.scope, values=dict(zip(definition.parameters, values, strict=True)))
        self.context.active.append(function)
        try:
            self.context.inlined[key] = self.inside(scope).term(definition.value)
        except RejectionError as rejected:
            raise RejectionError(called_from(rejected.diagnostic, syntax)) from None
        finally:
            self.context.active.pop()
        return self.context.inlined[key]


def called_from(diagnostic: Diagnostic, call: Call) -> Diagnostic:
    """A diagnostic inside a body, with a label at the call that led there."""
    at = diagnostic.span
    is_inside = at.source is call.span.source and call.span.start <= at.start and at.stop <= call.span.stop
    if is_inside or len(diagnostic.labels) >= 4:
        return diagnostic
    return replace(diagnostic, labels=(*diagnostic.labels, (call.span, f"in this call of `{call.function}`")))

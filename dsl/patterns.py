"""The body of a pattern: parameters, inputs, axes, equations and blocks, on its own or inlined in another."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from attnc.dsl import blocks
from attnc.dsl.builder import is_negative, is_zero
from attnc.dsl.builtins import RESERVED
from attnc.dsl.expressions import Expressions
from attnc.dsl.pointwise import Operand, arithmetic, require_int
from attnc.dsl.rejection import PoisonedError, RejectionError, rejection
from attnc.dsl.scopes import PREDEFINED, Bad, FunctionDefinition, Value
from attnc.dsl.source import Span
from attnc.dsl.syntax import (
    AxisDeclaration,
    Equation,
    Function,
    InputDeclaration,
    Name,
    ParameterDeclaration,
    PatternDeclaration,
    RepeatBlock,
    ScanBlock,
    Statement,
)
from attnc.dsl.terms import Axis, Input, Parameter, Term
from attnc.dsl.types import BUILT_IN_INDICES, Base, Type

BASES = {"int": Base.INT, "real": Base.REAL, "float": Base.REAL, "bool": Base.BOOL}


@dataclass(eq=False)
class Binding:
    """What declarations of a body mean: on its own they declare, inlined they take what the call gives.

    `prefix` is put before the names of declared axes, so that those of an inlined pattern stay apart.
    """

    parameter: Callable[[ParameterDeclaration], Value]
    input: Callable[[InputDeclaration], Term]
    prefix: str = ""


class Body:
    """Runs the statements of a pattern in the scope of `at`; `report` takes what is wrong, or raises it."""

    def __init__(self, at: Expressions, binding: Binding, report: Callable[[RejectionError], None]) -> None:
        self.at = at
        self.scope = at.scope
        self.binding = binding
        self.report = report

    def run(self, declaration: PatternDeclaration) -> None:
        for parameter in declaration.parameters:
            self._guarded((parameter.name,), lambda p=parameter: self._parameter(p))  # type: ignore[misc]
        for statement in declaration.body:
            self._guarded(assigned_names(statement), lambda s=statement: self._statement(s))  # type: ignore[misc]

    def _guarded(self, names: tuple[str, ...], action: Callable[[], None]) -> None:
        """Run one statement; if it is rejected, its names stand for a bad value, so that one error is reported once."""
        try:
            action()
        except (RejectionError, PoisonedError) as failure:
            if isinstance(failure, RejectionError):
                self.report(failure)
            for name in names:
                if name not in PREDEFINED and name not in BUILT_IN_INDICES:
                    self.scope.values.setdefault(name, Bad.VALUE)

    def _statement(self, statement: Statement) -> None:
        match statement:
            case Equation(name, value):
                self._define(name, statement.span)
                self.scope.values[name] = self.at.term(value)
            case Function():
                define_function(self.at, statement)
            case InputDeclaration(name):
                if name not in (*PREDEFINED[:3], "b"):
                    self._define(name, statement.span)
                self.scope.values[name] = self.binding.input(statement)
                self.scope.places[name] = statement.span
            case AxisDeclaration():
                self._axis(statement)
            case ScanBlock():
                self.scope.values.update(blocks.scan(self.at, statement))
            case RepeatBlock():
                self.scope.values.update(blocks.repeat(self.at, statement))

    def _parameter(self, parameter: ParameterDeclaration) -> None:
        if parameter.name == "scale" and parameter.type.base not in ("real", "float"):
            raise rejection("parameter", "`scale` is a real", parameter.span, help="write `scale: real = 1.0`")
        if parameter.name != "scale":
            self._define(parameter.name, parameter.span)
        self.scope.values[parameter.name] = self.binding.parameter(parameter)
        self.scope.places[parameter.name] = parameter.span

    def _define(self, name: str, span: Span) -> None:
        require_free(self.at, name, span)
        if name in self.scope.values or name in self.scope.functions or self.scope.axis(name) in self.at.context.axes:
            place = self.scope.places.get(name)
            labels = () if place is None else ((place, "defined here"),)
            raise rejection(
                "duplicate-name", f"`{name}` is already defined", span, *labels, help="give it another name"
            )
        self.scope.places[name] = span

    def _axis(self, statement: AxisDeclaration) -> None:
        """`axis s = blocks(j, size, stride)` or `segments(j, count)`."""
        self._define(statement.name, statement.span)
        call = statement.value
        if call.function not in ("blocks", "segments"):
            help = "write `blocks(j, size)`, `blocks(j, size, stride)` or `segments(j, count)`"
            raise rejection("unknown-function", f"`{call.function}` makes no axis", call.span, help=help)
        names = ("j", "size", "stride") if call.function == "blocks" and len(call.arguments) == 3 else ("j", "size")
        over, *rest = self.at.arguments(call, names)
        if not isinstance(over, Name) or over.identifier not in ("i", "j"):
            raise rejection("unknown-axis", f"`{call.function}` groups i or j, not `{over.span.text}`", over.span)
        lengths = [self._length(self.at.operand(argument)) for argument in rest]
        name = self._unused(self.binding.prefix + statement.name)
        stride = lengths[1] if len(lengths) > 1 else None
        axis = Axis(name, call.function, over.identifier, lengths[0], stride, span=statement.span)
        self.at.context.axes[name] = axis
        self.scope.axes[statement.name] = name

    def _length(self, operand: Operand) -> Term:
        require_int(operand, "a size")
        if operand.type.indices:
            raise rejection("type-mismatch", f"a size is one int, found {operand.type}", operand.span)
        if is_zero(operand.term):
            raise rejection(
                "division-by-zero", "blocks of length 0", operand.span, help="a size or a stride is at least 1"
            )
        if is_negative(operand.term):
            raise rejection("not-positive", f"a size is positive, not {operand.span.text}", operand.span)
        return operand.term

    def _unused(self, name: str) -> str:
        taken = self.at.context.axes
        if not self.binding.prefix or name not in taken:
            return name
        return next(f"{name}{n}" for n in range(2, len(taken) + 3) if f"{name}{n}" not in taken)


def assigned_names(statement: Statement) -> tuple[str, ...]:
    """Names that a statement gives a value."""
    match statement:
        case Equation(name) | InputDeclaration(name):
            return (name,)
        case ScanBlock(_, body) | RepeatBlock(_, body):
            return tuple(equation.name for equation in body)
    return ()


ANOTHER_NAME = "take another name"


def require_free(at: Expressions, name: str, span: Span) -> None:
    """Reject a name that the language has given a meaning."""
    if name in PREDEFINED:
        meaning = {"q": "the queries", "k": "the keys", "v": "the values", "scale": "a parameter of every pattern"}[
            name
        ]
        raise rejection("reserved-name", f"`{name}` is {meaning} and cannot be defined again", span, help=ANOTHER_NAME)
    if name in BUILT_IN_INDICES:
        raise rejection("reserved-name", f"`{name}` is an index and cannot be defined again", span, help=ANOTHER_NAME)


def define_function(at: Expressions, function: Function) -> None:
    """Add a function to the scope of `at`."""
    scope = at.scope
    require_free(at, function.name, function.span)
    if function.name in RESERVED:
        raise rejection("reserved-name", f"`{function.name}` is a function of the language", function.span)
    known = scope.functions.get(function.name)
    if known is not None or function.name in scope.values or function.name in scope.patterns:
        place = known.syntax.span if known is not None else scope.places.get(function.name)
        labels = () if place is None else ((place, "defined here"),)
        raise rejection("duplicate-name", f"`{function.name}` is already defined", function.span, *labels)
    for at_, name in enumerate(function.parameters):
        require_free(at, name, function.span)
        if name in function.parameters[:at_]:
            raise rejection("duplicate-name", f"`{function.name}` has two parameters `{name}`", function.span)
    scope.functions[function.name] = FunctionDefinition(function, scope)
    scope.places[function.name] = function.span


def parameter_base(declaration: ParameterDeclaration) -> tuple[Base, bool]:
    """Base type of a parameter, and whether it is a tuple."""
    name = declaration.type.base
    if declaration.type.axes:
        raise rejection(
            "parameter", "a parameter has no axes", declaration.type.span, help="an array is an input: `input x: ..`"
        )
    if name == "ints":
        return Base.INT, True
    if name not in BASES:
        raise rejection(
            "parameter", f"a parameter is an int, a real, a bool or ints, not `{name}`", declaration.type.span
        )
    return BASES[name], False


def input_layout(at: Expressions, declaration: InputDeclaration) -> tuple[tuple[str, ...], Type]:
    """The axes of an input as declared, and the type of its value."""
    base = BASES.get(declaration.type.base)
    if base is None:
        raise rejection(
            "parameter", f"an input is real, int or bool, not `{declaration.type.base}`", declaration.type.span
        )
    axes = tuple(at.scope.axis(name) or name for name in declaration.type.axes)
    indices = {name for name in axes if name in BUILT_IN_INDICES or name in at.context.axes}
    last = max((n for n, name in enumerate(axes) if name in indices), default=-1)
    kept = [name for n, name in enumerate(axes) if not (name == "1" and n < last)]
    vector = tuple(name for name in kept if name not in indices)
    if len(set(kept)) != len(kept):
        raise rejection("duplicate-name", f"`{declaration.name}` has an axis twice", declaration.type.span)
    if "t" in indices and indices & {"i", "j"}:
        help = "t is any position: read it as `x[i]` or `x[j]`"
        raise rejection("axis-mismatch", "an input is over t, or over i and j", declaration.type.span, help=help)
    if "0" in axes:
        raise rejection(
            "axis-mismatch", "an axis of length 0", declaration.type.span, help="an axis is at least 1 long"
        )
    return axes, Type(base, frozenset(indices), vector)


class Declarations:
    """The declarations of a pattern checked on its own; collects its parameters and inputs."""

    def __init__(self, at: Expressions, lengths: Mapping[str, int]) -> None:
        self.at = at
        self.lengths = lengths
        self.parameters: list[Parameter] = []
        self.inputs: list[Input] = []

    def parameter(self, declaration: ParameterDeclaration) -> Value:
        base, is_tuple = parameter_base(declaration)
        default = default_value(self.at, declaration, base, is_tuple)
        name, span = declaration.name, declaration.span
        elements: list[Term] = []
        if is_tuple:
            assert default is None or isinstance(default, tuple)
            length = self.lengths.get(name, 0 if default is None else len(default))
            if default is None and name not in self.lengths:
                help = f"give a default of the usual length: `{name}: ints = (1, 2)`"
                raise rejection("parameter", f"the length of `{name}` must be known", span, help=help)
            # The caller gives the elements: only how many there are is decided here.
            default = None if default is None else (*default, *default[-1:] * length)[:length]
            elements = [self.at.build.make("parameter", (), Type(base), span, f"{name}.{n}") for n in range(length)]
        self.parameters.append(Parameter(name, base, default, is_tuple, span=span))
        return tuple(elements) if is_tuple else self.at.build.make("parameter", (), Type(base), span, name)

    def input(self, declaration: InputDeclaration) -> Term:
        axes, type = input_layout(self.at, declaration)
        name = declaration.name
        if name in PREDEFINED:
            _require_layout(name, axes, type, declaration)
        default = None
        if declaration.default is not None:
            default = fitting(self.at, self.at.operand(declaration.default), type, f"the default of `{name}`")
        for axis in type.axes:
            self._axis(axis, declaration)
        self.inputs.append(Input(name, type.base, axes, default, span=declaration.span))
        return self.at.build.make("input", (), type, declaration.span, name)

    def _axis(self, axis: str, declaration: InputDeclaration) -> None:
        """Make a vector axis known by name; a number, or an int parameter of that name, fixes its length."""
        if axis.isdigit():
            self.at.context.sizes.setdefault(axis, self.at.build.literal(int(axis), declaration.type.span))
            return
        self.at.scope.axes.setdefault(axis, axis)
        value = self.at.scope.value(axis)
        if isinstance(value, Term) and value.form == "parameter":
            if value.type != Type(Base.INT):
                help = f"make it `{axis}: int`, or give the axis another name"
                raise rejection(
                    "parameter", f"the length of the axis `{axis}` is no int", declaration.type.span, help=help
                )
            self.at.context.sizes.setdefault(axis, value)


def _require_layout(name: str, axes: tuple[str, ...], type: Type, declaration: InputDeclaration) -> None:
    """q, k and v may be given another width, and nothing else."""
    position = "i" if name == "q" else "j"
    is_layout = len(axes) == 4 and axes[0] == "b" and axes[1] in ("h", "1") and axes[2] == position
    if is_layout and len(type.axes) == 1 and type.base is Base.REAL and declaration.default is None:
        return
    help = f"its layout is real[b, h, {position}, width], with the heads h or 1 and a width of any name"
    raise rejection("reserved-name", f"`{name}` cannot be declared like this", declaration.span, help=help)


def default_value(
    at: Expressions, declaration: ParameterDeclaration, base: Base, is_tuple: bool
) -> bool | int | float | tuple[int, ...] | None:
    """The default of a parameter, a literal of its type; None where there is none."""
    syntax = declaration.default
    if syntax is None:
        return None
    expected = "ints" if is_tuple else str(base)
    if not is_tuple:
        value = _literal(at.term(syntax), base)
        if value is None:
            help = f"write a literal, such as `{'true' if base is Base.BOOL else '1' if base is Base.INT else '1.0'}`"
            if base is Base.INT and re.fullmatch(r"[0-9.eE]+", syntax.span.text):
                help = f"write an int, such as `1`, or `{declaration.name}: real = {syntax.span.text}`"
            raise rejection(
                "parameter", f"the default of `{declaration.name}` is no {expected} literal", syntax.span, help=help
            )
        return value
    elements = tuple(_literal(term, base) for term in at.elements(syntax))
    if not elements or any(element is None for element in elements):
        raise rejection("parameter", f"the default of `{declaration.name}` is no tuple of ints", syntax.span)
    return tuple(int(element) for element in elements if element is not None)


def _literal(term: Term, base: Base) -> bool | int | float | None:
    value = term.attribute
    if term.form != "literal" or isinstance(value, (str, tuple)) or value is None:
        return None
    if base is Base.REAL and not isinstance(value, bool):
        return float(value)
    fits = isinstance(value, bool) if base is Base.BOOL else isinstance(value, int) and not isinstance(value, bool)
    return value if fits else None


def fitting(at: Expressions, operand: Operand, type: Type, what: str) -> Term:
    """A value that stands for one of a declared type: an int may be a real, and it may vary less."""
    found = operand.type
    term = (
        at.build.to_real(operand.term, operand.span)
        if (type.base, found.base) == (Base.REAL, Base.INT)
        else operand.term
    )
    extra = found.indices - type.indices
    if term.type.base is not type.base or found.selects or extra or len(found.axes) not in (0, len(type.axes)):
        raise rejection("type-mismatch", f"{what} must be {type}, found {found}", operand.span)
    return term


def default_scale(at: Expressions, axis: str, span: Span) -> Term:
    """D ** -0.5, for queries whose vector axis is `axis`."""
    width = Operand(at.build.size(axis, span), span)
    return arithmetic(at.build, "**", width, Operand(at.build.literal(-0.5, span), span), span)

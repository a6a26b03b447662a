"""A pattern that another one calls: its body with q, k, v, its parameters and its inputs as the call gives them."""

from __future__ import annotations

from attnc.dsl.diagnostics import did_you_mean
from attnc.dsl.expressions import Expressions, called_from
from attnc.dsl.patterns import Binding, Body, default_scale, default_value, fitting, input_layout, parameter_base
from attnc.dsl.pointwise import Operand, require_number
from attnc.dsl.rejection import PoisonedError, RejectionError, listed, rejection
from attnc.dsl.scopes import PatternDefinition, Scope, Value
from attnc.dsl.syntax import Call, Expression, InputDeclaration, ParameterDeclaration, PatternDeclaration
from attnc.dsl.terms import Term
from attnc.dsl.types import Base, Type


def inline(at: Expressions, pattern: PatternDefinition, call: Call) -> Term:
    """The value of `pattern(q, k, v, parameters.., inputs..)`: over (b, h, i), with one vector axis."""
    declaration = pattern.syntax
    if not pattern.sound:
        raise PoisonedError
    if pattern in at.context.active:
        raise rejection(
            "recursion", f"the pattern `{call.function}` calls itself", call.span, (declaration.span, "defined here")
        )
    if at.context.scanning:
        raise rejection(
            "scan", "a pattern called inside a scan", call.span, help="call it before the scan, and read the result"
        )
    scope, keywords = _opened(at, pattern, call)
    inner = at.inside(scope)
    given = _Given(at, inner, call, keywords)
    body = Body(inner, Binding(given.parameter, given.input, f"{call.function}_"), _raised)
    at.context.active.append(pattern)
    try:
        body.run(declaration)
    except RejectionError as rejected:
        raise RejectionError(called_from(rejected.diagnostic, call)) from None
    finally:
        at.context.active.pop()
    value = scope.values.get("out")
    if not isinstance(value, Term):
        raise PoisonedError
    return at.build.rename(value, "t", "i", call.span) if "t" in value.type.indices else value


def _raised(rejected: RejectionError) -> None:
    raise rejected


def _opened(at: Expressions, pattern: PatternDefinition, call: Call) -> tuple[Scope, dict[str, Expression]]:
    """The scope of an inlined body with q, k, v and scale, and the call's keywords."""
    if call.where is not None or call.loop is not None:
        raise rejection("argument", f"a call of the pattern `{call.function}` takes no `where` and no `for`", call.span)
    positional = [argument.value for argument in call.arguments if argument.name is None]
    keywords = {argument.name: argument.value for argument in call.arguments if argument.name is not None}
    known = _keywords(pattern.syntax)
    for argument in call.arguments:
        if argument.name is not None and argument.name not in known:
            help = did_you_mean(argument.name, known) or f"it has {listed(sorted(known))}"
            raise rejection(
                "argument", f"`{call.function}` has no parameter or input `{argument.name}`", argument.span, help=help
            )
    if len(keywords) + len(positional) != len(call.arguments):
        raise rejection("argument", "a keyword is given twice", call.span)
    if len(positional) != 3:
        message = f"`{call.function}(q, k, v, ..)` takes 3 arguments without a name, found {len(positional)}"
        raise rejection("argument", message, call.span, help="parameters and inputs are given by name: `window = 3`")
    operands = [at.operand(value) for value in positional]
    for name, operand in zip("qkv", operands, strict=True):
        _require_tokens(name, operand)
    q, k, v = operands
    scope = Scope(pattern.scope, values={"q": q.term, "k": k.term, "v": v.term})
    scope.axes = {"d": q.type.axes[0], "e": v.type.axes[0]}
    inner = at.inside(scope)
    scale = at.operand(keywords.pop("scale")) if "scale" in keywords else None
    if scale is not None:
        scope.values["scale"] = fitting(at, scale, Type(Base.REAL, frozenset("bh")), "`scale`")
    else:
        scope.values["scale"] = default_scale(inner, q.type.axes[0], call.span)
    return scope, keywords


def _keywords(declaration: PatternDeclaration) -> set[str]:
    inputs = {statement.name for statement in declaration.body if isinstance(statement, InputDeclaration)}
    return {"scale"} | {parameter.name for parameter in declaration.parameters} | inputs


def _require_tokens(name: str, operand: Operand) -> None:
    """An argument for q varies over i, one for k or v over j; each is a vector."""
    index = "i" if name == "q" else "j"
    require_number(operand)
    if operand.type.base is not Base.REAL or len(operand.type.axes) != 1 or operand.type.indices - {"b", "h", index}:
        width = "e" if name == "v" else "d"
        raise rejection(
            "type-mismatch", f"`{name}` must be real[b, h, {index}; {width}], found {operand.type}", operand.span
        )


class _Given:
    """Parameters and inputs of an inlined body, as the call gives them."""

    def __init__(self, outside: Expressions, inside: Expressions, call: Call, keywords: dict[str, Expression]) -> None:
        self.outside = outside
        self.inside = inside
        self.call = call
        self.keywords = keywords

    def parameter(self, declaration: ParameterDeclaration) -> Value:
        base, is_tuple = parameter_base(declaration)
        name = declaration.name
        if name == "scale":
            own = self.inside.scope.values["scale"]
            is_given = any(argument.name == "scale" for argument in self.call.arguments)
            if is_given or declaration.default is None:
                return own
        if is_tuple:
            elements = self._elements(declaration)
            return tuple(fitting(self.outside, element, Type(base), f"`{name}`") for element in elements)
        if name in self.keywords:
            return fitting(self.outside, self.outside.operand(self.keywords[name]), Type(base), f"`{name}`")
        default = default_value(self.inside, declaration, base, is_tuple)
        if default is None or isinstance(default, tuple):
            raise rejection(
                "argument",
                f"`{self.call.function}` needs `{name}`",
                self.call.span,
                (declaration.span, "declared here"),
            )
        return self.inside.build.literal(default, declaration.span)

    def _elements(self, declaration: ParameterDeclaration) -> list[Operand]:
        name = declaration.name
        syntax = self.keywords.get(name, declaration.default)
        if syntax is None:
            raise rejection(
                "argument",
                f"`{self.call.function}` needs `{name}`",
                self.call.span,
                (declaration.span, "declared here"),
            )
        at = self.outside if name in self.keywords else self.inside
        return [Operand(term, syntax.span) for term in at.elements(syntax)]

    def input(self, declaration: InputDeclaration) -> Term:
        name = declaration.name
        scope = self.inside.scope
        if name in "qkv":
            value = scope.values[name]
            assert isinstance(value, Term)
            scope.axes[declaration.type.axes[-1]] = value.type.axes[0]
            return value
        type = input_layout(self.inside, declaration)[1]
        if name not in self.keywords:
            if declaration.default is None:
                place = (declaration.span, "declared here")
                raise rejection("argument", f"`{self.call.function}` needs the input `{name}`", self.call.span, place)
            return fitting(self.inside, self.inside.operand(declaration.default), type, f"the default of `{name}`")
        operand = self.outside.operand(self.keywords[name])
        term = fitting(self.outside, operand, type, f"the input `{name}`")
        for declared, found in zip(type.axes, operand.type.axes, strict=False):
            if declared != found and (declared.isdigit() or scope.axes.get(declared, found) != found):
                what = f"the input `{name}` must be {type}, found {operand.type}"
                raise rejection("axis-mismatch", what, operand.span, (declaration.span, "declared here"))
            scope.axes[declared] = found
        return term

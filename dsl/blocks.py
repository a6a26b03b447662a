"""`scan t:` and `repeat steps:`: recurrences, their states, and the types of these, found as a fixed point."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

from attnc.dsl.builder import UNKNOWN
from attnc.dsl.expressions import Expressions
from attnc.dsl.pointwise import Operand, require_int, require_number
from attnc.dsl.rejection import listed, rejection
from attnc.dsl.scopes import Scope
from attnc.dsl.source import Span
from attnc.dsl.syntax import Equation, Expression, Name, RepeatBlock, ScanBlock, Syntax
from attnc.dsl.terms import Repeat, Scan, Term
from attnc.dsl.types import Base, Type

# A type can only grow by indices and once from int to real, so a fixed point is reached well before this.
MAX_ROUNDS = 16


def nodes(syntax: Syntax) -> Iterator[Syntax]:
    """A node of the syntax tree and all below it."""
    stack: list[object] = [syntax]
    while stack:
        node = stack.pop()
        if isinstance(node, tuple):
            stack.extend(node)
        elif isinstance(node, Syntax):
            yield node
            stack.extend(getattr(node, entry.name) for entry in fields(node))


def free_names(syntax: Expression) -> Iterator[str]:
    """Names that an expression reads."""
    return (node.identifier for node in nodes(syntax) if isinstance(node, Name))


def scan(at: Expressions, syntax: ScanBlock) -> dict[str, Term]:
    """Check a scan; the value over t of every name that it assigns."""
    if syntax.index != "t":
        raise rejection("scan", f"a scan runs over t, not over `{syntax.index}`", syntax.span, help="write `scan t:`")
    if at.context.scanning:
        raise rejection("scan", "a scan inside a scan", syntax.span)
    for equation in syntax.body:
        _require_new(at, equation)
    names = _scan_states(at.scope, syntax.body)
    at.context.scanning = True
    try:
        states = dict.fromkeys(names, UNKNOWN)
        steps, states = _fixed_point(at, syntax.body, states, "t")
    finally:
        at.context.scanning = False
    for name, type in states.items():
        if type is UNKNOWN:
            place = next(equation.span for equation in syntax.body if equation.name == name)
            help = f"a state starts at 0; add something to it, as in `{name} = {name} + outer(k, v)`"
            raise rejection("scan", f"the state `{name}` stays 0: every step only multiplies it", place, help=help)
    results = {}
    for name, term in dict(steps).items():
        block = Scan("t", tuple(states.items()), tuple(steps), name)
        type = states.get(name, term.type)
        over = Type(type.base, type.indices | {"t"}, type.axes, type.selects)
        results[name] = at.build.make("scan", (), over, term.span, None, block)
    return results


def repeat(at: Expressions, syntax: RepeatBlock) -> dict[str, Term]:
    """Check a repeat; the final value of every name that it changes."""
    if at.context.scanning:
        raise rejection("scan", "a repeat inside a scan", syntax.span)
    count = at.operand(syntax.count)
    require_int(count, "how often to repeat")
    if count.type.indices:
        raise rejection("type-mismatch", f"how often to repeat is one int, found {count.type}", count.span)
    initial: dict[str, Term] = {}
    for equation in syntax.body:
        value = at.value(equation.name, equation.span)
        if isinstance(value, Term):
            require_number(Operand(value, equation.span))
            initial[equation.name] = value
        elif equation.name in free_names(equation.value):
            help = f"write `{equation.name} = ..` before `repeat`"
            raise rejection(
                "unknown-name", f"`{equation.name}` has no value before the first round", equation.span, help=help
            )
    steps, states = _fixed_point(at, syntax.body, {name: term.type for name, term in initial.items()}, None)
    args = [count.term]
    for name, term in initial.items():
        args.append(at.build.to_real(term, term.span) if states[name].base is Base.REAL else term)
    results = {}
    for name in initial:
        block = Repeat(tuple(states.items()), tuple(steps), name)
        span = next(term.span for step, term in reversed(steps) if step == name)
        results[name] = at.build.make("repeat", tuple(args), states[name], span, None, block)
    return results


def _require_new(at: Expressions, equation: Equation) -> None:
    """A scan makes its names: they have no value from before."""
    if at.scope.value(equation.name) is None:
        return
    place = at.scope.place(equation.name)
    labels = () if place is None else ((place, "defined here"),)
    help = "a state of a scan starts at 0; give it another name"
    raise rejection("duplicate-name", f"`{equation.name}` is already defined", equation.span, *labels, help=help)


def _scan_states(scope: Scope, body: tuple[Equation, ...]) -> list[str]:
    """Names read before they are assigned, or assigned in terms of themselves; in the order of assignment."""
    assigned: set[str] = set()
    states: set[str] = set()
    names = [equation.name for equation in body]
    for equation in body:
        for name in free_names(equation.value):
            is_size = scope.size(name) is not None
            if name in names and name not in assigned and (name == equation.name or not is_size):
                states.add(name)
        assigned.add(equation.name)
    return [name for name in dict.fromkeys(names) if name in states]


def _fixed_point(
    at: Expressions, body: tuple[Equation, ...], states: dict[str, Type], index: str | None
) -> tuple[list[tuple[str, Term]], dict[str, Type]]:
    """Steps of a block and the types of its states, which hold whatever any round assigns to them."""
    used = at.build.count
    for _ in range(MAX_ROUNDS):
        at.build.count = used  # only the last round's terms are kept
        steps = _round(at, body, states, index)
        grown = dict(states)
        for name, term in steps:
            if name in grown:
                grown[name] = _grown(name, grown[name], term, index)
        if all(grown[name] == states[name] for name in states):
            return [(name, _as_state(at, term, states.get(name))) for name, term in steps], states
        states = grown
    raise AssertionError("the types of the states do not settle")


def _round(
    at: Expressions, body: tuple[Equation, ...], states: dict[str, Type], index: str | None
) -> list[tuple[str, Term]]:
    """The block's equations once, with the states of given types."""
    scope = Scope(at.scope)
    inner = at.inside(scope)
    for name, type in states.items():
        scope.values[name] = at.build.make("state", (), type, _first(body, name), name)
    steps = []
    for equation in body:
        term = inner.term(equation.value)
        require_number(Operand(term, equation.value.span))
        steps.append((equation.name, term))
        # A new term after each assignment: one term has one value.
        form = "state" if equation.name in states else "local"
        type = states.get(equation.name, _without(term.type, index))
        scope.values[equation.name] = at.build.make(form, (), type, equation.span, equation.name)
        scope.places[equation.name] = equation.span
    return steps


def _first(body: tuple[Equation, ...], name: str) -> Span:
    return next(equation.span for equation in body if equation.name == name)


def _without(type: Type, index: str | None) -> Type:
    if type is UNKNOWN or index is None:
        return type
    return Type(type.base, type.indices - {index}, type.axes, type.selects)


def _grown(name: str, known: Type, term: Term, index: str | None) -> Type:
    """The least type that holds what a state held and what a step gives it."""
    new = _without(term.type, index)
    if new is UNKNOWN or known is UNKNOWN:
        return known if new is UNKNOWN else new
    if new.axes and known.axes and new.axes != known.axes:
        raise rejection(
            "axis-mismatch",
            f"the state `{name}` has the vector axes {listed(known.axes)}, and is given {listed(new.axes)}",
            term.span,
        )
    base = Base.REAL if Base.REAL in (new.base, known.base) else Base.INT
    return Type(base, known.indices | new.indices, known.axes or new.axes)


def _as_state(at: Expressions, term: Term, state: Type | None) -> Term:
    if state is None or state is UNKNOWN or state.base is term.type.base:
        return term
    return at.build.to_real(term, term.span)

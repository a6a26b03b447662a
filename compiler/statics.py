"""Parameters whose value decides what a pattern compiles to: the exponents of weights, which multiply out.

A call with another value of such a parameter runs another program, made once a value, as for the length of a tuple.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from attnc.dsl.terms import Pattern, Repeat, Scan, Term
from attnc.dsl.types import Base


def static_parameters(pattern: Pattern) -> tuple[str, ...]:
    """The int parameters that are the exponent of a value over pairs of rows and keys."""
    found: dict[str, None] = {}
    for term in below(pattern.out):
        if term.form == "pow" and {"i", "j"} <= term.args[0].type.indices:
            exponent = term.args[1].args[0] if term.args[1].form == "to_real" else term.args[1]
            if exponent.form == "parameter" and exponent.type.base is Base.INT:
                found[str(exponent.attribute)] = None
    return tuple(found)


def by_default(pattern: Pattern) -> Pattern:
    """The pattern for the default values of its static parameters."""
    known = {p.name: p.default for p in pattern.parameters if p.name in static_parameters(pattern)}
    return specialised(pattern, {name: value for name, value in known.items() if isinstance(value, int)})


def specialised(pattern: Pattern, values: Mapping[str, int]) -> Pattern:
    """The pattern with numbers in the place of some int parameters; they stay declared."""
    done: dict[int, Term] = {}
    for term in below(pattern.out):
        if term.form == "parameter" and term.attribute in values:
            number = values[str(term.attribute)]
            done[id(term)] = Term("literal", (), term.type, number, span=term.span)
            continue
        block = term.block
        if block is not None:
            block = replace(block, steps=tuple((name, done[id(step)]) for name, step in block.steps))
        args = tuple(done[id(arg)] for arg in term.args)
        same = block is term.block and all(x is y for x, y in zip(args, term.args, strict=True))
        done[id(term)] = term if same else replace(term, args=args, block=block)
    return replace(pattern, out=done[id(pattern.out)])


def below(root: Term) -> Iterator[Term]:
    """Every term once, operands and the steps of blocks before their users."""
    seen: set[int] = set()
    stack = [(root, False)]
    while stack:
        term, expanded = stack.pop()
        if expanded:
            yield term
        elif id(term) not in seen:
            seen.add(id(term))
            stack.append((term, True))
            stack.extend((operand, False) for operand in reversed([*term.args, *steps(term.block)]))


def steps(block: Scan | Repeat | None) -> list[Term]:
    """What the steps of a block assign."""
    return [] if block is None else [step for _, step in block.steps]

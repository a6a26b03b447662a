"""Compiled patterns by key: what the torch operator, which takes strings and tensors only, looks up."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from attnc.compiler.statics import specialised, static_parameters
from attnc.dsl.check import check
from attnc.dsl.source import Source, Span
from attnc.dsl.terms import Parameter, Pattern, Term
from attnc.dsl.types import Base

if TYPE_CHECKING:
    from attnc.compiler.composition import Composition
    from attnc.compiler.plan import Plan

PROGRAMS: dict[str, Program] = {}


class Program:
    """A checked pattern, its key, and its plan once somebody asks for it."""

    def __init__(self, pattern: Pattern, root: Path | None, composition: Composition | None = None) -> None:
        """`composition`: of a pattern that has another one than its text alone gives."""
        self._composition = composition
        self.pattern = pattern
        self.root = root
        self.key = f"{pattern.name}-{fingerprint(pattern)[:24]} of {pattern.source.name}"
        self.parameters = with_scale(pattern)
        self._variants: dict[tuple[tuple[str, int], ...], Program] = {}
        self._numbered: dict[tuple[tuple[str, int], ...], Program] = {}

    @cached_property
    def composition(self) -> Composition:
        """What the back ends execute. Raises AttnError where the pattern uses a form that is not lowered yet."""
        if self._composition is not None:
            return self._composition
        from attnc.compiler.pipeline import compose  # imports sympy, which a reader of files does not need

        return compose(self.pattern)

    @property
    def is_one_softmax(self) -> bool:
        """Whether the text's result is one softmax over keys, or a merge: its rows have a log-sum-exp."""
        return self._sums_weights and self.composition.is_one_softmax

    @cached_property
    def _sums_weights(self) -> bool:
        """Whether the text says so: a merge, or values summed with weights (not what reassociation makes one)."""
        out = self.pattern.out
        if out.form != "dot" or len(out.args) != 2:
            return out.form == "merge"
        softmaxes = [one.attribute for one in out.args if one.form == "softmax"]
        return any(isinstance(over, tuple) and over[0] == out.attribute for over in softmaxes)

    @cached_property
    def absorbed(self) -> Composition:
        """The composition in which queries take over projections of the keys."""
        from attnc.compiler.pipeline import compose

        return compose(self.pattern, absorbed=True)

    def composition_for(self, sizes: Mapping[str, int], widest: int | None = None) -> Composition:
        """The cheaper composition for a call of these lengths; `widest`: vectors that what executes it can take."""
        from attnc.compiler.absorb import saves

        projections = self.composition.projections
        if not projections or not saves(projections, sizes):
            return self.composition
        fits = widest is None or self.absorbed.widest(sizes) <= widest
        return self.absorbed if fits else self.composition

    @property
    def plans(self) -> list[Plan]:
        """The plans of the steps that stream keys."""
        from attnc.compiler.pipeline import plans

        return plans(self.composition.steps)

    @property
    def plan(self) -> Plan:
        """The plan of a pattern that is one attention over q, k and v as they are given; LookupError for others."""
        step = self.composition.attention
        if step is None:
            raise LookupError(f"{self.pattern.name} is more than one attention over q, k and v")
        return step.plan

    @cached_property
    def lengths(self) -> dict[str, int]:
        """Length of every tuple parameter."""
        return {p.name: len(p.default) for p in self.parameters if isinstance(p.default, tuple)}

    @cached_property
    def token_read(self) -> Term | None:
        """A read of a token input at the query's position, if there is one: such a pattern needs N <= M."""
        found = (t for t in terms(self.pattern) if t.form == "rename" and t.attribute == ("t", "i"))
        return next(found, None)

    @cached_property
    def divisors(self) -> tuple[tuple[Term, Span], ...]:
        """What divides in the text or sizes an axis, with the place, but numbers: it must be positive in every call."""
        found = [(term.args[1], term.span) for term in terms(self.pattern) if term.form in ("floordiv", "mod")]
        found += [(term, axis.span) for axis in self.pattern.axes for term in (axis.size, axis.stride) if term]
        return tuple((term, span) for term, span in found if term.form != "literal" and not term.type.indices)

    @cached_property
    def statics(self) -> tuple[str, ...]:
        """Parameters that a call must give a number to before the pattern compiles: see `with_numbers`."""
        return static_parameters(self.pattern)

    def with_numbers(self, numbers: Mapping[str, int]) -> Program:
        """The program for these values of the parameters that are `statics`."""
        chosen = tuple((name, numbers[name]) for name in self.statics)
        if not chosen:
            return self
        if chosen not in self._numbered:
            self._numbered[chosen] = register(specialised(self.pattern, dict(chosen)), self.root)
        return self._numbered[chosen]

    @cached_property
    def handing(self) -> Program:
        """The program whose calls go on from one another: states are its last inputs, see `compiler.handing`.

        Raises AttnError, located, for a pattern that needs more of earlier tokens than states.
        """
        from attnc.compiler.handing import handing, state_inputs

        made = handing(self.pattern, self.composition, {})
        inputs = (*self.pattern.inputs, *state_inputs(made))
        return register(replace(self.pattern, parameters=made.parameters, inputs=inputs), self.root, made)

    @property
    def counts(self) -> bool:
        """Whether such a program takes how many tokens earlier calls had, as its last int."""
        from attnc.compiler.handing import COUNTED

        return any(parameter.name == COUNTED for parameter in self.parameters)

    @cached_property
    def counted(self) -> tuple[str, ...]:
        """The int parameters that kernels count with: all that a result reads but seeds of random numbers."""
        found: dict[str, None] = {}
        seen: set[int] = set()
        stack = [self.pattern.out]
        while stack:
            term = stack.pop()
            if id(term) in seen or term.form in ("uniform", "orthogonal_gaussian"):
                continue
            seen.add(id(term))
            if term.form == "parameter" and term.type.base is Base.INT:
                found[str(term.attribute)] = None
            stack += [*term.args, *(step for _, step in term.block.steps)] if term.block else term.args
        return tuple(found)

    def with_lengths(self, lengths: Mapping[str, int]) -> Program:
        """The same pattern for tuple parameters of other lengths; its text is checked again, once a combination."""
        changed = tuple(sorted((name, length) for name, length in lengths.items() if length != self.lengths[name]))
        if not changed:
            return self
        if changed not in self._variants:
            patterns = check(self.pattern.source, root=self.root, lengths=dict(changed))
            self._variants[changed] = register(patterns[self.pattern.name], self.root)
        return self._variants[changed]


def register(pattern: Pattern, root: Path | None, composition: Composition | None = None) -> Program:
    """The program of a checked pattern, known by its key from now on."""
    program = Program(pattern, root, composition)
    PROGRAMS[program.key] = PROGRAMS[_meaning(program.key)] = program
    return program


def program(key: str) -> Program:
    """The program of a key: of its own file, else of the same text wherever it was loaded from.

    The name of the file is part of a key for the sake of diagnostics; a graph that was exported elsewhere still
    finds its pattern. Raises LookupError where no text of that meaning is loaded.
    """
    found = PROGRAMS.get(key) or PROGRAMS.get(_meaning(key))
    if found is None:
        raise LookupError(
            f"no pattern of key `{key}` is loaded in this process: load its .attn file first "
            f"(the same text, by the same version of attnc, as when the operator was recorded)"
        )
    return found


def _meaning(key: str) -> str:
    return key.partition(" of ")[0]


def with_scale(pattern: Pattern) -> tuple[Parameter, ...]:
    """The parameters of a pattern with `scale` among them; a default of None there means D**-0.5."""
    if any(parameter.name == "scale" for parameter in pattern.parameters):
        return pattern.parameters
    scale = Parameter("scale", Base.REAL, None, False, span=pattern.span)
    return (*pattern.parameters, scale)


def fingerprint(pattern: Pattern) -> str:
    """Digest of all that a pattern means and of every text that it is made of."""
    digest = hashlib.sha256()
    numbers: dict[int, int] = {}
    sources: dict[Source, None] = {pattern.source: None}
    for term in terms(pattern):
        numbers[id(term)] = len(numbers)
        sources[term.span.source] = None
        args = [numbers[id(arg)] for arg in term.args]
        block = term.block and (*term.block.states, *((name, numbers[id(step)]) for name, step in term.block.steps))
        result = term.block and term.block.result
        line = (term.form, args, str(term.type), type(term.attribute).__name__, term.attribute, str(block), result)
        digest.update(f"{line}\n".encode())
    for parameter in pattern.parameters:
        digest.update(f"{parameter.name, parameter.base, parameter.default, parameter.is_tuple}\n".encode())
    for declared in pattern.inputs:
        default = declared.default and numbers[id(declared.default)]
        digest.update(f"{declared.name, declared.base, declared.axes, default}\n".encode())
    for axis in pattern.axes:
        stride = axis.stride and numbers[id(axis.stride)]
        digest.update(f"{axis.name, axis.kind, axis.over, numbers[id(axis.size)], stride}\n".encode())
    sizes = [(name, numbers[id(size)]) for name, size in pattern.sizes]
    digest.update(f"{pattern.name, pattern.output_axes, pattern.uses_value, numbers[id(pattern.out)], sizes}".encode())
    for source in sources:
        digest.update(b"\0" + source.text.encode())
    return digest.hexdigest()


def terms(pattern: Pattern) -> Iterator[Term]:
    """Every term of a pattern once, operands and the steps of blocks before their users."""
    roots = [pattern.out, *(size for _, size in pattern.sizes)]
    roots += [declared.default for declared in pattern.inputs if declared.default is not None]
    for axis in pattern.axes:
        roots += [axis.size] if axis.stride is None else [axis.size, axis.stride]
    seen: set[int] = set()
    stack = [(root, False) for root in reversed(roots)]
    while stack:
        term, expanded = stack.pop()
        if expanded:
            yield term
        elif id(term) not in seen:
            seen.add(id(term))
            operands = term.args + (tuple(step for _, step in term.block.steps) if term.block else ())
            stack.append((term, True))
            stack.extend((operand, False) for operand in reversed(operands))

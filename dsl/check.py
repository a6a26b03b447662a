"""The checker: a `.attn` file to checked patterns, with names resolved, functions inlined and every type known.

`check` reads the file; modules.py finds what it uses; patterns.py runs a pattern's statements; expressions.py
makes the terms, with the rules of pointwise.py, products.py, reductions.py, reading.py and blocks.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from attnc.dsl.builtins import RESERVED
from attnc.dsl.diagnostics import AttnError, Diagnostic
from attnc.dsl.expressions import Context, Expressions
from attnc.dsl.inlining import inline
from attnc.dsl.modules import Modules, folder_of
from attnc.dsl.parse import parse
from attnc.dsl.patterns import Binding, Body, Declarations, define_function
from attnc.dsl.pointwise import Operand, require_number
from attnc.dsl.rejection import PoisonedError, RejectionError, listed, rejection
from attnc.dsl.scopes import PREDEFINED, PatternDefinition, Scope
from attnc.dsl.source import Source, Span
from attnc.dsl.syntax import Equation, File, Function, PatternDeclaration, RepeatBlock, ScanBlock
from attnc.dsl.terms import Pattern, Term
from attnc.dsl.types import Base, Type
from attnc.dsl.uncalled import unknown_names


def check(source: Source, *, root: Path | None = None, lengths: Mapping[str, int] | None = None) -> dict[str, Pattern]:
    """Check a file and give its patterns by name, in the order of the text.

    `root` is the folder that holds every file it may use; a source that is named by an existing path finds
    them beside itself without. `lengths` gives tuple parameters another length than that of their defaults.
    Raises AttnError with all errors of the file, ValueError for a length of an unknown parameter.
    """
    file = parse(source)
    folder = folder_of(source) or root
    modules = Modules(root or folder)
    scope = modules.scope(file, folder)
    checker = _FileChecker(source, scope, lengths or {})
    patterns = checker.run(file)
    found = checker.diagnostics
    if modules.diagnostics:  # what a `use` did not give is not missed once more
        found = [diagnostic for diagnostic in found if diagnostic.code != "unknown-function"]
    diagnostics = _distinct(modules.diagnostics + found)
    if diagnostics:
        raise AttnError(diagnostics)
    return patterns


def _distinct(diagnostics: list[Diagnostic]) -> list[Diagnostic]:
    """Without repeats (an error in a function shows at each of its calls), in the order of the text."""
    first: dict[tuple[str, int, int], Diagnostic] = {}
    for diagnostic in diagnostics:
        span = diagnostic.span
        first.setdefault((span.source.name, span.start, span.stop), diagnostic)
    sources = list(dict.fromkeys(diagnostic.span.source.name for diagnostic in first.values()))
    return sorted(first.values(), key=lambda found: (sources.index(found.span.source.name), found.span.start))


class _FileChecker:
    """Checks the items of one file in order; a pattern sees those before it."""

    def __init__(self, source: Source, scope: Scope, lengths: Mapping[str, int]) -> None:
        self.source = source
        self.scope = scope
        self.lengths = lengths
        self.diagnostics: list[Diagnostic] = []
        self.called: set[object] = set()

    def run(self, file: File) -> dict[str, Pattern]:
        patterns: dict[str, Pattern] = {}
        top = Expressions(Context(inline), self.scope)
        functions = [item for item in file.items if isinstance(item, Function)]
        for function in functions:
            try:
                define_function(top, function)
            except RejectionError as rejected:
                self.diagnostics.append(rejected.diagnostic)
        declarations = [item for item in file.items if isinstance(item, PatternDeclaration)]
        self._require_lengths(declarations)
        for declaration in declarations:
            pattern = self._pattern(declaration)
            if pattern is not None:
                patterns[declaration.name] = pattern
            self.scope.patterns[declaration.name] = PatternDefinition(declaration, self.scope, pattern is not None)
            self.scope.places[declaration.name] = header(declaration)
        for definition in self.scope.functions.values():
            if definition not in self.called:
                self.diagnostics.extend(unknown_names(definition))
        return patterns

    def _require_lengths(self, declarations: list[PatternDeclaration]) -> None:
        known = {p.name for declaration in declarations for p in declaration.parameters if p.type.base == "ints"}
        unknown = sorted(set(self.lengths) - known)
        if unknown:
            raise ValueError(f"lengths of {listed(unknown)} given; the tuple parameters are {listed(sorted(known))}")

    def _pattern(self, declaration: PatternDeclaration) -> Pattern | None:
        """One pattern, or None where it has errors."""
        before = len(self.diagnostics)
        if declaration.name in self.scope.patterns or declaration.name in self.scope.functions:
            place = self.scope.places.get(declaration.name)
            labels = () if place is None else ((place, "defined here"),)
            message = f"`{declaration.name}` is already defined"
            self.diagnostics.append(Diagnostic("duplicate-name", message, header(declaration), labels))
        if declaration.name in RESERVED:
            message = f"`{declaration.name}` is a function of the language"
            self.diagnostics.append(Diagnostic("reserved-name", message, header(declaration)))
        context = Context(inline)
        scope = Scope(self.scope)
        at = Expressions(context, scope)
        predefine(at, header(declaration))
        declared = Declarations(at, self.lengths)
        body = Body(at, Binding(declared.parameter, declared.input), self._report)
        body.run(declaration)
        self._note_calls(context, scope)
        try:
            out, output_axes = _output(at, declaration)
        except RejectionError as rejected:
            self._report(rejected)
            return None
        except PoisonedError:
            return None  # what it uses was rejected, here or in the pattern it calls
        if len(self.diagnostics) > before:
            return None
        return Pattern(
            name=declaration.name,
            source=self.source,
            parameters=tuple(declared.parameters),
            inputs=tuple(declared.inputs),
            axes=tuple(context.axes.values()),
            out=out,
            output_axes=output_axes,
            uses_value=_reads_value(out),
            sizes=tuple(context.sizes.items()),
            span=declaration.span,
        )

    def _note_calls(self, context: Context, scope: Scope) -> None:
        """Read the functions of a pattern that it does not call, and note those of the file that it does."""
        called = {key[0] for key in context.inlined}
        self.called |= called
        for function in scope.functions.values():
            if function not in called:
                self.diagnostics.extend(unknown_names(function))

    def _report(self, rejected: RejectionError) -> None:
        self.diagnostics.append(rejected.diagnostic)


def header(declaration: PatternDeclaration) -> Span:
    """The first line of a pattern."""
    span = declaration.span
    first = span.text.split("\n", 1)[0].rstrip()
    return Span(source=span.source, start=span.start, stop=span.start + len(first))


def predefine(at: Expressions, span: Span) -> None:
    """q, k, v and scale."""
    layouts = {"q": ("i", "d"), "k": ("j", "d"), "v": ("j", "e")}
    for name in PREDEFINED[:3]:
        index, axis = layouts[name]
        type = Type(Base.REAL, frozenset({"b", "h", index}), (axis,))
        at.scope.values[name] = at.build.make("input", (), type, span, name)
    at.scope.values["scale"] = at.build.make("parameter", (), Type(Base.REAL), span, "scale")


def _output(at: Expressions, declaration: PatternDeclaration) -> tuple[Term, tuple[str, ...]]:
    """The result of a pattern and its layout."""
    value = at.value("out", header(declaration))
    if not isinstance(value, Term):
        help = "the result is what `out` is: `out = softmax[j](q @ k * scale) @ v`"
        raise rejection(
            "missing-output", f"the pattern `{declaration.name}` assigns no `out`", header(declaration), help=help
        )
    span = _output_span(declaration) or value.span
    if "t" in value.type.indices:
        value = at.build.rename(value, "t", "i", span)
    require_number(Operand(value, span))
    value = at.build.to_real(value, span)
    extra = sorted(value.type.indices - {"b", "h", "i"})
    if extra:
        remedy = "contract it: `softmax[j](..) @ v`, or `sum[j](..)`" if extra == ["j"] else None
        raise rejection("output", f"`out` still varies over {listed(extra)}: it is {value.type}", span, help=remedy)
    axes = value.type.axes
    if not axes:
        raise rejection("output", f"`out` must be a vector, found {value.type}", span, help="multiply by `v`: `.. @ v`")
    if len(axes) == 1:
        return value, ("b", "h", "i", *axes)
    if "i" in value.type.indices:
        help = "contract one of them with a vector, as in `q @ S`; a score is `q @ k`, not `q * k`"
        raise rejection("output", f"`out` has more than one vector axis: it is {value.type}", span, help=help)
    return value, ("b", "h", *axes)


def _output_span(declaration: PatternDeclaration) -> Span | None:
    """The expression that is assigned to `out`."""
    spans = [
        equation.value.span
        for statement in declaration.body
        for equation in (statement.body if isinstance(statement, ScanBlock | RepeatBlock) else (statement,))
        if isinstance(equation, Equation) and equation.name == "out"
    ]
    return spans[-1] if spans else None


def _reads_value(out: Term) -> bool:
    """Whether v plays a part in the result."""
    seen = {out}
    stack = [out]
    while stack:
        term = stack.pop()
        if term.form == "input" and term.attribute == "v":
            return True
        inner = term.args + tuple(step for _, step in term.block.steps) if term.block else term.args
        new = [arg for arg in inner if arg not in seen]
        seen.update(new)
        stack.extend(new)
    return False

"""What an editor asks about a text, right or wrong: the types of its expressions, and what its names stand for.

A text that is being written has mistakes. Lines that cannot be read are taken out, statements that break a rule are
passed over, and the rest still has its meaning. Places are (line, column), both counted from 0, since what is taken out
moves no line.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from attnc.dsl.builder import UNKNOWN
from attnc.dsl.check import header, predefine
from attnc.dsl.definitions import Definition, definitions, function_heading, pattern_heading
from attnc.dsl.diagnostics import AttnError
from attnc.dsl.expressions import Context, Expressions
from attnc.dsl.inlining import inline
from attnc.dsl.modules import Modules, prelude
from attnc.dsl.parse import parse
from attnc.dsl.patterns import Binding, Body, Declarations, define_function
from attnc.dsl.rejection import RejectionError
from attnc.dsl.scopes import PatternDefinition, Scope, Value
from attnc.dsl.source import Source, Span
from attnc.dsl.syntax import Expression, File, Function, PatternDeclaration, Use
from attnc.dsl.terms import Term
from attnc.dsl.types import Type

Place = tuple[int, int]
MOST_REPAIRS = 12
STAND_IN = "_ = 0"


class Analysis:
    """A text with its mistakes passed over. `unfinished`: a line that is being written and not to be read."""

    def __init__(self, source: Source, folder: Path | None = None, unfinished: int | None = None) -> None:
        self.folder = folder
        self.file = _readable(source, unfinished)
        self.source = source if self.file is None else self.file.source
        self.types: dict[Span, Type] = {}
        self._values: dict[Span, Scope] = {}  # of patterns
        self._used = Scope(prelude())
        if self.file is not None:
            self._run(self.file)

    @cached_property
    def definitions(self) -> list[Definition]:
        """What the text itself defines."""
        return [] if self.file is None else list(definitions(self.file))

    def offset(self, place: Place) -> int:
        """Offset of a place in the readable text."""
        line = min(place[0], len(self.source.line_starts) - 1)
        return self.source.line_starts[line] + min(place[1], len(self.source.line(line + 1)))

    def type_at(self, place: Place) -> tuple[Span, Type] | None:
        """The smallest expression around a place, and its type."""
        offset = self.offset(place)
        around = [span for span in self.types if span.start <= offset <= span.stop]
        if not around:
            return None
        span = min(around, key=lambda span: span.stop - span.start)
        return span, self.types[span]

    def definition(self, name: str, place: Place) -> Definition | None:
        """What a name means at a place: the innermost that is visible there, the last one before it."""
        offset = self.offset(place)
        seen = [d for d in self.definitions if d.name == name and d.visible.start <= offset <= d.visible.stop]
        if not seen:
            return next((d for d in self.outside() if d.name == name), None)
        narrowest = min(d.visible.stop - d.visible.start for d in seen)
        inner = [d for d in seen if d.visible.stop - d.visible.start == narrowest]
        before = [d for d in inner if d.span.start <= offset]
        return before[-1] if before else inner[0]

    def outside(self) -> Iterator[Definition]:
        """Functions and patterns of the files that this one uses, then those of the prelude."""
        for scope in (self._used, prelude()):
            for function in scope.functions.values():
                text, span = function_heading(function.syntax), function.syntax.span
                yield Definition(function.syntax.name, "function", span, span, text)
            for pattern in scope.patterns.values():
                text, span = pattern_heading(pattern.syntax), header(pattern.syntax)
                yield Definition(pattern.syntax.name, "pattern", span, span, text)

    def visible(self, place: Place) -> list[Definition]:
        """Everything that can be used at a place, by name; inner ones and later ones first."""
        offset = self.offset(place)
        here = [
            d
            for d in self.definitions
            if d.visible.start <= offset <= d.visible.stop
            and (d.span.stop < offset or d.kind not in ("name", "input", "axis"))
            and d.name != STAND_IN[0]
        ]
        here.sort(key=lambda d: (d.visible.stop - d.visible.start, -d.span.start))
        found: dict[str, Definition] = {}
        for definition in [*here, *self.outside()]:
            found.setdefault(definition.name, definition)
        return list(found.values())

    def type_of(self, definition: Definition) -> Type | None:
        """The type of what a pattern's text defines, where its statement is right."""
        scope = self._values.get(definition.visible)
        value: Value | None = scope.values.get(definition.name) if scope is not None else None
        return value.type if isinstance(value, Term) and value.type is not UNKNOWN else None

    def declaration(self, definition: Definition) -> PatternDeclaration | None:
        """The pattern that a definition names: of this text, else of a used file."""
        items = self.file.items if self.file is not None else ()
        own = (item for item in items if isinstance(item, PatternDeclaration) and item.name == definition.name)
        used = self._used.patterns.get(definition.name)
        return next(own, None if used is None else used.syntax)

    def pattern_at(self, place: Place) -> PatternDeclaration | None:
        """The pattern around a place."""
        offset = self.offset(place)
        items = self.file.items if self.file is not None else ()
        patterns = (item for item in items if isinstance(item, PatternDeclaration))
        return next((item for item in patterns if item.span.start <= offset <= item.span.stop), None)

    def used_file(self, place: Place) -> Path | None:
        """The file that a `use` at a place names, where there is one."""
        offset = self.offset(place)
        for item in self.file.items if self.file is not None else ():
            if isinstance(item, Use) and item.span.start <= offset <= item.span.stop and self.folder is not None:
                path = self.folder / item.path
                return path if path.is_file() else None
        return None

    def _run(self, file: File) -> None:
        """Check what can be checked, and keep the types."""
        scope = Modules(self.folder).scope(file, self.folder)
        assert scope.parent is not None
        self._used = scope.parent
        top = Expressions(Context(inline), scope)
        for item in file.items:
            if isinstance(item, Function):
                try:
                    define_function(top, item)
                except RejectionError:
                    continue
        for item in file.items:
            if isinstance(item, PatternDeclaration):
                at = _Recorder(Context(inline), Scope(scope), self.types)
                predefine(at, header(item))
                declared = Declarations(at, {})
                Body(at, Binding(declared.parameter, declared.input), lambda rejected: None).run(item)
                self._values[item.span] = at.scope
                scope.patterns[item.name] = PatternDefinition(item, scope, sound=True)


class _Recorder(Expressions):
    """Expressions that note the type of everything they make a term of."""

    def __init__(self, context: Context, scope: Scope, types: dict[Span, Type]) -> None:
        super().__init__(context, scope)
        self.types = types

    def inside(self, scope: Scope) -> Expressions:
        return _Recorder(self.context, scope, self.types)

    def term(self, syntax: Expression) -> Term:
        term = super().term(syntax)
        # A body that a call inlines has the types of its first call, unless it was checked by itself.
        if term.type is not UNKNOWN and (not self.context.active or syntax.span not in self.types):
            self.types[syntax.span] = term.type
        return term


def _readable(source: Source, unfinished: int | None) -> File | None:
    """The tree of a text without the lines that cannot be read; None where too many cannot."""
    lines = source.text.split("\n")
    broken = set() if unfinished is None else {unfinished}
    for _ in range(MOST_REPAIRS):
        text = "\n".join(_stand_in(line) if number in broken else line for number, line in enumerate(lines))
        try:
            return parse(Source(source.name, text))
        except AttnError as error:
            found = {d.span.source.position(d.span.start)[0] - 1 for d in error.diagnostics}
            if found <= broken:
                return None
            broken |= found
    return None


def _stand_in(line: str) -> str:
    """A line that is read as an equation where the line was inside a pattern, and as nothing where it was not."""
    indent = line[: len(line) - len(line.lstrip(" \t"))]
    return f"{indent}{STAND_IN}" if indent else ""

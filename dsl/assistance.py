"""What an editor shows while a `.attn` text is written: a remark on what is pointed at, names to go on with, and where
a name comes from. Knows nothing of an editor's protocol."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from attnc.dsl.analysis import Analysis, Place
from attnc.dsl.definitions import Definition
from attnc.dsl.source import Source, Span
from attnc.dsl.syntax import InputDeclaration, PatternDeclaration
from attnc.dsl.types import Type
from attnc.dsl.vocabulary import ATTRIBUTES, FUNCTIONS, INDICES, KEYWORDS, OPTIONS, SIZES, TENSORS, TYPES

WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
VARIES = {"b": "batch", "h": "head", "i": "query", "j": "key", "t": "token"}


@dataclass(frozen=True)
class Proposal:
    """A name to go on with. `kind`: a kind of `Definition`, or keyword, type, builtin, index, size, attribute, option.

    `detail`: how it is declared or called; `remark`: what it means.
    """

    name: str
    kind: str
    detail: str
    remark: str = ""


def word_at(source: Source, place: Place) -> tuple[str, int, int] | None:
    """The word at a place, with the columns where it starts and stops."""
    lines = source.text.split("\n")
    if place[0] >= len(lines):
        return None
    for match in WORD.finditer(lines[place[0]]):
        if match.start() <= place[1] <= match.end():
            return match.group(), match.start(), match.end()
    return None


def is_comment(source: Source, place: Place) -> bool:
    """Whether a place is in a comment."""
    before = source.text.split("\n")[place[0]][: place[1]]
    return "#" in re.sub(r'"[^"]*"', "", before)


# Remarks


def remark(analysis: Analysis, source: Source, place: Place) -> str | None:
    """Markdown on what stands at a place of `source`: a name's declaration and type, or an expression's type."""
    if is_comment(source, place):
        return None
    found = word_at(source, place)
    typed = analysis.type_at(place)
    if found is None:
        return None if typed is None else _typed(_shortened(typed[0].text), typed[1])
    word, start, _ = found
    line = source.text.split("\n")[place[0]]
    if line[:start].rstrip().endswith("."):
        return f"`.{word}`: {ATTRIBUTES[word]}" if word in ATTRIBUTES else None
    definition = analysis.definition(word, place)
    if definition is not None:
        own = typed[1] if typed is not None and typed[0].text == word else analysis.type_of(definition)
        return _defined(definition, own)
    if word in FUNCTIONS:
        called, meaning = FUNCTIONS[word]
        return (
            _typed(_shortened(typed[0].text), typed[1], called, meaning) if typed else _code(called) + f"\n\n{meaning}"
        )
    return _of_language(word)


def _of_language(word: str) -> str | None:
    for table in (TENSORS, INDICES, SIZES, KEYWORDS, TYPES):
        if word in table:
            return f"`{word}`: {table[word]}"
    return None


def _defined(definition: Definition, type: Type | None) -> str:
    parts = [_code(definition.text)]
    if type is not None:
        parts.append(f"`{definition.name}`: {_described(type)}")
    if definition.kind == "pattern":
        parts += _comment_above(definition.span)
    return "\n\n".join(parts)


def _typed(text: str, type: Type, called: str = "", meaning: str = "") -> str:
    parts = [_code(called), meaning] if called else []
    return "\n\n".join([*parts, f"`{text}`: {_described(type)}"])


def _described(type: Type) -> str:
    """`real[b, h, i, j]`, and in words what it varies over."""
    names = [VARIES.get(name, f"member of {name}") for name in type.ordered_indices()]
    varies = f", one for each {', '.join(names)}" if names else ""
    return f"`{type}`{varies}"


def _comment_above(span: Span) -> Iterator[str]:
    """The comment lines that stand right above a definition, as one paragraph."""
    line = span.source.position(span.start)[0]
    said: list[str] = []
    while line > 1 and (above := span.source.line(line - 1).strip()).startswith("#") | (not above and not said):
        said[:0] = [above.removeprefix("#").strip()] if above else []
        line -= 1
    kept = [text for text in said if not text.startswith(("check:", "run:", "draw:"))]
    if kept:
        yield " ".join(kept)


def _code(text: str) -> str:
    return f"```attn\n{text}\n```"


def _shortened(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 80 else f"{text[:77]}.."


# Proposals


def proposals(source: Source, folder: Path | None, place: Place) -> list[Proposal]:
    """What may stand at a place of a text whose line is still being written."""
    if is_comment(source, place):
        return []
    before = source.text.split("\n")[place[0]][: place[1]]
    if re.search(r"\w\.\w*$", before):
        return [Proposal(name, "attribute", name, text) for name, text in ATTRIBUTES.items()]
    if re.search(r"(:|\binput\s+\w+\s*:)\s*\w*$", before):
        return [Proposal(name, "type", name, text) for name, text in TYPES.items()]
    analysis = Analysis(source, folder, unfinished=place[0])
    if not before.strip() or not before[0].isspace():
        starters = ("pattern", "use") if not before[:1].isspace() else ("input", "axis", "scan", "repeat")
        return [Proposal(name, "keyword", name, KEYWORDS[name]) for name in starters]
    around = analysis.pattern_at(place)
    found = [
        Proposal(d.name, d.kind, _detail(analysis, d))
        for d in analysis.visible(place)
        if d.kind != "pattern" or _is_above(d, around)
    ]
    line = source.text.split("\n")[place[0]]
    found = [*_of_the_line(line), *found]
    found = [*_keywords_of_call(analysis, before, place), *found, *_of_the_language()]
    first: dict[str, Proposal] = {}
    for proposal in found:
        first.setdefault(proposal.name, proposal)
    return list(first.values())


def _of_the_line(line: str) -> Iterator[Proposal]:
    """Arguments of the function that a line defines, and names of its `for`: nothing else knows an unfinished line."""
    for kind, match in (
        ("argument", re.match(r"\s*\w+\s*\(([\w\s,]*)\)\s*=(?!=)", line)),
        ("element", re.search(r"\bfor\b([\w\s,]+?)\bin\b", line)),
    ):
        for name in WORD.findall(match[1]) if match else ():
            yield Proposal(name, kind, " ".join(line.split()))


def _is_above(definition: Definition, pattern: PatternDeclaration | None) -> bool:
    """Whether a pattern may call another: one that stands above it, or in a used file."""
    if pattern is None:
        return False
    return definition.span.source is not pattern.span.source or definition.span.start < pattern.span.start


def _detail(analysis: Analysis, definition: Definition) -> str:
    type = analysis.type_of(definition)
    return definition.text if type is None else f"{definition.name}: {type}"


def _of_the_language() -> Iterator[Proposal]:
    for name, (called, meaning) in FUNCTIONS.items():
        yield Proposal(name, "builtin", called, meaning)
    for kind, table in (("tensor", TENSORS), ("index", INDICES), ("size", SIZES)):
        for name, meaning in table.items():
            yield Proposal(name, kind, name, meaning)
    for name in ("where", "if", "then", "else", "for", "in", "not", "and", "or", "true", "false"):
        yield Proposal(name, "keyword", name, KEYWORDS[name])


def _keywords_of_call(analysis: Analysis, before: str, place: Place) -> Iterator[Proposal]:
    """Inside the parentheses of a call: the parameters and inputs of the pattern, the options of the reduction."""
    name = _open_call(before)
    if name in FUNCTIONS:
        called, _ = FUNCTIONS[name]
        for option in OPTIONS:
            if f"{option} =" in called:
                yield Proposal(f"{option} = ", "option", called)
    definition = None if name is None else analysis.definition(name, place)
    if definition is None or definition.kind != "pattern":
        return
    declaration = analysis.declaration(definition)
    if declaration is not None:
        yield from _keywords(declaration)


def _keywords(declaration: PatternDeclaration) -> Iterator[Proposal]:
    for parameter in declaration.parameters:
        yield Proposal(f"{parameter.name} = ", "parameter", " ".join(parameter.span.text.split()))
    for statement in declaration.body:
        if isinstance(statement, InputDeclaration):
            yield Proposal(f"{statement.name} = ", "input", " ".join(statement.span.text.split()))


def _open_call(before: str) -> str | None:
    """The function of the innermost parenthesis that is still open."""
    depth = 0
    for at in range(len(before) - 1, -1, -1):
        depth += (before[at] in ")]") - (before[at] in "([")
        if depth < 0 and before[at] == "(":
            called = re.search(r"(\w+)\s*(\[[^\]]*\])?\s*$", before[:at])
            return called[1] if called else None
        if depth < 0:
            return None
    return None


# Places


def origin(analysis: Analysis, source: Source, place: Place) -> Span | Path | None:
    """Where what stands at a place is defined: a span, perhaps of another file; or the file that a `use` names."""
    used = analysis.used_file(place)
    if used is not None:
        return used
    found = word_at(source, place)
    if found is None or is_comment(source, place):
        return None
    definition = analysis.definition(found[0], place)
    return None if definition is None else definition.span

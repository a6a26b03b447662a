"""Values given as text: `--set window=256`, and the lines of a file that say how to check and run it.

    # check: window=7
    # check: height=8 width=9 kernel=3 N=72 M=72
    # run: height=64 width=64 N=4096
    # check: g=-1..0
    # draw: window=12 slope=0.1..0.6

`attnc check` tries every `check` line (and the defaults, where there are any); `attnc run` and `explain` start from
the `run` line, `attnc draw` from the `draw` line. A line sets parameters, sizes (B H Hk N M D E) and, as `low..high`,
the range of a drawn input.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from attnc.dsl.diagnostics import AttnError, Diagnostic, did_you_mean
from attnc.dsl.source import Source, Span
from attnc.dsl.terms import Parameter, Pattern
from attnc.dsl.types import Base

Value = bool | int | float | tuple[int, ...]
SIZES = ("B", "H", "Hk", "N", "M", "D", "E")
KINDS = ("check", "run", "draw")
LINE = re.compile(rf"^[ \t]*#[ \t]*({'|'.join(KINDS)}):(.*)$", re.MULTILINE)
ITEM = re.compile(r"\S+")


@dataclass(frozen=True)
class Setting:
    """What one line sets."""

    parameters: dict[str, Value] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    ranges: dict[str, tuple[float, float]] = field(default_factory=dict)


def settings(pattern: Pattern, kind: str, known: frozenset[str]) -> list[Setting]:
    """The lines of one of the KINDS in a pattern's file, as far as they concern it.

    `known` are the names that the file's patterns have among them: a line for others is left to them. Raises AttnError,
    located, for a line that cannot be read.
    """
    found = (_setting(pattern, text, known) for line_kind, text in lines(pattern.source) if line_kind == kind)
    return [setting for setting in found if setting is not None]


def lines(source: Source) -> Iterator[tuple[str, Span]]:
    """(kind, what follows it) of every such comment."""
    for match in LINE.finditer(source.text):
        yield match.group(1), Span(source=source, start=match.start(2), stop=match.end(2))


def _setting(pattern: Pattern, text: Span, known: frozenset[str]) -> Setting | None:
    setting = Setting()
    strange = False
    for item in ITEM.finditer(text.text):
        span = Span(source=text.source, start=text.start + item.start(), stop=text.start + item.end())
        name, equals, value = item.group().partition("=")
        try:
            if not equals:
                raise ValueError("expected name=value")
            strange |= not _assign(setting, pattern, name, value, known)
        except ValueError as error:
            raise AttnError([Diagnostic("setting", str(error), span)]) from None
    return None if strange else setting


def _assign(setting: Setting, pattern: Pattern, name: str, value: str, known: frozenset[str]) -> bool:
    """Enters one item; False where only another pattern of the file has the name."""
    parameters = {p.name: p for p in pattern.parameters}
    if name in parameters:
        setting.parameters[name] = read(parameters[name], value)
    elif name == "scale":
        setting.parameters[name] = _number(name, value)
    elif name in SIZES:
        if not value.isdecimal() or int(value) < 1:
            raise ValueError(f"`{name}` must be a positive int, not `{value}`")
        setting.sizes[name] = int(value)
    elif any(declared.name == name for declared in pattern.inputs):
        low, dots, high = value.partition("..")
        if not dots:
            raise ValueError(f"`{name}` is an input: give the range to draw it from, such as {name}=-1..0")
        setting.ranges[name] = (_number(name, low), _number(name, high))
    elif name in known:
        return False
    else:
        names = [*parameters, *SIZES, *(declared.name for declared in pattern.inputs)]
        raise ValueError(
            f"`{pattern.name}` has no `{name}`; {did_you_mean(name, names) or 'it has ' + ', '.join(names)}"
        )
    return True


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"`{name}` must be a number, not `{text}`") from None


def read(declared: Parameter, text: str) -> Value:
    """The value of a parameter from text. Raises ValueError, which says what was expected."""
    try:
        if declared.is_tuple:
            return tuple(int(item) for item in text.strip("()").split(",") if item.strip())
        if declared.base is Base.BOOL:
            return {"true": True, "false": False}[text.lower()]
        return int(text) if declared.base is Base.INT else float(text)
    except (KeyError, ValueError):
        expected = "ints such as 64,128" if declared.is_tuple else {Base.BOOL: "true or false"}.get(declared.base)
        expected = expected or ("an int" if declared.base is Base.INT else "a number")
        raise ValueError(f"`{declared.name}` must be {expected}, not `{text}`") from None

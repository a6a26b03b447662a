"""Errors as users see them: a code, a message, the place in the text, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches

from attnc.dsl.codes import CODES
from attnc.dsl.source import Span

# Longest piece of a source line that is shown; a longer one is cut around the span.
SHOWN_COLUMNS = 160
TAB_COLUMNS = 4


class InternalError(Exception):
    """A mistake of attnc's own, never of the user's text."""

    def __init__(self, message: str) -> None:
        super().__init__(f"{message}\nThis is a bug in attnc, please report it with the .attn file.")


@dataclass(frozen=True)
class Diagnostic:
    """One mistake in a `.attn` text.

    `code` is a key of `CODES`; `labels` are related places, each with its own remark; `help` is a remedy,
    possibly of several lines.
    """

    code: str
    message: str
    span: Span
    labels: tuple[tuple[Span, str], ...] = ()
    help: str | None = None

    def __post_init__(self) -> None:
        if self.code not in CODES:
            raise InternalError(f"diagnostic code `{self.code}` is not listed in dsl/codes.py")


class AttnError(Exception):
    """The mistakes of one `.attn` file, all of them located; `str` renders them."""

    def __init__(self, diagnostics: Iterable[Diagnostic]) -> None:
        self.diagnostics = tuple(diagnostics)
        if not self.diagnostics:
            raise InternalError("an AttnError without a diagnostic")
        super().__init__(self.diagnostics)

    def __str__(self) -> str:
        return "\n\n".join(render(diagnostic) for diagnostic in self.diagnostics)


def render(diagnostic: Diagnostic) -> str:
    """Text of a diagnostic, without a final newline.

    ```
    error[unknown-name]: `windo` is not defined
     --> local.attn:2:24
      |
    2 |     out = softmax[j](s where i - j < windo) @ v
      |                                      ^^^^^
      = help: did you mean `window`?
    ```
    """
    spans = [diagnostic.span] + [span for span, _ in diagnostic.labels]
    width = max(len(str(span.source.position(span.start)[0])) for span in spans)
    gutter = " " * width
    lines = [f"error[{diagnostic.code}]: {diagnostic.message}", _place(gutter, "-->", diagnostic.span), f"{gutter} |"]
    lines += _excerpt(diagnostic.span, "^", "", width)
    previous = diagnostic.span
    for span, remark in diagnostic.labels:
        excerpt = _excerpt(span, "-", remark, width)
        if span.source is not previous.source:
            lines += [_place(gutter, ":::", span), f"{gutter} |"]
        elif excerpt[0] == _excerpt(previous, "-", "", width)[0]:
            del excerpt[0]  # the line is already there, just above
        lines += excerpt
        previous = span
    if diagnostic.help is not None:
        first, *rest = diagnostic.help.splitlines()
        lines += [f"{gutter} = help: {first}"] + [f"{gutter}         {line}" for line in rest]
    return "\n".join(lines)


def did_you_mean(name: str, known: Iterable[str], ending: str = "") -> str | None:
    """Help text that proposes the known names most like `name`, or None where none is. `ending`: shown after each."""
    close = get_close_matches(name, sorted(set(known)), n=2, cutoff=0.6)
    return f"did you mean {' or '.join(f'`{found}{ending}`' for found in close)}?" if close else None


def _place(gutter: str, arrow: str, span: Span) -> str:
    line, column = span.source.position(span.start)
    return f"{gutter}{arrow} {span.source.name}:{line}:{column}"


def _excerpt(span: Span, mark: str, remark: str, width: int) -> list[str]:
    """The line a span starts on, and the marks under it."""
    number, column = span.source.position(span.start)
    line = span.source.line(number).rstrip("\r")
    start = column - 1
    stop = min(start + max(span.stop - span.start, 1), max(len(line), start + 1))
    cut = max(0, min(start - SHOWN_COLUMNS // 4, len(line) - SHOWN_COLUMNS)) if len(line) > SHOWN_COLUMNS else 0
    shown = line[cut : cut + SHOWN_COLUMNS]
    left = "..." if cut else ""
    right = "..." if cut + SHOWN_COLUMNS < len(line) else ""
    before = _printable(line[cut:start])
    marked = _printable(line[start : min(stop, cut + SHOWN_COLUMNS)])
    pad = " " * (len(left) + len(before))
    return [
        f"{number:>{width}} | {left}{_printable(shown)}{right}".rstrip(),
        f"{' ' * width} | {pad}{mark * max(len(marked), 1)}{' ' if remark else ''}{remark}",
    ]


def _printable(text: str) -> str:
    """Text as a terminal can show it: tabs and odd spaces as blanks, control characters as question marks."""
    shown = (c if c.isprintable() else " " if c.isspace() else "?" for c in text.replace("\t", " " * TAB_COLUMNS))
    return "".join(shown)

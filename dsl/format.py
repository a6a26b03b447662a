"""The formatter: one way to space and indent a text, which keeps its words, its comments and its line breaks.

Blocks and lines within brackets are indented by four spaces. Operators have a space on both sides, save `**` between
two short operands. One empty line stands before a pattern and after its end, at most one elsewhere. Where the text has
the `=` or the comments of neighbouring lines in one column, they stay so. As every token stays, in its order, the
formatted text means the same.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from lark import Token

from attnc.dsl.layout import DEDENT, INDENT, NEWLINE, OPENING
from attnc.dsl.parse import parse, tokens
from attnc.dsl.source import Source

STEP = "    "
_CLOSING = frozenset(OPENING.values())
# A string is matched so that a `#` in it starts no comment.
_COMMENT = re.compile(r'"[^"\n]*"|#[^\n]*')


@dataclass
class Line:
    """One line of the text. Without words it is a comment, or empty."""

    column: int = 0  # where it starts in the source
    words: list[str] = field(default_factory=list)
    gaps: list[str] = field(default_factory=list)  # the space before each word
    equal: tuple[int, int] | None = None  # the `=` of a statement: its place among the words, its column
    comment: str = ""
    comment_column: int = 0
    comment_gap: str = "  "
    block: int = 0  # number of blocks around it
    bracket: int = 0  # number of earlier lines with a bracket that is still open
    inside: bool = False  # an earlier line has a bracket that was open where this one starts
    after_empty: bool = False

    def __str__(self) -> str:
        text = self.text(len(self.words))
        return f"{text}{self.comment_gap if self.words and self.comment else ''}{self.comment}"

    def text(self, count: int) -> str:
        """The indentation and the first `count` words."""
        words = zip(self.gaps[:count], self.words[:count], strict=True)
        return STEP * (self.block + self.bracket) + "".join(gap + word for gap, word in words).lstrip()


def format_source(source: Source) -> str:
    """The formatted text, which parses to the same tree and formats to itself.

    Raises AttnError for a text that does not parse.
    """
    parse(source)
    lines = _with_comments(_code_lines(source), source)
    _settle_comments(lines)
    _settle_empty_lines(lines)
    _align(lines)
    return "".join(f"\n{line}\n" if line.after_empty else f"{line}\n" for line in lines)


def _code_lines(source: Source) -> dict[int, Line]:
    """The lines that hold words, by number."""
    stream = tokens(source)
    lines: dict[int, Line] = {}
    block = 0
    opened: list[int] = []  # line of every open bracket
    for token, gap in zip(stream, _gaps(stream), strict=True):
        if token.type in _LAYOUT:
            block += (token.type == INDENT) - (token.type == DEDENT)
            continue
        number, column = source.position(token.start_pos or 0)
        if token.value in _CLOSING:
            opened.pop()
        if number not in lines:
            inside = bool(opened) or token.value in _CLOSING
            lines[number] = Line(column, block=block, bracket=len(set(opened)), inside=inside)
        elif token.value in _CLOSING and _CLOSING.issuperset(lines[number].words):
            lines[number].bracket = len(set(opened))
        if token.type == "EQUAL" and not opened:
            lines[number].equal = len(lines[number].words), column
        lines[number].words.append(token.value)
        lines[number].gaps.append(gap)
        if token.value in OPENING:
            opened.append(number)
    return lines


def _with_comments(code: dict[int, Line], source: Source) -> list[Line]:
    """All lines that are not empty, in order."""
    comments: dict[int, tuple[int, str]] = {}
    for match in _COMMENT.finditer(source.text):
        if match.group().startswith("#"):
            number, column = source.position(match.start())
            comments[number] = column, _comment(match.group())
    lines: list[Line] = []
    last = 0
    for number in sorted(code.keys() | comments.keys()):
        column, comment = comments.get(number, (0, ""))
        line = code.get(number, Line(column))
        line.comment, line.comment_column = comment, column
        line.after_empty = number > last + 1
        lines.append(line)
        last = number
    return lines


def _comment(text: str) -> str:
    body = text[1:].rstrip()
    return f"# {body}" if body and body[0] not in " #!" else f"#{body}"


def _settle_comments(lines: list[Line]) -> None:
    """Give every comment line the indentation of the code after it, or of the block that it ends.

    A comment behind the last line of a block belongs to the block if it stands as far right as its lines.
    """
    waiting: list[Line] = []
    columns: dict[int, int] = {}  # where the lines of every open block stand
    for line in [*lines, Line(column=1, words=["end of the file"])]:
        if not line.words:
            waiting.append(line)
            continue
        for comment in waiting:
            if line.inside:
                comment.inside = True
                comment.block, comment.bracket = line.block, line.bracket + (line.words[0] in _CLOSING)
            else:
                fitting = [block for block, column in columns.items() if column <= comment.column]
                comment.block = max(line.block, *fitting) if fitting else line.block
        waiting.clear()
        if not line.inside:
            columns = {block: column for block, column in columns.items() if block < line.block}
            columns[line.block] = line.column


def _settle_empty_lines(lines: list[Line]) -> None:
    """No empty line within brackets, at the start of a file or of a block; one around every pattern."""
    previous: Line | None = None  # the last line that starts a statement
    for at, line in enumerate(lines):
        if line.inside or at == 0 or lines[at - 1].words[-1:] == [":"]:
            line.after_empty = False
        if not line.words or line.inside:
            continue
        if line.block == 0 and previous and (previous.block > 0 or line.words[0] == "pattern"):
            lines[_first_of_paragraph(lines, at)].after_empty = True
        previous = line


def _first_of_paragraph(lines: list[Line], at: int) -> int:
    """Position of the first of the comment lines that stand right above a line, or its own."""
    while not lines[at].after_empty and not lines[at - 1].words and lines[at - 1].block == 0:
        at -= 1
    return at


def _align(lines: list[Line]) -> None:
    """Keep the `=` and the comments of neighbouring lines in one column where they were."""
    for run in _runs(lines, lambda line: line.equal and line.equal[1]):
        places = [line.equal[0] for line in run if line.equal]
        widths = [len(line.text(place)) for line, place in zip(run, places, strict=True)]
        for line, place, width in zip(run, places, widths, strict=True):
            line.gaps[place] = " " * (max(widths) - width + 1)
    for run in _runs(lines, lambda line: line.comment_column if line.words and line.comment else None):
        widths = [len(line.text(len(line.words))) for line in run]
        for line, width in zip(run, widths, strict=True):
            line.comment_gap = " " * (max(widths) - width + 2)


def _runs(lines: list[Line], column: Callable[[Line], int | None]) -> Iterator[list[Line]]:
    """Lines of one block, one after the other, that have something in the same column of the source."""
    run: list[Line] = []
    for line in lines:
        if run and (line.after_empty or line.block != run[-1].block or column(line) != column(run[-1])):
            yield run
            run = []
        if column(line) is not None:
            run.append(line)
    if run:
        yield run


# Spaces

_SHORT = frozenset({"NAME", "INTEGER", "REAL"})
_LAYOUT = frozenset({NEWLINE, INDENT, DEDENT})


def _gaps(stream: list[Token]) -> Iterator[str]:
    """The space before every token."""
    edge = Token(NEWLINE, "")
    padded = [edge, edge, *stream, edge, edge, edge]
    for at in range(2, len(stream) + 2):
        yield "" if _is_tight(padded, at) else " "


def _is_tight(stream: list[Token], at: int) -> bool:
    """Whether token `at` stands right behind the one before it."""
    token, before = stream[at], stream[at - 1]
    if before.type in _LAYOUT or before.value in OPENING or before.value == ".":
        return True
    if before.type == "MINUS" and not _ends_operand(stream[at - 2]):
        return True  # a sign, not a difference
    if "POWER" in (before.type, token.type):
        return _is_short_power(stream, at if token.type == "POWER" else at - 1)
    if token.value in OPENING:
        return _ends_operand(before)
    return token.value in _CLOSING or token.value in (",", ":", ".")


def _is_short_power(stream: list[Token], at: int) -> bool:
    """Whether both operands of the `**` at `at` are single words: `D**-0.5`, but `gamma ** (i - j)`."""
    right = at + 2 if stream[at + 1].type == "MINUS" else at + 1
    more = stream[right + 1]
    return stream[at - 1].type in _SHORT and stream[right].type in _SHORT and not (more.value in OPENING or more == ".")


def _ends_operand(token: Token) -> bool:
    return token.type in _SHORT or token.type in ("TRUE", "FALSE") or token.value in _CLOSING

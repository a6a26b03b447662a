"""Text to syntax tree: `read_source` and `parse`."""

from __future__ import annotations

from bisect import bisect_left
from functools import cache
from importlib.resources import files
from pathlib import Path

from lark import Lark, Token
from lark.exceptions import UnexpectedCharacters, UnexpectedToken

from attnc.dsl import syntax
from attnc.dsl.diagnostics import AttnError, Diagnostic, did_you_mean
from attnc.dsl.layout import DEDENT, INDENT, Layout, LayoutError, line_ranges
from attnc.dsl.mistakes import END, explain_character, explain_token
from attnc.dsl.source import Source, Span
from attnc.dsl.tree import TreeBuilder

LONGEST_FILE = 256 * 1024  # bytes
MOST_MISTAKES = 10
LONGEST_REPAIRED = 32 * 1024  # characters; every further syntax error costs another pass over the text

# Stands in for a line that was found wrong, while the lines after it are judged; the first words of a block's line.
_EMPTY = "_=0"
_OPENERS = ("pattern", "scan", "repeat")

# What lark sees starts with a newline, so that the first line's indentation is judged like any other's.
_OFFSET = -1


def read_source(path: Path) -> Source:
    """The text of a `.attn` file, named by its path.

    A byte order mark is dropped. Raises AttnError with code `unreadable`, `file-size` or `encoding`.
    """
    name = str(path)
    try:
        with path.open("rb") as file:
            content = file.read(LONGEST_FILE + 1)
    except OSError as error:
        message = f"cannot read the file: {error.strerror}"
        raise _at_start(Source(name, ""), "unreadable", message, help=_file_like(path)) from None
    if len(content) > LONGEST_FILE:
        raise _too_long(Source(name, ""))
    try:
        return Source(name, content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        # `start` counts from behind a byte order mark; error.object is what it counts in.
        good = error.object[: error.start].decode("utf-8")
        source = Source(name, good + "�")
        span = Span(source=source, start=len(good), stop=len(good) + 1)
        message = f"the file is not UTF-8: byte 0x{error.object[error.start]:02x} cannot stand here"
        raise AttnError([Diagnostic("encoding", message, span, help="save the file as UTF-8")]) from None


def parse(source: Source) -> syntax.File:
    """The syntax tree of a source.

    Raises AttnError with every syntax error that can be told apart from the consequences of another. The
    limits on size and nesting are checked before anything is built.
    """
    if len(source.text) > LONGEST_FILE or len(source.text.encode("utf-8", "replace")) > LONGEST_FILE:
        raise _too_long(source)
    lines = line_ranges(source)
    mistakes: list[Diagnostic] = []
    text: str | None = source.text
    while text is not None and len(mistakes) < MOST_MISTAKES:
        try:
            tree = _parser().parse("\n" + text + "\n")
        except (UnexpectedToken, UnexpectedCharacters, LayoutError) as error:
            mistake = _explain(error, source, lines)
            if mistakes and mistake.code == "indentation":
                break  # likely a consequence: the line above it may have been taken out
            mistakes.append(mistake)
            judged = len(text) <= LONGEST_REPAIRED and _is_within_line(error)
            text = _without_line(text, mistake.span.start, lines) if judged else None
        else:
            builder = TreeBuilder(source, _OFFSET)
            file = builder.transform(tree)
            mistakes += builder.mistakes
            if not mistakes:
                return file
            break
    raise AttnError(sorted(mistakes, key=lambda mistake: mistake.span.start))


def tokens(source: Source) -> list[Token]:
    """The tokens of a source that parses, line ends and block ends among them; `start_pos` is the offset."""
    found = list(_parser().lex("\n" + source.text + "\n"))
    for token in found:
        token.start_pos = max((token.start_pos or 0) + _OFFSET, 0)
    return found


@cache
def _parser() -> Lark:
    grammar = files("attnc.dsl").joinpath("attn.lark").read_text("utf-8")
    # The basic lexer, not the contextual one: the words of the language are reserved everywhere.
    return Lark(grammar, start="file", parser="lalr", lexer="basic", postlex=Layout(), propagate_positions=True)


def _explain(
    error: UnexpectedToken | UnexpectedCharacters | LayoutError, source: Source, lines: list[tuple[int, int]]
) -> Diagnostic:
    match error:
        case LayoutError():
            span = Span(source=source, start=error.start + _OFFSET, stop=error.stop + _OFFSET)
            return Diagnostic("indentation", error.message, span, help=error.help)
        case UnexpectedCharacters():
            return explain_character(source, (error.pos_in_stream or 0) + _OFFSET)
        case UnexpectedToken():
            at = len(source.text) if error.token.type == END else max((error.token.start_pos or 0) + _OFFSET, 0)
            return explain_token(source, error, at, _line_at(at, lines)[0])


def _is_within_line(error: Exception) -> bool:
    """Whether a mistake concerns one line alone, so that the others can still be judged."""
    if isinstance(error, UnexpectedToken):
        return error.token.type not in (INDENT, DEDENT, END) and INDENT not in error.accepts
    return isinstance(error, UnexpectedCharacters)


def _line_at(offset: int, lines: list[tuple[int, int]]) -> tuple[int, int]:
    return lines[bisect_left(lines, offset, key=lambda line: line[1])]


def _without_line(text: str, offset: int, lines: list[tuple[int, int]]) -> str | None:
    """`text` with the logical line at `offset` made an empty equation; None where that would mislead.

    A line that opens a block is left alone: without it every line of the block would be wrong.
    """
    start, stop = _line_at(offset, lines)
    line = text[start:stop]
    code = line.lstrip(" \t")
    indent = line[: len(line) - len(code)]
    if code.startswith(_OPENERS) or code.startswith(_EMPTY) or len(code) < len(_EMPTY):
        return None
    return text[:start] + indent + (_EMPTY if indent else "").ljust(len(code)) + text[stop:]


def _too_long(source: Source) -> AttnError:
    return _at_start(source, "file-size", f"the file is longer than {LONGEST_FILE // 1024} KiB")


def _file_like(path: Path) -> str | None:
    """The `.attn` files of a folder whose names are most like one that is not there."""
    try:
        beside = [] if path.exists() else [near.stem for near in path.parent.glob("*.attn")]
        return did_you_mean(path.stem, beside, ".attn")
    except OSError:
        return None


def _at_start(source: Source, code: str, message: str, help: str | None = None) -> AttnError:
    return AttnError([Diagnostic(code, message, Span(source=source, start=0, stop=0), help=help)])

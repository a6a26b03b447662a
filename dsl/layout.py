"""Brackets and indentation: what the layout of a text says, before and beside the grammar."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from lark.lark import PostLex
from lark.lexer import Token

from attnc.dsl.diagnostics import AttnError, Diagnostic
from attnc.dsl.source import Source, Span

DEEPEST_NESTING = 64

NEWLINE, INDENT, DEDENT = "_NL", "_INDENT", "_DEDENT"
OPENING = {"(": ")", "[": "]", "{": "}"}
# Comments and strings are matched so that the brackets in them are passed over.
_BRACKETS = re.compile(r"""[()\[\]{}]|\n|#[^\n]*|"[^"\n]*\"""")


@dataclass(frozen=True)
class LayoutError(Exception):
    """Indentation that no block has, at `offset` of the text that was lexed."""

    message: str
    help: str
    start: int
    stop: int


class Layout(PostLex):
    """Turns the lexer's newlines into the start and the end of lines and blocks.

    All state is local to `process`: one parser serves many threads.
    """

    always_accept = (NEWLINE,)

    def process(self, stream: Iterator[Token]) -> Iterator[Token]:
        depth = 0
        blocks = [""]
        token: Token | None = None
        for token in stream:
            if token.type != NEWLINE:
                depth += (token.value in OPENING) - (token.value in OPENING.values())
                yield token
            elif depth == 0:
                yield token
                yield from self._blocks(token, blocks)
        while token is not None and len(blocks) > 1:
            blocks.pop()
            yield Token.new_borrow_pos(DEDENT, "", token)

    def _blocks(self, newline: Token, blocks: list[str]) -> Iterator[Token]:
        """Compare the line's indentation with that of the open blocks, innermost last."""
        indent = newline.rsplit("\n", 1)[1]
        if "#" in indent:  # a comment ends the file
            indent = ""
        if indent.startswith(blocks[-1]):
            if indent != blocks[-1]:
                blocks.append(indent)
                yield Token.new_borrow_pos(INDENT, indent, newline)
            return
        stop = newline.end_pos or 0
        start = stop - len(indent)
        if indent not in blocks:
            if blocks[-1].startswith(indent):
                columns = ", ".join(str(len(block)) for block in blocks)
                raise LayoutError(
                    f"this line is indented by {len(indent)}, which no open block is",
                    f"the open blocks are indented by {columns}",
                    start,
                    stop,
                )
            raise LayoutError(
                "this line mixes tabs and spaces unlike the lines above it", "indent with four spaces", start, stop
            )
        while blocks[-1] != indent:
            blocks.pop()
            yield Token.new_borrow_pos(DEDENT, "", newline)


def line_ranges(source: Source) -> list[tuple[int, int]]:
    """Offsets `start:stop` of every logical line: a line with the lines that its open brackets continue.

    Raises AttnError for a bracket without its partner and for brackets nested too deeply.
    """
    open_brackets: list[int] = []
    ranges: list[tuple[int, int]] = []
    start = 0
    for match in _BRACKETS.finditer(source.text):
        text, at = match.group(), match.start()
        if text == "\n":
            if not open_brackets:
                ranges.append((start, at))
                start = at + 1
        elif text in OPENING:
            open_brackets.append(at)
            if len(open_brackets) > DEEPEST_NESTING:
                message = f"brackets are nested more than {DEEPEST_NESTING} deep"
                raise _error(source, "nesting", at, message, help="give a name to the inner part")
        elif text in OPENING.values():
            _close(source, open_brackets, at)
    if open_brackets:
        at = open_brackets[-1]
        raise _error(source, "syntax", at, f"`{source.text[at]}` is never closed")
    ranges.append((start, len(source.text)))
    return ranges


def _close(source: Source, open_brackets: list[int], at: int) -> None:
    closing = source.text[at]
    if not open_brackets:
        raise _error(source, "syntax", at, f"`{closing}` closes nothing")
    opened = open_brackets.pop()
    wanted = OPENING[source.text[opened]]
    if closing != wanted:
        label = (Span(source=source, start=opened, stop=opened + 1), "opened here")
        raise _error(source, "syntax", at, f"expected `{wanted}`, found `{closing}`", labels=(label,))


def _error(
    source: Source,
    code: str,
    at: int,
    message: str,
    labels: tuple[tuple[Span, str], ...] = (),
    help: str | None = None,
) -> AttnError:
    return AttnError([Diagnostic(code, message, Span(source=source, start=at, stop=at + 1), labels, help)])

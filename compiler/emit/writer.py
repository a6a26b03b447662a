"""Writes lines of Python: blocks, assignments and source comments."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from attnc.dsl.source import Span


class Writer:
    """Lines at a depth of indentation."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._depth = 0

    def line(self, text: str = "") -> None:
        self._lines.append("    " * self._depth + text if text else "")

    def comment(self, text: str) -> None:
        for line in text.splitlines() or [""]:
            self.line(f"# {line}".rstrip())

    def let(self, name: str, value: str, span: Span | None = None) -> str:
        """`name = value`, with the place in the `.attn` file that it comes from."""
        self.line(f"{name} = {value}" + (f"  # {span_comment(span)}" if span else ""))
        return name

    @contextmanager
    def block(self, head: str) -> Iterator[None]:
        """`head` and what is written inside, one step deeper."""
        self.line(head)
        self._depth += 1
        yield
        self._depth -= 1

    def text(self) -> str:
        return "\n".join(self._lines) + "\n"


def span_comment(span: Span) -> str:
    """`longformer.attn:7`; only the file's own name, made harmless for a comment."""
    name = span.source.name.replace("\\", "/").rsplit("/", 1)[-1]
    printable = "".join(character if character.isprintable() else "?" for character in name)
    return f"{printable}:{span.source.position(span.start)[0]}"

"""The generated Python module of a chunked step."""

from __future__ import annotations

import ast
from collections.abc import Sequence

from attnc.compiler.emit.chunked_kernel import ChunkedKernel
from attnc.compiler.emit.module import LOAD_TILE
from attnc.compiler.emit.writer import Writer

PRELUDE = (
    """
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
"""
    + LOAD_TILE
)


def emit_chunked(title: str, kernels: Sequence[ChunkedKernel]) -> str:
    """The module's text. It parses; `title` stands in comments."""
    writer = Writer()
    for line in title.splitlines():
        writer.comment("".join(character if character.isprintable() else "?" for character in line))
    writer.line(PRELUDE.rstrip("\n"))
    for kernel in kernels:
        writer.line()
        writer.line()
        writer.line(kernel.text.rstrip("\n"))
    text = writer.text()
    ast.parse(text)
    return text

"""A loaded `.attn` file: one attribute a pattern, and itself callable where one pattern is meant."""

from __future__ import annotations

import ast
import builtins
import linecache
import os
from collections.abc import Mapping
from pathlib import Path
from types import CodeType
from typing import Any, NoReturn

from torch import Tensor

from attnc.dsl.check import check
from attnc.dsl.diagnostics import AttnError
from attnc.dsl.parse import read_source
from attnc.dsl.source import Source, Span
from attnc.runtime.pattern import CompiledPattern


class AttnModule:
    """The patterns of a file, by name.

    A file that holds one pattern, or one named like the file, is callable as that pattern and has its methods:
    `from patterns import longformer` then `longformer(q, k, v)` or `longformer.longformer(q, k, v)`.

    Not a `types.ModuleType`: torch.compile traces a call of an object, never a call of a module.
    """

    def __init__(self, name: str) -> None:
        self.__name__ = name
        self._patterns: dict[str, CompiledPattern] = {}
        self._main: CompiledPattern | None = None

    def fill(self, source: Source, root: Path | None) -> None:
        """Checks a file and takes its patterns, in place of earlier ones. Raises AttnError with all its mistakes."""
        checked = check(source, root=root)
        known = {p.name for pattern in checked.values() for p in pattern.parameters}
        known |= {declared.name for pattern in checked.values() for declared in pattern.inputs}
        patterns = {name: CompiledPattern(pattern, root, frozenset(known)) for name, pattern in checked.items()}
        stem = self.__name__.rpartition(".")[2]
        for name in self._patterns:
            self.__dict__.pop(name, None)
        self._patterns = patterns
        self._main = next(iter(patterns.values())) if len(patterns) == 1 else patterns.get(stem)
        self.__dict__ |= patterns
        self.__file__ = source.name
        names = ", ".join(patterns)
        self.__doc__ = self._main.__doc__ if self._main else f"Attention patterns of {source.name}: {names}."
        if self._main:
            self.__signature__ = self._main.__signature__

    @property
    def patterns(self) -> Mapping[str, CompiledPattern]:
        """Every pattern of the file, in its order."""
        return dict(self._patterns)

    @property
    def main(self) -> CompiledPattern | None:
        """The only pattern, or the one named like the file."""
        return self._main

    def __call__(self, q: Tensor, k: Tensor, v: Tensor | None = None, **settings: Any) -> Tensor:
        """The file's one pattern, or the one named like it; see `CompiledPattern`."""
        if self._main is None:
            raise TypeError(f"{self.__name__} holds several patterns, call one: {', '.join(self._patterns)}")
        return self._main(q, k, v, **settings)

    def __getattr__(self, name: str) -> Any:
        main = self.__dict__.get("_main")
        if main is not None and not name.startswith("_"):
            return getattr(main, name)
        held = ", ".join(self.__dict__.get("_patterns", ()))
        raise AttributeError(f"{self.__name__} has no pattern `{name}`: it holds {held or 'none'}")

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *(dir(self._main) if self._main else ())})

    def __repr__(self) -> str:
        return f"<patterns {', '.join(self._patterns)} of {getattr(self, '__file__', self.__name__)}>"


def load(path: str | os.PathLike[str]) -> AttnModule:
    """The patterns of a `.attn` file. Raises AttnError with every mistake of the file, located."""
    if "\n" in os.fspath(path):
        raise ValueError("`attnc.load` takes the path of a file; a text is compiled by `attnc.compile`")
    file = Path(path)
    module = AttnModule(file.stem)
    try:
        module.fill(read_source(file), file.parent)
    except AttnError as error:
        raise_located(error)
    return module


def compile(text: str, *, name: str = "<text>", root: str | os.PathLike[str] | None = None) -> AttnModule:
    """The patterns of a text. `name` stands in diagnostics; `root` is the folder that `use` looks in."""
    if text.endswith(".attn") and "\n" not in text:
        raise ValueError(f"`attnc.compile` takes a text; a file is loaded by `attnc.load({text!r})`")
    module = AttnModule(Path(name).stem if name.endswith(".attn") else name)
    try:
        module.fill(Source(name, text), None if root is None else Path(root))
    except AttnError as error:
        raise_located(error)
    return module


def raise_located(error: AttnError) -> NoReturn:
    """Raises `error` from a frame that stands at its place in the `.attn` text, so that a traceback ends there."""
    span = error.diagnostics[0].span
    name = span.source.name
    if not os.path.exists(name):
        lines = span.source.text.splitlines(keepends=True)
        linecache.cache[name] = (len(span.source.text), None, lines, name)
    exec(_raising(span), {"error": error.with_traceback(None)})
    raise AssertionError("unreachable")


def _raising(span: Span) -> CodeType:
    """Code that raises `error` and believes itself to be the text of a span."""
    line, column = span.source.position(span.start)
    text = span.source.line(line)
    start = len(text[: column - 1].encode())
    stop = len(text[: max(column, column - 1 + span.stop - span.start)].encode())
    tree = ast.parse("raise error from None")
    for node in ast.walk(tree):
        if isinstance(node, ast.stmt | ast.expr):
            node.lineno = node.end_lineno = line
            node.col_offset, node.end_col_offset = start, stop
    return builtins.compile(tree, span.source.name, "exec")

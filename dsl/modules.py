"""Files and what they see of one another: the prelude, and `use "file.attn"`."""

from __future__ import annotations

from functools import lru_cache
from importlib import resources
from pathlib import Path, PurePosixPath

from attnc.dsl.diagnostics import AttnError, Diagnostic, did_you_mean
from attnc.dsl.parse import parse, read_source
from attnc.dsl.rejection import RejectionError, rejection
from attnc.dsl.scopes import FunctionDefinition, PatternDefinition, Scope
from attnc.dsl.source import Source
from attnc.dsl.syntax import File, Function, PatternDeclaration, Use
from attnc.dsl.types import BUILT_IN_INDICES

MAX_FILES = 64


@lru_cache(maxsize=1)
def prelude() -> Scope:
    """Functions that every file sees, from `std.attn`."""
    text = resources.files("attnc.dsl").joinpath("std.attn").read_text(encoding="utf-8")
    scope = Scope(axes={name: name for name in (*BUILT_IN_INDICES, "d", "e")})
    for item in parse(Source("std.attn", text)).items:
        assert isinstance(item, Function), "the prelude holds functions only"
        scope.functions[item.name] = FunctionDefinition(item, scope)
    return scope


def folder_of(source: Source) -> Path | None:
    """The folder of a source that is named by the path of a file, else None."""
    try:
        path = Path(source.name)
        return path.resolve().parent if path.is_file() else None
    except (OSError, ValueError):  # a name that no path can be
        return None


class Modules:
    """Reads the files that a file uses, each once, none from outside `root`."""

    def __init__(self, root: Path | None) -> None:
        self.root = None if root is None else root.resolve()
        self.diagnostics: list[Diagnostic] = []
        self._scopes: dict[Path, Scope] = {}
        self._open: list[Path] = []

    def scope(self, file: File, folder: Path | None) -> Scope:
        """The scope of a file: around it what it uses, and around that the prelude."""
        used = Scope(prelude())
        for item in file.items:
            if not isinstance(item, Use):
                continue
            try:
                other = self._used(item, folder)
            except RejectionError as rejected:
                self.diagnostics.append(rejected.diagnostic)
                continue
            if other is not None:
                used.functions.update(other.functions)
                used.patterns.update(other.patterns)
        return Scope(used)

    def _used(self, use: Use, folder: Path | None) -> Scope | None:
        """The scope of a used file; None where it has errors of its own, which are then reported."""
        path = self._path(use, folder)
        if path in self._open:
            names = " -> ".join(step.name for step in [*self._open[self._open.index(path) :], path])
            raise rejection("use", f"`{use.path}` uses itself: {names}", use.span)
        if path in self._scopes:
            return self._scopes[path]
        if len(self._scopes) >= MAX_FILES:
            raise rejection("use", f"more than {MAX_FILES} files", use.span)
        self._open.append(path)
        try:
            file = parse(read_source(path))
        except AttnError as error:
            self.diagnostics.extend(error.diagnostics)
            return None
        else:
            scope = self._scopes[path] = self.scope(file, path.parent)
            for item in file.items:
                if isinstance(item, Function):
                    scope.functions[item.name] = FunctionDefinition(item, scope)
                elif isinstance(item, PatternDeclaration):
                    scope.patterns[item.name] = PatternDefinition(item, scope, sound=True)
            return scope
        finally:
            self._open.pop()

    def _path(self, use: Use, folder: Path | None) -> Path:
        """Where a used file is: below the root, however the path is written."""
        if self.root is None or folder is None:
            help = "say which folder it is in: `attnc.compile(text, root=folder)`"
            raise rejection("use", f"`{use.path}` cannot be found: this text is not in a file", use.span, help=help)
        written = PurePosixPath(use.path)
        if written.is_absolute() or "\\" in use.path or "\0" in use.path:
            raise rejection("use", f"`{use.path}` must be relative to the file that uses it", use.span)
        path = folder.joinpath(written).resolve()
        if not path.is_relative_to(self.root):
            raise rejection("use", f"`{use.path}` is outside of the folder `{self.root.name}`", use.span)
        if path.suffix != ".attn":
            raise rejection("use", f"`{use.path}` is not an .attn file", use.span)
        if not path.is_file():
            near = [other.name for other in sorted(path.parent.glob("*.attn"))] if path.parent.is_dir() else []
            raise rejection("use", f"there is no file `{use.path}`", use.span, help=did_you_mean(path.name, near))
        return path

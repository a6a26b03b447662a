"""`from patterns import longformer`: finds `patterns/longformer.attn` on the import path.

Light on purpose: `import attnc` installs the finder, and torch is loaded with the first `.attn` file.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from attnc.runtime.modules import AttnModule

SUFFIX = ".attn"


class AttnLoader(importlib.abc.InspectLoader):
    """Loads one `.attn` file as an `AttnModule`."""

    def __init__(self, path: str) -> None:
        self.path = path

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        from attnc.runtime.modules import AttnModule

        return cast(ModuleType, AttnModule(spec.name))  # the import system takes any object

    def exec_module(self, module: ModuleType) -> None:
        from attnc.dsl.diagnostics import AttnError
        from attnc.dsl.parse import read_source
        from attnc.runtime.modules import raise_located

        path = Path(self.path)
        try:
            cast("AttnModule", module).fill(read_source(path), path.parent)
        except AttnError as error:
            raise_located(error)

    def get_source(self, fullname: str) -> str:
        """Text of the file, for `inspect` and tracebacks."""
        return Path(self.path).read_text(encoding="utf-8")

    def is_package(self, fullname: str) -> bool:
        """Never: a `.attn` file has no submodules."""
        return False


class AttnFinder(importlib.abc.MetaPathFinder):
    """Finds `.attn` files in the folders that Python searches. A Python module of the same name wins."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Spec of `fullname`, or None where no folder of `path` (sys.path at the top) holds its file."""
        name = fullname.rpartition(".")[2] + SUFFIX
        for folder in sys.path if path is None else path:
            file = os.path.join(folder or os.getcwd(), name)
            if os.path.isfile(file):
                python = importlib.machinery.PathFinder.find_spec(fullname, path)
                if python is not None and python.loader is not None:  # without a loader: only a folder
                    return None
                file = os.path.abspath(file)
                spec = importlib.machinery.ModuleSpec(fullname, AttnLoader(file), origin=file)
                spec.has_location = True
                return spec
        return None


def install() -> None:
    """Puts the finder before Python's own, once: a folder of the same name would else hide the file."""
    if not any(isinstance(finder, AttnFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, AttnFinder())

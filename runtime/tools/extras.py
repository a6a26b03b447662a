"""Libraries that only some commands need: what they are for, and how they are installed."""

from __future__ import annotations

from importlib.util import find_spec

# library: (extra of this package that brings it, what cannot be done without it)
EXTRAS = {"matplotlib": ("draw", "drawing"), "pygls": ("lsp", "the language server")}


class MissingExtraError(ImportError):
    """A library that is not installed; the message says how to install it."""


def require_library(name: str) -> None:
    """Raises MissingExtraError where a library of `EXTRAS` is not installed."""
    if find_spec(name) is None:
        extra, purpose = EXTRAS[name]
        raise MissingExtraError(f"{purpose} needs {name}: pip install 'attnc[{extra}]'", name=name)

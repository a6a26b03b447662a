"""attnc, a compiler for attention: a few equations in a `.attn` file become a fused torch operator.

`import attnc` also lets Python import `.attn` files: `from patterns import longformer`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from attnc.runtime import import_hook

if TYPE_CHECKING:
    from attnc import nn
    from attnc.dsl.diagnostics import AttnError
    from attnc.runtime.decoding.decoding_cache import DecodingCache
    from attnc.runtime.compute.gaussian import orthogonal_gaussian
    from attnc.runtime.decoding.kv_cache import Pages
    from attnc.runtime.modules import AttnModule, compile, load
    from attnc.runtime.pattern import CompiledPattern
    from attnc.runtime.state import State

__version__ = "0.1.0"
__all__ = [
    "AttnError",
    "AttnModule",
    "CompiledPattern",
    "DecodingCache",
    "Pages",
    "State",
    "__version__",
    "compile",
    "load",
    "nn",
    "orthogonal_gaussian",
]

# Loaded at first use: they bring torch, which `attnc fmt` and a mere `import attnc` do without.
_HOMES = {
    "AttnError": "attnc.dsl.diagnostics",
    "AttnModule": "attnc.runtime.modules",
    "CompiledPattern": "attnc.runtime.pattern",
    "DecodingCache": "attnc.runtime.decoding.decoding_cache",
    "Pages": "attnc.runtime.decoding.kv_cache",
    "State": "attnc.runtime.state",
    "compile": "attnc.runtime.modules",
    "load": "attnc.runtime.modules",
    "orthogonal_gaussian": "attnc.runtime.compute.gaussian",
}


def __getattr__(name: str) -> Any:
    if name == "nn":
        return importlib.import_module("attnc.nn")
    if name not in _HOMES:
        raise AttributeError(f"module 'attnc' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


import_hook.install()

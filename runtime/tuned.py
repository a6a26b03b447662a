"""Which tile shape a launch takes: one that `attnc tune` found best on this device, else that of the rule.

A winner holds for a kernel (its module's text), a device, an element type and a class of sizes. It lies in the cache
folder (see `cache`); what is read from there is taken only where it is one of the shapes that would be tried.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import lru_cache

import torch

from attnc.compiler.emit.kernel import Kernel
from attnc.compiler.schedule import TileShape
from attnc.compiler.schedule_candidates import candidates
from attnc.runtime.cache import keep, kept
from attnc.runtime.call import Call
from attnc.runtime.kernel_call import Kernels, padded


@dataclass(frozen=True)
class Site:
    """A kernel whose tile shape is chosen, in one class of calls."""

    kernel: str
    module: str
    device: str
    dtype: str
    sizes: tuple[tuple[str, int], ...]

    @property
    def key(self) -> str:
        return json.dumps(["tile shape", asdict(self)], sort_keys=True)


@dataclass
class Session:
    """A tuner at work. `sites`: the kernels that were launched, with the shapes to try (the first: the rule's)."""

    sites: dict[Site, Sequence[TileShape]] = field(default_factory=dict)
    chosen: dict[Site, TileShape] = field(default_factory=dict)


_session: Session | None = None
_known: dict[Site, TileShape | None] = {}


def site_of(kernel: str, module_text: str, call: Call) -> Site:
    """The site of a launch. Sizes and ints count by the power of two that holds them."""
    return Site(
        kernel,
        digest(module_text),
        device_name(call.q.device),
        str(call.q.dtype).removeprefix("torch."),
        size_class(call),
    )


def size_class(call: Call) -> tuple[tuple[str, int], ...]:
    """What calls share a winner by: lengths and int parameters to a factor of two, widths as they are."""
    sizes, v = call.sizes, call.v if call.v is not None else call.k
    heads = sizes["b"] * sizes["h"]
    rough = {"BH": heads, "N": sizes["i"], "M": sizes["j"]}
    rough |= {name: abs(value) for name, value in sorted(call.parameters.items()) if isinstance(value, int)}
    exact = {"D": sizes["d"], "E": v.shape[3], "group": sizes["h"] // max(call.k.shape[1], 1)}
    return (*((name, 1 << max(value - 1, 0).bit_length()) for name, value in rough.items()), *exact.items())


@lru_cache(maxsize=256)
def digest(text: str) -> str:
    """A short name of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:24]


@lru_cache(maxsize=16)
def device_name(device: torch.device) -> str:
    """What is written on the device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def chosen_shape(
    kernels: Kernels, kernel: Kernel, call: Call, role: str, rule: TileShape, itemsize: int | None = None
) -> TileShape:
    """The tile shape of a launch. `role`: see `candidates`; `rule`: what `compiler.schedule` says."""
    value = call.v if call.v is not None else call.k
    width = max(padded(call.sizes["d"]), padded(value.shape[3]))
    options = candidates(role, width, itemsize or call.q.element_size(), rule)
    return tile_of(site_of(kernel.name, kernels.text, call), options)


def tile_of(site: Site, options: Sequence[TileShape]) -> TileShape:
    """The shape of a launch. `options`: that of the rule, then what else may be tried."""
    if _session is not None:
        _session.sites.setdefault(site, options)
        return _session.chosen.get(site, options[0])
    if site not in _known:
        _known[site] = None if os.environ.get("ATTNC_TUNED") == "0" else read(site, options)
    return _known[site] or options[0]


def read(site: Site, options: Sequence[TileShape]) -> TileShape | None:
    """The winner on disk, if there is one among the options."""
    text = kept(site.key)
    if text is None:
        return None
    return next((shape for shape in options if text == written(shape)), None)


def written(shape: TileShape) -> str:
    """A shape as it lies on disk."""
    return json.dumps(asdict(shape), sort_keys=True)


def settle(site: Site, shape: TileShape) -> None:
    """Later launches at a site take this shape, in this process and in others."""
    keep(site.key, written(shape))
    _known[site] = shape


def forget() -> None:
    """Drops what is known of winners; the next launches look at the disk."""
    _known.clear()


@contextmanager
def session() -> Iterator[Session]:
    """Lets a tuner choose."""
    global _session
    before, _session = _session, Session()
    try:
        yield _session
    finally:
        _session = before

"""Which tile shape a launch takes: one that `attnc tune` found best on this device, else that of the rule.

A winner holds for a kernel (its module's text), a device, an element type and a class of sizes. It lies in the cache
folder (see `cache`); what is read from there is taken only where it is one of the shapes that would be tried.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial

import torch

from attnc.compiler.emit.kernel import Kernel
from attnc.compiler.schedule import TileShape
from attnc.compiler.schedule_candidates import candidates
from attnc.runtime.cache import keep, kept
from attnc.runtime.call import Call
from attnc.runtime.cuda.kernel_call import Kernels, padded
from attnc.runtime.tools.tile_costs import tile_seconds


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


@dataclass(frozen=True)
class Choice:
    """What a launch chooses among: `options`, that of the rule first. `seconds`: by the cost model, to compare."""

    options: Sequence[TileShape]
    seconds: Callable[[TileShape], float] = lambda shape: 0.0

    def likely(self, most: int) -> list[TileShape]:
        """The rule's shape, and those that the cost model takes to be the fastest others; first ones first."""
        rule, *others = self.options
        return [rule, *sorted(others, key=self.seconds)][:most]


@dataclass
class Session:
    """A tuner at work. `sites`: the kernels that were launched."""

    sites: dict[Site, Choice] = field(default_factory=dict)
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
    seconds = partial(tile_seconds, kernels.plan, kernel.domain, call, role)
    return tile_of(site_of(kernel.name, kernels.text, call), Choice(options, seconds))


def tile_of(site: Site, choice: Choice) -> TileShape:
    """The shape of a launch."""
    rule = choice.options[0]
    if _session is not None:
        _session.sites.setdefault(site, choice)
        return _session.chosen.get(site, rule)
    if site not in _known:
        _known[site] = None if os.environ.get("ATTNC_TUNED") == "0" else read(site, choice.options)
    return _known[site] or rule


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

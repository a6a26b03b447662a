"""What the options of the command line mean: patterns, settings, shapes, devices."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from attnc.dsl.diagnostics import did_you_mean

if TYPE_CHECKING:
    import torch

    from attnc.runtime.pattern import CompiledPattern
    from attnc.runtime.tools.inputs import Shape
    from attnc.runtime.tools.settings import Setting

# Imports inside of functions: `attnc fmt` and `attnc --help` do without torch.

DTYPES = ("float32", "bfloat16", "float16", "float64")


class UsageError(Exception):
    """A mistake on the command line."""


def select(file: Path, name: str | None, *, all_of_them: bool = False) -> list[CompiledPattern]:
    """The pattern of a file that is meant: by name, the only one, or the one named like the file."""
    from attnc.dsl.parse import read_source
    from attnc.runtime.modules import AttnModule

    module = AttnModule(file.stem)
    module.fill(read_source(file), file.parent)
    held = module.patterns
    if not held:
        raise UsageError(f"{file} holds no pattern")
    if name is not None:
        if name not in held:
            raise UsageError(
                f"{file} has no pattern `{name}`; {did_you_mean(name, held) or 'it has ' + ', '.join(held)}"
            )
        return [held[name]]
    if all_of_them:
        return list(held.values())
    if module.main is None:
        raise UsageError(f"{file} holds several patterns: choose one by --pattern: {', '.join(held)}")
    return [module.main]


def chosen_setting(pattern: CompiledPattern, set_: list[str] | None, shape: str | None) -> Setting:
    """What the command line sets."""
    from attnc.runtime.program import with_scale
    from attnc.runtime.tools.settings import Setting, read

    declared = {p.name: p for p in with_scale(pattern.pattern)}
    parameters = {}
    for item in set_ or ():
        name, equals, value = item.partition("=")
        if not equals:
            raise UsageError(f"--set {item}: expected NAME=VALUE")
        if name not in declared:
            known = ", ".join(declared)
            raise UsageError(
                f"--set {item}: no parameter `{name}`; {did_you_mean(name, declared) or 'there are ' + known}"
            )
        try:
            parameters[name] = read(declared[name], value)
        except ValueError as error:
            several = "; each parameter has a --set of its own" if "," in value and "=" in value else ""
            raise UsageError(f"--set {item}: {error}{several}") from None
    return Setting(parameters, read_shape(shape))


def run_setting(
    pattern: CompiledPattern, set_: list[str] | None, shape: str | None, device: str
) -> tuple[Setting, Shape]:
    """What to run: the command line over the file's `# run:` line over the defaults.

    Inputs are drawn as the first `# check:` line says where the `# run:` line does not.
    """
    from attnc.runtime.tools.inputs import Shape
    from attnc.runtime.tools.settings import Setting, settings

    chosen = chosen_setting(pattern, set_, shape)
    line = next(iter(settings(pattern.pattern, "run", pattern.known)), Setting())
    checked = next(iter(settings(pattern.pattern, "check", pattern.known)), Setting())
    ranges = checked.ranges | line.ranges
    setting = Setting(line.parameters | chosen.parameters, line.sizes | chosen.sizes, ranges)
    standard = Shape.square(1, 16, 16384, 64) if device.startswith("cuda") else Shape.square(1, 8, 4096, 64)
    return setting, standard.updated(setting.sizes)


def read_shape(shape: str | None) -> dict[str, int]:
    """Sizes of `--shape B,H,N,D`."""
    if shape is None:
        return {}
    try:
        sizes = [int(item) for item in shape.split(",")]
    except ValueError:
        sizes = []
    if len(sizes) != 4 or min(sizes) < 1:
        raise UsageError(f"--shape {shape}: expected four positive ints B,H,N,D, such as 1,8,4096,64")
    return dict(zip("BHND", sizes, strict=True))


def known_device(device: str | None) -> str | None:
    """A device that is there."""
    import torch

    if device is None:
        return None
    if device.partition(":")[0] not in ("cpu", "cuda"):
        raise UsageError(f"--device {device}: cpu or cuda")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError(f"--device {device}: there is no CUDA device here")
    return device


def known_dtype(dtype: str | None) -> torch.dtype | None:
    """The element type of a name."""
    import torch

    if dtype is None:
        return None
    if dtype not in DTYPES:
        raise UsageError(f"--dtype {dtype}: {', '.join(DTYPES)}")
    found = getattr(torch, dtype)
    assert isinstance(found, torch.dtype)
    return found


def interpret_without_cuda() -> None:
    """Lets Triton interpret the kernels where no GPU can run them; triton reads this when it is imported."""
    import torch

    if not torch.cuda.is_available() and "triton" not in sys.modules:
        os.environ.setdefault("TRITON_INTERPRET", "1")


def short(dtype: torch.dtype) -> str:
    """`float32` of `torch.float32`."""
    return str(dtype).removeprefix("torch.")

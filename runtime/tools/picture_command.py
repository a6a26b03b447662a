"""What `attnc draw` is asked for, and what it refuses."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnc.runtime.pattern import CompiledPattern
from attnc.runtime.refusal import extra_inputs
from attnc.runtime.tools.options import UsageError
from attnc.runtime.tools.picture import View, picture, picture_of_call, save
from attnc.runtime.tools.settings import Setting


@dataclass(frozen=True)
class Request:
    """Options of the command. `weights`: False asks for pairs. `tensors`: a file with q, k and inputs by name."""

    setting: Setting
    weights: bool | None
    graph: bool
    tile: int | None
    tensors: Path | None

    @property
    def view(self) -> View | None:
        if self.graph:
            return "graph"
        if self.weights is None:
            return "weights" if self.tensors and not self.tile else None
        return "weights" if self.weights else "pairs"


def write_picture(pattern: CompiledPattern, request: Request, output: Path) -> str:
    """Draws and writes; the line to print. Raises UsageError for options that do not go together."""
    beside = request.weights is not None, request.tile, request.tensors, request.setting != Setting()
    if request.graph and any(beside):
        raise UsageError("--graph shows the text: only --pattern and --output go with it")
    if request.weights and request.tile:
        raise UsageError("--tile is for pairs, not for --weights")
    if request.tensors is None:
        figure = picture(pattern, request.view, request.setting, tile=request.tile)
    else:
        if request.setting.sizes:
            raise UsageError("--shape is for made tensors, and --tensors gives them")
        given = _read(pattern, request.tensors)
        q, k, v = (given.pop(name, None) for name in "qkv")
        assert q is not None
        assert k is not None
        settings: dict[str, Any] = {**request.setting.parameters, **given}
        figure = picture_of_call(pattern, request.view, q, k, v, settings, tile=request.tile)
    try:
        save(figure, output)
    except ValueError as error:
        raise UsageError(str(error)) from None
    except OSError as error:
        raise UsageError(f"cannot write {output}: {error.strerror}") from None
    return f"wrote {output}"


def _read(pattern: CompiledPattern, file: Path) -> dict[str, Tensor]:
    """q, k, v and the inputs of a pattern from a file of tensors by name."""
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UsageError(f"cannot read {file}: {error.strerror}") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError):
        raise UsageError(f"{file} is no file that torch.save wrote from a dict of tensors") from None
    if not isinstance(found, dict) or not all(isinstance(tensor, Tensor) for tensor in found.values()):
        raise UsageError(f"{file} holds no dict of tensors")
    if missing := [name for name in ("q", "k") if name not in found]:
        raise UsageError(f"{file} has no `{missing[0]}`")
    known = ["q", "k", "v", *(declared.name for declared in extra_inputs(pattern.pattern))]
    if strange := [name for name in found if name not in known]:
        raise UsageError(
            f"{file} has `{strange[0]}`, which {pattern.__name__} does not take: it has {', '.join(known)}"
        )
    return found

"""Pictures of a pattern: what `attnc draw` and `CompiledPattern.draw` do."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from attnc.runtime.refusal import refuse
from attnc.runtime.tools.extras import require_library
from attnc.runtime.tools.picture_inputs import picture_inputs, picture_setting
from attnc.runtime.tools.settings import Setting
from attnc.runtime.tools.weights import weights

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from attnc.runtime.pattern import CompiledPattern

View = Literal["pairs", "weights", "graph"]
FORMATS = (".svg", ".png", ".pdf")
# The same picture gives the same file, and needs no font where it is shown.
SVG: dict[Any, Any] = {"svg.hashsalt": "attnc", "svg.fonttype": "path"}


def picture(
    pattern: CompiledPattern, view: View | None, setting: Setting | None = None, *, tile: int | None = None
) -> Figure:
    """A figure at small sizes, with tensors made for it; `setting`: parameters, sizes and ranges of inputs."""
    if view == "graph":
        return _graph(pattern)
    setting = picture_setting(pattern, setting or Setting())
    made = picture_inputs(pattern, setting)
    v = made.v if pattern.pattern.uses_value else None
    return picture_of_call(pattern, view, made.q, made.k, v, {**setting.parameters, **made.inputs}, tile=tile)


def picture_of_call(
    pattern: CompiledPattern,
    view: View | None,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    settings: dict[str, Any],
    *,
    tile: int | None = None,
) -> Figure:
    """A figure of the first element of a batch; arguments as those of a call. Raises AttnError as `weights` does.

    Without a `view`: pairs, or weights where no key, or only every later one, is left out.
    """
    if view == "graph":
        return _graph(pattern)
    if tile is not None and tile < 1:
        refuse(pattern.pattern, "not-positive", f"a picture with tiles of {tile}")
    found = weights(pattern, q, k, v, settings)
    require_library("matplotlib")
    from attnc.runtime.tools.drawing import draw_pairs, draw_weights, tells_by_weights

    title = titled(pattern, settings)
    if view == "weights" or (view is None and tile is None and tells_by_weights(found)):
        return draw_weights(title, found)
    return draw_pairs(title, found, tile)


def drawn(
    pattern: CompiledPattern,
    q: Tensor | None,
    k: Tensor | None,
    v: Tensor | None,
    settings: dict[str, Any],
    *,
    view: View | None,
    tile: int | None,
    file: str | os.PathLike[str] | None,
) -> Figure:
    """What `CompiledPattern.draw` says."""
    _refuse_options(pattern, {"view": view, "tile": tile, "file": file})
    if view == "graph" and (settings or tile or q is not None or k is not None or v is not None):
        refuse(pattern.pattern, "argument", "a graph shows the text: tensors, parameters and tiles have no part in it")
    if tile is not None and (view == "weights" or (view is None and q is not None)):
        refuse(pattern.pattern, "argument", 'tiles are of pairs: `view="pairs"`')
    if q is not None and k is not None:
        figure = picture_of_call(pattern, view or "weights", q, k, v, settings, tile=tile)
    elif q is not None or k is not None or v is not None:
        refuse(pattern.pattern, "argument", "a picture of a call needs q and k", help="or none of q, k, v")
    else:
        figure = picture(pattern, view, _as_setting(pattern, settings), tile=tile)
    if file is not None:
        save(figure, file)
    return figure


def _refuse_options(pattern: CompiledPattern, options: dict[str, object]) -> None:
    """An option that a pattern has a parameter or input of the same name of is not guessed about."""
    declared = {parameter.name for parameter in pattern.pattern.parameters}
    declared |= {given.name for given in pattern.pattern.inputs}
    for name, value in options.items():
        if value is not None and name in declared:
            help = "`attnc.runtime.tools.picture.picture_of_call` takes them apart"
            message = f"`{name}` is an option of `draw` and a name of the pattern"
            refuse(pattern.pattern, "argument", message, about=name, help=help)


def _as_setting(pattern: CompiledPattern, settings: dict[str, Any]) -> Setting:
    """Parameters by name. Inputs belong to the q and k that they were made for."""
    for name, value in settings.items():
        if isinstance(value, Tensor):
            refuse(pattern.pattern, "argument", f"`{name}` is given without q and k", about=name)
    return Setting(parameters=settings)


def save(figure: Figure, file: str | os.PathLike[str]) -> None:
    """Writes an SVG, PNG or PDF, by the file's suffix. Raises ValueError for another, OSError where it cannot."""
    import matplotlib as mpl

    suffix = Path(file).suffix.lower()
    if suffix not in FORMATS:
        raise ValueError(f"a picture is written as {', '.join(FORMATS)}, not as `{Path(file).name}`")
    metadata: dict[str, Any] = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(suffix, {})
    with mpl.rc_context(SVG):
        figure.savefig(file, dpi="figure", transparent=True, metadata=metadata)


def _graph(pattern: CompiledPattern) -> Figure:
    require_library("matplotlib")
    from attnc.runtime.tools.graph_drawing import draw_graph

    return draw_graph(pattern.__name__, pattern.pattern)


def titled(pattern: CompiledPattern, settings: Mapping[str, Any]) -> str:
    """`sliding_window(window=7)`."""
    given = [f"{name}={value}" for name, value in settings.items() if not isinstance(value, Tensor)]
    return f"{pattern.__name__}({', '.join(given)})" if given else pattern.__name__

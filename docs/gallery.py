"""Builds docs/gallery.md and the pictures in docs/gallery/: every example at a small size.

Run `python docs/gallery.py`; it needs matplotlib (`pip install attnc[draw]`). What sees only some keys is drawn pair by
pair and in tiles. What sees all of them, or all up to its own, is drawn with its weights: there lies the difference.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl
import torch

import attnc
from attnc.runtime.drawing import draw_pairs, draw_weights
from attnc.runtime.graph_drawing import draw_graph
from attnc.runtime.picture import titled
from attnc.runtime.picture_inputs import picture_inputs, picture_setting
from attnc.runtime.settings import Setting
from attnc.runtime.weights import Weights, weights

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HERE = Path(__file__).parent
EXAMPLES = HERE.parent / "examples"
PICTURES = HERE / "gallery"
HEADS = {"H": 2}
GRAPH = "bigbird"  # the example whose graph is shown
# Text as text keeps the files small.
SVG = {"svg.hashsalt": "attnc", "svg.fonttype": "none", "font.sans-serif": ["DejaVu Sans", "Arial", "Helvetica"]}

FAMILIES = {
    "Fixed patterns": "full causal sliding_window local_window dilated_window strided sparse_fixed longformer bigbird "
    "streaming block_local prefix_lm documents alibi softcap relative_bias sink_logit neighborhood swin duo "
    "vertical_slash longnet",
    "Low rank": "linformer nystrom compressed agent latent mla",
    "Kernels and states": "linear linear_full performer cosformer hedgehog based power retention simple_gla gla rwkv6 "
    "rwkv7 mlstm forgetting delta gated_delta kda",
    "Routing and learned sparsity": "moba nsa quest seer dsa xattention routing reformer moh mosa "
    "mixture_of_attentions",
    "Mixtures": "demo_hybrid based_window lolcats infini hymba half_and_half window_plus_blocks window_delta "
    "routed_by_state fading_past",
}

GATE, DECAY, SLOW = (0.0, 1.0), (-1.0, 0.0), (-0.3, 0.0)
# Where small parameters that `attnc draw` would choose, or standard normal inputs, do not show what a mechanism is.
SETTINGS = {
    "alibi": Setting(ranges={"slope": (0.1, 0.6)}),
    "bigbird": Setting({"block": 4, "randoms": 2}),
    "compressed": Setting({"size": 8, "stride": 4}),
    "cosformer": Setting({"horizon": 64}),
    "delta": Setting(ranges={"beta": GATE}),
    "dilated_window": Setting({"window": 6, "dilation": 4}),
    "dsa": Setting({"top": 12}),
    "fading_past": Setting({"sinks": 2, "window": 12}, ranges={"f": (2.0, 4.0)}),
    "forgetting": Setting(ranges={"f": SLOW}),
    "gated_delta": Setting(ranges={"beta": GATE, "g": SLOW}),
    "gla": Setting(ranges={"g": SLOW}),
    "half_and_half": Setting({"window": 12}, ranges={"mix": GATE}),
    "hymba": Setting({"window": 12}, ranges={"g": SLOW}),
    "infini": Setting({"segment": 16}),
    "kda": Setting(ranges={"beta": GATE, "g": SLOW}),
    "lolcats": Setting({"window": 12}),
    "longnet": Setting({"segments": (8, 32), "rates": (1, 2)}),
    "mixture_of_attentions": Setting({"window": 12}),
    "mla": Setting(ranges={"w_k": (-0.2, 0.2)}),
    "mlstm": Setting(ranges={"f": SLOW, "n": DECAY}),
    "moba": Setting({"block": 8, "top": 3}),
    "moh": Setting({"active": 1}),
    "mosa": Setting({"tokens": 16}),
    "nsa": Setting({"size": 8, "stride": 4, "block": 8, "top": 3, "window": 12}, ranges={"gate": GATE}),
    "nystrom": Setting({"landmarks": 8}),
    "performer": Setting({"features": 64}),
    "prefix_lm": Setting(ranges={"prefix": (24, 24)}),
    "quest": Setting({"page": 8, "top": 2}),
    "relative_bias": Setting({"scale": 0.1}),
    "retention": Setting(ranges={"gamma": (0.75, 0.95)}),
    "routed_by_state": Setting({"block": 8, "top": 2}),
    "rwkv6": Setting(ranges={"g": SLOW}),
    "rwkv7": Setting(ranges={"g": SLOW, "a": (-0.1, 0.1), "b": (-0.1, 0.1)}),
    "seer": Setting({"block": 8, "threshold": 0.25}),
    "simple_gla": Setting(ranges={"g": SLOW}),
    "swin": Setting({"height": 8, "width": 8, "window": 4}, {"N": 64}),
    "window_delta": Setting({"window": 12}, ranges={"beta": GATE, "gate": (-1.0, 1.0)}),
    "window_plus_blocks": Setting({"window": 12, "block": 8, "top": 1}),
    "xattention": Setting({"block": 8, "stride": 4, "mass": 0.6}),
}


def main() -> None:
    """Write the page and its pictures; pictures of examples that are gone go too."""
    PICTURES.mkdir(exist_ok=True)
    names = [path.stem for path in sorted(EXAMPLES.glob("*.attn"))]
    for name in names:
        with mpl.rc_context(SVG):
            figure = drawn(name)
            figure.savefig(PICTURES / f"{name}.svg", transparent=True, metadata={"Date": None})
    with mpl.rc_context(SVG):
        figure = draw_graph(GRAPH, getattr(attnc.load(EXAMPLES / f"{GRAPH}.attn"), GRAPH).pattern)
        figure.savefig(PICTURES / "graph.svg", transparent=True, metadata={"Date": None})
    for path in PICTURES.glob("*.svg"):
        if path.stem not in (*names, "graph"):
            path.unlink()
    (HERE / "gallery.md").write_text(page(names), encoding="utf-8")


def drawn(name: str) -> Figure:
    """The picture of one example."""
    pattern = getattr(attnc.load(EXAMPLES / f"{name}.attn"), name)
    own = SETTINGS.get(name, Setting())
    setting = picture_setting(pattern, Setting(own.parameters, HEADS | own.sizes, own.ranges))
    made = picture_inputs(pattern, setting)
    v = made.v if pattern.pattern.uses_value else None
    parts = weights(pattern, made.q, made.k, v, {**setting.parameters, **made.inputs})
    title = titled(pattern, setting.parameters)
    return draw_weights(title, parts) if all(map(sees_all, parts)) else draw_pairs(title, parts)


def sees_all(part: Weights) -> bool:
    """Whether every row sees every key, or every key up to its own."""
    live = part.live
    return bool(live.all()) or torch.equal(live, torch.ones_like(live).tril())


def page(names: list[str]) -> str:
    """The text of gallery.md: families in order, and what belongs to none at the end."""
    families = {family: [name for name in listed.split() if name in names] for family, listed in FAMILIES.items()}
    known = {name for listed in families.values() for name in listed}
    families["More"] = [name for name in names if name not in known]
    lines = [INTRODUCTION]
    for family, members in families.items():
        if members:
            lines += [f"## {family}", ""]
        for name in members:
            lines += [
                f"### [{name}](../examples/{name}.attn)",
                "",
                remark(name),
                "",
                f"![{name}](gallery/{name}.svg)",
                "",
            ]
    return "\n".join(lines).rstrip() + "\n"


def remark(name: str) -> str:
    """The comment that an example starts with, without the lines for `attnc check` and `attnc run`."""
    text = (EXAMPLES / f"{name}.attn").read_text(encoding="utf-8")
    comment = text[: text.index("pattern ")].splitlines()
    said = [line.removeprefix("#").strip() for line in comment if line.startswith("#")]
    return " ".join(line for line in said if not line.startswith(("check:", "run:")))


INTRODUCTION = f"""# Gallery

Every file of [examples/](../examples) on 64 tokens or so, with small parameters; `python docs/gallery.py` builds this
page. Blue pairs are live; a tile is dark where all of its pairs are, and light where some are. Mechanisms that see all
keys, or all up to their own, are shown with their weights (orange: negative). A scan or a chain of low-rank products
has weights too, as it is linear in the values: they are what the reference gives for one value after another. Tokens
come in runs of a few subjects, which return; that makes the squares where content counts.

`attnc draw` draws any file like this, for slides and papers; `--weights` shows weights, of your own tensors with
`--tensors`, and `--graph` what is computed:

```console
$ attnc draw examples/{GRAPH}.attn --graph -o /tmp/{GRAPH}.svg
```

![What {GRAPH} computes](gallery/graph.svg)

In Python, `.draw()` gives a matplotlib figure:

```python
import torch
import attnc

{GRAPH} = attnc.load("examples/{GRAPH}.attn").{GRAPH}
q, k = torch.randn(2, 1, 4, 96, 64)
figure = {GRAPH}.draw(q, k, block=8)
print(figure.get_suptitle())
```
```output
{GRAPH}(block=8)
```
"""

if __name__ == "__main__":
    main()

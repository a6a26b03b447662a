"""Builds docs/gallery.md and the pictures in docs/gallery/: every example at a small size.

Run `python docs/gallery.py`; it needs matplotlib (`pip install attnc[draw]`). The pictures are those of `attnc draw`,
with two heads.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl

import attnc
from attnc.runtime.tools.graph_drawing import draw_graph
from attnc.runtime.tools.picture import picture
from attnc.runtime.tools.settings import Setting

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
    return picture(pattern, None, Setting(sizes=HEADS))


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
    return " ".join(line for line in said if not line.startswith(("check:", "run:", "draw:")))


INTRODUCTION = f"""# Gallery

Every file of [examples/](../examples) on 64 tokens or so, with small parameters; `python docs/gallery.py` builds this
page. Blue pairs are live; a tile has the full colour where all of its pairs are, and a faint one where some are.
Mechanisms that see all keys, or all up to their own, are shown with their weights (orange: negative). A scan or a chain
of low-rank products has weights too, as it is linear in the values: they are what the reference gives for one value
after another. Tokens come in runs of a few subjects, which return; that makes the squares where content counts.

`attnc draw` draws any file like this, for slides and papers; a `# draw:` line of the file says with which parameters.
`--weights` shows weights, `--tensors` those of your own q and k, and `--graph` what is computed:

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

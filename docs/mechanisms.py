"""Builds docs/mechanisms/: a page for each example, with what the compiler says about it.

Run `python docs/mechanisms.py`. A page has the text, its picture of the gallery, whether it is causal, the steps that
it compiles to, what a row costs, and what decoding keeps.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from gallery import EXAMPLES, FAMILIES, remark

import attnc
from attnc.compiler.cache_plan import describe_cache
from attnc.compiler.causality import describe_causality
from attnc.compiler.composition import Carry, Choose, Composition, Compute, Recur, Sequential, Step
from attnc.compiler.cost import state_formula, step_costs
from attnc.compiler.describe import describe_step
from attnc.dsl.diagnostics import AttnError
from attnc.runtime.pattern import CompiledPattern
from attnc.runtime.tools.comparison import filled

PAGES = Path(__file__).parent / "mechanisms"
MOST_TOKENS = 1 << 20  # of a cache that is only described
ARXIV = re.compile(r"arXiv (\d{4}\.\d{4,5})")


def main() -> None:
    """Write every page; pages of examples that are gone go too."""
    PAGES.mkdir(exist_ok=True)
    made = pages()
    for name, text in made.items():
        (PAGES / name).write_text(text, encoding="utf-8")
    for path in PAGES.glob("*.md"):
        if path.name not in made:
            path.unlink()


def pages() -> dict[str, str]:
    """Every page by its file's name."""
    names = [path.stem for path in sorted(EXAMPLES.glob("*.attn"))]
    return {"index.md": index(names)} | {f"{name}.md": page(name) for name in names}


def families(names: list[str]) -> dict[str, list[str]]:
    """The names by family, as in the gallery; those of no family at the end."""
    found = {family: [name for name in listed.split() if name in names] for family, listed in FAMILIES.items()}
    known = {name for listed in found.values() for name in listed}
    found["More"] = [name for name in names if name not in known]
    return {family: members for family, members in found.items() if members}


def index(names: list[str]) -> str:
    """The table of contents."""
    lines = [INTRODUCTION]
    for family, members in families(names).items():
        lines += [f"## {family}", "", "| mechanism | |", "|---|---|"]
        lines += [f"| [{name}]({name}.md) | {linked(remark(name))} |" for name in members]
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def page(name: str) -> str:
    """One mechanism."""
    pattern: CompiledPattern = getattr(attnc.load(EXAMPLES / f"{name}.attn"), name)
    composition = pattern.program.composition
    text = pattern.pattern.span.text.rstrip()
    sections = [
        f"# {name}",
        linked(remark(name)),
        f"```attn\n{text}\n```",
        f"![{name}](../gallery/{name}.svg)",
        "## Causality",
        causality(pattern),
        "## Steps",
        "\n".join(steps(composition)),
        "## Cost",
        fenced([*streamed(composition), *states(composition)] or ["linear in the sequence: no pair is formed"]),
        "## Decoding",
        decoding(pattern),
        f"[The file](../../examples/{name}.attn). [All mechanisms](index.md).",
    ]
    return "\n\n".join(sections) + "\n"


def causality(pattern: CompiledPattern) -> str:
    """Whether a row may depend on a later token, and where."""
    verdict, *places = describe_causality(pattern.pattern)
    if not places:
        return f"{verdict[0].upper()}{verdict[1:]}."
    return fenced([verdict, *places])


def steps(composition: Composition) -> Iterator[str]:
    """One line a step that is more than maths over one sequence; those that are such are counted."""
    for step in composition.steps:
        if not isinstance(step, Compute):
            yield f"- {heading(step)}"
    computed = sum(isinstance(step, Compute) for step in composition.steps)
    if computed:
        yield f"- {computed} step{'s' if computed > 1 else ''} of pointwise maths, products and pools over one sequence"


def heading(step: Step) -> str:
    """What a step is, without its operands and scores, which `attnc explain` shows."""
    _, _, told = describe_step(step).partition(": ")
    if isinstance(step, Choose):
        return told.partition("; score")[0]
    if isinstance(step, Sequential):
        return told.partition("\n")[0]
    return told.partition(";")[0]


def streamed(composition: Composition) -> Iterator[str]:
    """Keys of a row in every step that streams keys."""
    for costs in step_costs(composition.steps):
        yield from costs


def states(composition: Composition) -> Iterator[str]:
    """Operations of the steps that carry a state."""
    for step in composition.steps:
        if isinstance(step, Carry | Recur):
            yield state_formula(step, composition.arrays)


def decoding(pattern: CompiledPattern) -> str:
    """What `pattern.cache(..)` keeps of the past, with the default parameters, or why it cannot."""
    try:
        kept = describe_cache(pattern.cache(MOST_TOKENS, **filled(pattern)).plan)
    except AttnError as error:
        return f"Not token by token: {error.diagnostics[0].message}."
    return fenced(kept or ["nothing is kept"])


def fenced(lines: list[str]) -> str:
    """Lines as they are."""
    return "\n".join(["```text", *lines, "```"])


def linked(text: str) -> str:
    """Papers as links."""
    return ARXIV.sub(r"[arXiv \1](https://arxiv.org/abs/\1)", text)


INTRODUCTION = """# Mechanisms

A page for each file of [examples/](../../examples): its text, its picture, and what the compiler says about it.
`python docs/mechanisms.py` builds these pages. `attnc explain FILE` prints more, for any file.
"""

if __name__ == "__main__":
    main()

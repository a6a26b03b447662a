"""The share of live pairs of a pattern as an editor shows it: of its defaults, at one length."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from attnc.dsl.diagnostics import AttnError
from attnc.dsl.source import Source

LENGTH = 1024


@lru_cache(maxsize=64)
def live_remark(text: str, file: str, folder: Path | None, name: str) -> str | None:
    """One sentence; None where a text is wrong, has no kernel, or a parameter is not known. Imports torch.

    Sizes and parameters are those of the file's `# run:` line, else the defaults at 1024 tokens.
    """
    from attnc.runtime.modules import AttnModule
    from attnc.runtime.tools.comparison import defaults, required
    from attnc.runtime.tools.inputs import Shape, made_inputs
    from attnc.runtime.tools.settings import Setting, settings

    module = AttnModule(name)
    try:
        module.fill(Source(file, text), folder)
        pattern = module.patterns[name]
        line = next(iter(settings(pattern.pattern, "run", pattern.known)), Setting())
        if required(pattern) - set(line.parameters):
            return None
        shape = Shape.square(1, 2, LENGTH, 16).updated(line.sizes)
        made = made_inputs(pattern.pattern, shape, defaults(pattern) | line.parameters, ranges=line.ranges)
        share = pattern.live_fraction(made.q, made.k, made.v, **line.parameters, **made.inputs)
    except (AttnError, KeyError):
        return None
    given = "".join(f", {key}={value}" for key, value in line.parameters.items())
    return f"{share:.3g} of the pairs are live, of {shape.queries} queries and {shape.keys} keys{given}"

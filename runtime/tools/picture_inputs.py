"""What a picture shows where nothing is given: small sizes, and tokens whose subject returns now and then.

Of tokens drawn at random a router picks blocks at random, and its picture shows nothing. Here tokens come in runs of
one of a few subjects, and a subject comes back, as in a text: queries fit the keys of their own subject best.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from attnc.runtime.pattern import CompiledPattern
from attnc.runtime.program import terms
from attnc.runtime.tools.comparison import defaults, shrunken
from attnc.runtime.tools.inputs import Made, Shape, made_inputs
from attnc.runtime.tools.settings import Setting, settings

# Wide enough that no score of rectified features is 0 by chance, and a zero weight says that a key plays no part.
SHAPE = Shape(batch=1, heads=4, key_heads=4, queries=64, keys=64, width=64, value_width=64)
SUBJECTS = 5
RUNS = (5, 12)  # shortest and longest run of one subject
LIKENESS = 0.6  # of two tokens of one subject, as a cosine
SEED = 3


def picture_setting(pattern: CompiledPattern, chosen: Setting) -> Setting:
    """Parameters small enough to show their structure: `chosen`, then the file's `# draw:` line, then its first
    `# check:` line, then ints made small."""
    lines = settings(pattern.pattern, "check", pattern.known)
    first = lines[0] if lines else Setting()
    drawn = next(iter(settings(pattern.pattern, "draw", pattern.known)), Setting())
    ranges = {name: bounds for line in reversed(lines) for name, bounds in line.ranges.items()}
    parameters = shrunken(pattern) | first.parameters | drawn.parameters | chosen.parameters
    return Setting(parameters, first.sizes | drawn.sizes | chosen.sizes, ranges | drawn.ranges | chosen.ranges)


def picture_inputs(pattern: CompiledPattern, setting: Setting) -> Made:
    """Tensors for a picture, in float32; inputs as `attnc check` makes them."""
    shape = SHAPE.updated(setting.sizes)
    made = made_inputs(pattern.pattern, shape, defaults(pattern) | setting.parameters, seed=SEED, ranges=setting.ranges)
    generator = torch.Generator().manual_seed(SEED)
    subject = _subjects(max(shape.queries, shape.keys), generator)
    key_heads, width = made.k.shape[1], made.k.shape[3]
    if made.q.shape[3] != width:  # keys of another layout, such as a latent
        return made
    if any(term.form == "scan" for term in terms(pattern.pattern)):
        length = 1.0  # a delta rule takes keys of length 1, as its papers do: with longer ones its state explodes
    else:
        length = width**0.5  # so that q @ k / sqrt(width) is about as usual
    directions = _unit(torch.randn(key_heads, SUBJECTS, width, generator=generator))
    group = shape.heads // key_heads
    q = _tokens(directions.repeat_interleave(group, 0), subject[-shape.queries :], generator, width**0.5)
    k = _tokens(directions, subject[-shape.keys :], generator, length)
    return replace(made, q=q.expand(shape.batch, -1, -1, -1), k=k.expand(shape.batch, -1, -1, -1))


def _subjects(length: int, generator: torch.Generator) -> Tensor:
    """(length,): the subject of every token; two runs in a row have different ones."""
    found: list[int] = []
    last = 0
    while len(found) < length:
        run = int(torch.randint(RUNS[0], RUNS[1] + 1, (), generator=generator))
        last = (last + int(torch.randint(1, SUBJECTS, (), generator=generator))) % SUBJECTS
        found += [last] * run
    return torch.tensor(found[:length])


def _tokens(directions: Tensor, subject: Tensor, generator: torch.Generator, length: float) -> Tensor:
    """(1, heads, tokens, width): vectors of one length, those of a subject alike."""
    heads, _, width = directions.shape
    noise = _unit(torch.randn(heads, len(subject), width, generator=generator))
    mixed = LIKENESS**0.5 * directions[:, subject] + (1 - LIKENESS) ** 0.5 * noise
    return (_unit(mixed) * length).unsqueeze(0)


def _unit(x: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x, dim=-1)

"""The kernels of a chunked step, in the order in which they run."""

from __future__ import annotations

from attnc.compiler.composition import Carry, Recur
from attnc.compiler.emit.chunked_backward import FeatureGradients, ValueGradients
from attnc.compiler.emit.chunked_kernel import ChunkedKernel, Variant
from attnc.compiler.emit.chunked_module import emit_chunked
from attnc.compiler.emit.chunked_pairs import Outputs, Scores, stored_scores
from attnc.compiler.emit.chunked_solve import Solve
from attnc.compiler.emit.chunked_states import PrefixSums, States

RULES = ("sum", "delta", "dplr")


def chunked_kernels(variant: Variant) -> tuple[ChunkedKernel, ...]:
    """Every kernel of a variant, forward and backward."""
    writers = [PrefixSums(variant)] if variant.decay != "none" else []
    found = [writer.kernel() for writer in writers]
    found += [Scores(variant, *pair).kernel() for pair in stored_scores(variant)]
    if variant.rule != "sum":
        found.append(Solve(variant, reverse=False).kernel())
    found += [States(variant, reverse=False).kernel(), Outputs(variant).kernel()]
    if variant.rule != "sum":
        found.append(Solve(variant, reverse=True).kernel())
    found.append(States(variant, reverse=True).kernel())
    if variant.rule != "delta":
        found.append(ValueGradients(variant).kernel())
    found.append(FeatureGradients(variant).kernel())
    return tuple(found)


def variant_of(step: Carry | Recur, channel: bool, grouped: bool, delta: bool = False) -> Variant:
    """The variant of a step.

    channel: its decay is one for each feature; grouped: query heads share key heads; delta: `left` is `key`.
    """
    decay = "none" if step.decay is None else "channel" if channel else "scalar"
    if isinstance(step, Carry):
        return Variant(decay, step.extent.kind, step.total is not None, grouped)
    return Variant(decay, rule="delta" if delta else "dplr")


def chunked_text(variant: Variant, title: str = "") -> str:
    """The module of a variant, under a title: for people, the pattern that has the step."""
    return emit_chunked(f"{title}\n{variant}".strip(), chunked_kernels(variant))

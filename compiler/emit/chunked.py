"""The kernels of a chunked step, in the order in which they run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import cache

from attnc.compiler.composition import Carry, Recur
from attnc.compiler.emit.chunked_backward import FeatureGradients, ValueGradients
from attnc.compiler.emit.chunked_kernel import ChunkedKernel, Variant, scaled_name
from attnc.compiler.emit.chunked_module import emit_chunked
from attnc.compiler.emit.chunked_pairs import Outputs, Scores, scores_name, stored_scores
from attnc.compiler.emit.chunked_solve import Solve
from attnc.compiler.emit.chunked_states import PrefixSums, States
from attnc.dsl.terms import Input

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


@cache
def kept_names(variant: Variant) -> tuple[str, ...]:
    """The buffers of forward that backward reads: prefix sums, states, and what was solved or weighed in chunks."""
    names = [] if variant.decay == "none" else ["sums"]
    state, norm = ("end", "end_norm") if variant.extent == "all" else ("states", "norms")
    names += [state, norm] if variant.total else [state]
    names += [] if variant.rule == "sum" else ["inverse", "reads", "solved"]
    names += [scores_name(*pair) for pair in stored_scores(variant)]
    if variant.scaled:
        names += [scaled_name(read.x, False) for read in variant.reads]
        names += [scaled_name(write.x, True) for write in variant.writes]
    return tuple(names)


def kept_numbers(variant: Variant) -> str:
    """How many numbers they are for each position and head. F, E: features and values; C: positions of a chunk."""
    if variant.extent == "all":
        return "F*E/N"
    count = Counter(kept_unit(name, variant) for name in kept_names(variant))
    return " + ".join(unit if many == 1 else f"{many}*{unit}" for unit, many in count.items())


def kept_unit(name: str, variant: Variant) -> str:
    """The numbers of one of them for each position."""
    if name == "sums":
        return "F" if variant.decay == "channel" else "1"
    if name == "inverse" or name.startswith("scores_"):
        return "C"
    return {"states": "F*E/C", "norms": "F/C", "solved": "E"}.get(name, "F")


def plain_variant(step: Carry | Recur, arrays: Mapping[str, Input]) -> Variant:
    """The variant of a call in which every query head has its own keys."""
    axes = () if step.decay is None else arrays[step.decay].axes
    channel = any(axis not in ("b", "h", "t", "1") for axis in axes)
    return variant_of(step, channel, grouped=False, delta=isinstance(step, Recur) and step.left == step.key)


def chunked_text(variant: Variant, title: str = "") -> str:
    """The module of a variant, under a title: for people, the pattern that has the step."""
    return emit_chunked(f"{title}\n{variant}".strip(), chunked_kernels(variant))

"""What becomes of a text: patterns, plans and kernels, or located errors."""

from __future__ import annotations

from attnc.compiler.cost import cost_formulas
from attnc.compiler.emit.backward import backward_kernels
from attnc.compiler.emit.module import emit_module
from attnc.compiler.emit.streamed import forward_kernels
from attnc.compiler.pipeline import compose, plans, transpose
from attnc.dsl.check import check
from attnc.dsl.diagnostics import AttnError, render
from attnc.dsl.source import Source
from attnc.dsl.terms import Pattern


def outcome(text: str) -> str:
    """Takes a text through every stage that needs no tensors.

    Gives `compiled`, or the code of its first diagnostic, of which all are rendered. Any other exception is a bug.
    """
    try:
        patterns = check(Source("fuzzed.attn", text))
        for pattern in patterns.values():
            compiled(pattern)
    except AttnError as error:
        for diagnostic in error.diagnostics:
            assert 0 <= diagnostic.span.start <= diagnostic.span.stop <= len(diagnostic.span.source.text)
            assert render(diagnostic).startswith(f"error[{diagnostic.code}]: ")
        return error.diagnostics[0].code
    return "compiled"


def compiled(pattern: Pattern) -> None:
    """The kernels of a pattern, forward and backward, and what `explain` says of it."""
    for plan in plans(compose(pattern).steps):
        emit_module(plan, forward_kernels(plan))
        cost_formulas(plan)
        turned = transpose(plan)
        for number, branch in enumerate(turned.branches):
            emit_module(turned, backward_kernels(turned, branch, number))

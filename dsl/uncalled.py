"""Functions that nothing calls: they have no types, but the names in them must mean something."""

from __future__ import annotations

from collections.abc import Iterator

from attnc.dsl.blocks import nodes
from attnc.dsl.builtins import BRACKETED, FUNCTIONS
from attnc.dsl.diagnostics import Diagnostic, did_you_mean
from attnc.dsl.reductions import REDUCTIONS, SELECTIONS
from attnc.dsl.scopes import FunctionDefinition
from attnc.dsl.syntax import Call, Loop, Name, Read, Reduction


def unknown_names(function: FunctionDefinition) -> Iterator[Diagnostic]:
    """A diagnostic for every name in a function's body that nothing in its scope has."""
    body = list(nodes(function.syntax.value))
    scope = function.scope
    values = scope.value_names() | {axis for inner in scope.chain() for axis in inner.axes}
    values |= {*function.syntax.parameters, *(name for node in body if isinstance(node, Loop) for name in node.names)}
    # `identity[m]` names an axis, which may be one that only the values have.
    axes = {
        item for node in body if isinstance(node, Read) for item in node.items if node.value.span.text == "identity"
    }
    for node in body:
        if (
            isinstance(node, Name)
            and node.identifier not in values
            and node.identifier != "identity"
            and node not in axes
        ):
            help = did_you_mean(node.identifier, scope.value_names())
            yield Diagnostic("unknown-name", f"`{node.identifier}` is not defined", node.span, help=help)
        if isinstance(node, Call) and scope.callee(node.function) is None and node.function not in FUNCTIONS:
            message = f"there is no function or pattern `{node.function}`"
            yield Diagnostic("unknown-function", message, node.span, help=did_you_mean(node.function, FUNCTIONS))
        known = REDUCTIONS | SELECTIONS | BRACKETED
        if isinstance(node, Reduction) and node.function not in known:
            message = f"there is no reduction or selection `{node.function}`"
            yield Diagnostic("unknown-function", message, node.span, help=did_you_mean(node.function, known))

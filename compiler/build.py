"""Terms to graph: every value once, spans kept."""

from __future__ import annotations

from attnc.compiler.blocks import Names, build_scan
from attnc.compiler.ir import Graph, Node
from attnc.compiler.ops import OPS
from attnc.dsl.diagnostics import AttnError, Diagnostic
from attnc.dsl.terms import Pattern, Scan, Term


def build(graph: Graph, pattern: Pattern) -> Node:
    """The graph of a pattern's result."""
    return build_term(graph, pattern.out)


def build_term(graph: Graph, root: Term) -> Node:
    """The graph of one term."""
    return _build(graph, root, {}, None)


def _build(graph: Graph, root: Term, done: dict[int, Node], names: Names | None) -> Node:
    """The graph of a term outside (no names) or inside of a block."""
    stack = [(root, False)]
    while stack:
        term, expanded = stack.pop()
        if id(term) in done:
            continue
        if isinstance(term.block, Scan):
            done[id(term)] = build_scan(graph, term, done, lambda step, done, names: _build(graph, step, done, names))
            continue
        if term.block is not None:
            raise unlowered(term, f"a `{term.form}` block")
        if names is not None and term.form in ("state", "local"):
            done[id(term)] = names.read(term)
            continue
        if not expanded:
            stack.append((term, True))
            stack.extend((arg, False) for arg in reversed(term.args))
            continue
        args = tuple(done[id(arg)] for arg in term.args)
        type = None if OPS[term.form].pointwise else term.type
        done[id(term)] = graph.make(term.form, *args, type=type, attribute=term.attribute, span=term.span)
    return done[id(root)]


def unlowered(at: Term | Node, what: str, help: str | None = None) -> AttnError:
    """The error for a form of the language that no lowering covers yet."""
    assert at.span is not None
    return AttnError(
        [
            Diagnostic(
                "not-lowered",
                f"{what} is part of the language, but this version of the compiler has no lowering for it here",
                at.span,
                help=help or "`pattern.reference(..)` evaluates it (float64, every pair); no fast kernel exists yet",
            )
        ]
    )

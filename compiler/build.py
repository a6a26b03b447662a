"""Terms to graph: every value once, spans kept."""

from __future__ import annotations

from collections.abc import Mapping

from attnc.compiler.ir import Block, Graph, Node
from attnc.compiler.ops import OPS
from attnc.compiler.scans import build_scan
from attnc.dsl.diagnostics import AttnError, Diagnostic
from attnc.dsl.terms import Pattern, Repeat, Scan, Term


def build(graph: Graph, pattern: Pattern) -> Node:
    """The graph of a pattern's result."""
    return build_term(graph, pattern.out)


def build_term(graph: Graph, root: Term, known: Mapping[int, Node] | None = None) -> Node:
    """The graph of one term. `known`: nodes of terms, by id, that are built already."""
    return _build(graph, root, dict(known or {}))


def _build(graph: Graph, root: Term, done: dict[int, Node]) -> Node:
    """The graph of one term; `done` gets every node on the way."""
    stack = [(root, False)]
    while stack:
        term, expanded = stack.pop()
        if id(term) in done:
            continue
        if isinstance(term.block, Scan):
            done[id(term)] = build_scan(graph, term, done, _build)
            continue
        outside = captured(term.block) if term.block is not None else []
        if not expanded:
            stack.append((term, True))
            stack.extend((arg, False) for arg in reversed([*term.args, *outside]))
            continue
        args = tuple(done[id(arg)] for arg in [*term.args, *outside])
        if term.block is not None:
            block = build_block(graph, term.block, outside)
            done[id(term)] = graph.make(term.form, *args, type=term.type, block=block, span=term.span)
            continue
        type = None if OPS[term.form].pointwise else term.type
        done[id(term)] = graph.make(term.form, *args, type=type, attribute=term.attribute, span=term.span)
    return done[id(root)]


def owned(root: Term, found: dict[int, bool]) -> bool:
    """Whether a term of a block reads a state or an earlier step."""
    if id(root) not in found:
        inside = root.form in ("state", "local") or any(owned(arg, found) for arg in root.args)
        found[id(root)] = inside
    return found[id(root)]


def captured(block: Scan | Repeat) -> list[Term]:
    """What the steps of a block read from outside: the largest such terms, once each."""
    inside: dict[int, bool] = {}
    outside: dict[int, Term] = {}
    seen: set[int] = set()
    stack = [step for _, step in reversed(block.steps)]
    while stack:
        term = stack.pop()
        if id(term) in seen:
            continue
        seen.add(id(term))
        if owned(term, inside):
            stack.extend(reversed(term.args))
        elif term.form != "literal":
            outside[id(term)] = term
    return list(outside.values())


def build_block(graph: Graph, block: Repeat, outside: list[Term]) -> Block:
    """A block with what it captures as locals."""
    names = tuple(f"captured.{number}" for number in range(len(outside)))
    known = {
        id(term): graph.make("local", type=term.type, attribute=name, span=term.span)
        for name, term in zip(names, outside, strict=True)
    }
    steps = tuple((name, build_term(graph, step, known)) for name, step in block.steps)
    return Block(None, tuple(name for name, _ in block.states), names, steps, block.result)


UNLOWERED_HELP = "the language has it, so `pattern.reference(..)` evaluates it (float64, every pair); no kernel does"


def unlowered(at: Term | Node, what: str, help: str | None = None) -> AttnError:
    """The error for a form of the language that no lowering covers yet."""
    assert at.span is not None
    return AttnError(
        [
            Diagnostic(
                "not-lowered",
                f"{what} cannot be compiled yet",
                at.span,
                help=help or UNLOWERED_HELP,
            )
        ]
    )

"""What a pattern computes, as a graph for people: its tensors, contractions, reductions and selections.

The checked tree has a node a sign, far too many to look at. Here what is done for each position by itself is one line
of text in the language's notation: conditions, and arithmetic between two operations. What has a name in the text is
called by it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import networkx as nx

from attnc.dsl.notation import condition_place, given_name, is_true, notation
from attnc.dsl.terms import Pattern, Scan, Term
from attnc.dsl.types import Base

SELECTIONS = ("topk", "threshold", "mass", "argmax")
CONTRACTIONS = ("dot", "matmul", "outer")
REDUCTIONS = ("sum", "mean", "max", "min", "cumsum", "softmax", "normalize", "group_sum", "merge")
BLOCKS = ("scan", "repeat")
KINDS = {
    **dict.fromkeys(SELECTIONS, "selection"),
    **dict.fromkeys(CONTRACTIONS, "contraction"),
    **dict.fromkeys((*REDUCTIONS, *BLOCKS), "reduction"),
    "orthogonal_gaussian": "tensor",
}
THROUGH = ("rename", "to_real", "detach")  # an operand read at a position is still that operand
UNNAMED = "\u00b7"


@dataclass(frozen=True)
class Shown:
    """A node of the graph. `kind`: tensor, condition, selection, contraction, reduction, pointwise or result."""

    label: str
    kind: str


def pipeline_graph(pattern: Pattern) -> nx.DiGraph[int]:
    """Operand -> user; every node has a `Shown` under the key `shown`. The result has no successor."""
    return _Graph(pattern).graph


class _Graph:
    def __init__(self, pattern: Pattern) -> None:
        self.graph: nx.DiGraph[int] = nx.DiGraph()
        self._unique: dict[tuple[object, ...], Term] = {}
        self._same: dict[int, Term] = {}
        self._users: dict[int, int] = {}
        self._stateful: set[int] = set()
        out = self._merged(pattern.out)
        self._conditions = {id(c) for term in self._below(out) for c in _condition(term)}
        for term in self._below(out):
            for arg in _operands(term):
                self._users[id(arg)] = self._users.get(id(arg), 0) + 1
        while out.form in THROUGH and not self._is_node(out):
            out = out.args[0]
        self.result = out
        self._add(out)

    def _merged(self, root: Term) -> Term:
        """The tree with equal terms made one."""
        stack = [(root, False)]
        while stack:
            term, expanded = stack.pop()
            if id(term) in self._same:
                continue
            if not expanded:
                stack.append((term, True))
                stack.extend((operand, False) for operand in _operands(term))
                continue
            key = (term.form, *(id(self._same[id(operand)]) for operand in _operands(term)), str(term.type))
            key = (*key, term.attribute.__class__, term.attribute, term.block and term.block.result)
            if key not in self._unique:
                args = tuple(self._same[id(arg)] for arg in term.args)
                self._unique[key] = Term(term.form, args, term.type, term.attribute, term.block, span=term.span)
                self._note_state(self._unique[key])
            self._same[id(term)] = self._unique[key]
        return self._same[id(root)]

    def _note_state(self, term: Term) -> None:
        if term.form in ("state", "local") or any(id(arg) in self._stateful for arg in term.args):
            self._stateful.add(id(term))

    def _operands(self, term: Term) -> list[Term]:
        return [self._same.get(id(operand), operand) for operand in _operands(term)]

    def _below(self, root: Term) -> Iterator[Term]:
        seen, stack = {id(root)}, [root]
        while stack:
            term = stack.pop()
            yield term
            for operand in self._operands(term):
                if id(operand) not in seen:
                    seen.add(id(operand))
                    stack.append(operand)

    def _is_node(self, term: Term) -> bool:
        """Whether a term is drawn by itself; what is not is part of its users' text."""
        if id(term) in self._stateful:
            return False
        if term.form in KINDS or id(term) in self._conditions:
            return True
        if term.form == "input":
            return term.type.base is Base.REAL
        shared = self._users.get(id(term), 0) > 1 and term.form not in THROUGH
        return shared and term.type.base is Base.REAL and next(self._references(term), None) is not None

    def _references(self, term: Term) -> Iterator[Term]:
        """The nodes that a term's text mentions, each once; and its condition."""
        seen: set[int] = set()
        yield from (self._same.get(id(condition), condition) for condition in _condition(term))
        seen.update(id(condition) for condition in _condition(term))
        stack = list(reversed(self._operands(term)))
        while stack:
            operand = stack.pop()
            if id(operand) in seen:
                continue
            seen.add(id(operand))
            if self._is_node(operand) and id(operand) not in self._conditions:
                yield operand
            else:
                stack.extend(reversed(self._operands(operand)))

    def _add(self, root: Term) -> None:
        stack = [root]
        while stack:
            term = stack.pop()
            if "shown" in self.graph.nodes.get(id(term), {}):
                continue
            self.graph.add_node(id(term), shown=self._shown(term))
            for operand in self._references(term):
                while operand.form in THROUGH and self._is_node(operand.args[0]):
                    operand = operand.args[0]
                stack.append(operand)
                self.graph.add_edge(id(operand), id(term))
        # Nodes were added with a number that depends on memory: number them in the order of the walk.
        nx.relabel_nodes(self.graph, {node: n for n, node in enumerate(list(self.graph))}, copy=False)

    def _shown(self, term: Term) -> Shown:
        if id(term) in self._conditions:
            return Shown(f"where {notation(term, self._reference)}", "condition")
        kind = "tensor" if term.form == "input" else KINDS.get(term.form, "pointwise")
        kind = "result" if term is self.result else kind
        if term.block is not None:
            lines = [f"  {name} = {' '.join(step.span.text.split())}" for name, step in term.block.steps]
            times = term.block.index if isinstance(term.block, Scan) else notation(term.args[0], self._reference)
            return Shown("\n".join([f"{term.form} {times}:", *lines]), kind)
        text = notation(term, self._reference, where="..")
        name = given_name(term) or ("out" if term is self.result else None)
        return Shown(text if name is None or name == text else f"{name} = {text}", kind)

    def _reference(self, term: Term) -> str | None:
        """What a term is called in the text of its users; None where it is written out."""
        term = self._same.get(id(term), term)
        if id(term) in self._conditions or not self._is_node(term):
            return None
        return str(term.attribute) if term.form == "input" else given_name(term) or UNNAMED


def _operands(term: Term) -> tuple[Term, ...]:
    return term.args + (tuple(step for _, step in term.block.steps) if term.block else ())


def _condition(term: Term) -> Iterator[Term]:
    """The condition of a reduction or selection that has one."""
    place = condition_place(term)
    if place is not None and not is_true(term.args[place]):
        yield term.args[place]

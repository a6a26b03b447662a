"""Whether row i of a result depends on tokens after i, and where in the text such a dependence comes from.

Every value is followed from its operands up as a set of *horizons*: the last token that an element may depend on, told
by one of its indices. A reduction over an index leaves the horizons of its live members, bounded by what its condition
says: `j <= i`, `s.stop <= i`, `s.index < i // block`. What no rule bounds counts as a leak, so that `causal: yes` is
proven, while `no` names the place where it could not be.

A condition alone does not make a pattern causal: a selection of blocks whose scores pool later queries masks those
tokens in the attention, and still depends on them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from attnc.compiler.algebra import Algebra, at_most
from attnc.compiler.build import build_term
from attnc.compiler.conditions import disjunction
from attnc.compiler.domains import DomainBuilder
from attnc.compiler.ir import Graph, Node
from attnc.compiler.membership import Tables
from attnc.compiler.simplify import simplify
from attnc.compiler.statics import specialised
from attnc.dsl.diagnostics import AttnError
from attnc.dsl.source import Span
from attnc.dsl.terms import Axis, Pattern, Repeat, Scan, Term

TOKENS = frozenset("ijt")
REDUCTIONS = frozenset({"sum", "mean", "max", "min", "softmax", "normalize"})
SELECTIONS = frozenset({"topk", "threshold", "mass", "argmax"})
ZERO_OUTSIDE = frozenset({"softmax", "normalize"})  # their dead members are 0, so a sum over them has live ones only
STATIC = frozenset({"literal", "parameter", "size", "index", "start", "stop"})


@dataclass(frozen=True)
class Horizon:
    """The last token that a value depends on. `kind`: `at` (the token at index `name`), `end` (the last token of a
    member of the declared axis `name`), or `leak` (a later one than the query's: `span` and `reason` say where)."""

    kind: str
    name: str = ""
    span: Span | None = None
    reason: str = ""


Horizons = frozenset[Horizon]
NONE: Horizons = frozenset()


def leaks(pattern: Pattern) -> list[tuple[Span, str]]:
    """Where the result at a query may depend on later tokens: (place, reason) each, in the order of the text.

    Empty: proven causal. A pattern whose result has no query position depends on all tokens.
    """
    found = Causality(pattern).of(pattern.out)
    spans = {(horizon.span or pattern.out.span, horizon.reason) for horizon in found if horizon.kind == "leak"}
    if any(horizon.kind != "leak" and horizon != Horizon("at", "i") for horizon in found):
        spans.add((pattern.out.span, "the result is not one of a query's position"))
    return sorted(spans, key=lambda leak: (leak[0].start, leak[1]))


def causality(pattern: Pattern) -> str:
    """`yes` or `no` for all values of parameters, or `by default`: proven for the default ones only."""
    if not leaks(pattern):
        return "yes"
    return "no" if not defaults(pattern) or leaks(specialised(pattern, defaults(pattern))) else "by default"


def defaults(pattern: Pattern) -> dict[str, int]:
    """The default values of int parameters."""
    return {one.name: one.default for one in pattern.parameters if type(one.default) is int}


def describe_causality(pattern: Pattern) -> list[str]:
    """Lines for people: whether no row depends on a later token, else each place that lets one."""
    verdict, found = causality(pattern), leaks(pattern)
    if verdict == "yes":
        return ["causal: yes, no row depends on a later token"]
    lines = ["causal: no, because"]
    if verdict == "by default":
        values = ", ".join(f"{name} = {value}" for name, value in defaults(pattern).items())
        lines = [f"causal: yes for {values}, but not for all values, because"]
    for span, reason in found:
        lines.append(f"    line {span.source.position(span.start)[0]}, `{' '.join(span.text.split())}`: {reason}")
    return lines


class Causality:
    """Horizons of the terms of one pattern."""

    def __init__(self, pattern: Pattern) -> None:
        self.graph = Graph()
        self.algebra = Algebra(self.graph)
        self.axes: dict[str, Axis] = {axis.name: axis for axis in pattern.axes}
        self._known: dict[int, Horizons] = {}
        self._names: dict[str, Horizons] = {}  # states and locals of the enclosing block

    def of(self, term: Term) -> Horizons:
        """The horizons of a term."""
        if id(term) in self._known:
            return self._known[id(term)]
        for arg in term.args:
            self.of(arg)
        found = self._of(term)
        if not self._names:
            self._known[id(term)] = found
        return found

    def union(self, terms: tuple[Term, ...]) -> Horizons:
        return NONE.union(*(self.of(term) for term in terms))

    def _of(self, term: Term) -> Horizons:
        if term.form in STATIC:
            return NONE
        if term.form == "input":
            return frozenset(Horizon("at", name) for name in term.type.indices & TOKENS)
        if term.form in ("state", "local"):
            return self._names.get(str(term.attribute), NONE)
        if term.block is not None:
            return self.block(term)
        if term.form == "rename":
            return self.rename(term)
        if term.form == "shift":
            return self.shift(term)
        if term.form in REDUCTIONS:
            return self.reduction(term)
        if term.form in SELECTIONS:
            condition = term.args[1 if term.form == "argmax" else 2]
            return self.over(term, self.union(term.args), str(term.attribute), condition)
        if term.form in ("dot", "matrix"):
            return self.contraction(term)
        return self.union(term.args)  # pointwise, products of vectors, prefix sums: nothing after the operands

    # Rules

    def block(self, term: Term) -> Horizons:
        """A scan sees its operands up to the token; a repeat goes round until nothing is added."""
        block = term.block
        assert block is not None
        outer, found = self._names, self.union(term.args)
        names = {name for name, _ in block.states} | {name for name, _ in block.steps}
        while True:
            self._names = {**outer, **dict.fromkeys(names, found)}
            seen = found.union(*(self.of(step) for _, step in block.steps))
            if seen == found:
                break
            found = seen
        self._names = outer
        return self.scanned(found, block) if isinstance(block, Scan) else found

    @staticmethod
    def scanned(found: Horizons, block: Scan | Repeat) -> Horizons:
        """Inside a scan i, j and t are all the current token."""
        assert isinstance(block, Scan)
        at = Horizon("at", block.index)
        return frozenset(at if horizon.kind == "at" else horizon for horizon in found)

    def rename(self, term: Term) -> Horizons:
        assert isinstance(term.attribute, tuple)
        source, target = (str(name) for name in term.attribute)
        return frozenset(
            Horizon("at", target) if horizon == Horizon("at", source) else horizon for horizon in self.of(term.args[0])
        )

    def shift(self, term: Term) -> Horizons:
        """A read at a computed position: of a token, not after an index; of a member, before the query's own."""
        source, position = term.args
        along = str(term.attribute)
        found, own = self.of(source), Horizon("end" if along in self.axes else "at", along)
        rest = (found - {own}) | self.of(position)
        if own not in found:
            return rest
        bounded = self.node(position)
        held = self.member_before(along, bounded) if along in self.axes else self.token_before(bounded)
        if held is not None:
            return rest | {Horizon("at", held)}
        reason = (
            f"a member of `{along}` is read whose tokens may end after the query"
            if along in self.axes
            else "a position is read that may lie after the query"
        )
        return rest | {Horizon("leak", span=self.place(source, term), reason=reason)}

    def reduction(self, term: Term) -> Horizons:
        assert isinstance(term.attribute, tuple)
        axis, within = (None if name is None else str(name) for name in term.attribute)
        assert axis is not None
        found = self.union(term.args)
        if within is None:
            # Where the index stays (softmax), an element depends on the whole row, which `over` bounds.
            return self.over(term, found, axis, term.args[1])
        own = Horizon("end" if axis in self.axes else "at", axis)
        inside = frozenset({Horizon("end", within)} if own in found else ())
        if axis in self.axes and own in found:  # a member that overlaps may end later than the one that it is part of
            reason = f"a member of `{axis}` that overlaps one of `{within}` may end after it"
            nested = self.same_multiples(axis, within)
            inside |= frozenset() if nested else {Horizon("leak", span=term.span, reason=reason)}
        return (found - {own}) | inside

    def contraction(self, term: Term) -> Horizons:
        """A product over an index: a sum over its live members where one operand is 0 on the others."""
        found = self.union(term.args)
        names = term.attribute if isinstance(term.attribute, tuple) else (term.attribute,)
        for name in map(str, names):
            if name in TOKENS or name in self.axes:
                live = self.condition_of(term, name)
                found = self.over(term, found, name, live)
        return found

    def condition_of(self, term: Term, name: str) -> Term | None:
        """The condition outside of which a factor of a product over `name` is 0."""
        for factor in term.args:
            if factor.form in ZERO_OUTSIDE and factor.attribute == (name, None):
                return factor.args[1]
        return None

    def over(self, term: Term, found: Horizons, name: str, condition: Term | None) -> Horizons:
        """Horizons once the members of an index are put together, as far as a condition lets them take part."""
        own = {Horizon("at", name), Horizon("end", name)} & found
        if not own:
            return found
        (horizon,) = own  # of a token, or of a member: a name is one of both
        bounds = self.bounds(horizon, self.node(condition)) if condition is not None else None
        if bounds is not None:
            return (found - own) | bounds
        reason = f"nothing keeps {name} at or before the query"
        if name in self.axes:
            reason = f"members of `{name}` take part that may end after the query"
        place = self.place(term, term)
        inner = {one.span for one in found if one.kind == "leak" and one.reason == reason and one.span}
        if any(place.start <= span.start and span.stop <= place.stop for span in inner):
            return found - own  # said of what this term is made of
        return (found - own) | {Horizon("leak", span=place, reason=reason)}

    # Bounds

    def bounds(self, horizon: Horizon, condition: Node | None) -> Horizons | None:
        """What bounds an index in every way to fulfil a condition; None where nothing is known."""
        if condition is None:
            return None
        found: set[Horizon] = set()
        for atoms in disjunction(self.graph, condition):
            held = self.bounded_by(horizon, atoms)
            if held is None:
                return None
            found.add(held)
        return frozenset(found)

    def bounded_by(self, horizon: Horizon, atoms: tuple[Node, ...]) -> Horizon | None:
        if horizon.kind == "at":
            return self.position_bound(horizon.name, atoms)
        for atom in atoms:
            held = self.member_bound(horizon.name, atom)
            if held is not None:
                return held
        return None

    def position_bound(self, name: str, atoms: tuple[Node, ...]) -> Horizon | None:
        """A token index that is at most i: the keys of a row, solved for."""
        if name != "j":
            return None
        if any(self.is_chosen(atom) for atom in atoms):
            return Horizon("at", "i")
        atoms = tuple(atom for atom in atoms if atom.op != "member")
        solved = DomainBuilder(self.graph, self.algebra, Tables(self.graph, self.algebra, {})).solve_atoms(atoms)
        limit = self.graph.make("add", self.graph.index("i"), self.graph.literal(1))
        if any(at_most(self.algebra, high, limit) for high in solved.highs):
            return Horizon("at", "i")
        return None

    def is_chosen(self, atom: Node) -> bool:
        """Whether an atom asks for j in a selection whose candidates all end at or before the query."""
        if atom.op != "member" or atom.args[0] is not self.graph.index("j") or atom.args[1].op not in SELECTIONS:
            return False
        selection = atom.args[1]
        axis = str(selection.attribute)
        candidate = Horizon("end" if axis in self.axes else "at", axis)
        return self.bounds(candidate, selection.args[2]) == frozenset({Horizon("at", "i")})

    def member_bound(self, name: str, atom: Node) -> Horizon | None:
        """The last token of a member, from `s.stop <= x`, `s.index < x // size` or `s.index <= u.index`."""
        if atom.op not in ("lt", "le"):
            return None
        left, right = atom.args
        one = self.graph.literal(1)
        if left.op == "stop" and left.attribute == name:
            limit = self.graph.make("add", self.graph.index("i"), one if atom.op == "le" else self.graph.literal(2))
            return Horizon("at", "i") if at_most(self.algebra, right, limit) else None
        if left.op != "index" or left.attribute != name or not self.tiled(name):
            return None
        if right.op == "index" and right.attribute in self.axes and self.same_size(name, str(right.attribute)):
            return Horizon("end", str(right.attribute))
        if atom.op == "lt" and self.is_number(right, name):
            return Horizon("at", "i")
        return None

    def member_before(self, axis: str, position: Node | None) -> str | None:
        """i where a member number is that of a block before the query's own."""
        if position is None or position.op != "sub" or not self.is_number(position.args[0], axis):
            return None
        step = position.args[1]
        return "i" if step.op == "literal" and isinstance(step.attribute, int) and step.attribute >= 1 else None

    def token_before(self, position: Node | None) -> str | None:
        """The index that a position is never after."""
        if position is None:
            return None
        for name in position.type.indices & TOKENS:
            if at_most(self.algebra, position, self.graph.index(name)):
                return str(name)
        return None

    def is_number(self, node: Node, axis: str) -> bool:
        """Whether a node is i // size, the number of the query's own member of an axis."""
        own = node.op == "floordiv" and node.args[0] is self.graph.index("i")
        return own and self.tiled(axis) and node.args[1] is self.size(axis)

    def tiled(self, axis: str) -> bool:
        """Whether members lie end to end."""
        return self.axes[axis].kind == "blocks" and self.axes[axis].stride is None

    def size(self, axis: str) -> Node | None:
        return self.node(self.axes[axis].size)

    def same_size(self, one: str, other: str) -> bool:
        return self.tiled(one) and self.tiled(other) and self.size(one) is self.size(other)

    def same_multiples(self, inner: str, outer: str) -> bool:
        """Whether members of one axis never cross an end of the other's: not known of sizes that calls give."""
        return self.same_size(inner, outer)

    def node(self, term: Term) -> Node | None:
        """A condition or position as a node; None where the compiler has none for it."""
        try:
            return simplify(self.graph, build_term(self.graph, term))
        except AttnError:
            return None

    @staticmethod
    def place(term: Term, otherwise: Term) -> Span:
        return next((one.span for one in pooled(term)), otherwise.span)


def pooled(term: Term) -> Iterator[Term]:
    """Reductions over the members of an axis of queries, below a term: where later queries come in."""
    seen: set[int] = set()
    stack = [term]
    while stack:
        one = stack.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        pools = one.form in REDUCTIONS and isinstance(one.attribute, tuple) and one.attribute[0] == "i"
        if pools and one.attribute != ("i", None):
            yield one
        stack.extend(one.args)

"""The cache of a pattern: everything that its steps keep between the calls of token-by-token decoding.

A row of the whole sequence must not depend on later tokens, nor on how many there are. Then each step needs of the past
only: arrays of its keys, as long as later queries see them (`compiler.retention`); a state; and, of values over the
sequence, running sums, shifted values, and the positions of blocks that are not whole yet.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from attnc.compiler.algebra import Algebra, at_most
from attnc.compiler.causality import Causality, leaks
from attnc.compiler.composition import Attend, Carry, Choose, Composition, Compute, Extreme, Recur, Regroup, Step
from attnc.compiler.ir import Node, walk
from attnc.compiler.relocate import obstacle
from attnc.compiler.retention import Retention, counted, retained, union
from attnc.compiler.statics import below, specialised
from attnc.dsl.diagnostics import AttnError, Diagnostic
from attnc.dsl.source import Span
from attnc.dsl.terms import Axis, Pattern, Term

TOKENS = frozenset("ijt")
REDUCTIONS = frozenset({"sum", "mean", "max", "min", "softmax", "normalize", "cumsum"})
SELECTIONS = frozenset({"topk", "threshold", "mass", "argmax"})


@dataclass(frozen=True)
class Kept:
    """Arrays along one index (j, the tokens, or a declared axis of blocks) that have a place for each position kept.

    `parts`: arrays that are the first columns of another one of them, and take no memory. `given`: arrays of nothing
    but numbers that the caller gave, kept in their element type; what is computed is kept in the type of sums.
    `operands`: arrays that are nothing but keys and values of softmaxes, of which products may round what is computed.
    """

    index: str
    arrays: tuple[str, ...]
    retention: Retention
    parts: Mapping[str, str] = field(default_factory=dict)
    given: frozenset[str] = frozenset()
    operands: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Trailing:
    """A value over the sequence that needs earlier values of its operand.

    kinds: `sum` (the running sum of a cumsum), `shift` (the last `amount` values), `pool` (values of the members of
    `axis` that are not whole yet).
    """

    kind: str
    node: Node
    axis: str | None = None
    amount: Node | None = None

    @property
    def operand(self) -> Node:
        return self.node.args[0]


@dataclass(frozen=True)
class CachePlan:
    """What is kept between calls: arrays, trailing values of `Compute` steps, and states."""

    kept: tuple[Kept, ...]
    trailing: tuple[Trailing, ...]
    states: tuple[Carry | Recur, ...]

    def along(self, index: str) -> Kept | None:
        """What is kept along an index."""
        return next((one for one in self.kept if one.index == index), None)


def cache_of(
    pattern: Pattern, composition: Composition, parameters: Mapping[str, int] | None = None, *, documents: bool = False
) -> CachePlan:
    """What a decoding of the pattern keeps. `parameters`: values of ints; a lag may be causal for some of them only.
    `documents`: states that begin anew with a document of packed ones are states, too.

    Raises AttnError, located in the text, for a pattern that cannot be decoded: a row depends on later tokens or on the
    length of the sequence, or a step has no form that goes on from a state.
    """
    for span, reason in leaks(specialised(pattern, parameters or {})):
        raise undecodable(pattern, span, f"a query depends on later tokens here: {reason}")
    check_lengths(pattern)
    return _Deriving(pattern, composition, documents).plan()


def undecodable(pattern: Pattern, span: Span, reason: str) -> AttnError:
    """The error for a pattern that has no cache."""
    help = "give it the whole sequence in one call"
    return AttnError([Diagnostic("decoding", f"{pattern.name} cannot be decoded: {reason}", span, help=help)])


def check_lengths(pattern: Pattern) -> None:
    """No value is one of the sequence's length, which grows while it is decoded."""
    causality = Causality(pattern)
    axes = {axis.name: axis for axis in pattern.axes}
    bounded = {id(arg) for term in below(pattern.out) for arg in _before_query(causality, axes, term)}
    for term in below(pattern.out):
        if term.form == "size" and term.attribute in TOKENS:
            raise undecodable(pattern, term.span, "this is the length of the sequence, which grows")
        if term.form == "stop" and axes[str(term.attribute)].stride is None and id(term) not in bounded:
            raise undecodable(pattern, term.span, "the last block ends with the sequence, which grows")
    for axis in pattern.axes:
        if axis.kind == "segments":
            raise undecodable(pattern, axis.span, "segments are as long as the length of the sequence says")


def _before_query(causality: Causality, axes: dict[str, Axis], term: Term) -> Iterator[Term]:
    """`s.stop` in `s.stop <= x` with x at or before the query: a block cut short by the end is in neither way."""
    if term.form not in ("lt", "le") or term.args[0].form != "stop":
        return
    limit = causality.node(term.args[1])
    graph = causality.graph
    last = graph.index("i") if term.form == "le" else graph.make("add", graph.index("i"), graph.literal(1))
    if limit is not None and at_most(causality.algebra, limit, last):
        yield term.args[0]


@dataclass
class _Deriving:
    """One plan on its way."""

    pattern: Pattern
    composition: Composition
    documents: bool = False
    needs: dict[str, list[Retention]] = field(default_factory=dict)
    arrays: dict[str, dict[str, None]] = field(default_factory=dict)
    trailing: list[Trailing] = field(default_factory=list)
    states: list[Carry | Recur] = field(default_factory=list)
    others: set[str] = field(default_factory=set)  # arrays that more than products of a softmax read

    def plan(self) -> CachePlan:
        for step in self.composition.steps:
            self.step(step)
        graph = self.composition.graph
        assert graph is not None
        kept = tuple(self.kept(index, union(graph, parts)) for index, parts in self.needs.items())
        return CachePlan(kept, tuple(self.trailing), tuple(self.states))

    def kept(self, index: str, retention: Retention) -> Kept:
        arrays = tuple(self.arrays[index])
        made = {step.name: step.node for step in self.composition.steps if isinstance(step, Compute)}
        whole = {name: made[name] for name in arrays if name in made and made[name].op == "concat"}
        parts = {str(first.attribute): name for name, node in whole.items() if (first := node.args[0]).op == "input"}
        parts = {name: of for name, of in parts.items() if name in arrays and name not in parts.values()}
        given = frozenset(name for name in arrays if name not in made or is_given(made[name]))
        operands = frozenset(arrays) - self.others
        return Kept(index, arrays, retention, parts, given, operands)

    def step(self, step: Step) -> None:
        if isinstance(step, Compute):
            for node in every_node(step.node):
                self.value(node)
        elif isinstance(step, Attend | Extreme):
            self.attend(step if isinstance(step, Attend) else step.attend)
        elif isinstance(step, Carry):
            self.carry(step)
        elif isinstance(step, Recur):
            self.states.append(step)
        elif isinstance(step, Choose | Regroup):
            self.others |= set(arrays_read(step))
            what = "a choice may fall on any of them" if isinstance(step, Choose) else "any may be of a query's group"
            for index in ("j", *self.axis_names()):
                self.keep(index, arrays_read(step), Retention(reasons=(what,)))
        else:
            raise self.refused(None, "it has a step that does not go on from a cache yet")

    def refused(self, node: Node | None, reason: str) -> AttnError:
        span = (node.span if node is not None else None) or self.pattern.out.span
        return undecodable(self.pattern, span, reason)

    # Keys

    def attend(self, step: Attend) -> None:
        """The arrays of its keys, as long as a later query sees them."""
        if step.rows != "i":
            raise self.refused(None, f"its rows are those of {step.rows}, not queries")
        if step.keys != "j" and step.keys not in self.axis_names():
            return  # the same keys for every query: learned ones
        graph = self.composition.graph
        assert graph is not None
        found = retained(graph, [branch.condition for branch in step.plan.branches])
        if step.keys != "j" and not found.everything:
            found = Retention(reasons=(f"members of {step.keys} are few",))
        fixed = obstacle(step.plan, places=True)
        if fixed is not None and not found.everything:
            found = Retention(reasons=(fixed,))
        beside = side_inputs(step, "j")
        if obstacle(step.plan, places=False) is not None:
            beside += side_inputs(step, "i")  # rows read them where they lie among the kept ones
        self.others |= set(beside)
        self.keep(step.keys, [step.key, step.value], found)
        self.keep(step.keys, beside, found)

    def keep(self, index: str, arrays: Sequence[str], retention: Retention) -> None:
        along = ("j", "t") if index == "j" else (index,)
        found = [name for name in arrays if set(along) & set(self.composition.arrays[name].axes)]
        if found:
            self.arrays.setdefault(index, {}).update(dict.fromkeys(found))
            self.needs.setdefault(index, []).append(retention)

    def axis_names(self) -> set[str]:
        return {axis.name for axis in self.composition.axes}

    # States

    def carry(self, step: Carry) -> None:
        """A sum over past keys; one over all keys is none, and packed documents start anew where nothing says so."""
        extent = step.extent
        if extent.kind == "all":
            raise self.refused(None, "a sum over all keys")
        if extent.same is not None and not self.documents:
            raise self.refused(None, f"a state that starts anew where `{extent.same}` changes")
        delayed = extent.kind == "lag" and not _is_zero(extent.amount)
        if step.decay is not None and extent.kind == "period":
            raise self.refused(None, "a decaying state of whole periods")
        self.states.append(step)
        if delayed:
            assert extent.amount is not None
            graph = self.composition.graph
            assert graph is not None
            window = graph.make("add", graph.make("maximum", extent.amount, graph.literal(0)), graph.literal(1))
            names = [step.key, step.value, *([step.decay] if step.decay else [])]
            self.others |= set(names)
            self.keep("j", names, Retention(window=window))

    # Values over the sequence

    def value(self, node: Node) -> None:
        """A node of a `Compute` step: what of it is not one position at a time."""
        axis, within = node.attribute if isinstance(node.attribute, tuple) and len(node.attribute) == 2 else (None,) * 2
        along = TOKENS | self.axis_names()
        if node.op in REDUCTIONS and axis in along:
            self.reduction(node, str(axis), within)
        elif node.op == "shift":
            self.shift(node)
        elif node.op in SELECTIONS and node.attribute in along:
            raise self.refused(node, "a selection among all positions")
        elif node.op == "dot" and node.attribute in along:
            raise self.refused(node, "a sum over the sequence")
        elif node.op in ("matrix", "unmatrix"):
            named = node.attribute if isinstance(node.attribute, tuple) else (node.attribute,)
            if along & set(named):
                raise self.refused(node, "positions are made a vector")

    def reduction(self, node: Node, axis: str, within: object) -> None:
        always = node.args[1].op == "literal" and node.args[1].attribute is True
        if node.op == "cumsum" and axis in TOKENS and always:
            self.note(Trailing("sum", node))
        elif within is not None and axis in TOKENS and node.op != "cumsum":
            if not always or len(node.args) > 2:
                raise self.refused(node, "a pool over some of its members only")
            self.note(Trailing("pool", node, axis=str(within)))
        else:
            raise self.refused(node, f"a reduction over all of {axis}")

    def shift(self, node: Node) -> None:
        """A read of the position some parameters before."""
        graph = self.composition.graph
        assert graph is not None
        algebra = Algebra(graph)
        along = str(node.attribute)
        distance = algebra.difference(graph.index(along), node.args[1])
        if along not in TOKENS or any(algebra.node(symbol).op != "parameter" for symbol in distance.free_symbols):
            raise self.refused(node, "a read at another position that is not a fixed distance behind")
        self.note(Trailing("shift", node, amount=algebra.node(distance)))

    def note(self, trailing: Trailing) -> None:
        if all(one.node is not trailing.node for one in self.trailing):
            self.trailing.append(trailing)


def _is_zero(amount: Node | None) -> bool:
    return amount is None or (amount.op == "literal" and amount.attribute == 0)


def is_given(root: Node) -> bool:
    """Whether a value is the caller's numbers, arranged."""
    return all(node.op in ("input", "concat", "rename") for node in walk(root))


def every_node(root: Node) -> Iterator[Node]:
    """The nodes of a value, those of its blocks among them."""
    for node in walk(root):
        yield node
        if node.block is not None:
            for _, step in node.block.steps:
                yield from every_node(step)


def arrays_read(step: Choose | Regroup) -> list[str]:
    """The arrays that a step reads."""
    nodes: list[Node | None]
    if isinstance(step, Choose):
        nodes, names = [step.score, step.condition, step.force], []
    else:
        orders = [order for order in (step.rows, step.keys) if order is not None]
        nodes = [node for order in orders for node in (order.group, order.live)]
        nodes += [node for one in step.ranges for node in (one.low, one.high)]
        inner = [step.attend.query, step.attend.key, step.attend.value]
        inner += [entry.name for entry in step.attend.plan.inputs]
        names = [moved.source for moved in step.moved] + [name for name in inner if name not in step.made]
    leaves = walk(*(node for node in nodes if node is not None))
    names += [str(node.attribute) for node in leaves if node.op == "input"]
    return list(dict.fromkeys(names))


def side_inputs(step: Attend, side: str) -> list[str]:
    """The arrays beside q, k and v that a step's plan reads at its rows (`i`) or its keys (`j`)."""
    roots = []
    for branch in step.plan.branches:
        roots += [branch.score, branch.condition, *([branch.sink] if branch.sink is not None else [])]
    tables = {table.name: table for table in step.plan.derived}
    roots += [arg for table in tables.values() for arg in table.args]
    found: dict[str, None] = {}
    for node in walk(*roots):
        if node.op == "rename" and node.attribute == ("t", side):
            found |= {str(leaf.attribute): None for leaf in walk(node) if leaf.op == "input"}
        elif node.op == "input" and node.depends_on(side) and node.attribute not in ("q", "k", "v"):
            found[str(node.attribute)] = None
    return list(found)


def describe_cache(plan: CachePlan) -> list[str]:
    """Lines for people: what is kept of each index, and the states."""
    lines = []
    for kept in plan.kept:
        if kept.arrays:
            lines.append(f"{', '.join(kept.arrays)} of {kept.index}: {'; '.join(counted(kept.retention))}")
            lines += [f"    - {reason}" for reason in kept.retention.reasons]
            lines += [f"    - {name} is the first columns of {whole}" for name, whole in kept.parts.items()]
    for state in plan.states:
        copies = 2 if isinstance(state, Carry) and state.extent.kind == "period" else 1
        lines.append(f"{state.name}: {'a state' if copies == 1 else 'two states'} of {state.key} by {state.value}")
    words = {"sum": "its running sum", "shift": "its last values", "pool": "values of members that are not whole yet"}
    lines += [f"{one.node.op} of {_place(one.node)}: {words[one.kind]}" for one in plan.trailing]
    return lines


def _place(node: Node) -> str:
    """What a trailing value is of: the array, or the text."""
    operand = node.args[0]
    if operand.op == "input":
        return str(operand.attribute)
    return " ".join(node.span.text.split()) if node.span else node.op

"""A pattern whose calls go on from one another: states enter as inputs, and are left beside the result.

For patterns that need of the past nothing but states (`compiler.cache_plan` derives what they need). Positions are
counted on, where the text reads them. What keeps keys, sums or open blocks, too, is decoded with a cache instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from attnc.compiler.cache_plan import TOKENS, CachePlan, Trailing, cache_of
from attnc.compiler.composition import Carry, Composition, Compute, Handed, Handing, Recur, Step
from attnc.compiler.ir import Graph, Node, walk
from attnc.compiler.verify import step_reads
from attnc.dsl.diagnostics import AttnError, Diagnostic
from attnc.dsl.source import Span
from attnc.dsl.terms import Input, Parameter, Pattern
from attnc.dsl.types import Base, Type

# Names that no text can give: those of the language do not begin with a digit.
COUNTED = "0counted"  # the parameter: tokens of earlier calls


def handing(pattern: Pattern, composition: Composition, parameters: Mapping[str, int]) -> Composition:
    """The composition that takes states and leaves them. `parameters`: values of ints.

    Raises AttnError, located in the text, for a pattern that needs more of earlier tokens than states.
    """
    try:
        plan = cache_of(pattern, composition, parameters, documents=True)
    except AttnError as error:
        reason = error.diagnostics[0]
        raise refused(pattern, reason.span, reason.message.partition(": ")[2], "give it the whole sequence") from None
    return _Handing(pattern, composition, plan).made()


def refused(pattern: Pattern, span: Span, reason: str, help: str) -> AttnError:
    """The error for a pattern that has no states to hand over."""
    message = f"{pattern.name} hands no state from call to call: {reason}"
    return AttnError([Diagnostic("decoding", message, span, help=help)])


@dataclass
class _Handing:
    """One such composition on its way."""

    pattern: Pattern
    composition: Composition
    plan: CachePlan
    inputs: list[Input] = field(default_factory=list)
    arrays: dict[str, Input] = field(default_factory=dict)
    handed: list[Handed] = field(default_factory=list)
    documents: dict[str, tuple[str, str]] = field(default_factory=dict)

    def made(self) -> Composition:
        self.check()
        steps = used([one for step in self.composition.steps for one in self.step(step)])
        counts = any(reads_counted(step) for step in steps)
        counted = Parameter(COUNTED, Base.INT, 0, False, span=self.pattern.span)
        return replace(
            self.composition,
            parameters=(*self.composition.parameters, *([counted] if counts else [])),
            inputs=(*self.composition.inputs, *self.inputs),
            steps=tuple(steps),
            arrays={**self.composition.arrays, **self.arrays, **{one.name: one for one in self.inputs}},
            handed=tuple(self.handed),
        )

    @property
    def graph(self) -> Graph:
        assert self.composition.graph is not None
        return self.composition.graph

    def check(self) -> None:
        """States are all that is kept, and there are some."""
        for kept in self.plan.kept:
            if kept.arrays:
                raise self.refused(None, f"it needs earlier {', '.join(kept.arrays)} of {kept.index}, too")
        lags = {step.name for state in self.plan.states for step in self.lagging(state)}
        for trailing in self.plan.trailing:
            if not any(one.name in lags and one.node is trailing.node for one in self.computed().values()):
                raise self.refused(trailing.node, f"it needs earlier values of a {trailing.kind}, too")
        for state in self.plan.states:
            if isinstance(state, Carry) and state.extent.kind == "period":
                raise self.refused(None, "it needs the state of whole periods beside that of the open one")
        if not self.plan.states:
            raise self.refused(None, "it has none")
        if any(not isinstance(step, Compute | Carry | Recur) for step in self.composition.steps):
            raise self.refused(None, "it attends to keys that are no tokens, too")

    def refused(self, node: Node | None, reason: str) -> AttnError:
        span = (node.span if node is not None else None) or self.pattern.out.span
        return refused(
            self.pattern, span, reason, "`pattern.cache(..)` and `pattern.decode(..)` keep all that it needs"
        )

    # States that are read before their update: arrays of tokens lag by one

    def computed(self) -> dict[str, Compute]:
        return {step.name: step for step in self.composition.steps if isinstance(step, Compute)}

    def lagging(self, step: Carry | Recur) -> list[Compute]:
        """The arrays of a step that lag by one token, if all that follow the tokens do."""
        found = [self.computed().get(name) if name else None for name in tokens_read(step)]
        lags = [one for one in found if one is not None and self.lags(one.node)]
        return lags if len(lags) == sum(name is not None for name in tokens_read(step)) else []

    def lags(self, node: Node) -> bool:
        trailing = next((one for one in self.plan.trailing if one.node is node), None)
        return trailing is not None and is_one(trailing)

    def unlagged(self, step: Carry | Recur) -> tuple[list[Step], Carry | Recur]:
        """A lagging step with its arrays as they are, and the steps that make those that are not there."""
        made: list[Step] = []
        names: list[str | None] = []
        for name in tokens_read(step):
            source = None if name is None else self.computed()[name].node.args[0]
            if source is None or source.op == "input":
                names.append(None if source is None else str(source.attribute))
                continue
            one = Compute(f"{name}_now", self.moved(source))
            self.arrays[one.name] = replace(self.composition.arrays[str(name)], name=one.name)
            made.append(one)
            names.append(one.name)
        fields = ("key", "value", "decay", "left", "right")
        return made, replace(step, **dict(zip(fields, names, strict=False)))  # type: ignore[arg-type]

    # Steps

    def step(self, step: Step) -> list[Step]:
        if isinstance(step, Compute):
            return [replace(step, node=self.moved(step.node))]
        if not isinstance(step, Carry | Recur):
            return [step]
        early = bool(self.lagging(step))
        made, step = self.unlagged(step) if early else ([], step)
        before, after = f"{step.name}_before", f"{step.name}_after"
        self.input(before, Base.REAL, ("b", "h", f"features of {step.name}", f"values of {step.name}"))
        self.handed.append(Handed(step.name, before, after))
        same = step.extent.same if isinstance(step, Carry) else None
        document = None if same is None else self.document(same, step.name)
        return [*made, replace(step, handing=Handing(before, after, document, early))]

    def document(self, same: str, step: str) -> tuple[str, str]:
        """The names of the last document before and after a call."""
        if same not in self.documents:
            self.documents[same] = f"{same}_before", f"{same}_after"
            self.input(self.documents[same][0], Base.INT, ("b",))
            self.handed.append(Handed(same, *self.documents[same]))
            return self.documents[same]
        return self.documents[same][0], f"{same}_after_{step}"  # the same again, that nobody asks for

    def input(self, name: str, base: Base, axes: tuple[str, ...]) -> None:
        self.inputs.append(Input(name, base, axes, None, span=self.pattern.span))

    def moved(self, root: Node) -> Node:
        """A value whose positions count from the first call on."""
        done: dict[Node, Node] = {}
        counted = self.graph.make("parameter", type=Type(Base.INT), attribute=COUNTED)
        for node in walk(root):
            if node.op == "index" and node.attribute in TOKENS:
                done[node] = self.graph.make("add", node, counted)
            elif node.op == "shift":  # reads at a distance
                done[node] = self.graph.rebuild(node, (done[node.args[0]], node.args[1]))
            else:
                done[node] = self.graph.rebuild(node, tuple(done[arg] for arg in node.args))
        return done[root]


def tokens_read(step: Carry | Recur) -> tuple[str | None, ...]:
    """The arrays that enter a state."""
    first = (step.key, step.value, step.decay)
    return (*first, step.left, step.right) if isinstance(step, Recur) else first


def used(steps: list[Step]) -> list[Step]:
    """The steps without values that nothing reads."""
    read = {name for step in steps for name in step_reads(step)}
    return [step for step in steps if not isinstance(step, Compute) or step.name in read or step is steps[-1]]


def is_one(trailing: Trailing) -> bool:
    """Whether a trailing value is that of the token before."""
    amount = trailing.amount
    return trailing.kind == "shift" and amount is not None and amount.op == "literal" and amount.attribute == 1


def reads_counted(step: Step) -> bool:
    """Whether a step counts positions."""
    return isinstance(step, Compute) and any(
        node.op == "parameter" and node.attribute == COUNTED for node in walk(step.node)
    )


def state_inputs(composition: Composition) -> Iterator[Input]:
    """The inputs that states enter by, in the order of `handed`."""
    for one in composition.handed:
        yield composition.arrays[one.before]

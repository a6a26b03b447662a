"""What a kernel computes for a selection (`composition.Scores`): its score as sums over loops of one product.

A score is peeled from the outside: a sum over the query heads of a group, or over a vector axis, is a loop over heads;
a sum over the places that overlap a member is a loop over those; softmax weights that some attention sums values by are
exp(score - lse) with that attention's lse. What is left is pointwise over the lines and the places, with one product of
a vector of each. Anything else is left to torch, with a reason.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from attnc.compiler.algebra import Algebra
from attnc.compiler.attention import LEAVES, Attention, is_attention, pair_product, sides
from attnc.compiler.composition import Attend, Choose, Scores
from attnc.compiler.decompose import Decomposer, depends, is_pointwise
from attnc.compiler.domains import DomainBuilder
from attnc.compiler.ir import Graph, Node, walk
from attnc.compiler.membership import Tables
from attnc.compiler.plan import Bounds, Plan
from attnc.dsl.diagnostics import AttnError
from attnc.dsl.terms import Input
from attnc.dsl.types import Base, Type


class NoKernelError(Exception):
    """Why a kernel takes no such selection."""


def with_scores(at: Decomposer, step: Choose) -> Choose:
    """The step with what a kernel computes, or with the reason why none does."""
    try:
        return replace(step, scores=scores(at, step))
    except NoKernelError as reason:
        return replace(step, reason=str(reason))
    except AttnError as error:
        return replace(step, reason=f"its score has {error.diagnostics[0].message.partition(' is part of')[0]}")


def attend_first(at: Decomposer, selection: Node) -> None:
    """Makes the attentions that sum values by weights of a selection's score, whose lse the selection reads."""
    weights = {node for node in walk(selection.args[0]) if node.op == "softmax"}
    for node in at.nodes() if weights else ():
        found = sides(node)
        if found is not None and found[0] in weights and is_attention(at, node) and selection not in walk(node):
            at.lower(node)


def scores(at: Decomposer, step: Choose) -> Scores:
    """What a kernel computes of a step; NoKernelError where it takes none."""
    if step.form != "topk" or step.amount is None:
        raise NoKernelError(f"a {step.form} has lists of any length")
    if step.amount.type.indices:
        raise NoKernelError("its count differs by row")
    peeled = Peeled.of(at, step)
    shared = Shared()
    inner = Expressed(at, step, shared, peeled.places or step.axis, peeled.head, outer=peeled.places is not None)
    body = inner.transcribe(peeled.body)
    live = None
    if peeled.softmax is not None:
        body, live = weights(at, step, inner, body, peeled.softmax)
    outer = inner if peeled.places is None else Expressed(at, step, shared, step.axis, None, outer=False)
    condition = outer.transcribe(step.condition)
    force = None if step.force is None or step.force.attribute is False else outer.transcribe(step.force)
    roots = [node for node in (body, live, condition, force) if node is not None]
    if step.heads == "one" and any(node.op == "size" and node.attribute == "h" for node in walk(*roots)):
        raise NoKernelError("it counts the heads, which share one choice")
    query, key = inner.vectors()
    plan = Plan(
        name=at.pattern.name,
        source=at.pattern.source,
        parameters=at.pattern.parameters,
        inputs=tuple(shared.inputs.values()),
        branches=(),
        merged=False,
        derived=(),
        graph=at.graph,
    )
    bounds = bounds_of(at, outer.transcribe(loosened(at, step.condition, step.axis)))
    arrays = {name: node for node, name in shared.names.items()}
    return Scores(plan, body, live, condition, force, bounds, query, key, peeled.head, peeled.places, arrays)


@dataclass(frozen=True)
class Peeled:
    """A score without its loops. `softmax`: the node whose weights the body's score gives, if it does."""

    body: Node
    head: str | None = None
    places: str | None = None
    softmax: Node | None = None

    @staticmethod
    def of(at: Decomposer, step: Choose) -> Peeled:
        """Takes the loops off, from the outside in."""
        found = Peeled(step.score)
        while (one := found.without_one(at, step)) is not None:
            found = one
        return found

    def without_one(self, at: Decomposer, step: Choose) -> Peeled | None:
        """One loop less; None where there is none outside."""
        node = self.body
        if self.softmax is not None:
            return None
        if node.op == "group_sum" and self.head is None and step.heads == "group":
            return replace(self, body=node.args[0], head="h")
        if node.op == "dot" and pair_product(node, step.rows, self.places or step.axis) is None:
            return self.without_axis(at, step, node)
        if node.op == "sum" and isinstance(node.attribute, tuple) and is_true(node.args[1]):
            summed, within = (None if one is None else str(one) for one in node.attribute)
            if within == step.axis and self.places is None and summed is not None:
                if summed != "j" and at.axes[summed].kind != "blocks":
                    return None
                return replace(self, body=node.args[0], places=summed)
            if within is None and (product := bound_product(at.graph, node)) is not None:
                return replace(self, body=product)
        if node.op == "softmax" and node.attribute == (self.places or step.axis, None) and len(node.args) == 2:
            alone = self.places is None and self.head is None and node.args[1] is step.condition
            return replace(self, body=node.args[0], softmax=None if alone else node)  # alone, scores order like weights
        return None

    def without_axis(self, at: Decomposer, step: Choose, node: Node) -> Peeled | None:
        """`w @ body` over a vector axis of both, as a loop over it: its places are the heads."""
        axis, key = str(node.attribute), self.places or step.axis
        if self.head is not None or step.heads != "one":
            return None
        for weight, body in (node.args, node.args[::-1]):
            of_pairs = depends(body, step.rows) and depends(body, key)
            if of_pairs and not depends(weight, key) and body.type.axes == weight.type.axes == (axis,):
                return replace(self, body=at.graph.make("mul", weight, body), head=axis)
        return None


def is_true(node: Node) -> bool:
    """The literal of a reduction without a condition."""
    return node.op == "literal" and node.attribute is True


def bound_product(graph: Graph, node: Node) -> Node | None:
    """The sum along a vector of the larger of two products by the same numbers, as one product:

    sum max(x a, x b) = [max(x, 0); min(x, 0)] @ [max(a, b); min(a, b)]
    """
    body = node.args[0]
    if body.op != "maximum" or any(arg.op != "mul" for arg in body.args):
        return None
    first, second = (arg.args for arg in body.args)
    shared = next((one for one in first if one in second), None)
    if shared is None or len(shared.type.axes) != 1 or shared.type.axes != body.type.axes:
        return None
    a, b = (args[1] if args[0] is shared else args[0] for args in (first, second))
    if a.type.axes != body.type.axes or b.type.axes != body.type.axes:
        return None
    upper = graph.make("relu", shared)
    lower = graph.make("neg", graph.make("relu", graph.make("neg", shared)))
    x = end_to_end(graph, upper, lower)
    y = end_to_end(graph, graph.make("maximum", a, b), graph.make("minimum", a, b))
    return graph.make("dot", x, y, type=node.type, attribute=x.type.axes[0], span=node.span)


def end_to_end(graph: Graph, x: Node, y: Node) -> Node:
    """Two vectors as one."""
    axis = f"{x.type.axes[0]}+{y.type.axes[0]}"
    type = Type(Base.REAL, x.type.indices | y.type.indices, (axis,))
    return graph.make("concat", x, y, type=type, attribute=axis)


@dataclass
class Shared:
    """The arrays that a selection's expressions read: what each is made of, and its layout in the kernel."""

    names: dict[Node, str] = field(default_factory=dict)
    inputs: dict[str, Input] = field(default_factory=dict)


class Expressed(Attention):
    """Transcribes expressions over lines and members (or places), called i and j from there on.

    `outer`: j counts places, and the number of members is another length.
    """

    def __init__(
        self, at: Decomposer, step: Choose, shared: Shared, key: str, head: str | None, *, outer: bool
    ) -> None:
        self.at, self.graph, self.node = at, at.graph, step.score
        self.row, self.key, self.head, self.outer = step.rows, key, head, outer
        self.shared, self.inputs = shared, shared.inputs
        self.branches, self.weights = (), []
        self.known, self.products = {}, {}

    def scalar(self, node: Node) -> bool:
        return set(node.type.axes) <= {self.row, self.key, self.head}

    def computed(self, node: Node) -> Node:
        """Maths of positions and parameters where it is used; all else is an array of its side, made beforehand."""
        positional = all(is_pointwise(one) or one.op in (*LEAVES, "start", "stop") for one in walk(node))
        if positional and not node.type.axes:
            return self.graph.rebuild(node, tuple(self.transcribe(arg) for arg in node.args))
        return self.array(node)

    def array(self, node: Node) -> Node:
        """Reads a value of one side as an array over batch, heads and that side."""
        places = (*node.type.ordered_indices(), *node.type.axes)
        swapped = {self.row: "i", self.key: "j"} | ({} if self.head is None else {self.head: "h"})
        if not set(places) <= {"b", "h", *swapped}:
            raise NoKernelError("a part of its score varies over more than lines and members")
        name = self.shared.names.setdefault(node, f"part{len(self.shared.names)}")
        axes = tuple(axis for axis in "bhij" if axis in {swapped.get(one, one) for one in places})
        self.inputs[name] = Input(name, node.type.base, axes, None, span=self.at.pattern.span)
        return self.graph.make("input", type=Type(node.type.base, frozenset(axes)), attribute=name)

    def size(self, node: Node) -> Node:
        if self.outer and node.attribute == self.key:
            return self.graph.size(f"outer_{self.key}")
        return super().size(node)

    def membership(self, node: Node) -> Node:
        raise NoKernelError("its candidates are those of another selection")

    def vectors(self) -> tuple[Node | None, Node | None]:
        """The nodes of the product's two vectors."""
        if len(self.products) > 1:
            raise NoKernelError("its score has several products")
        for product in self.products:
            pair = pair_product(product, self.row, self.key)
            assert pair is not None
            for vector, side in zip(pair, (self.row, self.key), strict=True):
                rest = [axis for axis in vector.type.axes if axis != self.head]
                if len(rest) != 1 or not vector.type.indices <= {"b", "h", side}:
                    raise NoKernelError("its product is one of matrices")
            return pair
        return None, None


def weights(at: Decomposer, step: Choose, inner: Expressed, score: Node, softmax: Node) -> tuple[Node, Node]:
    """Softmax weights by the log-sum-exp of an attention over the same scores; and which places have one."""
    live = inner.transcribe(softmax.args[1])
    query, key = inner.vectors()
    for made in at.steps:
        if not isinstance(made, Attend) or (made.rows, made.keys) != (step.rows, inner.key):
            continue
        (branch, *others) = made.plan.branches
        if others or branch.sink is not None or branch.score is not score or branch.condition is not live:
            continue
        if query is at.read(made.query) and key is at.read(made.key):
            indices = frozenset({"b", "h", step.rows})
            lse = at.graph.make("input", type=Type(Base.REAL, indices), attribute=made.lse)
            layout = ("b", "h", step.rows)
            at.inputs.setdefault(made.lse, Input(made.lse, Base.REAL, layout, None, span=at.pattern.span))
            return at.graph.make("exp", at.graph.make("sub", score, inner.array(lse))), live
    raise NoKernelError("no attention before it sums values by the weights of its score")


def loosened(at: Decomposer, condition: Node, axis: str) -> Node:
    """A condition that holds wherever this one does, on the number of a member instead of where it begins or ends.

    A member of blocks that begins at x or before has a number of x // stride or less; one that ends there began before.
    """
    graph = at.graph
    if condition.op == "and":
        return graph.all_of(loosened(at, arg, axis) for arg in condition.args)
    if condition.op not in ("le", "lt") or axis == "j" or at.axes[axis].kind != "blocks":
        return condition
    place, limit = condition.args
    if place.op not in ("start", "stop") or place.attribute != axis or limit.depends_on(axis):
        return condition
    if (place.op == "stop") != (condition.op == "lt"):  # start < x and stop <= x: begins before x
        limit = graph.make("sub", limit, graph.literal(1))
    elif condition.op == "lt":  # stop < x
        limit = graph.make("sub", limit, graph.literal(2))
    stride = at.term(at.axes[axis].stride or at.axes[axis].size)
    return graph.make("le", graph.index(axis), graph.make("floordiv", limit, stride))


def bounds_of(at: Decomposer, condition: Node) -> Bounds | None:
    """Members lo <= j < hi of a line that hold all of its candidates; None where they may be any."""
    algebra = Algebra(at.graph)
    tables = Tables(at.graph, algebra, at.blocks())
    domain = DomainBuilder(at.graph, algebra, tables).build(condition)
    if tables.derived or len(domain.key_sets) != 1:
        return None
    (key_set,) = domain.key_sets
    return key_set.runs[0].outer if key_set.walk is None and len(key_set.runs) == 1 else None

"""The rule for attention: a softmax of scores over keys, and its sum of values, becomes an `Attend` step.

Rows and keys may be positions, members of declared axes, or a vector axis of an input (latents, landmarks, summary
rows): in the step's plan they are called i and j. What varies over one side is an array of its own unless a kernel can
compute it where it is used; the products between the sides become one q @ k.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from attnc.compiler.build import unlowered
from attnc.compiler.composition import Attend
from attnc.compiler.decompose import Decomposer, depends, is_pointwise, vector
from attnc.compiler.ir import Node, walk
from attnc.compiler.selection import choose, steered
from attnc.compiler.streaming import Softmax, stream
from attnc.dsl.terms import Input
from attnc.dsl.types import Base, Type

LEAVES = frozenset({"literal", "parameter", "size", "index"})
SHARED = frozenset("bh")


def attend(at: Decomposer, node: Node) -> Node | None:
    """`softmax[x](score where condition, sink = ..) @ value`, or a merge of such."""
    if node.op == "merge":
        return Attention(at, node, node.args).step()
    if is_attention(at, node):
        return Attention(at, node, (node,)).step()
    return None


def sides(node: Node) -> tuple[Node, Node] | None:
    """(weights, values) of a weighted sum: a product over what one operand's softmax or normalize runs along."""
    if node.op != "dot":
        return None
    for weights, value in (node.args, node.args[::-1]):
        if weights.op in ("softmax", "normalize") and weights.attribute == (node.attribute, None):
            return weights, value
    return None


def is_attention(at: Decomposer, node: Node) -> bool:
    """Whether a product is one of softmax weights that have rows and keys, with values of the keys alone."""
    found = sides(node)
    if found is None or found[0].op != "softmax":
        return False
    weights, value = found
    key = str(node.attribute)
    rows = rows_of(weights, key)
    if len(rows) != 1 or depends(value, rows[0]) or len(value.type.axes) - (key in value.type.axes) != 1:
        return False
    return key in at.long(weights) or (bool(at.long(weights)) and is_scored(weights.args[0], rows[0], key))


def rows_of(weights: Node, key: str) -> list[str]:
    """What weights vary over beside batch, head and the keys."""
    return [name for name in (*weights.type.ordered_indices(), *weights.type.axes) if name not in ("b", "h", key)]


def is_scored(score: Node, row: str, key: str) -> bool:
    """Whether a score has a product of a vector of the row with one of the key."""
    return any(pair_product(node, row, key) is not None for node in walk(score))


def pair_product(node: Node, row: str, key: str) -> tuple[Node, Node] | None:
    """(row's vector, key's vector) of a dot product between them, over a vector axis."""
    if node.op != "dot" or node.attribute in (row, key):
        return None
    for x, y in (node.args, node.args[::-1]):
        if depends(x, row) and depends(y, key) and not depends(x, key) and not depends(y, row):
            return x, y
    return None


@dataclass
class Attention:
    """One attention on its way to a step."""

    at: Decomposer
    node: Node
    branches: tuple[Node, ...]
    inputs: dict[str, Input] = field(default_factory=dict)
    known: dict[Node, Node] = field(default_factory=dict)
    products: dict[Node, None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.graph = self.at.graph
        parts = []
        for branch in self.branches:
            found = sides(branch)
            if found is None or found[0].op != "softmax":
                raise unlowered(branch, f"`{branch.op}` in the place of a softmax branch")
            parts.append(found)
        self.key = str(self.branches[0].attribute)
        self.value = parts[0][1]
        rows = rows_of(parts[0][0], self.key)
        if len(rows) != 1:
            raise unlowered(parts[0][0], "a softmax whose weights have no rows, or more than one index of rows,")
        (self.row,) = rows
        self.weights = [weights for weights, _ in parts]
        for branch, (weights, value) in zip(self.branches, parts, strict=True):
            if value is not self.value or branch.attribute != self.key or rows_of(weights, self.key) != rows:
                raise unlowered(branch, "a merge of branches over different keys, values or rows")

    def step(self) -> Node:
        """Adds the step; the node that reads its output."""
        at = self.at
        softmaxes = []
        roots = [root for weights in self.weights for root in weights.args]
        joined = self.join_products(roots)
        for weights in self.weights:
            score, condition, *sink = (self.transcribe(joined.get(arg, arg)) for arg in weights.args)
            softmaxes.append(Softmax(score, condition, sink[0] if sink else None))
        query, key = self.operands()
        value = at.array(self.value_vector())
        plan = stream(at, softmaxes, self.inputs, merged=len(self.weights) > 1 or self.node.op == "merge")
        segments = any(one in at.axes and at.axes[one].kind == "segments" for one in (self.row, self.key))
        plan = replace(plan, exact=segments, joined=bool(joined))
        name, lse = at.fresh("attention"), at.fresh("lse")
        at.steps.append(Attend(name, lse, plan, query, key, value, self.row, self.key))
        return self.result(name)

    def result(self, name: str) -> Node:
        """The output as the text's node has it: the rows' axis may come after the values'."""
        (width,) = (axis for axis in self.value.type.axes if axis != self.key)
        is_axis = self.row in self.weights[0].type.axes
        indices = frozenset("bh") | (frozenset() if is_axis else {self.row})
        type = Type(Base.REAL, indices, (self.row, width) if is_axis else (width,))
        made = self.at.declare(name, type)
        if made.type.axes == self.node.type.axes:
            return made
        return self.graph.make("transpose", made, type=self.node.type, span=self.node.span)

    def value_vector(self) -> Node:
        """The values with the keys before their vector axis."""
        return self.keys_first(self.value, self.key)

    def keys_first(self, node: Node, name: str) -> Node:
        """A matrix over a side's vector axis and another one, that side first."""
        if len(node.type.axes) != 2 or node.type.axes[0] == name:
            return node
        axes = node.type.axes[::-1]
        return self.graph.make("transpose", node, type=Type(node.type.base, node.type.indices, axes))

    # Products

    def join_products(self, roots: list[Node]) -> dict[Node, Node]:
        """Sums of products between the sides as one product of longer vectors, where a score has several.

        a * (x @ y) + b * (u @ w) = [a x; b u] @ [y; w]
        """
        products = {node for root in roots for node in walk(root) if pair_product(node, self.row, self.key)}
        if len(products) < 2:
            return {}
        replaced: dict[Node, Node] = {}
        for root in roots:
            replaced[root] = self._joined(root, {})
        return replaced

    def _joined(self, node: Node, done: dict[Node, Node]) -> Node:
        if node not in done:
            pair = self.as_product(node)
            if pair is not None and node.op in ("add", "sub"):
                x, y = pair
                axis = next(name for name in x.type.axes if name != self.row)
                made = self.graph.make("dot", x, y, type=node.type, attribute=axis, span=node.span)
                done[node] = made
            else:
                done[node] = self.graph.rebuild(node, tuple(self._joined(arg, done) for arg in node.args))
        return done[node]

    def as_product(self, node: Node) -> tuple[Node, Node] | None:
        """(row's vector, key's vector) whose product a node is."""
        found = pair_product(node, self.row, self.key)
        if found is not None:
            return found
        make = self.graph.make
        if node.op == "neg" and (pair := self.as_product(node.args[0])):
            return make("neg", pair[0]), pair[1]
        if node.op == "mul":
            for inner, factor in (node.args, node.args[::-1]):
                one_sided = not (depends(factor, self.row) and depends(factor, self.key))
                pair = self.as_product(inner) if one_sided else None
                if pair is not None and not factor.type.axes:
                    x, y = pair
                    return (x, make("mul", y, factor)) if depends(factor, self.key) else (make("mul", x, factor), y)
        if node.op in ("add", "sub"):
            first, second = self.as_product(node.args[0]), self.as_product(node.args[1])
            if first and second:
                x = second[0] if node.op == "add" else make("neg", second[0])
                return self.end_to_end(first[0], x), self.end_to_end(first[1], second[1])
        return None

    def end_to_end(self, x: Node, y: Node) -> Node:
        if len(x.type.axes) != 1 or len(y.type.axes) != 1:
            raise unlowered(self.node, "a sum of products with matrices in a score")
        axis = f"{x.type.axes[0]}+{y.type.axes[0]}"
        type = Type(Base.REAL, x.type.indices | y.type.indices, (axis,))
        return self.graph.make("concat", x, y, type=type, attribute=axis)

    def operands(self) -> tuple[str, str]:
        """The arrays that stand for q and k."""
        if len(self.products) > 1:
            first, second, *_ = self.products
            raise unlowered(second, f"a score with two products that do not add up (the other: {first.span})")
        for product in self.products:
            pair = pair_product(product, self.row, self.key)
            assert pair is not None
            return (
                self.at.array(self.keys_first(pair[0], self.row)),
                self.at.array(self.keys_first(pair[1], self.key)),
            )
        if self.row != "i" or self.key != "j":
            raise unlowered(self.node, "a softmax over other rows or keys without a product between them")
        return "q", "k"

    # Scores and conditions

    def transcribe(self, node: Node) -> Node:
        """A score or condition as the plan has it: over i and j, with arrays for what one side computes."""
        if node not in self.known:
            self.known[node] = self._transcribe(node)
        return self.known[node]

    def _transcribe(self, node: Node) -> Node:
        of_row, of_key = depends(node, self.row), depends(node, self.key)
        if pair_product(node, self.row, self.key) is not None:
            return self.product(node)
        if node.op == "member":
            return self.membership(node)
        if not (of_row and of_key):
            return self.one_sided(node)
        if node.op == "input":
            return self.alias(str(node.attribute))  # over pairs, as the caller has it
        if not (is_pointwise(node) or node.op == "take"):
            raise unlowered(node, f"`{node.op}` inside a score")
        if not self.scalar(node):
            raise unlowered(node, "a vector of pairs inside a score")
        return self.graph.rebuild(node, tuple(self.transcribe(arg) for arg in node.args))

    def product(self, node: Node) -> Node:
        self.products[node] = None
        make = self.graph.make
        q = make("input", type=vector(Base.REAL, "bhi", "d"), attribute="q")
        k = make("input", type=vector(Base.REAL, "bhj", "d"), attribute="k")
        return make("dot", q, k, type=vector(Base.REAL, "bhij"), attribute="d", span=node.span)

    def membership(self, node: Node) -> Node:
        """A position or distance in a list of the call, a key in a selection, or in blocks that no tensor steers."""
        element, collection = node.args
        if collection.type.selects is not None and (self.row, self.key) != ("i", "j"):
            raise unlowered(node, "a selection that steers which pairs of other rows and keys are live")
        if steered(collection):
            if element.op != "index" or element.attribute != "j":
                raise unlowered(node, "asking a selection for anything but the key `j` in a softmax")
            lists = choose(self.at, collection)
            name = str(lists.attribute)
            self.inputs[name] = self.at.inputs[name]
            return self.graph.make("member", element, lists, type=node.type, span=node.span)
        if collection.type.selects is None:
            lowered = self.at.array(collection)
            return self.graph.make("member", self.transcribe(element), self.alias(lowered), type=node.type)
        return node

    def one_sided(self, node: Node) -> Node:
        """What varies over one side at most."""
        if node.op == "size":
            return self.size(node)
        if node.op == "index":
            return self.position(node)
        if node.op in ("start", "stop"):
            return self.bound(node)
        return node if node.op in LEAVES else self.computed(node)

    def computed(self, node: Node) -> Node:
        """A value of one side: computed where it is used if it is maths of leaves, else an array."""
        if is_pointwise(node) and self.scalar(node):
            return self.graph.rebuild(node, tuple(self.transcribe(arg) for arg in node.args))
        if node.op == "rename" and self.in_place(node):
            return self.graph.make(
                "rename", self.alias(self.at.array(node.args[0])), type=node.type, attribute=node.attribute
            )
        if node.op == "take":
            vector_, place = node.args
            return self.graph.rebuild(node, (self.alias(self.at.array(vector_)), self.transcribe(place)))
        return self.alias(self.at.array(node))

    def scalar(self, node: Node) -> bool:
        """Whether a value has no vector axis beside those that stand for rows or keys."""
        return set(node.type.axes) <= {self.row, self.key}

    def in_place(self, node: Node) -> bool:
        """Whether tokens are read at a side that is still called what the text calls it."""
        assert isinstance(node.attribute, tuple)
        return node.attribute[0] == "t" and node.attribute[1] in ("i", "j")

    def alias(self, name: str) -> Node:
        """Reads an array, with the names of rows and keys replaced by i and j."""
        if name in ("q", "k", "v"):
            name = self.at.copied(name)  # in the plan these are the operands
        entry = self.at.inputs[name]
        swapped = {self.row: "i", self.key: "j"}
        axes = tuple(swapped.get(axis, axis) for axis in entry.axes)
        moved = [axis for axis in entry.axes if axis in ("i", "j") and axis not in (self.row, self.key)]
        if moved:
            raise unlowered(self.node, f"a value of the sequence {moved[0]} in an attention over other rows and keys")
        self.inputs[name] = Input(name, entry.base, axes, None, span=entry.span)
        read = self.at.read(name)
        indices = frozenset(swapped.get(axis, axis) for axis in read.type.indices)
        indices |= {swapped[axis] for axis in read.type.axes if axis in swapped}
        rest = tuple(axis for axis in read.type.axes if axis not in swapped)
        return self.graph.make("input", type=Type(entry.base, indices, rest), attribute=name)

    def size(self, node: Node) -> Node:
        """Lengths of the text's own axes, under other names where the step's differ."""
        name = str(node.attribute)
        if name == self.row:
            return self.graph.size("i")
        if name == self.key:
            return self.graph.size("j")
        if name in ("b", "h") or (name == "t" and self.key == "j"):
            return node
        return self.graph.size(f"outer_{name}")

    def position(self, node: Node) -> Node:
        name = str(node.attribute)
        if name in (self.row, self.key):
            return self.graph.index("i" if name == self.row else "j")
        if name in ("b", "h"):
            return node
        raise unlowered(node, f"the index {name} in an attention over other rows and keys")

    def bound(self, node: Node) -> Node:
        """First, or one past the last, position of a member of a declared axis, in closed form of its number."""
        graph, name = self.graph, str(node.attribute)
        make, axis = graph.make, self.at.axes[name]
        length = self.size(graph.size(axis.over))
        if axis.over == "i":
            length = make("add", length, self.size(graph.size("offset")))
        size = self.transcribe(self.at.term(axis.size))
        if axis.kind == "segments":
            size = make("floordiv", make("sub", make("add", length, size), graph.literal(1)), size)
        stride = self.transcribe(self.at.term(axis.stride)) if axis.stride is not None else size
        first = make("mul", self.position(graph.index(name)), stride)
        if node.op == "start":
            return first if axis.kind == "blocks" else make("minimum", first, length)
        last = make("add", first, size)
        # A strided block lies wholly inside the sequence; the last of the others may be short.
        return last if axis.stride is not None else make("minimum", last, length)

"""Scans that have a parallel form, found by linear analysis of their steps in the state.

Every assignment of a state is brought to the form

    S <- diag(a) S + sum of x (y^T S) + sum of k v^T,

over the state at the start of the position, and every read to y^T S + rest. Without x and y the reads are carried
sums; with one pair they are those of a `Recur`; what writes k v^T in several places is several sums, since the state
is linear in what is written. What is not of that form raises `Unrecognised` with the reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from attnc.compiler.features import end_to_end
from attnc.compiler.ir import Graph, Node, substitute, walk
from attnc.compiler.reindex import reindexed
from attnc.compiler.scans import scan_names
from attnc.compiler.simplify import simplify
from attnc.dsl.types import Base, Type


class Unrecognised(Exception):  # noqa: N818  # an answer, not a mistake
    """Why a scan has no parallel form, and which part of it."""

    def __init__(self, reason: str, node: Node) -> None:
        super().__init__(reason)
        self.reason = reason
        self.node = node


@dataclass(frozen=True)
class Read:
    """A read of a state: sum over `writes` of the carried sum of (key, value), at `query`.

    query (b, h, i; d), key, left, right (b, h, j; d), value (b, h, j; e), decay None, (b, h, t) or (b, h, t; d). The
    array of the reads stands for the node `place` (b, h, i; e).
    """

    place: Node
    query: Node
    writes: tuple[tuple[Node, Node], ...]
    decay: Node | None
    left: Node | None
    right: Node | None


@dataclass(frozen=True)
class Recognised:
    """The value of a scan, read at i: `result` over the places of `reads`."""

    reads: tuple[Read, ...]
    result: Node


@dataclass(frozen=True)
class Row:
    """y^T S + rest for the state S at the base; None: 0."""

    read: Node | None = None
    rest: Node | None = None


@dataclass(frozen=True)
class Matrix:
    """diag(diag) S + sum of x (y^T S) + sum of k v^T for the state S at the base; diag None: 0."""

    diag: Node | None = None
    changes: tuple[tuple[Node, Node], ...] = ()
    writes: tuple[tuple[Node, Node], ...] = ()


def recognise(graph: Graph, scan: Node) -> Recognised:
    """The reads of a scan node over t as parallel sums. Raises Unrecognised."""
    return Reader(graph, scan).result()


def reads_state(node: Node) -> bool:
    """Whether a value depends on a state."""
    return any(one.op == "state" for one in walk(node))


class Reader:
    """Reads one scan."""

    def __init__(self, graph: Graph, scan: Node) -> None:
        self.graph = graph
        self.scan = scan
        index, names = scan_names(scan)
        self.index = index
        self.assigned: dict[str, list[Node]] = {}
        for name, value in zip(names, scan.args, strict=False):
            self.assigned.setdefault(name, []).append(value)
        self.reads: list[Read] = []
        self._stateful: dict[Node, bool] = {}
        self._transitions: dict[str, Matrix] = {}

    def stateful(self, node: Node) -> bool:
        if node not in self._stateful:
            self._stateful[node] = reads_state(node)
        return self._stateful[node]

    def result(self) -> Recognised:
        if self.index != "t":
            raise Unrecognised(f"it runs over {self.index}", self.scan)
        places: dict[Node, Node] = {}
        self.collect(self.scan.args[-1], places)
        epilogue = substitute(self.graph, self.scan.args[-1], places)
        if self.stateful(epilogue):
            raise Unrecognised("its result is no function of reads of a state", self.scan.args[-1])
        return Recognised(tuple(self.reads), simplify(self.graph, reindexed(self.graph, epilogue, "t", "i")))

    # Reads

    def collect(self, node: Node, places: dict[Node, Node]) -> None:
        """The reads of a result: each `y @ S` becomes a place for its array, plus what it has beside the state."""
        if not self.stateful(node) or node in places:
            return
        if node.op == "dot" and any(is_state_like(arg, node) for arg in node.args):
            places[node] = self.place(node)
            return
        if node.op == "state":
            raise Unrecognised("its result is the state itself, not a read of it", node)
        for arg in node.args:
            self.collect(arg, places)

    def place(self, node: Node) -> Node:
        """One read, of the state after the position if it can be told so, else of the state before it."""
        names = {str(one.attribute[0]) for one in walk(node) if one.op == "state"}  # type: ignore[index]
        if len(names) != 1:
            raise Unrecognised("it reads several states in one product", node)
        (name,) = names
        final = len(self.assigned.get(name, []))
        counts = {one.attribute[1] for one in walk(node) if one.op == "state"}  # type: ignore[index]
        after = counts == {final}
        row = self.row(node, name, final if after else 0)
        if row.read is None:
            assert row.rest is not None
            return row.rest
        read = self.read(name, row.read, node.type, after=after)
        return read if row.rest is None else self.graph.make("add", read, row.rest)

    def read(self, name: str, query: Node, type: Type, *, after: bool) -> Node:
        """The place of a read's array, over t; the arrays that it needs, at the positions where they are."""
        graph, transition = self.graph, self.transition(name)
        decay, (left, right) = self.decay(transition), self.change(transition)
        if not transition.writes:
            raise Unrecognised("nothing is ever written to the state", self.scan)
        writes = [(key, value) for key, value in transition.writes]
        axes = type.axes
        if not axes:  # a state of one vector, read to a number
            one = end_to_end(graph, [graph.literal(1.0)])
            writes = [(graph.make("mul", key, value), one) for key, value in writes]
        arrays = [self.at_keys(one, after=after) for write in writes for one in write]
        place = graph.make(
            "input",
            type=Type(Base.REAL, frozenset("bhi"), axes or ("1",)),
            attribute=f"read {len(self.reads)} of {name}",
        )
        found = Read(
            place,
            simplify(graph, reindexed(graph, query, "t", "i")),
            tuple(zip(arrays[::2], arrays[1::2], strict=True)),
            None if decay is None else self.shifted(decay, "t", after=after),
            None if left is None else self.at_keys(left, after=after),
            None if right is None else self.at_keys(right, after=after),
        )
        self.reads.append(found)
        at_t = graph.make(
            "rename", place, type=Type(Base.REAL, frozenset("bht"), place.type.axes), attribute=("i", "t")
        )
        if axes:
            return at_t
        return graph.make("take", at_t, graph.literal(0), type=Type(Base.REAL, frozenset("bht")), attribute="1")

    def at_keys(self, node: Node, *, after: bool) -> Node:
        """A value of the token as one of the key."""
        return self.shifted(simplify(self.graph, reindexed(self.graph, node, "t", "j")), "j", after=after)

    def shifted(self, node: Node, index: str, *, after: bool) -> Node:
        """Read before the update is read after the update of the position before: everything moves by one.

        Its value there is that of the position before, and 0 at the first.
        """
        if after or not node.depends_on(index):
            return node
        graph = self.graph
        before = graph.make("sub", graph.index(index), graph.literal(1))
        return graph.make("shift", node, before, type=node.type, attribute=index, span=node.span)

    # Transitions

    def transition(self, name: str) -> Matrix:
        """What a position does to a state, over the state before it."""
        if name not in self._transitions:
            found = self.matrix(self.state(name, len(self.assigned.get(name, []))), name, 0)
            self._transitions[name] = replace(
                found,
                changes=self.gathered(found.changes),
                writes=self.gathered(found.writes),
            )
        return self._transitions[name]

    def state(self, name: str, count: int) -> Node:
        """The value of a state after so many assignments; the state node for none."""
        if count:
            return self.assigned[name][count - 1]
        return next(one for one in walk(self.scan) if one.op == "state" and one.attribute == (name, 0))

    def decay(self, transition: Matrix) -> Node | None:
        """The log decay; None without one."""
        diag = transition.diag
        if diag is None:
            return self.graph.literal(float("-inf"))
        if diag.op == "literal" and diag.attribute == 1.0:
            return None
        found = logarithm(self.graph, diag)
        if found is None:
            raise Unrecognised("it is not certain that its decay is positive; write it as exp of a log decay", diag)
        return found

    def change(self, transition: Matrix) -> tuple[Node | None, Node | None]:
        if len(transition.changes) > 1:
            count = len(transition.changes)
            raise Unrecognised(f"the change of its state has rank {count}, not 1", self.scan)
        return transition.changes[0] if transition.changes else (None, None)

    def gathered(self, pairs: Sequence[tuple[Node, Node]]) -> tuple[tuple[Node, Node], ...]:
        """x y^T + x z^T = x (y + z)^T, x y^T + z y^T = (x + z) y^T."""
        for side in (0, 1):
            groups: dict[Node, list[Node]] = {}
            for pair in pairs:
                groups.setdefault(pair[side], []).append(pair[1 - side])
            joined = [(shared, self.sum(others)) for shared, others in groups.items()]
            pairs = [pair if side == 0 else pair[::-1] for pair in joined]
        return tuple(pairs)

    def sum(self, nodes: Iterable[Node]) -> Node:
        result: Node | None = None
        for node in nodes:
            result = node if result is None else self.graph.make("add", result, node)
        assert result is not None
        return result

    # Linear forms

    def matrix(self, node: Node, name: str, base: int) -> Matrix:
        """A value of the state's shape, over the state after `base` assignments."""
        graph = self.graph
        if node.op == "state":
            if node.attribute[0] != name:  # type: ignore[index]
                raise Unrecognised("two states depend on one another", node)
            count = int(node.attribute[1])  # type: ignore[index, arg-type]
            if count == base:
                return Matrix(graph.literal(1.0))
            return self.matrix(self.state(name, count), name, base)
        if node.op in ("add", "sub"):
            x, y = (self.matrix(arg, name, base) for arg in node.args)
            y = self.times(y, graph.literal(-1.0)) if node.op == "sub" else y
            diag = x.diag if y.diag is None else y.diag if x.diag is None else graph.make("add", x.diag, y.diag)
            return Matrix(diag, x.changes + y.changes, x.writes + y.writes)
        if node.op == "neg":
            return self.times(self.matrix(node.args[0], name, base), graph.literal(-1.0))
        if node.op in ("mul", "div"):
            return self.scaled(node, name, base)
        if node.op == "outer":
            return self.outer(node, name, base)
        if len(node.type.axes) == 1 and not self.stateful(node):
            return Matrix(writes=((node, graph.literal(1.0)),))  # a state of one vector
        raise Unrecognised(f"`{node.op}` makes its next state no linear function of the last", node)

    def scaled(self, node: Node, name: str, base: int) -> Matrix:
        """A matrix by row: times or over a number, or a vector over its first axis."""
        value, by = node.args
        if node.op == "mul" and (self.stateful(by) or len(by.type.axes) > len(value.type.axes)):
            value, by = by, value
        if not self.stateful(node):
            return self.written(node, name)
        if self.stateful(by):
            raise Unrecognised("its state is multiplied by what depends on it", node)
        if len(by.type.axes) > 1 or (by.type.axes and by.type.axes[0] != node.type.axes[0]):
            raise Unrecognised("its state is multiplied by a matrix, element by element", node)
        if node.op == "div":
            by = self.graph.make("div", self.graph.literal(1.0), by)
        return self.times(self.matrix(value, name, base), by)

    def written(self, node: Node, name: str) -> Matrix:
        """A product of a matrix without the state and a factor; or a vector, for a state of one vector."""
        if len(node.type.axes) == 1:
            return Matrix(writes=((node, self.graph.literal(1.0)),))
        value, by = node.args if node.args[0].type.axes == node.type.axes else node.args[::-1]
        if len(by.type.axes) > 1 or node.op != "mul":
            raise Unrecognised("a matrix is written that is no outer product", node)
        return self.times(self.matrix(value, name, 0), by)

    def times(self, matrix: Matrix, by: Node) -> Matrix:
        """diag(by) times a matrix."""
        graph = self.graph

        def product(x: Node) -> Node:
            return by if x.op == "literal" and x.attribute == 1.0 else graph.make("mul", x, by)

        return Matrix(
            None if matrix.diag is None else product(matrix.diag),
            tuple((graph.make("mul", x, by), y) for x, y in matrix.changes),
            tuple((graph.make("mul", k, by), v) for k, v in matrix.writes),
        )

    def outer(self, node: Node, name: str, base: int) -> Matrix:
        """x (y^T S + rest)."""
        left, right = node.args
        if self.stateful(left):
            raise Unrecognised("its state is read along its first axis", node)
        row = self.row(right, name, base)
        return Matrix(
            None,
            () if row.read is None else ((left, row.read),),
            () if row.rest is None else ((left, row.rest),),
        )

    def row(self, node: Node, name: str, base: int) -> Row:
        """A value over the state's last axis (or a number, for a state of one vector)."""
        graph = self.graph
        if not self.stateful(node):
            return Row(rest=node)
        if node.op in ("add", "sub"):
            x, y = (self.row(arg, name, base) for arg in node.args)
            y = self.row_times(y, graph.literal(-1.0)) if node.op == "sub" else y
            return Row(_plus(graph, x.read, y.read), _plus(graph, x.rest, y.rest))
        if node.op == "neg":
            return self.row_times(self.row(node.args[0], name, base), graph.literal(-1.0))
        if node.op in ("mul", "div"):
            value, by = node.args
            if node.op == "mul" and self.stateful(by):
                value, by = by, value
            if self.stateful(by) or by.type.axes:
                raise Unrecognised("what is read of its state is not scaled by a number", node)
            by = graph.make("div", graph.literal(1.0), by) if node.op == "div" else by
            return self.row_times(self.row(value, name, base), by)
        if node.op == "dot":
            return self.dot(node, name, base)
        raise Unrecognised(f"`{node.op}` of what is read of its state", node)

    def row_times(self, row: Row, by: Node) -> Row:
        def product(x: Node | None) -> Node | None:
            return None if x is None else self.graph.make("mul", x, by)

        return Row(product(row.read), product(row.rest))

    def dot(self, node: Node, name: str, base: int) -> Row:
        """y^T (diag(a) S + sum of x (z^T S) + sum of k v^T)."""
        graph, axis = self.graph, str(node.attribute)
        vector, value = node.args if self.stateful(node.args[1]) else node.args[::-1]
        if self.stateful(vector) or not is_state_like(value, node):
            raise Unrecognised("its state is not read by a vector over its first axis", node)
        matrix = self.matrix(value, name, base)
        read = None if matrix.diag is None else self.times(Matrix(vector), matrix.diag).diag
        rest: Node | None = None
        for x, y in matrix.changes:
            read = _plus(graph, read, graph.make("mul", y, self.inner(vector, x, axis)))
        for key, written in matrix.writes:
            rest = _plus(graph, rest, graph.make("mul", written, self.inner(vector, key, axis)))
        return Row(read, rest)

    def inner(self, x: Node, y: Node, axis: str) -> Node:
        return self.graph.make("dot", x, y, type=Type(Base.REAL, x.type.indices | y.type.indices), attribute=axis)


def is_state_like(node: Node, product: Node) -> bool:
    """Whether a product contracts the first axis of one or two of a value that depends on a state."""
    axes = node.type.axes
    return 1 <= len(axes) <= 2 and axes[0] == product.attribute and reads_state(node)


def _plus(graph: Graph, x: Node | None, y: Node | None) -> Node | None:
    if x is None or y is None:
        return x if y is None else y
    return graph.make("add", x, y)


def logarithm(graph: Graph, node: Node) -> Node | None:
    """The logarithm of a value that is positive for certain: exp, sigmoid, products of them; else None."""
    if node.op == "exp":
        return node.args[0]
    if node.op == "sigmoid":
        return graph.make("neg", graph.make("softplus", graph.make("neg", node.args[0])))
    if node.op == "literal":
        return graph.make("log", node) if float(node.attribute) > 0 else None  # type: ignore[arg-type]
    if node.op in ("mul", "div"):
        x, y = (logarithm(graph, arg) for arg in node.args)
        return None if x is None or y is None else graph.make("add" if node.op == "mul" else "sub", x, y)
    if node.op == "pow":
        log = logarithm(graph, node.args[0])
        exponent = node.args[1] if node.args[1].type.base is Base.REAL else graph.make("to_real", node.args[1])
        return None if log is None else graph.make("mul", log, exponent)
    return None

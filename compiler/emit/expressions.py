"""Nodes to Triton expressions.

A kernel sees a tile of rows and a tile of keys. What does not vary over the keys is computed once, before the
loops (`hoist`); the rest is written where it is used. A `View` says how the positions are spelt there.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import count

from attnc.compiler.emit.writer import Writer
from attnc.compiler.ir import Node, walk
from attnc.compiler.ops import OPS
from attnc.dsl.types import Base

SHORT = 40  # operations that an expression is written with although some repeat


@dataclass(frozen=True)
class View:
    """How a tile spells its positions: suffixes that make a vector over i or j broadcast."""

    i: str = ""
    j: str = ""


SIZES = {"b": "B", "h": "H", "i": "N", "j": "M", "t": "M", "d": "D", "e": "E", "offset": "OFFSET"}

ROWS = View()  # vectors over the rows of the tile
TILE = View(i="[:, None]", j="[None, :]")  # rows are queries, keys stream by
TURNED = View(i="[None, :]", j="[:, None]")  # rows are keys, queries stream by
PAIRS = View()  # one key a row: i and j are both vectors over the rows


@dataclass(frozen=True)
class Array:
    """A tensor argument of a kernel: an input or a derived table, with the axes of its layout."""

    name: str
    axes: tuple[str, ...]


def array_name(node: Node) -> str:
    """The argument's name: inputs as declared, with a prefix that no other name has; tables by part."""
    if node.op == "input":
        return "x_" + _apart(str(node.attribute), r"_(s\d+|n\d+|group)_*$")
    return f"t_{str(node.attribute).replace('.', '_')}"


def parameter_name(name: str) -> str:
    """The argument's name of a parameter."""
    if "." in name:  # an element of a tuple
        return "n_" + name.replace(".", "_")
    return "n_" + _apart(name, r"_\d+_*$")


def _apart(name: str, derived: str) -> str:
    """A user's name, with `_` after one that reads like what is derived from another: `g_n0`, a length of `g`."""
    return f"{name}_" if re.search(derived, name) else name


@dataclass
class Expressions:
    """Writes the expressions of one kernel.

    `arrays`: layout of every input and table by its node attribute. `streamed`: the index that the loops run over.
    `head_rows`: rows of a tile may be of several heads, so that h is a vector as i is, and streams where i does.
    `paged`: arrays whose key j of row b is at `place` of the page `page`, vectors over the keys.
    """

    writer: Writer
    arrays: dict[str, Array]
    streamed: str = "j"
    head_rows: bool = False
    paged: frozenset[str] = frozenset()
    hoisted: dict[Node, str] = field(default_factory=dict)
    local: dict[Node, str] = field(default_factory=dict)
    numbers: Iterator[int] = field(default_factory=count)

    def hoist(self, roots: Iterable[Node]) -> None:
        """Compute what does not vary over the streamed index, before the loops."""
        for root in roots:
            for node in self._maximal(root):
                for inner in self._repeated(node):
                    self._hoist(inner)
                if node.args or node.op in ("input", "derived"):
                    self._hoist(node)

    def _hoist(self, node: Node) -> None:
        if node not in self.hoisted:
            text = self.text(node, ROWS)
            self.hoisted[node] = self.writer.let(f"r{len(self.hoisted)}", text, node.span)

    def _maximal(self, root: Node) -> list[Node]:
        """The largest parts of an expression that do not vary over the streamed index, each once."""
        found: dict[Node, None] = {}
        seen: set[Node] = set()
        stack = [root]
        while stack:
            node = stack.pop()
            if not self.streams(node) and not node.type.axes:
                found[node] = None
            elif node not in seen:
                seen.add(node)
                read = node.op in ("take", "rename")  # what is read stays with its place
                stack.extend(reversed(node.args[1 if read else 0 :]))
        return list(found)

    def streams(self, node: Node) -> bool:
        """Whether a value differs along the streamed side: rows that stream may be of several heads."""
        return node.depends_on(self.streamed) or (self.streamed == "i" and self.head_rows and node.depends_on("h"))

    def _repeated(self, root: Node) -> list[Node]:
        """What the text of an expression would spell more than once, operands first."""
        times = spellings([root])
        return [node for node in walk(root) if OPS[node.op].triton and times[node] > 1 and node is not root]

    def once(self, root: Node, view: View) -> str:
        """The expression of a node; in a long one, what its text would spell more than once is named before it."""
        length: dict[Node, int] = {}
        for node in walk(root):
            length[node] = 1 + sum(length[arg] for arg in node.args)
        if length[root] <= SHORT:
            return self.text(root, view)
        within = replace(self, local=dict(self.local))
        for node in self._repeated(root):
            if node not in self.hoisted and node not in self.local:
                within.local[node] = self.writer.let(f"once{next(self.numbers)}", within.text(node, view), node.span)
        return within.text(root, view)

    def share(self, roots: Iterable[Node], view: View) -> None:
        """Name what a loop's expressions use more than once."""
        roots = list(roots)
        times = spellings(roots)
        for node in walk(*roots):
            loaded = node.op == "take" or (node.op in ("rename", "input", "derived") and not node.type.axes)
            if node in self.hoisted or node in self.local or not self.streams(node) or node.op == "dot":
                continue
            if (times[node] > 1 and node.args) or loaded:
                text = self.text(node, view)
                self.local[node] = self.writer.let(f"e{len(self.local)}", text, node.span)

    def text(self, node: Node, view: View) -> str:
        """The expression of a node; row vectors and key vectors are made to broadcast."""
        if node in self.hoisted:
            of_row = node.depends_on("i") or (self.head_rows and node.depends_on("h"))
            return self.hoisted[node] + (view.i if of_row else view.j if node.depends_on("j") else "")
        if node in self.local:
            return self.local[node]
        if node.op == "literal":
            return literal(node)
        if node.op == "parameter":
            name = parameter_name(str(node.attribute))
            return f"({name} != 0)" if node.type.base is Base.BOOL else name  # bools are passed as ints
        if node.op == "size":
            return SIZES.get(str(node.attribute), f"size_{node.attribute}")
        if node.op == "index":
            own = {"i": f"i{view.i}", "j": f"j{view.j}", "h": self.head(view)}
            return own.get(str(node.attribute), str(node.attribute))
        if node.op == "dot":
            return "s"
        if node.op in ("input", "derived", "rename", "take"):
            return self.load(node, view)
        if node.op in ("floordiv", "mod") and all(is_natural(arg) for arg in node.args):
            sign = "//" if node.op == "floordiv" else "%"
            return f"({self.text(node.args[0], view)} {sign} {self.text(node.args[1], view)})"
        template = OPS[node.op].triton
        if template is None:
            raise TypeError(f"{node.op} has no text in a kernel")
        return template.format(*(self.text(arg, view) for arg in node.args))

    def head(self, view: View) -> str:
        """The query head, one a tile or one a row."""
        return f"h{view.i}" if self.head_rows else "h"

    def load(self, node: Node, view: View) -> str:
        """A read of an input or table, every index held inside of its bounds."""
        places: dict[str, str] = {}
        renamed: dict[str, str] = {}
        while node.op in ("take", "rename"):
            if node.op == "take":
                places[str(node.attribute)] = self.text(node.args[1], view)
            else:
                assert isinstance(node.attribute, tuple)
                renamed[str(node.attribute[0])] = str(node.attribute[1])
            node = node.args[0]
        array = self.arrays[str(node.attribute)]
        in_pages = str(node.attribute) in self.paged and node.op == "input"
        name = array_name(node)
        offsets, masks = [], dict[str, None]()
        for slot, axis in enumerate(array.axes):
            index = renamed.get(axis, axis)
            if axis.isdigit() and axis not in places:
                continue  # an axis of length 1
            if axis in places:
                place = f"tl.minimum(tl.maximum({places[axis]}, 0), {name}_n{slot} - 1)"
                if node.op != "derived" and not within(places[axis], axis):
                    masks[f"({places[axis]} >= 0) & ({places[axis]} < {name}_n{slot})"] = None
            elif index == "i":
                place = f"i{view.i}" if axis == "t" else f"(i{view.i} - OFFSET)"
                masks[f"i_ok{view.i}"] = None
                if axis == "t":
                    place = f"tl.minimum({place}, {name}_n{slot} - 1)"
            elif index == "j":
                place = f"place{view.j}" if in_pages else f"j{view.j}"
                masks[f"j_ok{view.j}"] = None
            elif index == "h":
                place = f"{self.head(view)} // {name}_group"
            else:
                place = f"page{view.j}" if in_pages and index == "b" else index
            offsets.append(f"({place}) * {name}_s{slot}")
        pointer = f"{name} + {' + '.join(offsets)}" if offsets else name
        guard = f", mask={' & '.join(masks)}, other=0" if masks else ""
        loaded = f"tl.load({pointer}{guard})"
        return f"{loaded}.to(tl.float32)" if node.type.base is Base.REAL else loaded


def spellings(roots: Iterable[Node]) -> Counter[Node]:
    """How often the texts of its users spell each node; a text may hold an operand twice."""
    times: Counter[Node] = Counter()
    for node in walk(*roots):
        template = OPS[node.op].triton or ("{1}" * 3 if node.op == "take" else "")
        for slot, arg in enumerate(node.args):
            times[arg] += max(template.count(f"{{{slot}}}"), 1)
    return times


def literal(node: Node) -> str:
    """A literal as Python text; infinities by name."""
    if isinstance(node.attribute, float):
        if node.attribute != node.attribute or node.attribute in (float("inf"), float("-inf")):
            return f'float("{node.attribute}")'
        return repr(node.attribute)
    return str(node.attribute)


def within(place: str, axis: str) -> bool:
    """Whether a place is a number inside of an axis of known length."""
    return place.isdigit() and axis.isdigit() and int(place) < int(axis)


def is_natural(root: Node) -> bool:
    """Whether an int is certain to be >= 0 wherever a divisor is positive (see plan.Requirement)."""
    done: dict[Node, bool] = {}  # expressions share parts
    for node in walk(root):
        done[node] = _is_natural(node, done)
    return done[root]


def _is_natural(node: Node, done: dict[Node, bool]) -> bool:
    if node.op == "literal":
        return isinstance(node.attribute, int) and node.attribute >= 0
    if node.op in ("index", "size"):
        return True
    if node.op == "mod":
        return not node.args[1].type.indices or done[node.args[1]]
    if node.op in ("add", "mul", "minimum"):
        return all(done[arg] for arg in node.args)
    if node.op == "floordiv":
        return done[node.args[0]]
    if node.op == "maximum":
        return any(done[arg] for arg in node.args)
    return False

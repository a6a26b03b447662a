"""Kernels of values of rows: a program takes a tile of rows, reads every operand once and writes every result once.

A value is a number, (rows), (1, elements) or (rows, elements). A vector over several segments is a list of tiles.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

from attnc.compiler.emit.expressions import literal
from attnc.compiler.emit.pointwise_module import template
from attnc.compiler.emit.writer import Writer
from attnc.compiler.fuse import Group, Operand, segments
from attnc.compiler.ir import Node, walk
from attnc.compiler.ops import OPS
from attnc.compiler.row_gradients import COTANGENT, HELD, row_gradients
from attnc.dsl.types import Base


@dataclass(frozen=True)
class Place:
    """A tensor argument: its pointer's name, which of b, h, the sequence and a vector axis it has strides along.

    `part`: it has some heads alone, `from` <= h < `to`; what is read in others, nobody uses.
    """

    name: str
    dims: str  # of "bhnf"
    axis: str | None
    part: bool = False

    @property
    def arguments(self) -> list[str]:
        ends = [f"{self.name}_from", f"{self.name}_to"] if self.part else []
        return [self.name, *(f"{self.name}_s{dim}" for dim in self.dims), *ends]


@dataclass(frozen=True)
class RowKernel:
    """A kernel's text. `reads` and `writes`: its tensors in order; `segments`: axes, by the number of their tiles.

    Arguments: pointers, strides and perhaps heads of `reads` and `writes`; of each read with heads, how many rows'
    heads share one; `numbers`; widths of the segments; N, OFFSET, H, TILES. Constants: BLOCK_R, and BLOCK_k, EVEN_k of
    each segment.
    """

    name: str
    text: str
    reads: tuple[Place, ...]
    writes: tuple[Place, ...]
    numbers: tuple[str, ...]
    segments: tuple[str, ...]

    @property
    def constants(self) -> list[str]:
        return constants(self.segments)


def place_of(operand: Operand, parts: Collection[str]) -> Place:
    """The tensor argument of an operand. `parts`: those that have some heads alone."""
    axes = operand.node.type.axes
    dims = "".join(dim for dim in "bh" if dim in operand.node.type.indices)
    dims += "n" if operand.along is not None else ""
    return Place(operand.name, dims + ("f" if axes else ""), axes[0] if axes else None, operand.name in parts)


@dataclass
class Emitter:
    """Writes one kernel of a group. `parts`: the operands that have some heads alone."""

    group: Group
    parts: Collection[str] = ()
    writer: Writer = field(default_factory=Writer)
    values: dict[Node, list[str]] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)  # of segments
    flat: dict[Node, bool] = field(default_factory=dict)

    def forward(self) -> RowKernel:
        """The group's value."""
        root = self.group.value
        out = Place("out", self.dims(root), root.type.axes[0] if root.type.axes else None)
        return self.kernel("rows", [root], [out], self.places())

    def places(self) -> list[Place]:
        """The tensor arguments of all operands."""
        return [place_of(operand, self.parts) for operand in self.group.operands]

    def backward(self, wanted: Sequence[str], held: Sequence[str]) -> RowKernel:
        """Gradients of operands, those of `wanted` that get one: `d_` and the operand's name.

        One that does not vary along the sequence is a sum for each tile: its place along n counts tiles. To those in
        `held`, which have every head and batch, what is there already is added.
        """
        root, made = self.group.value, row_gradients(self.group, wanted, held)
        outs = []
        for operand in self.group.operands:
            if operand.name in made:
                axis = next(iter(operand.node.type.axes), None)
                dims = self.dims(root).replace("f", "") + "f" * bool(axis)
                outs.append(Place(f"d_{operand.name}", dims, axis, operand.name in self.parts))
        cotangent = Place(COTANGENT, self.dims(root), root.type.axes[0] if root.type.axes else None)
        roots = [made[out.name[2:]] for out in outs]
        places = self.places()
        places += [replace(place, name=HELD + place.name) for place in places if place.name in held]
        return self.kernel("row_gradients", roots, outs, [*places, cotangent])

    def dims(self, root: Node) -> str:
        """The dimensions of a result."""
        return "".join(dim for dim in "bh" if dim in self.group.indices) + "n" + "f" * bool(root.type.axes)

    def kernel(self, name: str, roots: Sequence[Node], outs: Sequence[Place], places: Sequence[Place]) -> RowKernel:
        """A kernel that writes `roots` to `outs`. Operands that no root reads are left out."""
        nodes = list(walk(*roots))
        names = {str(node.attribute) for node in nodes if node.op == "input"}
        reads = [place for place in places if place.name in names]
        axes = [node.type.axes[0] for node in nodes if node.type.axes]
        axes += [str(node.attribute) for node in nodes if node.op == "size"]
        axes += [out.axis for out in outs if out.axis]
        self.order = list(dict.fromkeys(part for axis in axes for part in segments(axis)))
        numbers = [
            one for one, _ in self.group.numbers if any(n.attribute == one and n.op == "parameter" for n in nodes)
        ]
        body = Writer()
        self.writer = body
        by_name = {place.name: place for place in reads}
        with body.block(self.head(name, reads, outs, numbers)):
            self.position()
            for node in nodes:
                self.emit(node, by_name)
            for root, out in zip(roots, outs, strict=True):
                self.write(root, out)
        text = body.text()
        return RowKernel(name, f"@triton.jit\n{text}", tuple(reads), tuple(outs), tuple(numbers), tuple(self.order))

    def head(self, name: str, reads: Sequence[Place], outs: Sequence[Place], numbers: Sequence[str]) -> str:
        """The function's first lines."""
        lines = [", ".join(place.arguments) for place in (*reads, *outs)]
        groups = [f"{place.name}_group" for place in reads if "h" in place.dims]
        widths = [f"W_{at}" for at in range(len(self.order))]
        lines.append(", ".join([*groups, *numbers, *widths, "N", "OFFSET", "H", "TILES"]))
        lines.append(", ".join(f"{one}: tl.constexpr" for one in constants(self.order)))
        return f"def {name}(\n" + "".join(f"    {line},\n" for line in lines) + "):"

    def position(self) -> None:
        """Which rows, and which elements of every segment."""
        write = self.writer.line
        write("tile = tl.program_id(0) % TILES")
        write("h = tl.program_id(0) // TILES % H")
        write("b = tl.program_id(0) // TILES // H")
        write("first = tile.to(tl.int64) * BLOCK_R")
        write("r = tl.arange(0, BLOCK_R)")
        write("row_ok = first + r < N")
        if self.order:
            write("rows, rows_ok = r[:, None], row_ok[:, None]")
        if any(node.op == "index" and node.attribute == self.group.along for node in walk(self.group.value)):
            offset = " + OFFSET" if self.group.along == "i" else ""
            write(f"position = first + r{offset}")
        for at in range(len(self.order)):
            write(f"c_{at} = tl.arange(0, BLOCK_{at})[None, :]")
            write(f"ok_{at} = c_{at} < W_{at}")

    # Values

    def tiles(self, axis: str) -> list[int]:
        """The numbers of an axis's segments."""
        return [self.order.index(part) for part in segments(axis)]

    def emit(self, node: Node, places: dict[str, Place]) -> None:
        """Name a node's value; what is a word already stays so."""
        if node.op == "input":
            texts = self.loads(node, places[str(node.attribute)])
        elif node.op in ("sum", "max", "min"):
            texts = [self.reduction(node)]
        elif node.op == "part" and not node.type.axes:
            texts = [f"tl.sum({self.values[node.args[0]][first_segment(node)]}, 1)"]
        elif OPS[node.op].pointwise:
            texts = self.pointwise(node)
        else:
            self.values[node] = self.words(node)
            return
        number = len(self.values)
        mark = [""] if len(texts) == 1 else [f"_{at}" for at in range(len(texts))]
        self.values[node] = [
            self.writer.let(f"v{number}{end}", text, node.span) for end, text in zip(mark, texts, strict=True)
        ]

    def words(self, node: Node) -> list[str]:
        """The texts of a node that computes nothing."""
        name = str(node.attribute)
        if node.op == "literal":
            return [literal(node)]
        if node.op == "parameter":
            return [f"({name} != 0)" if node.type.base is Base.BOOL else name]
        if node.op == "size":
            return ["(" + " + ".join(f"W_{at}" for at in self.tiles(name)) + ")"]
        if node.op == "index":
            return [name if name in ("b", "h") else "position"]
        if node.op == "detach":
            return self.values[node.args[0]]
        if node.op == "part":
            start, (axis,) = first_segment(node), node.type.axes
            return self.values[node.args[0]][start : start + len(segments(axis))]
        if node.op == "features":
            return [text for arg in node.args for text in self.across(arg)]
        raise TypeError(f"{node.op} has no text in a kernel of rows")

    def across(self, node: Node) -> list[str]:
        """A node's texts beside vectors: one of a row is the same for all elements."""
        texts = self.values[node]
        return [f"{texts[0]}[:, None]"] if self.is_flat(node) else texts

    def is_flat(self, node: Node) -> bool:
        """Whether a value has one dimension, of rows."""
        if node not in self.flat:
            varies = any(self.is_flat(arg) for arg in node.args) or node.op in ("sum", "max", "min", "part")
            varies = varies or (node.op in ("input", "index") and self.group.along in node.type.indices)
            self.flat[node] = varies and not node.type.axes
        return self.flat[node]

    def pointwise(self, node: Node) -> list[str]:
        text = template(node)
        own = [self.across(arg) if node.type.axes else self.values[arg] for arg in node.args]
        count = len(segments(node.type.axes[0])) if node.type.axes else 1
        return [text.format(*(one[at if len(one) > 1 else 0] for one in own)) for at in range(count)]

    def reduction(self, node: Node) -> str:
        """Over all segments of an axis."""
        body = node.args[0]
        found = ""
        for at, text in zip(self.tiles(body.type.axes[0]), self.values[body], strict=True):
            part = f"_{node.op}({text}, ok_{at}, EVEN_{at})"
            joined = {
                "sum": f"{found} + {part}",
                "max": f"tl.maximum({found}, {part})",
                "min": f"tl.minimum({found}, {part})",
            }
            found = joined[node.op] if found else part
        return found

    # Memory

    def pointer(self, place: Place, row: str) -> str:
        """The address of a tile's first row. `row`: its place along the sequence."""
        terms = [place.name]
        if "b" in place.dims:
            terms.append(f"b.to(tl.int64) * {place.name}_sb")
        if "h" in place.dims:
            head = (
                "h" if place.name.startswith(("d_", "out")) or place.name == COTANGENT else f"h // {place.name}_group"
            )
            head = f"h - {place.name}_from" if place.part else head
            terms.append(f"({head}).to(tl.int64) * {place.name}_sh")
        if "n" in place.dims:
            terms.append(f"{row} * {place.name}_sn")
        return " + ".join(terms)

    def loads(self, node: Node, place: Place) -> list[str]:
        """The tiles of an operand."""
        operand = next((one for one in self.group.operands if one.name == place.name.removeprefix(HELD)), None)
        row = "(first + OFFSET)" if operand is not None and operand.moved else "first"
        base = self.writer.let(f"{place.name}_at", self.pointer(place, row))
        cast = {Base.REAL: ".to(tl.float32)", Base.INT: ".to(tl.int64)", Base.BOOL: " != 0"}[node.type.base]
        of_rows = "n" in place.dims
        inside = self.inside(place)
        other = "1.0" if node.type.base is Base.REAL else "0"  # no element that is not there divides by 0
        if place.axis is None:
            return [
                f"(tl.load({base} + r * {place.name}_sn, mask=row_ok{inside}, other={other}){cast})"
                if of_rows
                else f"(tl.load({base}){cast})"
            ]
        texts, before = [], ""
        for at in self.tiles(place.axis):
            column = f"(c_{at}{before}) * {place.name}_sf"
            if of_rows:
                pointers = f"{base} + rows * {place.name}_sn + {column}"
                texts.append(f"(_load({pointers}, rows_ok{inside}, ok_{at}, {other}, EVEN_{at}){cast})")
            else:
                texts.append(f"(tl.load({base} + {column}, mask=ok_{at}, other={other}){cast})")
            before += f" + W_{at}"
        return texts

    def inside(self, place: Place) -> str:
        """What a mask has for a tensor of some heads."""
        return f" & (h >= {place.name}_from) & (h < {place.name}_to)" if place.part else ""

    def write(self, root: Node, out: Place) -> None:
        """Store a result: rows, or their sum where the operand is one for all."""
        operand = next((one for one in self.group.operands if f"d_{one.name}" == out.name), None)
        summed = operand is not None and operand.along is None
        row = "tile" if summed else "(first + OFFSET)" if operand is not None and operand.moved else "first"
        base = self.writer.let(f"{out.name}_at", self.pointer(out, row))
        write, inside = self.writer.line, self.inside(out)
        if out.axis is None:
            value = f"_each({self.values[root][0]}, BLOCK_R)"
            if summed:
                write(f"tl.store({base}, tl.sum(tl.where(row_ok, {value}, 0.0), 0))")
            else:
                write(f"_store({base} + r * {out.name}_sn, {value}, row_ok{inside}, row_ok, True)")
            return
        texts, before = self.across(root), ""
        for place, at in enumerate(self.tiles(out.axis)):
            value = f"_full({texts[place if len(texts) > 1 else 0]}, BLOCK_R, BLOCK_{at})"
            column = f"(c_{at}{before}) * {out.name}_sf"
            if summed:
                total = f"tl.sum(tl.where(rows_ok, {value}, 0.0), 0, keep_dims=True)"
                write(f"_store({base} + {column}, {total}, ok_{at}, ok_{at}, True)")
            else:
                pointers = f"{base} + rows * {out.name}_sn + {column}"
                write(f"_store({pointers}, {value}, rows_ok{inside}, ok_{at}, EVEN_{at})")
            before += f" + W_{at}"


def first_segment(node: Node) -> int:
    """Where a part begins."""
    assert isinstance(node.attribute, int)
    return node.attribute


def constants(order: Sequence[str]) -> list[str]:
    """The constants of a kernel over these segments."""
    return ["BLOCK_R", *(f"{what}_{at}" for at in range(len(order)) for what in ("BLOCK", "EVEN"))]


def emit_rows(group: Group, parts: Collection[str] = ()) -> RowKernel:
    """The kernel of a group's value. `parts`: the operands that have some heads alone."""
    return Emitter(group, parts).forward()


def emit_row_gradients(
    group: Group, wanted: Sequence[str], held: Sequence[str] = (), parts: Collection[str] = ()
) -> RowKernel:
    """The kernel of the gradients of some operands; none of its results where nothing flows."""
    return Emitter(group, parts).backward(wanted, held)

"""A fixed number of rounds on small matrices as one kernel: a program a batch row and head, everything in registers.

Forward runs the rounds of a `repeat` block; for gradients it keeps the states at the start of each. Backward goes
through the rounds from the last to the first, makes a round's values again from what was kept, and takes its steps
back one by one. Outside of a matrix, in a tile that is padded, every value is 0.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable
from dataclasses import dataclass, field

from attnc.compiler.emit.writer import Writer
from attnc.compiler.ir import Node, walk
from attnc.dsl.types import Base

POINTWISE = {"neg": "-{0}", "add": "{0} + {1}", "sub": "{0} - {1}", "mul": "{0} * {1}", "div": "{0} / {1}"}
PRODUCTS = ("dot", "matmul")
CONSTANTS = frozenset({"literal", "identity", *POINTWISE})
HEADS = frozenset("bh")
HEADER = """# Rounds on small matrices.

import triton
import triton.language as tl
"""


@dataclass(frozen=True)
class MatrixKernels:
    """The text of `rounds` and `rounds_back`, and what they take.

    `reads`: the places among the operands of the `repeat` that are given as tensors, in order: the states at the
    start, then the captured values that are not made of numbers alone. `axes`: the names of lengths.
    """

    text: str
    reads: tuple[int, ...]
    states: tuple[str, ...]
    axes: tuple[str, ...]


def matrix_kernels(node: Node) -> MatrixKernels | None:
    """The kernels of a `repeat`; None where its values are not all matrices, or numbers, a batch row and head."""
    return _Emitter(node).kernels() if _fits(node) else None


def _fits(node: Node) -> bool:
    block = node.block
    if block is None or node.op != "repeat" or block.result not in block.states:
        return False
    values = [*node.args[1:], *(one for _, step in block.steps for one in walk(step))]
    if not all(_is_small(one) for one in values):
        return False
    starts = dict(zip(block.states, node.args[1:], strict=False))
    if not all(len(start.type.axes) == 2 for start in starts.values()):
        return False
    if not all(step.type.axes == starts[name].type.axes for name, step in block.steps if name in starts):
        return False
    return all(_is_known(one) for _, step in block.steps for one in walk(step))


def _is_small(node: Node) -> bool:
    return node.type.base is Base.REAL and node.type.indices <= HEADS and len(node.type.axes) in (0, 2)


def _is_known(node: Node) -> bool:
    if node.op in PRODUCTS:
        left, right = (arg.type.axes for arg in node.args)
        inner = node.op == "matmul" or (left[-1:] == right[:1] == (node.attribute,))
        return len(left) == len(right) == 2 and inner and node.type.axes == (left[0], right[1])
    return node.op in CONSTANTS or node.op in ("state", "local", "transpose")


@dataclass
class _Emitter:
    """Writes the two kernels of one `repeat`."""

    node: Node
    writer: Writer = field(default_factory=Writer)
    count: int = 0

    def __post_init__(self) -> None:
        block = self.node.block
        assert block is not None
        self.block = block
        self.names = (*block.states, *block.captured)
        self.operands = dict(zip(self.names, self.node.args[1:], strict=True))
        self.given = [name for name in self.names if name in block.states or not _is_constant(self.operands[name])]
        self.reads = tuple(self.names.index(name) + 1 for name in self.given)
        values = [*self.node.args[1:], *(one for _, step in block.steps for one in walk(step))]
        self.axes = tuple(sorted({axis for one in values for axis in one.type.axes}))
        self.slots = {name: slot for slot, name in enumerate(self.given)}

    def kernels(self) -> MatrixKernels:
        self.writer.line(HEADER.rstrip("\n"))
        self.forward()
        self.backward()
        text = self.writer.text()
        ast.parse(text)
        return MatrixKernels(text, self.reads, self.block.states, self.axes)

    # Kernels

    def head(self, name: str, tensors: Iterable[str], flags: Iterable[str]) -> str:
        given = [
            f"x{slot}, x{slot}_sb, x{slot}_sh" + ("" if self.is_number(one) else f", x{slot}_sr, x{slot}_sc")
            for one, slot in self.slots.items()
        ]
        lengths = [f"N_{self.axes.index(axis)}" for axis in self.axes]
        constants = [f"{flag}: tl.constexpr" for flag in (*self.blocks(), "PADDED", "PRECISION", *flags)]
        return f"def {name}({', '.join([*given, *tensors, 'ROUNDS', 'H', *lengths, *constants])}):"

    def blocks(self) -> list[str]:
        return [f"BLOCK_{at}" for at in range(len(self.axes))]

    def forward(self) -> None:
        writer = self.writer
        kept = [f"kept_{at}" for at in range(len(self.block.states))]
        writer.line()
        writer.line()
        writer.line("@triton.jit")
        with writer.block(self.head("rounds", [*kept, "out"], ["KEEP"])):
            known = self.start()
            with writer.block("for n in range(ROUNDS):"):
                with writer.block("if KEEP:"):
                    for at, state in enumerate(self.block.states):
                        self.store(f"kept_{at}", f"state_{at}", self.operands[state], "program * ROUNDS + n")
                inside = self.round(known)
                for at, state in enumerate(self.block.states):
                    writer.let(f"state_{at}", inside[-1][state])
            result = self.block.states.index(self.block.result)
            self.store("out", f"state_{result}", self.operands[self.block.result], "program")

    def backward(self) -> None:
        writer, states = self.writer, self.block.states
        kept = [f"kept_{at}" for at in range(len(states))]
        grads = [f"g{slot}" for slot in self.slots.values()]
        writer.line()
        writer.line()
        writer.line("@triton.jit")
        with writer.block(self.head("rounds_back", [*kept, "cotangent", *grads], [])):
            known = self.start(states=False)
            for name, slot in self.slots.items():
                if name == self.block.result:
                    self.load(f"grad_{slot}", "cotangent", self.operands[name], "program")
                elif self.is_number(name):
                    writer.let(f"grad_{slot}", "0.0")
                else:
                    rows, columns = self.shape(self.operands[name])
                    writer.let(f"grad_{slot}", f"tl.zeros([BLOCK_{rows}, BLOCK_{columns}], tl.float32)")
            with writer.block("for back in range(ROUNDS):"):
                writer.let("n", "ROUNDS - 1 - back")
                for at, state in enumerate(states):
                    self.load(f"state_{at}", f"kept_{at}", self.operands[state], "program * ROUNDS + n")
                self.take_back(known, self.round(known))
            for name, slot in self.slots.items():
                self.store(f"g{slot}", f"grad_{slot}", self.operands[name], "program")

    def start(self, states: bool = True) -> dict[str, str]:
        """Lanes, masks, and the values that stay the same, by name."""
        writer = self.writer
        writer.let("program", "tl.program_id(0).to(tl.int64)")
        writer.let("b", "program // H")
        writer.let("h", "program % H")
        for at in range(len(self.axes)):
            writer.let(f"i_{at}", f"tl.arange(0, BLOCK_{at})")
        for rows, columns in sorted({self.shape(one) for one in self.matrices()}):
            row, column = f"(i_{rows} < N_{rows})[:, None]", f"(i_{columns} < N_{columns})[None, :]"
            writer.let(f"ok_{rows}_{columns}", f"{row} & {column}")
        known: dict[str, str] = {}
        for name in self.names:
            node = self.operands[name]
            if name in self.block.states:
                known[name] = f"state_{self.block.states.index(name)}"
                if states:
                    self.load_given(known[name], name)
            elif name in self.slots:
                known[name] = self.load_given(f"held_{self.slots[name]}", name)
            else:
                known[name] = self.expression(node, {}, {})
        return known

    def matrices(self) -> list[Node]:
        nodes = [one for _, step in self.block.steps for one in walk(step)]
        nodes += [
            one for operand in self.node.args[1:] for one in (walk(operand) if _is_constant(operand) else [operand])
        ]
        return [one for one in nodes if one.type.axes]

    def is_number(self, name: str) -> bool:
        return not self.operands[name].type.axes

    def shape(self, node: Node) -> tuple[int, int]:
        rows, columns = (self.axes.index(axis) for axis in node.type.axes)
        return rows, columns

    # Memory

    def load_given(self, name: str, operand: str) -> str:
        slot, node = self.slots[operand], self.operands[operand]
        base = f"x{slot} + b * x{slot}_sb + h * x{slot}_sh"
        if not node.type.axes:
            return self.writer.let(name, f"tl.load({base}).to(tl.float32)")
        rows, columns = self.shape(node)
        place = f"{base} + i_{rows}[:, None] * x{slot}_sr + i_{columns}[None, :] * x{slot}_sc"
        return self.writer.let(name, f"tl.load({place}, mask=ok_{rows}_{columns}, other=0.0).to(tl.float32)")

    def place(self, tensor: str, node: Node, number: str) -> str:
        rows, columns = self.shape(node)
        line = f"(({number}) * N_{rows} + i_{rows}[:, None]) * N_{columns} + i_{columns}[None, :]"
        return f"{tensor} + {line}"

    def load(self, name: str, tensor: str, node: Node, number: str) -> None:
        rows, columns = self.shape(node)
        self.writer.let(name, f"tl.load({self.place(tensor, node, number)}, mask=ok_{rows}_{columns}, other=0.0)")

    def store(self, tensor: str, value: str, node: Node, number: str) -> None:
        if not node.type.axes:
            self.writer.line(f"tl.store({tensor} + {number}, {value})")
            return
        rows, columns = self.shape(node)
        self.writer.line(f"tl.store({self.place(tensor, node, number)}, {value}, mask=ok_{rows}_{columns})")

    # Values

    def round(self, known: dict[str, str]) -> list[dict[str, str]]:
        """One round: what every name stands for before each step, and after the last. `values`: its nodes by step."""
        names, versions = dict(known), []
        self.values: list[dict[Node, str]] = []
        for name, step in self.block.steps:
            versions.append(dict(names))
            texts: dict[Node, str] = {}
            names[name] = self.expression(step, names, texts)
            self.values.append(texts)
        return [*versions, names]

    def expression(self, root: Node, names: dict[str, str], texts: dict[Node, str]) -> str:
        """Writes the value of a node; the name that holds it."""
        for node in walk(root):
            if node not in texts:
                texts[node] = self.value(node, names, texts)
        return texts[root]

    def value(self, node: Node, names: dict[str, str], texts: dict[Node, str]) -> str:
        if node.op in ("state", "local"):
            return names[str(node.attribute)]
        if node.op == "literal":
            return repr(float(node.attribute))  # type: ignore[arg-type]
        if node.op == "identity":
            (at,) = {self.axes.index(axis) for axis in node.type.axes}
            equal = f"(i_{at}[:, None] == i_{at}[None, :]) & ok_{at}_{at}"
            return self.fresh(f"tl.where({equal}, 1.0, 0.0)")
        operands = [texts[arg] for arg in node.args]
        if node.op == "transpose":
            return self.fresh(f"tl.trans({operands[0]})")
        if node.op in PRODUCTS:
            return self.fresh(dot(*operands))
        return self.padded(self.fresh(POINTWISE[node.op].format(*operands)), node)

    def fresh(self, text: str) -> str:
        self.count += 1
        return self.writer.let(f"t{self.count}", text)

    def padded(self, name: str, node: Node) -> str:
        """A pointwise value with what is outside of the matrix 0."""
        if node.type.axes:
            rows, columns = self.shape(node)
            with self.writer.block("if PADDED:"):
                self.writer.let(name, f"tl.where(ok_{rows}_{columns}, {name}, 0.0)")
        return name

    # Gradients

    def take_back(self, known: dict[str, str], versions: list[dict[str, str]]) -> None:
        """The steps of a round from the last to the first; `grad_N` of what is given goes from round to round."""
        writer, states = self.writer, self.block.states
        of: dict[str, str] = {state: f"grad_{self.slots[state]}" for state in states}
        for (name, step), texts in reversed(list(zip(self.block.steps, self.values, strict=True))):
            cotangent = of.pop(name, None)
            if cotangent is None:
                continue
            for read, part in self.through(step, cotangent, texts).items():
                if read in self.slots and read not in states:
                    grad = f"grad_{self.slots[read]}"
                    writer.let(grad, f"{grad} + {part}")
                elif read not in self.names or read in states:
                    of[read] = self.fresh(f"{of[read]} + {part}") if read in of else part
        for state in states:
            slot = self.slots[state]
            if state in of:
                writer.let(f"grad_{slot}", of[state])
            else:
                rows, columns = self.shape(self.operands[state])
                writer.let(f"grad_{slot}", f"tl.zeros([BLOCK_{rows}, BLOCK_{columns}], tl.float32)")

    def through(self, root: Node, cotangent: str, texts: dict[Node, str]) -> dict[str, str]:
        """Cotangents of the names that a step reads."""
        order = list(walk(root))
        held: dict[Node, str] = {root: cotangent}
        found: dict[str, str] = {}
        for node in reversed(order):
            if node not in held:
                continue
            own = held[node]
            if node.op in ("state", "local"):
                found[str(node.attribute)] = own
                continue
            for arg, part in zip(node.args, self.parts(node, own, [texts[arg] for arg in node.args]), strict=True):
                if _is_constant(arg):
                    continue
                if node.type.axes and not arg.type.axes:
                    part = self.fresh(f"tl.sum(tl.sum({part}, 1), 0)")
                part = self.padded(self.fresh(part), arg) if node.op in POINTWISE else self.fresh(part)
                held[arg] = self.fresh(f"{held[arg]} + {part}") if arg in held else part
        return found

    @staticmethod
    def parts(node: Node, own: str, operands: list[str]) -> list[str]:
        """The cotangent of each operand, as text."""
        if node.op == "transpose":
            return [f"tl.trans({own})"]
        if node.op == "neg":
            return [f"-{own}"]
        if node.op not in PRODUCTS and node.op not in POINTWISE:
            return []
        x, y = operands
        return {
            "add": [own, own],
            "sub": [own, f"-{own}"],
            "mul": [f"{own} * {y}", f"{own} * {x}"],
            "div": [f"{own} / {y}", f"-{own} * {x} / ({y} * {y})"],
        }.get(node.op, [dot(own, f"tl.trans({y})"), dot(f"tl.trans({x})", own)])


def dot(x: str, y: str) -> str:
    """A product of two matrices, as text."""
    return f"tl.dot({x}, {y}, input_precision=PRECISION)"


def _is_constant(root: Node) -> bool:
    """Whether a value is made of numbers alone."""
    return all(node.op in CONSTANTS for node in walk(root))

"""Where a term is evaluated: over whole arrays, at one step of a block, or only at the live members of a reduction.

A term may have a different value in a scan step than outside (its states), so every scope keeps its own values
and takes from its parent those that don't depend on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

from attnc.dsl.terms import Pattern, Repeat, Scan, Term
from attnc.dsl.types import Base
from attnc.runtime.reference.arrays import Array, aligned, layout
from attnc.runtime.reference.binding import Binding

# A rule gives the value of a form in a scope.
Rule = Callable[["Scope", Term], Array]

# Forms whose value or derivative may not be finite where the operands are.
FRAGILE = frozenset({"exp", "log", "sqrt", "pow", "div", "floordiv", "mod"})
# Forms that give each position a value from the same position of their operands.
ELEMENTWISE = frozenset(
    (
        *(
            "to_real",
            "neg",
            "not",
            "abs",
            "exp",
            "log",
            "tanh",
            "sigmoid",
            "relu",
            "elu",
            "silu",
            "softplus",
            "sin",
            "cos",
        ),
        *("sqrt", "floor", "add", "sub", "mul", "div", "floordiv", "mod", "pow", "minimum", "maximum"),
        *("lt", "le", "eq", "ne", "and", "or", "select", "uniform"),
        *("take", "outer", "concat", "transpose", "matmul", "detach"),
    )
)
# Scopes of conditions inside conditions: each may double the work, and only derivatives of overflows need them.
DEPTH = 8


def operands(term: Term) -> Iterator[Term]:
    """What a term is made of: its args and the steps of its block."""
    yield from term.args
    if term.block is not None:
        for _, step in term.block.steps:
            yield step


def walk(roots: Iterable[Term]) -> Iterator[Term]:
    """Every term once, operands (and the steps of blocks) before users."""
    seen: set[int] = set()
    stack = [(root, False) for root in roots]
    while stack:
        term, expanded = stack.pop()
        if expanded:
            yield term
        elif id(term) not in seen:
            seen.add(id(term))
            stack.append((term, True))
            stack.extend((operand, False) for operand in operands(term))


def is_elementwise(term: Term) -> bool:
    """Whether every position of the value depends on that position of the operands alone."""
    if term.form == "dot":  # over a vector axis, not over an index
        return any(term.attribute in arg.type.axes for arg in term.args)
    return term.form in ELEMENTWISE


@dataclass(frozen=True)
class Facts:
    """`free`: states and locals of enclosing blocks it reads. `fragile`: holds a fragile form, elementwise."""

    free: frozenset[str]
    fragile: bool


def facts(pattern: Pattern) -> dict[int, Facts]:
    """Facts on every term of a pattern, by identity."""
    roots = [pattern.out, *(size for _, size in pattern.sizes)]
    roots += [entry.default for entry in pattern.inputs if entry.default is not None]
    roots += [term for axis in pattern.axes for term in (axis.size, axis.stride) if term is not None]
    found: dict[int, Facts] = {}
    for term in walk(roots):
        free: frozenset[str] = frozenset().union(*(found[id(arg)].free for arg in term.args))
        if term.form in ("state", "local"):
            free |= {str(term.attribute)}
        if term.block is not None:
            bound = {name for name, _ in term.block.states} | {name for name, _ in term.block.steps}
            free = free.union(*(found[id(step)].free for _, step in term.block.steps)) - bound
        below = is_elementwise(term) and any(found[id(arg)].fragile for arg in term.args)
        found[id(term)] = Facts(free, term.form in FRAGILE or below)
    return found


class Scope:
    """Whole arrays: the scope of a call."""

    def __init__(self, binding: Binding, rules: Mapping[str, Rule], known: dict[int, Facts]) -> None:
        self.binding = binding
        self.rules = rules
        self.facts = known
        self.values: dict[int, Array] = {}

    def owns(self, term: Term) -> bool:
        """Whether the term is evaluated here, rather than taken from the parent."""
        return True

    def inherited(self, term: Term) -> Array:
        raise AssertionError("the outermost scope owns every term")

    def named(self, name: str) -> Array:
        """Value of a state or an earlier step of the block."""
        raise AssertionError(f"`{name}` is read outside its block")

    def operand(self, user: Term, arg: Term) -> Array:
        """Value of an argument as its user sees it."""
        return self.value(arg)

    def value(self, term: Term) -> Array:
        """Value of a term. Chains of elementwise terms of any depth use no recursion."""
        stack = [term]
        while stack:
            current = stack[-1]
            if id(current) in self.values:
                stack.pop()
                continue
            if not self.owns(current):
                self.values[id(current)] = self.inherited(current)
                continue
            waiting = is_elementwise(current) and current.form != "select"
            missing = [arg for arg in current.args if id(arg) not in self.values] if waiting else []
            if missing:
                stack.extend(missing)
                continue
            value = self.rules[current.form](self, current)
            for axis, size in zip(value.axes, value.data.shape[len(value.indices) :], strict=True):
                self.binding.axis_sizes.setdefault(axis, size)
            self.values[id(current)] = value
        return self.values[id(term)]

    def where(self, condition: Array) -> Scope:
        """The scope of the members where a bool condition holds; this one where that changes nothing."""
        if not condition.indices or condition.axes:
            return self
        return LiveScope(self, condition)

    def integer(self, term: Term) -> int:
        """Value of an int that doesn't vary."""
        return int(self.value(term).data.item())

    def index_size(self, index: str) -> int:
        if index in self.binding.axes:
            return len(self.members(index)[0])
        return self.binding.index_sizes[index]

    def members(self, axis: str) -> tuple[torch.Tensor, torch.Tensor]:
        """First, and one past the last, global position of every member of a declared axis (int64, 1-d)."""
        known = self.binding.members
        if axis not in known:
            known[axis] = self._members(axis)
        return known[axis]

    def _members(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        axis = self.binding.axes[name]
        length = self.binding.origin(axis.over) + self.binding.index_sizes[axis.over]
        size = self.integer(axis.size)
        stride = size if axis.stride is None else self.integer(axis.stride)
        if size < 1 or stride < 1:
            raise ValueError(
                f"{self.binding.pattern.name}: axis `{name}`: size and stride must be at least 1, "
                f"got size={size}, stride={stride}"
            )
        if axis.kind == "segments":
            count, size = size, -(-length // size)
            stride = size
        elif axis.stride is None:
            count = -(-length // size)
        else:
            count = max(0, (length - size) // stride + 1)
        start = torch.arange(count, device=self.binding.device) * stride
        return start.clamp(max=length), (start + size).clamp(max=length)


class ChildScope(Scope):
    def __init__(self, parent: Scope) -> None:
        super().__init__(parent.binding, parent.rules, parent.facts)
        self.parent = parent

    def inherited(self, term: Term) -> Array:
        return self.parent.value(term)


class BlockScope(ChildScope):
    """One round of a scan (at `position`) or a repeat: `names` are its states and earlier steps.

    The steps are evaluated in order and a term is read once: after a step has assigned a state, others read it.
    """

    def __init__(self, parent: Scope, block: Scan | Repeat, names: dict[str, Array], position: int | None) -> None:
        super().__init__(parent)
        self.index = block.index if isinstance(block, Scan) else None
        self.bound = {name for name, _ in block.states} | {name for name, _ in block.steps}
        self.names = names
        self.position = position

    def owns(self, term: Term) -> bool:
        return not self.facts[id(term)].free.isdisjoint(self.bound)

    def inherited(self, term: Term) -> Array:
        value = self.parent.value(term)
        return value if self.index is None or self.position is None else value.select(self.index, self.position)

    def named(self, name: str) -> Array:
        return self.names[name]


class LiveScope(ChildScope):
    """Members where a condition holds. Elsewhere the operands of fragile forms are 1.

    A dead member contributes nothing, so its value doesn't matter, but `0 * inf` in the chain rule would:
    `gamma ** (i - j)` overflows for j far above i, and its gradient must be 0 there, not NaN.
    """

    def __init__(self, parent: Scope, condition: Array, depth: int = 1) -> None:
        super().__init__(parent)
        self.condition = condition
        self.depth = depth
        self.reduced: dict[frozenset[str], Array] = {}

    def owns(self, term: Term) -> bool:
        shared = len(term.type.indices.intersection(self.condition.indices))
        enough = shared >= min(2, len(self.condition.indices))
        return enough and self.facts[id(term)].fragile and is_elementwise(term)

    def operand(self, user: Term, arg: Term) -> Array:
        value = self.value(arg)
        shared = frozenset(value.indices).intersection(self.condition.indices)
        if user.form not in FRAGILE or arg.type.base is Base.BOOL or not shared:
            return value
        live = self.live(shared)
        order = layout((*value.indices, *live.indices))
        rank = len(value.axes)
        mask, data = live.over(order), value.over(order)
        mask = mask.reshape(mask.shape + (1,) * rank)
        return Array(torch.where(mask, data, torch.ones_like(data)), order, value.axes)

    def live(self, indices: frozenset[str]) -> Array:
        """Where a member is live for some value of the indices left out."""
        if indices not in self.reduced:
            data, names = self.condition.data, self.condition.indices
            for at in reversed(range(len(names))):
                if names[at] not in indices:
                    data = data.any(at)
            self.reduced[indices] = Array(data, tuple(name for name in names if name in indices))
        return self.reduced[indices]

    def where(self, condition: Array) -> Scope:
        if condition.axes or self.depth == DEPTH:
            return self
        order, _, (outer, inner) = aligned(self.condition, condition)
        return LiveScope(self, Array(outer & inner, order), self.depth + 1)

"""Masks of partial pieces: evaluated once where several heads, or tiles along a diagonal, have the same one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attnc.compiler.ir import Node, walk
from attnc.compiler.ops import OPS
from attnc.compiler.plan import Domain
from attnc.runtime.cpu.batches import Shifted, Step

if TYPE_CHECKING:
    from attnc.runtime.cpu.executor import Work

KEPT = 32  # masks of one branch; each has the pairs of one step at most


class Masks:
    """Where pairs are dead, by key set of one domain."""

    def __init__(self, domain: Domain) -> None:
        masks = [key_set.mask for key_set in domain.key_sets]
        self.nodes = masks
        self.dotted = any(node.op == "dot" for mask in masks for node in walk(mask))
        self._by_head = [mask.depends_on("h") or self.dotted for mask in masks]
        self._by_batch = [mask.depends_on("b") for mask in masks]
        self._still = [drift(mask) == 0 for mask in masks]
        self._along: dict[tuple[int, ...], Tensor] = {}

    def dead(self, work: Work, number: int, step: Step, columns: tuple[int, int], dots: Tensor | None) -> Tensor:
        """Dead pairs in some columns of step `number`, broadcast against (x, tiles, g, rows, columns).

        `dots`: q @ k of these columns, where a mask needs it.
        """
        start, stop = columns
        shared = not self._by_head[step.key_set] and (work.one_batch or not self._by_batch[step.key_set])
        if shared and (number, start) in work.dead:
            return work.dead[number, start]
        steady = shared and not self._by_batch[step.key_set]
        place = self.diagonal(work, step, columns) if steady else None
        if place is not None and place in self._along:
            return self._along[place]
        keys = step.positions()[..., start:stop]
        held = keys.clamp(min=0) if step.per_row else keys
        rows = work.rows
        if place is not None:
            held, rows = held[:, :1], rows[:, :1]
        dead = work.environment(held, torch.float64, dots, rows).value(self.nodes[step.key_set]).logical_not()
        if shared and dead.dim():
            dead = dead[:1]  # the same for every lane
        if step.per_row:
            dead = dead | (keys < 0)
        if place is not None:
            if len(self._along) >= KEPT:
                self._along.clear()
            self._along[place] = dead
        elif shared:
            work.dead[number, start] = dead
        return dead

    def diagonal(self, work: Work, step: Step, columns: tuple[int, int]) -> tuple[int, ...] | None:
        """What decides a mask of i - j: the shape of rows and keys and how far apart they are."""
        rows, keys = work.batch.rows, step.keys
        if not (self._still[step.key_set] and isinstance(rows, Shifted) and isinstance(keys, Shifted)):
            return None
        if rows.tiles > 1 and rows.shift != keys.shift:
            return None
        start, stop = columns
        apart = keys.start + keys.step * start - rows.start
        return step.key_set, rows.step, rows.count, keys.step, stop - start, apart


def drift(root: Node) -> int | None:
    """By how much an int changes where i and j both grow by 1 (0 for a bool that stays as it is); None: not known."""
    known: dict[Node, int | None] = {}
    for node in walk(root):
        known[node] = _drift(node, [known[arg] for arg in node.args])
    return known[root]


def _drift(node: Node, operands: list[int | None]) -> int | None:
    if not node.type.indices & {"i", "j"}:
        return 0
    if node.op == "index":
        return 1
    if None in operands or not operands:
        return None
    steps = [operand or 0 for operand in operands]
    if node.op in ("add", "sub", "neg"):
        first = -steps[0] if node.op == "neg" else steps[0]
        return first + sum(steps[1:]) if node.op == "add" else first - sum(steps[1:])
    if node.op in ("minimum", "maximum", "lt", "le", "eq", "ne") and steps[0] == steps[1]:
        return steps[0] if node.op in ("minimum", "maximum") else 0
    fits = OPS[node.op].pointwise or node.op == "take"
    return 0 if fits and not any(steps) else None

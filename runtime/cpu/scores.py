"""How a branch's score follows from q @ k."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from torch import Tensor

from attnc.compiler.ir import Node, walk
from attnc.runtime.cpu.batches import Step
from attnc.runtime.cpu.distances import Line
from attnc.runtime.evaluate import Environment

if TYPE_CHECKING:
    from attnc.runtime.cpu.executor import Work

LOG2E = math.log2(math.e)
EMPTY: Mapping[Node, Line] = {}


@dataclass(frozen=True)
class Score:
    """A score to base 2.

    Linear in q @ k: product of `factors` (which go into q) times q @ k, plus the `terms`; each with a sign or, for
    a factor, whether it divides. Otherwise `formula` is evaluated on the pairs.
    """

    formula: Node | None
    factors: tuple[tuple[Node, bool], ...] = ()
    terms: tuple[tuple[Node, int], ...] = ()
    sign: int = 1

    @property
    def plain(self) -> bool:
        """Whether the score is q @ k times a factor."""
        return self.formula is None and not self.terms

    @cached_property
    def constant(self) -> bool:
        """Whether the factor is the same for all rows and heads."""
        return not any(node.type.indices for node, _ in self.factors)

    def factor(self, at: Environment) -> Tensor | float:
        """What q is multiplied with, a number or over (x, tiles, g, rows, 1)."""
        if self.formula is not None:
            return 1.0
        product: Tensor | float = LOG2E * self.sign
        for node, divides in self.factors:
            value = at.value(node)
            product = product / value if divides else product * value
        return product

    def finish(self, work: Work, step: Step, dots: Tensor, lines: Mapping[Node, Line] = EMPTY) -> Tensor:
        """The score of pairs whose q @ k is `dots`; overwrites it where the score is linear in it.

        `lines`: terms that are functions of i - j and are read from a line of numbers; the others are evaluated.
        """
        if self.plain:
            return dots
        at = work.environment(step.positions().clamp(min=0), dots.dtype, dots)
        if self.formula is not None:
            return at.value(self.formula).expand(dots.shape) * LOG2E
        for node, sign in self.terms:
            value = lines[node].pairs(work, step) if node in lines else None
            dots.add_(at.value(node) if value is None else value, alpha=sign * LOG2E)
        return dots


def read_score(root: Node, *, folded: bool = True) -> Score:
    """Take a score apart. `folded`: q may carry its factors (nobody else reads q @ k)."""
    if not folded:
        return Score(root)
    dotted = {node for node in walk(root) if node.op == "dot" or any(arg.op == "dot" for arg in node.args)}
    for node in walk(root):
        if any(arg in dotted for arg in node.args):
            dotted.add(node)
    factors: list[tuple[Node, bool]] = []
    terms: list[tuple[Node, int]] = []
    sign, node = 1, root
    while node.op != "dot":
        inside = [slot for slot, arg in enumerate(node.args) if arg in dotted]
        if len(inside) != 1:
            return Score(root)
        (slot,) = inside
        others = [arg for at, arg in enumerate(node.args) if at != slot]
        if node.op in ("add", "sub") and not factors:
            if node.op == "add":
                terms.append((others[0], sign))
            elif slot == 0:
                terms.append((others[0], -sign))
            else:
                terms.append((others[0], sign))
                sign = -sign
        elif node.op == "neg":
            sign = -sign
        elif (node.op == "mul" or (node.op == "div" and slot == 0)) and not others[0].depends_on("j"):
            factors.append((others[0], node.op == "div"))
        else:
            return Score(root)
        node = node.args[slot]
    return Score(None, tuple(factors), tuple(terms), sign)

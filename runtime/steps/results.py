"""What running a composition leaves: the result, and the arrays that its gradients want."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attnc.compiler.composition import Compute

TOKENS = frozenset("ijt")


@dataclass(frozen=True)
class Result:
    """The result in the layout of the pattern, and what every heavy step left, in order.

    `returned`: the place among `saved` of the array that is the result as it stands, if one is.
    """

    out: Tensor
    saved: list[Tensor]
    returned: int | None = None

    @property
    def kept(self) -> list[Tensor]:
        """`saved` with an empty vector for what is returned: an operator returns nothing twice."""
        kept = list(self.saved)
        if self.returned is not None:
            kept[self.returned] = self.out.new_empty(0)
        return kept


def own(out: Tensor, others: Sequence[Tensor | None]) -> Tensor:
    """A result that shares no memory, which an operator's may not."""
    place = out.untyped_storage().data_ptr()
    shared = any(other is not None and other.untyped_storage().data_ptr() == place for other in others)
    return out.clone(memory_format=torch.contiguous_format) if shared else out.contiguous()


def summary(step: Compute) -> bool:
    """Whether a value is a product over the tokens: short beside what it is made of, whose gradients do without it."""
    node = step.node
    return node.op == "dot" and node.attribute in TOKENS and not TOKENS & node.type.indices

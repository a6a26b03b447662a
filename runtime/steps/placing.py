"""Rows that lie elsewhere (`plan.Placed`): arrays over positions in the order of a plan's rows, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from attnc.compiler.plan import Plan
from attnc.runtime.call import Call
from attnc.runtime.steps.arrangement import Placement, at_places, same_heads


@dataclass(frozen=True)
class RowPlaces:
    """The rows of one call: `order` has b and h, 1 long where rows do not differ by them."""

    order: Placement

    @classmethod
    def of(cls, plan: Plan, call: Call) -> RowPlaces | None:
        """None where rows lie in their order."""
        if plan.placed is None:
            return None
        axes = {entry.name: entry.axes for entry in plan.inputs}
        found = []
        for name in (plan.placed.places, plan.placed.count):
            tensor = call.inputs[name]
            for at, axis in enumerate("bh"):
                tensor = tensor if axis in axes[name] else tensor.unsqueeze(at)
            found.append(same_heads(tensor, call.q)[0])
        return cls(Placement(*found))

    def ordered(self, tensor: Tensor) -> Tensor:
        """An array (b, h, N, ..) over positions in the order of the rows."""
        return at_places(tensor, self.order.places)

    def copied(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies of q, do, lse and delta (b, h, N, ..) in the order of the rows, as far as these take part."""
        from attnc.runtime.cuda.launch_ordering import order_rows  # late: it brings triton

        names = ("q", "do", "lse", "delta")
        made = order_rows(self.order.places, self.order.count, *(tensors[name] for name in names))
        return dict(zip(names, made, strict=True))

    def back(self, tensor: Tensor) -> Tensor:
        """An array (b, h, N, ..) in the order of the rows over positions."""
        places = self.order.places.to(torch.int64)
        places = places.view(*places.shape, *(1,) * (tensor.dim() - 3)).expand(tensor.shape)
        return torch.empty_like(tensor).scatter_(2, places, tensor)

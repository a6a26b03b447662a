"""Terms of a score that are functions of i - j: a line of numbers a head, read by every tile as a view."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attnc.compiler.ir import Node
from attnc.compiler.plan import Plan
from attnc.runtime.call import Call
from attnc.runtime.cpu.batches import Shifted, Step
from attnc.runtime.cpu.masks import drift
from attnc.runtime.evaluate import Environment

if TYPE_CHECKING:
    from attnc.runtime.cpu.executor import Work


def by_distance(node: Node) -> bool:
    """Whether a value depends on both positions, and only through i - j."""
    return {"i", "j"} <= node.type.indices and drift(node) == 0


class Line:
    """Such a value for every distance; place j - i + origin."""

    def __init__(self, plan: Plan, call: Call, node: Node, real: torch.dtype) -> None:
        self.plan = plan
        self.call = call
        self.node = node
        self.real = real
        self.origin = call.offset + call.sizes["i"] - 1

    @cached_property
    def values(self) -> Tensor:
        """(B or 1, H or 1, N + M - 1): the value at (i, j) = (origin - place, 0), of which only i - j counts."""
        sizes = self.call.sizes
        positions = {
            "b": torch.arange(sizes["b"]).view(-1, 1, 1),
            "h": torch.arange(sizes["h"]).view(1, -1, 1),
            "i": self.origin - torch.arange(sizes["i"] + sizes["j"] - 1).view(1, 1, -1),
            "j": torch.zeros(1, 1, 1, dtype=torch.int64),
        }
        return Environment(self.plan, self.call, positions, self.real).value(self.node).contiguous()

    def pairs(self, work: Work, step: Step) -> Tensor | None:
        """The values of a step, (x or 1, tiles, g or 1, rows, keys); None where its positions are no progressions."""
        rows, keys = work.batch.rows, step.keys
        if not (isinstance(rows, Shifted) and isinstance(keys, Shifted)):
            return None
        # Places grow along keys, shrink along rows, and along tiles do either. Strides must not be negative: an
        # axis along which they shrink is read backwards and turned around.
        moved = keys.shift - rows.shift
        spans = ((keys.tiles - 1) * moved, -(rows.count - 1) * rows.step, (keys.count - 1) * keys.step)
        first = keys.start - (rows.start + self.call.offset) + self.origin + sum(span for span in spans if span < 0)
        line = self.values[..., first : first + sum(abs(span) for span in spans) + 1]
        if line.shape[0] > 1 or line.shape[1] > 1:
            batch = work.lanes.b.view(-1, 1) if line.shape[0] > 1 else 0
            line = line[batch, work.lanes.h.view(len(work.lanes), -1) if line.shape[1] > 1 else 0]
            line = line.view(len(work.lanes), -1, line.shape[-1])
        size = (*line.shape[:2], keys.tiles, rows.count, keys.count)
        stride = (*line.stride()[:2], abs(moved), rows.step, keys.step)
        view = line.as_strided(size, stride, line.storage_offset())
        return view.flip((2, 3) if moved < 0 else (3,)).transpose(1, 2)

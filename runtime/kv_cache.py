"""The memory of a cache: arrays with a place for every position kept, in one block or in pages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from attnc.compiler.cache_plan import Kept
from attnc.runtime.slots import Slots


@dataclass
class Pages:
    """A paged memory: place p of row b lies in page table[b, p // size], at p % size.

    `table`: int32 (B, pages of a row), numbers of pages of one pool of `count`, shared by all rows and arrays.
    """

    size: int
    count: int
    table: Tensor


@dataclass
class Held:
    """The arrays kept along one index. A buffer is (places, ..), a place for each row of the batch or of all pages."""

    kept: Kept
    slots: Slots
    layouts: Mapping[str, tuple[str, ...]]
    pages: Pages | None = None
    buffers: dict[str, Tensor] = field(default_factory=dict)
    batch: int = 0

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.buffers.values())

    @property
    def position_bytes(self) -> int:
        """Bytes of one position of every row of the batch."""
        return self.batch * sum(buffer[:1].nbytes for buffer in self.buffers.values())

    def describe(self) -> list[str]:
        """Bytes of one more token and of all that is there, for all rows of the batch."""
        slots, each = self.slots, self.position_bytes
        what = "token" if self.kept.index == "j" else f"member of {self.kept.index}"
        if slots.everything:
            growth = f"{each:,} bytes a {what}"
        else:
            growth = f"{slots.constant} places of {each:,} bytes"
            growth += "".join(f", and {one.width} for every {one.period} tokens" for one in slots.classes)
        return [f"{', '.join(self.buffers)}: {growth}; {self.nbytes:,} bytes for at most {slots.length} of {self.kept.index}"]

    # Layouts: a row form (b, places, ..) for each array

    def order(self, name: str) -> list[int]:
        """Dimensions of an array in its layout: b, along, then the others; b may be absent."""
        layout = list(self.layouts[name])
        along = next(at for at, axis in enumerate(layout) if axis == self.kept.index or self.is_token(axis))
        first = [layout.index("b")] if "b" in layout else []
        return [*first, along, *(at for at in range(len(layout)) if at not in (*first, along))]

    def is_token(self, axis: str) -> bool:
        return self.kept.index == "j" and axis in ("j", "t")

    def rows(self, name: str, tensor: Tensor, count: int) -> Tensor:
        """An array of `count` positions as (b, count, ..)."""
        tensor = tensor.permute(self.order(name))
        if "b" not in self.layouts[name]:
            tensor = tensor.unsqueeze(0)
        return tensor.expand(self.batch, count, *tensor.shape[2:])

    def array(self, name: str, rows: Tensor) -> Tensor:
        """(b, places, ..) in the array's layout."""
        order = self.order(name)
        if "b" not in self.layouts[name]:
            rows = rows[0]
        return rows.permute([order.index(at) for at in range(len(order))])

    # Reading and writing

    def physical(self, places: Tensor) -> Tensor:
        """Places (b or 1, n) of the rows in the buffers (b, n)."""
        if self.pages is None:
            row = torch.arange(self.batch, device=places.device).unsqueeze(-1)
            return row * self.slots.count + places
        table, size = self.pages.table, self.pages.size
        page = table.gather(1, (places // size).expand(self.batch, -1).long())
        return page.long() * size + places % size

    def write(self, name: str, rows: Tensor, places: Tensor) -> None:
        """Sets places (b or 1, n) to rows (b, n, ..)."""
        if name not in self.buffers:
            count = self.batch * self.slots.count if self.pages is None else self.pages.count * self.pages.size
            self.buffers[name] = rows.new_zeros(count, *rows.shape[2:])
        self.buffers[name][self.physical(places)] = rows

    def gather(self, name: str, places: Tensor) -> Tensor:
        """Places (b or 1, n) as (b, n, ..), a copy."""
        return self.buffers[name][self.physical(places)]

    def view(self, name: str, used: int) -> Tensor:
        """The first places of every row (b, used, ..): in place, or gathered from pages."""
        buffer = self.buffers[name]
        if self.pages is None:
            return buffer.view(self.batch, self.slots.count, *buffer.shape[1:])[:, :used]
        return self.gather(name, torch.arange(used, device=buffer.device).unsqueeze(0))

"""The memory of a cache: arrays with a place for every position kept, in one block or in pages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from attnc.compiler.cache_plan import Kept
from attnc.runtime.decoding.slots import Slots


@dataclass
class Pages:
    """A paged memory: place p of row b lies in page table[b, p // size], at p % size.

    `table`: int32 (B, pages of a row), numbers of pages of one pool of `count`, shared by all rows and arrays. Entries
    may change in place. One of a page that is not there is refused where it is used; the kernels of lone tokens, which
    do not wait for the device, read no key from it and leave none there. Raises ValueError for a table of another form.
    """

    size: int
    count: int
    table: Tensor

    def __post_init__(self) -> None:
        if self.size < 1 or self.count < 1:
            raise ValueError(f"{self.count} pages of {self.size} places: there is at least one of each")
        if self.table.dim() != 2 or self.table.dtype != torch.int32 or not self.table.is_contiguous():
            raise ValueError("the table of pages is int32 (rows of the batch, pages of a row), and contiguous")

    def named(self, numbers: Tensor) -> Tensor:
        """Entries (b, n) of the table at these pages of each row, as int64. Raises ValueError for a page not there."""
        found = self.table.gather(1, numbers).long()
        wrong = (found < 0) | (found >= self.count)
        if not (found.is_cuda and torch.cuda.is_current_stream_capturing()) and bool(wrong.any()):
            row, at = wrong.nonzero()[0].tolist()
            page = f"page {int(found[row, at])} as number {int(numbers[row, at])} of row {row}"
            raise ValueError(f"the table names {page}, and the pool has pages 0 to {self.count - 1}")
        return found


@dataclass
class Held:
    """The arrays kept along one index. A buffer is (places, ..), a place for each row of the batch or of all pages."""

    kept: Kept
    slots: Slots
    layouts: Mapping[str, tuple[str, ...]]
    pages: Pages | None = None
    element: torch.dtype = torch.float32
    batch: int = 0
    buffers: dict[str, Tensor] = field(default_factory=dict)
    forms: dict[str, tuple[int, ...]] = field(default_factory=dict)  # of a place, for parts of other arrays

    def __post_init__(self) -> None:
        if self.pages is not None:
            rows, columns = self.pages.table.shape
            if rows != self.batch or columns * self.pages.size < self.slots.count:
                held = f"{rows} rows of {columns} pages of {self.pages.size}"
                raise ValueError(f"{held} do not hold {self.slots.count} places for each of {self.batch} rows")

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.buffers.values())

    @property
    def position_bytes(self) -> int:
        """Bytes of one position of every row of the batch."""
        return self.batch * sum(self.places(name)[0, 0].nbytes for name in self.buffers)

    def describe(self) -> str:
        """Places, bytes of one, and bytes of all."""
        slots, each = self.slots, self.position_bytes
        what = "token" if self.kept.index == "j" else f"member of {self.kept.index}"
        if slots.everything:
            return f"{', '.join(self.buffers)}: {each:,} bytes a {what}, {self.nbytes:,} for {slots.length}"
        growth = "".join(f" and of {one.width} for every {one.period} tokens" for one in slots.classes)
        size = f"{self.nbytes:,}{f' for {slots.length} tokens' if growth else ', however many tokens'}"
        return f"{', '.join(self.buffers)}: {each:,} bytes for each of {slots.constant} places{growth}, {size}"

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

    def index(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """Where places (b or 1, n) of the rows are: (row, place), or (page, place in it), each broadcast to (b, n)."""
        if self.pages is None:
            return torch.arange(self.batch, device=places.device).unsqueeze(-1), places
        size = self.pages.size
        return self.pages.named((places // size).expand(self.batch, -1).long()), places % size

    def places(self, name: str) -> Tensor:
        """A buffer as (rows, places, ..) or (pages, places of one, ..): a view."""
        return self.buffers[name].permute(self.order(name) if "b" in self.layouts[name] else self.unbatched(name))

    def unbatched(self, name: str) -> list[int]:
        """`order` for a buffer that has a first dimension which its array does not have."""
        return [0, *(at + 1 for at in self.order(name))]

    def write(self, name: str, rows: Tensor, places: Tensor) -> None:
        """Sets places (b or 1, n) to rows (b, n, ..). The first time takes the memory, laid out as the array is."""
        if name in self.kept.parts:
            self.forms[name] = tuple(rows.shape[2:])
            return
        narrow = name in self.kept.given or (name in self.kept.operands and rows.is_cuda)  # where kernels round them
        if narrow and rows.is_floating_point():
            rows = rows.to(self.element)
        if name not in self.buffers:
            counts = (self.batch, self.slots.count) if self.pages is None else (self.pages.count, self.pages.size)
            order = self.order(name) if "b" in self.layouts[name] else self.unbatched(name)
            shape = [*counts, *rows.shape[2:]]
            self.buffers[name] = rows.new_zeros([shape[order.index(at)] for at in range(len(order))])
        self.places(name)[self.index(places)] = rows

    def gather(self, name: str, places: Tensor) -> Tensor:
        """Places (b or 1, n) as (b, n, ..), a copy."""
        if name in self.kept.parts:
            return self.part(name, self.gather(self.kept.parts[name], places))
        return self.places(name)[self.index(places)]

    def part(self, name: str, rows: Tensor) -> Tensor:
        """The first columns of another array's rows, in the form of the array that they are."""
        form = self.forms[name]
        return rows[..., : form[-1]].reshape(*rows.shape[:2], *form)

    def view(self, name: str, used: int) -> Tensor:
        """The first places of every row (b, used, ..): in place, or gathered from pages."""
        if name in self.kept.parts:
            return self.part(name, self.view(self.kept.parts[name], used))
        if self.pages is None:
            return self.places(name)[:, :used]
        return self.gather(name, torch.arange(used, device=self.pages.table.device).unsqueeze(0))

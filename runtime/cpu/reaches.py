"""Which keys the rows of a carried sum see, and the lengths of its arrays."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Reach:
    """Which keys a row i sees, i counted from `offset`, the position of the first row.

    `kind`: `all`; `lag`: j <= i - amount; `period`: j < i // amount * amount. `same` (b, t), contiguous runs of equal
    ints: only keys of the row's own run.
    """

    kind: str = "lag"
    amount: int = 0
    offset: int = 0
    same: Tensor | None = None


@dataclass(frozen=True)
class Shapes:
    """Lengths of one call: batch, heads of the rows, rows, keys, features, width of a value; type of the sums."""

    batch: int
    heads: int
    rows: int
    keys: int
    features: int
    width: int
    dtype: torch.dtype

    @staticmethod
    def of(query: Tensor, key: Tensor, value: Tensor, decay: Tensor | None) -> Shapes:
        given = [query, key, value, *([] if decay is None else [decay])]
        batch, heads = (max(one.shape[n] for one in given) for n in (0, 1))
        dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
        return Shapes(batch, heads, query.shape[2], key.shape[2], key.shape[3], value.shape[3], dtype)


@dataclass(frozen=True)
class Runs:
    """Where runs of equal ints go on, as 0 or 1: `starting`: from the chunk before to the row (z, n, c), `ending`: from
    the key to the chunk's end, `through`: over the whole chunk (z, n). `same`: the ints (z, n, c)."""

    same: Tensor
    starting: Tensor
    ending: Tensor
    through: Tensor

    def agree(self) -> Tensor:
        """Which pairs of a chunk are of one run, (z, n, c, c)."""
        return self.same.unsqueeze(-1) == self.same.unsqueeze(-2)

    @staticmethod
    def of(same: Tensor, previous: Tensor, shapes: Shapes, chunk: int, length: int) -> Runs:
        missing = -length % chunk
        same = same.expand(shapes.batch, shapes.heads, length)
        if missing:
            same = torch.cat([same, same[..., -1:].expand(-1, -1, missing)], -1)
        cut = same.reshape(shapes.batch * shapes.heads, -1, chunk)
        first = previous[..., :1].expand(shapes.batch, shapes.heads, 1).reshape(-1, 1)
        before = torch.cat([first, cut[:, :-1, -1]], 1)
        last = cut[:, :, -1]
        return Runs(
            cut,
            (cut == before.unsqueeze(-1)).to(shapes.dtype),
            (cut == last.unsqueeze(-1)).to(shapes.dtype),
            (before == last).to(shapes.dtype),
        )

"""Random projections with orthogonal rows (Performer, arXiv 2009.14794, section 2.4)."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from attnc.runtime.compute.hashing import uniform


@lru_cache(maxsize=32)
def _orthogonal_gaussian(features: int, width: int, seed: int) -> Tensor:
    blocks = -(-features // width)
    q, r = torch.linalg.qr(_gaussian(blocks * width, width, seed, 0).view(blocks, width, width))
    # QR leaves the signs of the columns open; with r's diagonal positive q is Haar distributed.
    signs = torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0)
    directions = (q * signs[:, None, :]).mT.reshape(blocks * width, width)[:features]
    # The rows of an independent Gaussian matrix give the norms, so that each row is Gaussian by itself.
    norms = torch.linalg.vector_norm(_gaussian(features, width, seed, 1), dim=1, keepdim=True)
    return torch.mul(directions, norms)


def _gaussian(rows: int, columns: int, seed: int, stream: int) -> Tensor:
    """Standard normal (rows, columns), float64: Box and Muller over the hash of (seed, stream, row, column, part)."""
    row = torch.arange(rows)[:, None]
    column = torch.arange(columns)[None, :]
    prefix = [torch.tensor(seed), torch.tensor(stream), row, column]
    radius = (-2 * torch.log1p(-uniform([*prefix, torch.tensor(0)]))).sqrt()
    return radius * torch.cos(2 * math.pi * uniform([*prefix, torch.tensor(1)]))


def orthogonal_gaussian(
    features: int,
    width: int,
    seed: int = 0,
    *,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
) -> Tensor:
    """Random matrix (features, width): orthogonal rows in blocks of `width`, with the norms of Gaussian rows.

    The same numbers for the same (features, width, seed) everywhere: they come from `uniform` of the language.
    Made in float64 on the CPU, then converted to `dtype` and `device`. Each call gives a fresh tensor.

    Raises ValueError if `features` is negative or `width` is not positive.
    """
    if features < 0 or width < 1:
        raise ValueError(
            f"orthogonal_gaussian: features must be >= 0 and width >= 1, got features={features}, width={width}"
        )
    return _orthogonal_gaussian(features, width, seed).to(device=device, dtype=dtype, copy=True)

"""What the machine at hand can do at most: bytes moved and floating-point operations a second, measured."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks.timing import side_by_side

COPIED = {"cuda": 2**30, "cpu": 2**27}  # bytes of the copied tensor, far more than a cache holds
SIDE = {"cuda": 8192, "cpu": 2048}  # of the multiplied matrices


@dataclass(frozen=True)
class Ceilings:
    """Bytes (read and written) and operations of a matrix product, a second."""

    bytes_per_second: float
    operations_per_second: float

    def floor(self, moved: int, operations: int | None) -> tuple[float, str]:
        """Milliseconds below which no call can be that moves so many bytes and counts so many operations, and why."""
        memory, rate = moved / self.bytes_per_second * 1e3, (operations or 0) / self.operations_per_second * 1e3
        return (memory, "memory") if memory > rate else (rate, "products")

    def __str__(self) -> str:
        rates = f"{self.bytes_per_second / 1e12:.3g} TB/s and {self.operations_per_second / 1e12:.3g} TFLOP/s"
        return (
            "the longer of q, k, v and the result moved once and the products of live pairs at the full rate, "
            f'{rates} (a copy, and a product of matrices); "of it" is the floor over attnc\'s time'
        )

    @classmethod
    def here(cls, device: str, dtype: torch.dtype) -> Ceilings:
        """Of the largest plain copy and matrix product that say something; random numbers, since zeros are faster."""
        kind = device.partition(":")[0]
        source = torch.randint(0, 127, (COPIED[kind],), dtype=torch.int8, device=device)
        target = torch.empty_like(source)
        side = SIDE[kind]
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        calls = {"copy": lambda: target.copy_(source), "product": lambda: torch.mm(a, b, out=out)}
        times = side_by_side(calls, device, least=5, seconds=0.2)
        return cls(
            2 * source.nbytes / times["copy"].median * 1e3,
            2 * side**3 / times["product"].median * 1e3,
        )

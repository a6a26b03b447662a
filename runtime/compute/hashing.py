"""`uniform(seed, ints...)`: a counter-based hash to [0, 1), the same on every back end.

The words (each int modulo 2**32, the seed first) are chained through the 32-bit finaliser of MurmurHash3
(Appleby, public domain):

    state = 0
    for word in words:
        state = mix((state ^ word) + 0x9E3779B9 mod 2**32)
    uniform = (state >> 8) / 2**24

    mix(h): h ^= h >> 16; h *= 0x85EBCA6B; h ^= h >> 13; h *= 0xC2B2AE35; h ^= h >> 16   (mod 2**32)

24 bits, so that the value is exact in float32 as well. Everything is written in int64 with masks: the low 32
bits of a wrapped 64-bit product are those of the true product.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
INCREMENT = 0x9E3779B9  # 2**32 / golden ratio: keeps an all-zero prefix from mixing to zero
BITS = 24


def mix(word: Tensor) -> Tensor:
    """MurmurHash3's 32-bit finaliser of an int64 tensor with values in [0, 2**32)."""
    word = word ^ (word >> 16)
    word = (word * 0x85EBCA6B) & MASK
    word = word ^ (word >> 13)
    word = (word * 0xC2B2AE35) & MASK
    return word ^ (word >> 16)


def hashed(words: Sequence[Tensor]) -> Tensor:
    """Hash of broadcastable int64 tensors, an int64 tensor with values in [0, 2**32)."""
    state = torch.zeros((), dtype=torch.int64, device=words[0].device)
    for word in words:
        state = mix(((state ^ (word & MASK)) + INCREMENT) & MASK)
    return state


def uniform(words: Sequence[Tensor]) -> Tensor:
    """A float64 in [0, 1), a multiple of 2**-24, per element of the broadcast int64 words (seed first)."""
    return torch.true_divide(hashed(words).bitwise_right_shift(32 - BITS).to(torch.float64), 2**BITS)

"""Which place of a cache holds which position: closed forms of the position and of the number of tokens.

Places are, in this order: the first positions, a ring of the last ones, and for each class of remainders one place a
member. A position has one place: the first positions' own, else that of the first class that has it, else the ring's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from attnc.compiler.ir import Node
from attnc.compiler.retention import Retention
from attnc.runtime.scalars import of_node


@dataclass(frozen=True)
class Class:
    """Positions with low <= position % period < high."""

    period: int
    low: int
    high: int

    @property
    def width(self) -> int:
        return self.high - self.low

    def has(self, position: Tensor) -> Tensor:
        remainder = position % self.period
        return (self.low <= remainder) & (remainder < self.high)

    def member(self, position: Tensor) -> Tensor:
        """The number of a position among those of the class."""
        return position // self.period * self.width + position % self.period - self.low

    def position(self, member: Tensor) -> Tensor:
        return member // self.width * self.period + member % self.width + self.low

    def below(self, length: int) -> int:
        """How many positions of the class are below a length."""
        return length // self.period * self.width + min(max(length % self.period - self.low, 0), self.width)


@dataclass(frozen=True)
class Slots:
    """The places of one cache: `everything` (a place is a position), or first, ring and classes, of `length` tokens."""

    length: int
    everything: bool
    first: int = 0
    window: int = 1
    classes: tuple[Class, ...] = ()

    @staticmethod
    def of(retention: Retention, parameters: Mapping[str, int | float | bool], length: int) -> Slots:
        """The places for at most `length` tokens: no more than one each."""
        if retention.everything:
            return Slots(length, everything=True)

        def number(node: Node | None) -> int:
            value = 0 if node is None else of_node(node, parameters, {})
            assert isinstance(value, int)
            return value

        classes = [Class(number(one.period), number(one.low), number(one.high)) for one in retention.every]
        kept = tuple(one for one in classes if one.width > 0)
        # A ring of one place at least: a position that nothing keeps goes there and is written over.
        found = Slots(length, False, max(number(retention.first), 0), max(number(retention.window), 1), kept)
        return found if found.count < length else Slots(length, everything=True)

    @property
    def constant(self) -> int:
        """Places that do not become more with the sequence."""
        return 0 if self.everything else self.first + self.window

    @property
    def count(self) -> int:
        """All places."""
        return self.used(self.length)

    def used(self, tokens: int) -> int:
        """Places, in order, that can hold one of so many tokens."""
        if self.everything:
            return tokens
        if len(self.classes) == 1:
            return self.constant + self.classes[0].below(tokens)
        return self.constant + sum(one.below(self.length) for one in self.classes)

    def place(self, position: Tensor) -> Tensor:
        """The place of a position."""
        if self.everything:
            return position
        found = self.first + position % self.window
        start = self.constant + sum(one.below(self.length) for one in self.classes)
        for one in reversed(self.classes):
            start -= one.below(self.length)
            found = torch.where(one.has(position), start + one.member(position), found)
        return torch.where(position < self.first, position, found)

    def positions(self, tokens: Tensor, used: int) -> Tensor:
        """The position that each of the first `used` places holds after so many tokens (b,): (b, places), -1: none."""
        tokens = tokens.unsqueeze(-1)
        device = tokens.device
        if self.everything:
            every = torch.arange(used, device=device)
            return torch.where(every < tokens, every, -1)
        ring = torch.arange(self.window, device=device)
        last = tokens - 1 - (tokens - 1 - ring) % self.window
        parts = [torch.arange(self.first, device=device).expand(tokens.shape[0], -1), last]
        parts += [
            one.position(torch.arange(one.below(self.length), device=device)).expand(tokens.shape[0], -1)
            for one in self.classes
        ]
        held = torch.cat(parts, 1)[:, :used]
        # A position lies in its own place only: the ring and later classes do not hold what others do.
        own = self.place(held) == torch.arange(held.shape[1], device=device)
        return torch.where((held >= 0) & (held < tokens) & own, held, -1)

"""Listed branches for the tests: a pattern restricted to the keys that an array lists, and the same densely."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attnc.compiler.ir import Node
from attnc.compiler.pipeline import lower
from attnc.compiler.plan import Branch, Domain, Plan, Rows, Selected
from attnc.dsl.check import check
from attnc.dsl.source import Source
from attnc.dsl.terms import Pattern
from attnc.dsl.types import Base, Type
from attnc.runtime.call import Call, make_call
from attnc.runtime.reference.meaning import reference


def sources(condition: str, score: str, inputs: str = "", near: str = "") -> tuple[Pattern, Pattern]:
    """(dense, listed): PICKED is an input over pairs in the first, and left out of the second.

    `near`: a condition in closed form that joins by `or`; the listed branch then leaves its pairs out.
    """
    head = f"pattern p(block: int = 4, lines: int = 1):\n{inputs}"
    both = (f"({near}) or ({condition})" if near else condition).replace("PICKED", "chosen > 0")
    dense = f"{head}    input chosen: int[b, h, i, j]\n    out = softmax[j]({score} where {both}) @ v\n"
    rest = condition.replace("PICKED", "true") + (f" and not ({near})" if near else "")
    branches = [f"softmax[j]({score} where {one}) @ v" for one in ([near, rest] if near else [rest])]
    out = f"merge({', '.join(branches)})" if near else branches[0]
    listed = f"{head}    input members: int[b, g, l, s]\n    out = {out}\n"
    first, second = (next(iter(check(Source("t.attn", text)).values())) for text in (dense, listed))
    return first, second


def listed_plan(pattern: Pattern, *, blocks: bool, lines: bool) -> Plan:
    """The plan whose last branch takes its keys from `members`: of blocks of keys, of blocks of rows."""
    plan = lower(pattern)
    graph = plan.graph
    assert graph is not None

    def parameter(name: str) -> Node:
        return graph.make("parameter", type=Type(Base.INT), attribute=name)

    selected = Selected("members", parameter("block") if blocks else None, parameter("lines") if lines else None)
    *others, last = plan.branches
    listed = Branch(last.score, last.condition, Domain((), Rows()), None, selected=selected)
    return replace(plan, branches=(*others, listed))


@dataclass(frozen=True)
class Case:
    """Sizes of a call and of its lists: `block` keys an entry, `lines` rows a line, lists for `selections` heads."""

    batch: int
    heads: int
    key_heads: int
    rows: int
    keys: int
    width: int
    value: int
    block: int
    lines: int
    entries: int
    selections: int

    @property
    def offset(self) -> int:
        return max(self.keys - self.rows, 0)

    def members(self, seed: int) -> Tensor:
        """Ascending lists of distinct entries, some of them short or empty."""
        generator = torch.Generator().manual_seed(seed)
        blocks = -(-self.keys // self.block)
        count = (self.offset + self.rows - 1) // self.lines - self.offset // self.lines + 1
        shape = (self.batch, self.selections, count)
        drawn = torch.rand(*shape, blocks, generator=generator).argsort(-1)[..., : self.entries]
        kept = torch.rand(drawn.shape, generator=generator) < 0.7
        kept &= torch.rand(*shape, 1, generator=generator) < 0.9
        members = torch.where(kept, drawn, blocks).sort(-1).values
        return torch.where(members == blocks, -1, members).to(torch.int32)

    def chosen(self, members: Tensor) -> Tensor:
        """The same over pairs: (B, H, N, M), int64."""
        row = (torch.arange(self.rows) + self.offset) // self.lines - self.offset // self.lines
        key = torch.arange(self.keys) // self.block
        found = (members[:, :, row, :, None] == key).any(3)
        return found.repeat_interleave(self.heads // self.selections, 1).long()

    def tensors(self) -> dict[str, Tensor]:
        """q, k and v, float64."""
        generator = torch.Generator().manual_seed(0)
        shapes = {
            "q": (self.batch, self.heads, self.rows, self.width),
            "k": (self.batch, self.key_heads, self.keys, self.width),
            "v": (self.batch, self.key_heads, self.keys, self.value),
        }
        return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


@dataclass(frozen=True)
class Made:
    """A case with its patterns and tensors (q, k, v and the real inputs)."""

    case: Case
    dense: Pattern
    plan: Plan
    members: Tensor
    tensors: dict[str, Tensor]

    def call(self, dtype: torch.dtype) -> Call:
        given = {name: tensor.to(dtype) for name, tensor in self.tensors.items()}
        q, k, v = (given.pop(name) for name in "qkv")
        settings = {"block": self.case.block, "lines": self.case.lines, "scale": self.case.width**-0.5}
        return make_call(self.plan, q, k, v, settings, {"members": self.members, **given})

    def expected(self, weight: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Result and gradients of its product with `weight`, by the reference."""
        given = {name: tensor.clone().requires_grad_() for name, tensor in self.tensors.items()}
        inputs = {name: tensor for name, tensor in given.items() if name not in ("q", "k", "v")}
        settings = {"block": self.case.block, "lines": self.case.lines}
        chosen = self.case.chosen(self.members)
        out = reference(self.dense, given["q"], given["k"], given["v"], settings, {"chosen": chosen, **inputs})
        found = torch.autograd.grad((out * weight).sum(), list(given.values()), allow_unused=True)
        zeros = (torch.zeros_like(tensor) for tensor in given.values())
        return out.detach(), {n: z if g is None else g for n, g, z in zip(given, found, zeros, strict=True)}

"""Listed branches for the tests: a pattern's condition restricted to what an array lists, and the same densely."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attnc.compiler.pipeline import lower
from attnc.compiler.plan import Branch, Domain, Plan, Rows, Selected
from attnc.dsl.check import check
from attnc.dsl.source import Source
from attnc.dsl.terms import Pattern
from attnc.runtime.call import Call, make_call
from attnc.runtime.reference import reference


def sources(condition: str, score: str, inputs: str = "", *, near: str | None = None) -> tuple[Pattern, Pattern]:
    """The pattern with its selection as a dense input `chosen`, and the listed one without it."""
    head = f"pattern p(block: int = 4, lines: int = 1):\n{inputs}"
    both = f"({near}) or ({condition})" if near else condition
    both = both.replace("PICKED", "chosen > 0")
    dense = f"{head}    input chosen: int[b, h, i, j]\n    out = softmax[j]({score} where {both}) @ v\n"
    rest = condition.replace("PICKED", "true") + (f" and not ({near})" if near else "")
    branches = [f"softmax[j]({score} where {one}) @ v" for one in ([near, rest] if near else [rest])]
    out = f"merge({', '.join(branches)})" if near else branches[0]
    listed = f"{head}    input members: int[b, g, l, s]\n    used = block + lines\n    out = {out}\n"
    return tuple(next(iter(check(Source("t.attn", text)).values())) for text in (dense, listed))  # type: ignore[return-value]


def listed_plan(pattern: Pattern, width: bool, rows: bool) -> Plan:
    """The plan whose last branch takes its keys from `members`."""
    plan = lower(pattern)
    assert plan.graph is not None
    from attnc.dsl.types import Base, Type

    def parameter(name: str):  # type: ignore[no-untyped-def]
        return plan.graph.make("parameter", type=Type(Base.INT), attribute=name)  # type: ignore[union-attr]

    selected = Selected("members", parameter("block") if width else None, parameter("lines") if rows else None)
    *others, last = plan.branches
    listed = Branch(last.score, last.condition, Domain((), Rows()), None, selected=selected)
    return replace(plan, branches=(*others, listed))


@dataclass(frozen=True)
class Case:
    """Sizes of a call and of its lists."""

    batch: int
    heads: int
    key_heads: int
    rows: int
    keys: int
    width: int
    value: int
    block: int  # keys of an entry
    lines: int  # rows of a line
    entries: int
    selections: int  # heads that the lists have

    def members(self, seed: int) -> Tensor:
        """Ascending lists of distinct entries, some of them short or empty."""
        generator = torch.Generator().manual_seed(seed)
        offset = max(self.keys - self.rows, 0)
        blocks = -(-self.keys // self.block)
        count = (offset + self.rows - 1) // self.lines - offset // self.lines + 1 if self.rows else 0
        shape = (self.batch, self.selections, count)
        drawn = torch.rand(*shape, blocks, generator=generator).argsort(-1)[..., : self.entries]
        kept = torch.rand(*shape, drawn.shape[-1], generator=generator) < 0.7
        kept &= torch.rand(*shape, 1, generator=generator) < 0.9
        members = torch.where(kept, drawn, blocks).sort(-1).values
        return torch.where(members == blocks, -1, members).to(torch.int32)

    def chosen(self, members: Tensor) -> Tensor:
        """The same as a mask (B, H, N, M)."""
        offset = max(self.keys - self.rows, 0)
        row = (torch.arange(self.rows) + offset) // self.lines - offset // self.lines
        key = torch.arange(self.keys) // self.block
        found = (members[:, :, row, :, None] == key).any(3)
        return found.repeat_interleave(self.heads // self.selections, 1).expand(self.batch, self.heads, -1, -1).long()

    def tensors(self, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        q = torch.randn(self.batch, self.heads, self.rows, self.width, generator=generator, dtype=torch.float64)
        k = torch.randn(self.batch, self.key_heads, self.keys, self.width, generator=generator, dtype=torch.float64)
        v = torch.randn(self.batch, self.key_heads, self.keys, self.value, generator=generator, dtype=torch.float64)
        return q.to(dtype), k.to(dtype), v.to(dtype)


def parameters(case: Case) -> dict[str, int | float | bool]:
    return {"block": case.block, "lines": case.lines, "scale": case.width**-0.5}


def listed_call(plan: Plan, case: Case, members: Tensor, qkv: tuple[Tensor, Tensor, Tensor], extra: dict[str, Tensor]) -> Call:
    return make_call(plan, *qkv, parameters(case), {"members": members, **extra})


def expected(
    dense: Pattern, case: Case, members: Tensor, qkv: tuple[Tensor, Tensor, Tensor], extra: dict[str, Tensor]
) -> Tensor:
    """The reference of the dense pattern."""
    settings = {"block": case.block, "lines": case.lines}
    chosen = case.chosen(members)
    return reference(dense, *qkv, settings, {"chosen": chosen, **extra})

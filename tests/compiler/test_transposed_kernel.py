"""The text that is generated for row tiles and key ranges, run by Triton's interpreter: each live pair counts once."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import attnc
from attnc.compiler.emit.arguments import Signature
from attnc.compiler.emit.expressions import PAIRS, TURNED, View
from attnc.compiler.emit.kernel import StreamedKernel
from attnc.compiler.emit.listed_ranges import table_line
from attnc.compiler.emit.ranges import emit_ranges
from attnc.compiler.emit.rows import emit_rows
from attnc.compiler.pipeline import transpose
from attnc.compiler.plan import Diagonals
from attnc.compiler.schedule import TileShape
from attnc.runtime.cuda.kernel_call import KernelCall, Kernels, interpreting
from attnc.runtime.derived import derive
from attnc.runtime.tools.inputs import Shape, made_inputs

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
QUERIES, KEYS = 41, 63
CASES: list[tuple[str, dict[str, Any]]] = [
    ("bigbird", {"block": 16, "randoms": 2}),
    ("demo_hybrid", {"sinks": 3, "window": 9, "stride": 5}),
    ("dilated_window", {"window": 3, "dilation": 4}),
    ("documents", {}),
    ("longnet", {"segments": (6, 24), "rates": (2, 3)}),
    ("neighborhood", {"height": 7, "width": 9, "kernel": 3, "dilation": 2}),
    ("sparse_fixed", {"block": 8, "summary": 3}),
    ("strided", {"local": 5, "stride": 3}),
    ("swin", {"height": 7, "width": 9, "window": 3, "shift": 1}),
    ("vertical_slash", {}),
]
TEXTS = {
    "lines": "i // 5 % 2 == 0 and j // 4 % 3 == 1 and i > j",
    "columns_by_class": "j % 12 % 5 == 2 and j % 12 >= 4 and i >= j - 6",
}


class Counter(StreamedKernel):
    """Adds 1 to a pair of (B, H, M, N) for each time that it counts as live."""

    signature = Signature((), ("counts",), (), ())
    streamed = "i"

    def keep(self, view: View, live: str) -> None:
        self.writer.let("live", f"({live}) & j_ok{view.j}")

    def body(self) -> None:
        writer = self.writer
        writer.let("head", "tl.program_id(1)")
        writer.let("b", "head // H")
        writer.let("h", "head % H")
        listed = self.domain.rows.listed
        line = table_line(self.expressions.arrays[listed.table]) if listed else None
        emit_rows(writer, self.domain.rows, self.row_steps(self.domain.rows), "j", line)
        writer.let("j_ok", "row_ok")
        writer.let("lanes_n", "tl.arange(0, BLOCK_N)")
        for number, key_set in enumerate(self.domain.key_sets):
            pairs = isinstance(key_set.walk, Diagonals)
            view = PAIRS if pairs else TURNED
            loop = emit_ranges(writer, self.expressions, key_set, number, self.domain.rows)
            with writer.block(f"for n in range({loop.first}, {loop.last}):"):
                loop.keys(writer)
                self.expressions.local = {}
                writer.let("live", f"i_ok{view.i} & j_ok{view.j}")
                self.masked(key_set, loop, view, partial(self.keep, view))
                place = f"(head * M + j{view.j}) * N + i{view.i} - OFFSET"
                writer.let("pair", f"counts + {place}")
                writer.line("tl.store(pair, tl.load(pair, mask=live, other=0) + 1, mask=live)")


@pytest.mark.parametrize(("name", "settings"), [*CASES, *((name, {}) for name in TEXTS)], ids=str)
def test_each_live_pair_counts_once(name: str, settings: dict[str, Any]) -> None:
    assert interpreting(), "TRITON_INTERPRET=1 is set where the tests begin"
    if name in TEXTS:
        text = f"pattern {name}:\n    out = softmax[j](q @ k * scale where {TEXTS[name]}) @ v\n"
        pattern = getattr(attnc.compile(text), name)
    else:
        pattern = getattr(attnc.load(EXAMPLES / f"{name}.attn"), name)
    made = made_inputs(pattern.pattern, Shape(1, 2, 1, QUERIES, KEYS, 16, KEYS), settings)
    eye = torch.eye(KEYS).expand(1, 1, KEYS, KEYS)
    zero = torch.zeros_like(made.q)
    prepared = pattern.prepared(zero, made.k, eye, {**settings, **made.inputs})
    found, call = prepared.program, prepared.call(prepared.program.plan)
    plan = transpose(found.plan)
    derived = dict(call.derived)
    for table in plan.transposed_derived:
        derived |= derive(plan, table, call)
    call = replace(call, derived=derived)
    counts = torch.zeros(1, 2, KEYS, QUERIES, dtype=torch.int32)
    for branch in plan.branches:
        for domain in branch.transposed:
            kernel = Counter(plan, branch, domain, "count").kernel()
            run = KernelCall(call, {"v": eye, "counts": counts}, TileShape(16, 16, 1, 1))
            run.sizes["MEMBER"] = 0
            run.run(Kernels(plan, [kernel]), kernel, (run.tiles(domain, KEYS, 0), 2))
    weights = pattern.reference(zero, made.k, eye, **settings, **made.inputs)
    if len(plan.branches) == 1:
        np.testing.assert_array_equal(counts.numpy(), (weights > 0).mT.int().numpy())
    else:  # a key of two merged branches counts twice
        np.testing.assert_array_equal(counts.numpy() > 0, (weights > 0).mT.numpy())
        assert counts.sum() > (counts > 0).sum()

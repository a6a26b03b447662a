"""The generated Python module of a plan: its `.attn` text as comments, small shared functions, its kernels."""

from __future__ import annotations

import ast
from collections.abc import Sequence

from attnc.compiler.emit.arithmetic import FLOORS, TANH
from attnc.compiler.emit.kernel import Kernel
from attnc.compiler.emit.listed_joins import LISTED_JOINS
from attnc.compiler.emit.writer import Writer
from attnc.compiler.plan import Plan

LOAD_TILE = """

@triton.jit
def _load_tile(pointers, row_ok, column_ok, GUARD_ROWS: tl.constexpr, GUARD_COLUMNS: tl.constexpr):
    if GUARD_ROWS:
        if GUARD_COLUMNS:
            return tl.load(pointers, mask=row_ok[:, None] & column_ok[None, :], other=0.0)
        else:
            return tl.load(pointers, mask=row_ok[:, None], other=0.0)
    else:
        if GUARD_COLUMNS:
            return tl.load(pointers, mask=column_ok[None, :], other=0.0)
        else:
            return tl.load(pointers)
"""

EXACT_PRODUCT = """

@triton.jit
def _exact_product(x, y, total, PIECES: tl.constexpr, PRECISION: tl.constexpr):
    # x @ y of operands of any type; PIECES: a float32 number is the sum of two in bfloat16, but for 2**-16 of it
    if not PIECES:
        return tl.dot(x.to(tl.float32), y.to(tl.float32), total, input_precision=PRECISION)
    head_x = x.to(tl.bfloat16)
    head_y = y.to(tl.bfloat16)
    if x.dtype != tl.bfloat16:
        rest_x = (x.to(tl.float32) - head_x.to(tl.float32)).to(tl.bfloat16)
        total = tl.dot(rest_x, head_y, total, input_precision=PRECISION)
    if y.dtype != tl.bfloat16:
        rest_y = (y.to(tl.float32) - head_y.to(tl.float32)).to(tl.bfloat16)
        total = tl.dot(head_x, rest_y, total, input_precision=PRECISION)
    return tl.dot(head_x, head_y, total, input_precision=PRECISION)
"""

PRELUDE = (
    """
import triton
import triton.language as tl

FLOOR = tl.constexpr(-1.0e38)
FAR = tl.constexpr(2147483647)
LOG2E = tl.constexpr(1.4426950408889634)
ALIGNED = tl.constexpr(4)  # float32 numbers between the places that a copy may begin at


"""
    + FLOORS
    + """

@triton.jit
def _int32(x):
    # A scalar, of a number too, in the type of positions: what is read from an input may be wider
    return (tl.zeros([], tl.int32) + x).to(tl.int32)


"""
    + TANH
    + """

@triton.jit
def _pow(x, y):
    return tl.exp2(tl.log2(x) * y)


""".rstrip()
    + LOAD_TILE
    + EXACT_PRODUCT
    + '''

@triton.jit
def combine_parts(part_out, part_lse, tiles, rows, o, lse, o_sb, o_sh, o_sn, o_se, H, N, E,
                  BLOCK_M: tl.constexpr, ROWS: tl.constexpr, BLOCK_E: tl.constexpr):
    """Join the parts of a row tile by their log-sum-exps. tiles: (first slot, parts) a tile; rows: its rows."""
    tile = tl.program_id(0)
    head = tl.program_id(1)
    heads = tl.num_programs(1)
    first = tl.load(tiles + tile * 2)
    parts = tl.load(tiles + tile * 2 + 1)
    lane = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    e = tl.arange(0, BLOCK_E)
    row = tl.load(rows + tile * BLOCK_M + lane)
    row_ok = row >= 0
    peak = tl.full([ROWS], FLOOR, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_E], tl.float32)
    for part in range(0, parts):
        at = ((first + part).to(tl.int64) * heads + head) * BLOCK_M + lane
        statistic = tl.load(part_lse + at) * LOG2E
        higher = tl.maximum(peak, statistic)
        fade = tl.exp2(peak - higher)
        weight = tl.exp2(statistic - higher)
        total = total * fade + weight
        acc = acc * fade[:, None] + weight[:, None] * tl.load(part_out + at[:, None] * BLOCK_E + e[None, :])
        peak = higher
    seen = total > 0.0
    whole = tl.where(seen, total, 1.0)
    out = o + (head // H).to(tl.int64) * o_sb + (head % H).to(tl.int64) * o_sh
    out = out + row.to(tl.int64)[:, None] * o_sn + e[None, :] * o_se
    tl.store(out, (acc / whole[:, None]).to(o.dtype.element_ty), mask=row_ok[:, None] & (e < E)[None, :])
    statistic = tl.where(seen, (peak + tl.log2(whole)) / LOG2E, float("-inf"))
    tl.store(lse + head.to(tl.int64) * N + row, statistic, mask=row_ok)


@triton.jit(do_not_specialize=["H"])
def add_parts(sums, tiles, rows, out, out_sb, out_sh, out_sn, out_sd, H, D,
              BLOCK_M: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, ADDING: tl.constexpr):
    """Add the parts of a row tile in their order. tiles: (first slot, parts) a tile; rows: its rows."""
    tile = tl.program_id(0)
    head = tl.program_id(1)
    heads = tl.num_programs(1)
    first = tl.load(tiles + tile * 2)
    parts = tl.load(tiles + tile * 2 + 1)
    lane = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_D)
    row = tl.load(rows + tile * BLOCK_M + lane)
    inside = (row >= 0)[:, None] & (d < D)[None, :]
    total = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for part in range(0, parts):
        at = ((first + part).to(tl.int64) * heads + head) * BLOCK_M + lane
        total += tl.load(sums + at[:, None] * BLOCK_D + d[None, :])
    place = out + (head // H).to(tl.int64) * out_sb + (head % H).to(tl.int64) * out_sh
    place = place + row.to(tl.int64)[:, None] * out_sn + d[None, :] * out_sd
    if ADDING:
        total += tl.load(place, mask=inside, other=0.0)
    tl.store(place, total.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["H", "N"])
def row_products(x, y, out, x_sb, x_sh, x_sn, x_se, y_sb, y_sh, y_sn, y_se, H, N, E,
                 BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr):
    """out[b, h, n] = sum over e of x[b, h, n, e] * y[b, h, n, e], in float32."""
    head = tl.program_id(1)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    e = tl.arange(0, BLOCK_E)
    inside = (row < N)[:, None] & (e < E)[None, :]
    b = (head // H).to(tl.int64)
    h = (head % H).to(tl.int64)
    rows = row.to(tl.int64)[:, None]
    left = tl.load(x + b * x_sb + h * x_sh + rows * x_sn + e[None, :] * x_se, mask=inside, other=0.0)
    right = tl.load(y + b * y_sb + h * y_sh + rows * y_sn + e[None, :] * y_se, mask=inside, other=0.0)
    tl.store(out + head.to(tl.int64) * N + row, tl.sum(left.to(tl.float32) * right.to(tl.float32), 1), mask=row < N)
'''
)


def emit_module(plan: Plan, kernels: Sequence[Kernel]) -> str:
    """The module's text. It parses; user text stands in comments only."""
    writer = Writer()
    for line in plan.source.text.splitlines():
        writer.comment("".join(character if character.isprintable() else "?" for character in line))
    writer.line(PRELUDE.rstrip("\n"))
    if any(branch.selected is not None for branch in plan.branches):
        writer.line(LISTED_JOINS.rstrip("\n"))
    for kernel in kernels:
        writer.line()
        writer.line()
        writer.line(kernel.text.rstrip("\n"))
    text = writer.text()
    ast.parse(text)
    return text

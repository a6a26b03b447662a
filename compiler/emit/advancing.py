"""The recurrent form of a state for one new token: one kernel reads a state, changes it in place and reads the result.

    S = exp(g) S + x (y^T S) + k v^T,   out = q^T S

g none, one a head or one a feature; x and y where a token changes the state by a rank of one; with a total, a last
column of S sums what values of 1 would. A program has a block of columns of one head: no sum is shared.
"""

from __future__ import annotations

import ast

VECTORS = ("query", "key", "value", "decay", "left", "right")  # (b, h, width) each, of any strides; b or h may repeat

ADVANCING = """
import triton
import triton.language as tl


@triton.jit
def _step(tile, factor, key, value, left, read, DECAY: tl.constexpr, CHANGES: tl.constexpr):
    if DECAY > 0:
        tile = tile * factor[:, None]
    if CHANGES:
        tile = tile + left[:, None] * read[None, :]
    return tile + key[:, None] * value[None, :]


@triton.jit
def _features(pointer, start, stride, F, BLOCK_F: tl.constexpr):
    f = start + tl.arange(0, BLOCK_F)
    return tl.load(pointer + f * stride, mask=f < F, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["H", "F", "E", {groups}])
def advance({pointers}, state, out, sums, {strides}, {groups_plain}, H, F, E,
            DECAY: tl.constexpr, CHANGES: tl.constexpr, TOTAL: tl.constexpr, WHOLE: tl.constexpr,
            BLOCK_F: tl.constexpr, BLOCK_E: tl.constexpr):
    line = tl.program_id(1)
    b = (line // H).to(tl.int64)
    h = line % H
    columns = E + TOTAL
    e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    f = tl.arange(0, BLOCK_F)
    place = state + line.to(tl.int64) * F * columns + f[:, None] * columns + e[None, :]
{heads}
    token = tl.load(value_at + e * value_sw, mask=e < E, other=1.0).to(tl.float32)
    factor = tl.zeros([BLOCK_F], tl.float32)
    left_f = factor
    read = tl.zeros([BLOCK_E], tl.float32)
    result = read
    if DECAY == 1:
        factor += tl.exp(tl.load(decay_at).to(tl.float32))
    if CHANGES and not WHOLE:
        for start in range(0, F, BLOCK_F):
            inside = (start + f < F)[:, None] & (e < columns)[None, :]
            tile = tl.load(place + start * columns, mask=inside, other=0.0)
            read += tl.sum(tile * _features(right_at, start, right_sw, F, BLOCK_F)[:, None], 0)
    for start in range(0, BLOCK_F if WHOLE else F, BLOCK_F):
        inside = (start + f < F)[:, None] & (e < columns)[None, :]
        tile = tl.load(place + start * columns, mask=inside, other=0.0)
        if DECAY == 2:
            factor = tl.exp(_features(decay_at, start, decay_sw, F, BLOCK_F))
        if CHANGES:
            left_f = _features(left_at, start, left_sw, F, BLOCK_F)
            if WHOLE:
                read = tl.sum(tile * _features(right_at, start, right_sw, F, BLOCK_F)[:, None], 0)
        tile = _step(tile, factor, _features(key_at, start, key_sw, F, BLOCK_F), token, left_f, read, DECAY, CHANGES)
        tl.store(place + start * columns, tile, mask=inside)
        result += tl.sum(tile * _features(query_at, start, query_sw, F, BLOCK_F)[:, None], 0)
    tl.store(out + line.to(tl.int64) * E + e, result, mask=e < E)
    if TOTAL:
        tl.store(sums + line + e * 0, result, mask=e == E)
"""


def advancing_module() -> str:
    """The module's text: `advance`. state (b, h, F, E or E + 1), out (b, h, E) and sums (b, h) lie in order."""
    heads = [
        f"    {name}_at = {name} + b * {name}_sb + (h // {name}_group).to(tl.int64) * {name}_sh" for name in VECTORS
    ]
    text = ADVANCING.format(
        pointers=", ".join(VECTORS),
        strides=", ".join(f"{name}_s{axis}" for name in VECTORS for axis in "bhw"),
        groups=", ".join(f'"{name}_group"' for name in VECTORS),
        groups_plain=", ".join(f"{name}_group" for name in VECTORS),
        heads="\n".join(heads),
    )
    ast.parse(text)
    return text

"""Kernels that decide which rows of a call go together: the choice among few members, and who takes part first.

They hold no text of a pattern, so that one module serves all.
"""

ORDERING = '''"""Choices among few members, and positions in the order in which they take part."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["ROWS", "MIDDLE", "INNER", "MEMBERS"])
def choose_few(scores, allowed, forced, count, chosen, x_s0, x_s1, x_s2, x_s3, a_s0, a_s1, a_s2, a_s3,
               f_s0, f_s1, f_s2, f_s3, c_s0, c_s1, c_s2, ROWS, MIDDLE, INNER, MEMBERS,
               FORCED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr):
    """Of each row (.., MIDDLE, INNER) the `count` best candidates among its members, forced ones first.

    A member is taken if fewer than `count` come before it: better ones, and equal ones of a lower number.
    """
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    member = tl.arange(0, BLOCK_S)
    row_ok = row < ROWS
    inside = row_ok[:, None] & (member < MEMBERS)[None, :]
    r0 = (row // (MIDDLE * INNER)).to(tl.int64)
    r1 = (row // INNER % MIDDLE).to(tl.int64)
    r2 = (row % INNER).to(tl.int64)
    at = (r0 * x_s0 + r1 * x_s1 + r2 * x_s2)[:, None] + member[None, :] * x_s3
    x = tl.load(scores + at, mask=inside, other=0.0).to(tl.float32)
    x = tl.where(x != x, float("-inf"), x)
    at = (r0 * a_s0 + r1 * a_s1 + r2 * a_s2)[:, None] + member[None, :] * a_s3
    kind = (tl.load(allowed + at, mask=inside, other=0) != 0).to(tl.int32)  # 0: no candidate, 2: forced
    if FORCED:
        at = (r0 * f_s0 + r1 * f_s1 + r2 * f_s2)[:, None] + member[None, :] * f_s3
        kind = kind * (1 + (tl.load(forced + at, mask=inside, other=0) != 0).to(tl.int32))
    other, own = x[:, None, :], x[:, :, None]
    other_kind, own_kind = kind[:, None, :], kind[:, :, None]
    earlier = member[None, None, :] < member[None, :, None]
    better = (other > own) | ((other == own) & earlier)
    before = tl.sum(((other_kind > own_kind) | ((other_kind == own_kind) & better)).to(tl.int32), 2)
    most = tl.load(count + r0 * c_s0 + r1 * c_s1 + r2 * c_s2, mask=row_ok, other=0)
    taken = (kind > 0) & (before < most[:, None])
    tl.store(chosen + row.to(tl.int64)[:, None] * MEMBERS + member[None, :], taken, mask=inside)


@triton.jit(do_not_specialize=["ROWS", "MIDDLE", "INNER", "MEMBERS"])
def weigh_few(scores, allowed, weights, x_s0, x_s1, x_s2, x_s3, a_s0, a_s1, a_s2, a_s3, ROWS, MIDDLE, INNER, MEMBERS,
              BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr):
    """The softmax of each row's candidates; 0 for others, and for all where none has more than -inf."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    member = tl.arange(0, BLOCK_S)
    inside = (row < ROWS)[:, None] & (member < MEMBERS)[None, :]
    r0 = (row // (MIDDLE * INNER)).to(tl.int64)
    r1 = (row // INNER % MIDDLE).to(tl.int64)
    r2 = (row % INNER).to(tl.int64)
    at = (r0 * a_s0 + r1 * a_s1 + r2 * a_s2)[:, None] + member[None, :] * a_s3
    live = tl.load(allowed + at, mask=inside, other=0) != 0
    at = (r0 * x_s0 + r1 * x_s1 + r2 * x_s2)[:, None] + member[None, :] * x_s3
    x = tl.where(live, tl.load(scores + at, mask=inside, other=0.0).to(tl.float32), float("-inf"))
    top = tl.max(x, 1)
    shifted = tl.exp(x - tl.where(top == float("-inf"), 0.0, top)[:, None])
    total = tl.sum(shifted, 1)
    weight = shifted / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(weights + row.to(tl.int64)[:, None] * MEMBERS + member[None, :], weight, mask=inside)


@triton.jit(do_not_specialize=["ROWS", "MIDDLE", "INNER", "MEMBERS"])
def weigh_few_back(weights, cotangent, gradient, c_s0, c_s1, c_s2, c_s3, ROWS, MIDDLE, INNER, MEMBERS,
                   BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr):
    """d x = w * (g - sum of w g)"""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    member = tl.arange(0, BLOCK_S)
    inside = (row < ROWS)[:, None] & (member < MEMBERS)[None, :]
    r0 = (row // (MIDDLE * INNER)).to(tl.int64)
    r1 = (row // INNER % MIDDLE).to(tl.int64)
    r2 = (row % INNER).to(tl.int64)
    at = (r0 * c_s0 + r1 * c_s1 + r2 * c_s2)[:, None] + member[None, :] * c_s3
    g = tl.load(cotangent + at, mask=inside, other=0.0).to(tl.float32)
    place = row.to(tl.int64)[:, None] * MEMBERS + member[None, :]
    weight = tl.load(weights + place, mask=inside, other=0.0)
    part = tl.where(weight != 0.0, weight * g, 0.0)  # nothing comes from what has no weight
    tl.store(gradient + place, part - tl.where(weight != 0.0, weight, 0.0) * tl.sum(part, 1)[:, None], mask=inside)


@triton.jit(do_not_specialize=["H", "L", "CHUNKS"])
def count_live(live, counts, s0, s1, s2, H, L, CHUNKS, BLOCK: tl.constexpr):
    """How many positions of each chunk of a line (b, h) take part: counts (b, h, CHUNKS)."""
    line, chunk = tl.program_id(1), tl.program_id(0)
    at = chunk * BLOCK + tl.arange(0, BLOCK)
    pointers = live + (line // H).to(tl.int64) * s0 + (line % H).to(tl.int64) * s1 + at.to(tl.int64) * s2
    there = (tl.load(pointers, mask=at < L, other=0) != 0).to(tl.int32)
    tl.store(counts + line.to(tl.int64) * CHUNKS + chunk, tl.sum(there, 0))


@triton.jit(do_not_specialize=["H", "L", "CHUNKS"])
def place_live(live, counts, places, count, s0, s1, s2, H, L, CHUNKS, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr):
    """The positions of each line, those that take part first and each kind in its order: places (b, h, L)."""
    line, chunk = tl.program_id(1), tl.program_id(0)
    before, total = 0, 0
    for first in range(0, CHUNKS, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        many = tl.load(counts + line.to(tl.int64) * CHUNKS + c, mask=c < CHUNKS, other=0)
        before += tl.sum(tl.where(c < chunk, many, 0), 0)
        total += tl.sum(many, 0)
    at = chunk * BLOCK + tl.arange(0, BLOCK)
    pointers = live + (line // H).to(tl.int64) * s0 + (line % H).to(tl.int64) * s1 + at.to(tl.int64) * s2
    there = (tl.load(pointers, mask=at < L, other=0) != 0).to(tl.int32)
    rank = before + tl.cumsum(there, 0) - there
    slot = tl.where(there > 0, rank, total + at - rank)
    tl.store(places + line.to(tl.int64) * L + slot, at, mask=at < L)
    if chunk == 0:
        tl.store(count + line, total)


@triton.jit(do_not_specialize=["H", "L", "D", "E", "p_s0", "p_s1", "p_s2", "n_s0", "n_s1"])
def order_rows(places, count, q, do, lse, delta, q_out, do_out, lse_out, delta_out, p_s0, p_s1, p_s2, n_s0, n_s1,
               q_sb, q_sh, q_sn, q_sd, do_sb, do_sh, do_sn, do_se, H, L, D, E,
               BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr):
    """The rows that take part, in their order: q (b, h, L, D), do (.., E) and their statistics (b, h, L).

    Tiles behind the last of them are left as they are; the rest of its own weighs nothing.
    """
    line, first = tl.program_id(1), tl.program_id(0) * BLOCK
    b, h = (line // H).to(tl.int64), (line % H).to(tl.int64)
    taken = tl.load(count + b * n_s0 + h * n_s1)
    if first >= taken:
        return
    slot = first + tl.arange(0, BLOCK)
    there = slot < tl.minimum(taken, L)
    place = tl.load(places + b * p_s0 + h * p_s1 + slot * p_s2, mask=there, other=0).to(tl.int64)
    own = line.to(tl.int64) * L
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    for_d, for_e = (d < D)[None, :], (e < E)[None, :]
    inside = (slot < L)[:, None]
    at = q + b * q_sb + h * q_sh + place[:, None] * q_sn + d[None, :] * q_sd
    row = tl.load(at, mask=there[:, None] & for_d, other=0.0)
    tl.store(q_out + (own + slot)[:, None] * D + d[None, :], row, mask=inside & for_d)
    at = do + b * do_sb + h * do_sh + place[:, None] * do_sn + e[None, :] * do_se
    row = tl.load(at, mask=there[:, None] & for_e, other=0.0)
    tl.store(do_out + (own + slot)[:, None] * E + e[None, :], row, mask=inside & for_e)
    tl.store(lse_out + own + slot, tl.load(lse + own + place, mask=there, other=float("inf")), mask=slot < L)
    tl.store(delta_out + own + slot, tl.load(delta + own + place, mask=there, other=0.0), mask=slot < L)
'''

"""Functions of selection kernels that are the same for every pattern: order, the best of a line, what is held.

A score's rank is its bits as an int that orders like it (see `runtime.steps.choices.ranking`); NOTHING is no candidate.
The best are found by the rank of the last of them, bit by bit, so that no line is sorted and what is taken stays in
the order of members: ties go to the lowest.
"""

SELECTING = '''
NOTHING = tl.constexpr(-2147483648)
ALL = tl.constexpr(2147483647)
NONE_HELD = tl.constexpr(-9223372036854775808)  # of rank NOTHING


@triton.jit
def _ranking(score, live):
    number = tl.where(score == score, score, float("-inf"))
    bits = tl.where(number == 0.0, 0.0, number).to(tl.int32, bitcast=True)
    return tl.where(live, tl.where(bits < 0, bits ^ ALL, bits), NOTHING)


@triton.jit
def _last_rank(ranks, room, slack, ROUGHLY: tl.constexpr, FEW: tl.constexpr):
    """The rank of the `room`-th of each line, NOTHING where a line has fewer; and how many reach it (ALL: not counted).

    ROUGHLY: or any rank that `room` to `room + slack` reach.
    """
    known = tl.full([ranks.shape[0]], ALL, tl.int32)
    if FEW > 0:  # one after the other
        last = tl.full([ranks.shape[0]], ALL, tl.int32)
        count = tl.zeros([ranks.shape[0]], tl.int32)
        for _ in range(0, FEW):
            best = tl.max(tl.where(ranks < last[:, None], ranks, NOTHING), 1)
            more = count < room
            last = tl.where(more, best, last)
            count += tl.where(more, tl.sum((ranks == best[:, None]).to(tl.int32), 1), 0)
    else:  # by bits: the largest rank that `room` reach
        count = tl.sum((ranks >= 0).to(tl.int32), 1)
        last = tl.where(count >= room, 0, NOTHING)
        step = tl.full([], 1073741824, tl.int32)
        if ROUGHLY:
            known = tl.where(count >= room, count, tl.sum((ranks > NOTHING).to(tl.int32), 1))
            while step * tl.max((known > room + slack).to(tl.int32), 0) > 0:
                reached = last + step
                count = tl.sum((ranks >= reached[:, None]).to(tl.int32), 1)
                last = tl.where(count >= room, reached, last)
                known = tl.where(count >= room, count, known)
                step = step // 2
        else:
            for _ in range(0, 31):
                reached = last + step
                last = tl.where(tl.sum((ranks >= reached[:, None]).to(tl.int32), 1) >= room, reached, last)
                step = step // 2
    return last, known


@triton.jit
def _taken(ranks, must, wanted, slack, ROUGHLY: tl.constexpr, FORCED: tl.constexpr, FEW: tl.constexpr):
    """Which `wanted` of a line are taken, `must` first; and the rank that a later one has to exceed.

    ROUGHLY: up to `slack` more, the `wanted` among them.
    """
    live = ranks > NOTHING
    if FORCED:
        must = must & live
        forced = tl.sum(must.to(tl.int32), 1)
        many = forced > wanted  # then only these compete
        pool = tl.where(live & (must == many[:, None]), ranks, NOTHING)
        room = tl.where(many, wanted, wanted - forced)
    else:
        pool = ranks
        room = tl.zeros([ranks.shape[0]], tl.int32) + wanted
    last, known = _last_rank(pool, room, slack, ROUGHLY, FEW)
    above = pool > last[:, None]
    tied = ((pool == last[:, None]) & (pool > NOTHING)).to(tl.int32)
    left = tl.where(known <= room + slack, known, room) - tl.sum(above.to(tl.int32), 1)
    if tl.max(tl.sum(tied, 1) - left, 0) > 0:  # the lowest members of those that tie
        tied = tl.where(tl.cumsum(tied, 1) <= left[:, None], tied, 0)
    taken = above | (tied > 0)
    if FORCED:
        taken = taken | (must & (many[:, None] == 0))
        last = tl.where(many, ALL, last)
    return taken, last


@triton.jit
def _write(lines, line_ok, members, ranks, must, wanted, WIDTH, PADDED: tl.constexpr, FORCED: tl.constexpr,
           FEW: tl.constexpr):
    """The lists of lines whose members are all here."""
    taken, _ = _taken(ranks, must, wanted, 0, False, FORCED, FEW)
    ones = taken.to(tl.int32)
    place = tl.cumsum(ones, 1) - 1
    value = tl.zeros(ranks.shape, tl.int32) + members[None, :]
    tl.store(lines[:, None] + place, value, mask=taken & line_ok[:, None])
    entry = tl.arange(0, PADDED)[None, :]
    empty = (entry >= tl.sum(ones, 1)[:, None]) & (entry < WIDTH) & line_ok[:, None]
    tl.store(lines[:, None] + entry, tl.full(empty.shape, -1, tl.int32), mask=empty)


@triton.jit
def _write_few(lines, line_ok, members, ranks, WIDTH, PADDED: tl.constexpr, FEW: tl.constexpr):
    """The same for few entries that none is forced to: the best and lowest of what is left, then all in order."""
    entry = tl.arange(0, PADDED)[None, :]
    found = tl.full([ranks.shape[0], PADDED], ALL, tl.int32)
    for turn in range(0, FEW):
        best = tl.max(ranks, 1)
        who = tl.min(tl.where(ranks == best[:, None], members[None, :], ALL), 1)
        found = tl.where((entry == turn) & (best > NOTHING)[:, None], who[:, None], found)
        ranks = tl.where(members[None, :] == who[:, None], NOTHING, ranks)
    found = tl.sort(found, 1)
    tl.store(lines[:, None] + entry, tl.where(found == ALL, -1, found), mask=(entry < WIDTH) & line_ok[:, None])


@triton.jit
def _append(held, entries, members, ranks, must, last, used):
    """Holds what may still be taken, after what a line holds, as rank, member and whether it must be, in 64 bits; how
    many it holds then."""
    passes = (ranks > last[:, None]) | (must & (ranks > NOTHING))
    ones = passes.to(tl.int32)
    place = entries[:, None] + used[:, None] + tl.cumsum(ones, 1) - 1
    low = (members[None, :] * 2 + must.to(tl.int32)).to(tl.int64)
    tl.store(held + place, (ranks.to(tl.int64) << 32) | low, mask=passes)
    return used + tl.sum(ones, 1)


@triton.jit
def _compact(held, held_used, held_last, first_line, used, wanted, slack, BLOCK_M: tl.constexpr,
             CAPACITY: tl.constexpr, AT_ONCE: tl.constexpr, FORCED: tl.constexpr, FEW: tl.constexpr):
    """Keeps the best of what each line holds and up to `slack` more, in order, some lines at once: (how many, the rank
    to exceed)."""
    lane = first_line + tl.arange(0, BLOCK_M)
    tl.store(held_used + lane, used)
    tl.debug_barrier()
    for first in range(0, BLOCK_M, AT_ONCE):
        line = first_line + first + tl.arange(0, AT_ONCE)
        entry = tl.arange(0, CAPACITY)[None, :]
        inside = entry < tl.load(held_used + line)[:, None]
        both = tl.load(held + line[:, None] * CAPACITY + entry, mask=inside, other=NONE_HELD)
        taken, last = _taken((both >> 32).to(tl.int32), (both & 1) == 1, wanted, slack, True, FORCED, FEW)
        ones = taken.to(tl.int32)
        place = line[:, None] * CAPACITY + tl.cumsum(ones, 1) - 1
        tl.debug_barrier()
        tl.store(held + place, both, mask=taken)
        tl.store(held_used + line, tl.sum(ones, 1))
        tl.store(held_last + line, last)
    tl.debug_barrier()
    return tl.load(held_used + lane), tl.load(held_last + lane)


@triton.jit
def _unload(lines, line_ok, held, entries, used, WIDTH, ENTRIES: tl.constexpr):
    """Writes what the lines hold as their lists."""
    for begin in range(0, WIDTH, ENTRIES):
        entry = begin + tl.arange(0, ENTRIES)[None, :]
        both = tl.load(held + entries[:, None] + entry, mask=entry < used[:, None], other=-2)
        tl.store(lines[:, None] + entry, both.to(tl.int32) >> 1, mask=(entry < WIDTH) & line_ok[:, None])
'''.strip("\n")

"""Kernels around the listed ones, part of a module that has any of those: one that unites lists, and joins of slots.

`members` (lanes, LISTS * LINES, ENTRIES) says which entries have a part: those that name nothing wrote none, and are
not read. Parts are added in the order of the entries, or of the pieces.
"""

LISTED_JOINS = '''

@triton.jit
def _wide(x, NARROW: tl.constexpr):
    if NARROW:
        return x
    else:
        return x.to(tl.int64)


@triton.jit(do_not_specialize=["LINES", "ENTRIES"])
def unite_lines(members, united, named_by, counts, LINES, ENTRIES, TOGETHER: tl.constexpr, ENTRY: tl.constexpr,
                LINE: tl.constexpr):
    """The members that TOGETHER lines name, each once, in the order of the lines; which name it, by bits; how many.

    `members` (lists, LINES, ENTRIES); a group of lines is of one list. LINE and ENTRY: powers of two that hold them.
    """
    group = tl.program_id(0)
    groups = (LINES + TOGETHER - 1) // TOGETHER
    first_line = group % groups * TOGETHER
    lists = members + ((group // groups).to(tl.int64) * LINES + first_line) * ENTRIES
    lines = tl.minimum(TOGETHER, LINES - first_line)
    place = tl.arange(0, LINE * ENTRY)
    along = place // ENTRY
    ok = (along < lines) & (place % ENTRY < ENTRIES)
    named = tl.load(lists + along * ENTRIES + place % ENTRY, mask=ok, other=-1)
    bits = tl.zeros([LINE * ENTRY], tl.int32)
    entry = tl.arange(0, ENTRY)
    for line in range(0, lines):
        theirs = tl.load(lists + line * ENTRIES + entry, mask=entry < ENTRIES, other=-1)
        bits |= tl.max((named[:, None] == theirs[None, :]).to(tl.int32), 1) << line
    first = (named >= 0) & ((bits & ((1 << along) - 1)) == 0)
    entry = group.to(tl.int64) * (TOGETHER * ENTRIES) + tl.cumsum(first.to(tl.int32), 0) - 1
    tl.store(united + entry, named, mask=first)
    tl.store(named_by + entry, bits, mask=first)
    tl.store(counts + group, tl.sum(first.to(tl.int32), 0))


@triton.jit
def _listed_rows(unit, UNITS, LINES, FIRST_LINE, SKIPPED, LANE_HEADS, PER_LANE, N,
                 LISTS: tl.constexpr, SHARED: tl.constexpr, ROW_BLOCK: tl.constexpr):
    # Units (lanes, LISTS, LINES, SHARED, ROW_BLOCK): batch row, query head, row, whether it is there, list line
    list_line = unit // (SHARED * ROW_BLOCK)
    line = list_line % LINES
    lane = list_line // (LISTS * LINES)
    member = (list_line // LINES) % LISTS * SHARED + unit % (SHARED * ROW_BLOCK) // ROW_BLOCK
    row = (FIRST_LINE + line) * ROW_BLOCK + unit % ROW_BLOCK - SKIPPED
    ok = (unit < UNITS) & (row >= 0) & (row < N)
    return lane // LANE_HEADS, lane % LANE_HEADS * PER_LANE + member, row, ok, list_line.to(tl.int64)


@triton.jit(do_not_specialize=[
    "UNITS", "ENTRIES", "LINES", "FIRST_LINE", "SKIPPED", "LANE_HEADS", "PER_LANE", "H", "N"])
def join_entries(part_out, part_lse, other, other_lse, members, o, lse, o_sb, o_sh, o_sn, o_se, UNITS, ENTRIES, LINES,
                 FIRST_LINE, SKIPPED, LANE_HEADS, PER_LANE, H, N, E, LISTS: tl.constexpr, SHARED: tl.constexpr,
                 ROW_BLOCK: tl.constexpr, OTHER: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr):
    """The softmax of each row from the parts of its entries, by their log-sum-exps.

    With OTHER, keys of another branch have a part, too: (B, H, N, E) and (B, H, N), contiguous.
    """
    unit = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    e = tl.arange(0, BLOCK_E)
    b, h, row, ok, list_line = _listed_rows(
        unit, UNITS, LINES, FIRST_LINE, SKIPPED, LANE_HEADS, PER_LANE, N, LISTS, SHARED, ROW_BLOCK)
    peak = tl.full([BLOCK_M], FLOOR, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    place = (b * H + h).to(tl.int64) * N + row
    if OTHER:
        statistic = tl.load(other_lse + place, mask=ok, other=float("-inf")) * LOG2E
        peak = tl.maximum(peak, statistic)
        total = tl.exp2(statistic - peak)
        part = tl.load(other + place[:, None] * E + e[None, :], mask=ok[:, None] & (e < E)[None, :], other=0.0)
        acc = total[:, None] * part
    for entry in range(0, ENTRIES):
        there = ok & (tl.load(members + list_line * ENTRIES + entry, mask=ok, other=-1) >= 0)
        at = (list_line * ENTRIES + entry) * (SHARED * ROW_BLOCK) + unit % (SHARED * ROW_BLOCK)
        statistic = tl.load(part_lse + at, mask=there, other=float("-inf")) * LOG2E
        part = tl.load(part_out + at[:, None] * BLOCK_E + e[None, :], mask=there[:, None], other=0.0)
        higher = tl.maximum(peak, statistic)
        fade = tl.exp2(peak - higher)
        weight = tl.exp2(statistic - higher)
        total = total * fade + weight
        acc = acc * fade[:, None] + weight[:, None] * part
        peak = higher
    seen = total > 0.0
    whole = tl.where(seen, total, 1.0)
    out = o + (b.to(tl.int64) * o_sb + h.to(tl.int64) * o_sh + row.to(tl.int64) * o_sn)[:, None] + e[None, :] * o_se
    tl.store(out, (acc / whole[:, None]).to(o.dtype.element_ty), mask=ok[:, None] & (e < E)[None, :])
    statistic = tl.where(seen, (peak + tl.log2(whole)) / LOG2E, float("-inf"))
    tl.store(lse + place, statistic, mask=ok)


@triton.jit(do_not_specialize=["UNITS", "ENTRIES", "LINES", "FIRST_LINE", "SKIPPED", "LANE_HEADS", "PER_LANE", "N"])
def add_entries(parts, members, out, out_sb, out_sh, out_sn, out_sd, UNITS, ENTRIES, LINES, FIRST_LINE,
                SKIPPED, LANE_HEADS, PER_LANE, N, D, LISTS: tl.constexpr, SHARED: tl.constexpr,
                ROW_BLOCK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """The sum of the parts of each row's entries."""
    unit = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    b, h, row, ok, list_line = _listed_rows(
        unit, UNITS, LINES, FIRST_LINE, SKIPPED, LANE_HEADS, PER_LANE, N, LISTS, SHARED, ROW_BLOCK)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for entry in range(0, ENTRIES):
        there = ok & (tl.load(members + list_line * ENTRIES + entry, mask=ok, other=-1) >= 0)
        at = (list_line * ENTRIES + entry) * (SHARED * ROW_BLOCK) + unit % (SHARED * ROW_BLOCK)
        acc += tl.load(parts + at[:, None] * BLOCK_D + d[None, :], mask=there[:, None], other=0.0)
    rows = b.to(tl.int64) * out_sb + h.to(tl.int64) * out_sh + row.to(tl.int64) * out_sn
    mask = ok[:, None] & (d < D)[None, :]
    tl.store(out + rows[:, None] + d[None, :] * out_sd, acc.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["BLOCKS", "LANE_HEADS", "M"])
def add_pieces(parts, group_slot, group_slots, out, out_sb, out_sh, out_sn, out_sd, BLOCKS, LANE_HEADS, M, D,
               WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """The sum of the pieces of each block of keys that was cut: group_slots (lanes * BLOCKS) of them, 0 where not."""
    tiles = (WIDTH + BLOCK_M - 1) // BLOCK_M
    group = tl.program_id(0) // tiles
    slots = tl.load(group_slots + group)
    if slots == 0:
        return
    first = tl.load(group_slot + group)
    lane = group // BLOCKS
    along = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    j = group % BLOCKS * WIDTH + along
    ok = (along < WIDTH) & (j < M)
    d = tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for slot in range(0, slots):
        at = (first + slot).to(tl.int64) * WIDTH + along
        acc += tl.load(parts + at[:, None] * BLOCK_D + d[None, :], mask=ok[:, None], other=0.0)
    rows = (lane // LANE_HEADS).to(tl.int64) * out_sb + (lane % LANE_HEADS).to(tl.int64) * out_sh
    rows = rows + j.to(tl.int64) * out_sn
    mask = ok[:, None] & (d < D)[None, :]
    tl.store(out + rows[:, None] + d[None, :] * out_sd, acc.to(out.dtype.element_ty), mask=mask)
'''

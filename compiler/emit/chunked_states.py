"""Kernels over chunks in order: prefix sums of the decay, and the states that run along the sequence."""

from __future__ import annotations

from attnc.compiler.emit.chunked_kernel import ChunkedWriter, Read, Variant, Write, dot, scaled_name


class PrefixSums(ChunkedWriter):
    """`sums`: inclusive prefix sums of a log decay in every chunk, in base 2.

    A factor under 2^-48 counts as 2^-48, so that a decay to nothing (log decay -inf) leaves differences finite.
    """

    tensors = ("decay",)
    buffers = ("sums",)

    def __init__(self, variant: Variant) -> None:
        super().__init__(variant, "prefix_sums")

    def body(self) -> None:
        channel = self.variant.decay == "channel"
        self.heads("tl.program_id(2)", "HG")
        self.base("decay")
        self.lanes()
        self.let("chunk", "tl.program_id(1)")
        if channel:
            self.block_of_program("f", "tl.program_id(0)")
            self.let("before", "tl.zeros([BLOCK_F], tl.float32)")
        else:
            self.let("before", "tl.sum(tl.zeros([BLOCK_C], tl.float32), 0)")
        with self.when(self.variant.tiled, "for number in range(0, TILES):"):
            self.positions("number")
            place = "decay_at + t.to(tl.int64)"
            if channel:
                pointer = f"({place} * decay_st)[:, None] + f[None, :] * decay_sf"
                self.let("steps", f"_load_tile({pointer}, t_ok, f < F, True, not EVEN_F).to(tl.float32) * LOG2E")
            else:
                self.let("steps", f"tl.load({place} * decay_st, mask=t_ok, other=0.0).to(tl.float32) * LOG2E")
            self.let("steps", "tl.where(steps < -48.0, -48.0, steps)")
            self.let("inside", "tl.cumsum(steps, 0) + before" + ("[None, :]" if channel else ""))
            if channel:
                self.store_tile("sums", "head", "t", "T", "f", "inside", "t_ok")
            else:
                self.line("tl.store(sums + head * T + t, inside, mask=t_ok)")
            self.let("before", "before + tl.sum(steps, 0)")


class States(ChunkedWriter):
    """The state before every chunk, or (`reverse`) the gradient of the state after every chunk.

    S' = decay over the chunk * S + sum over its rows of (x decayed to the chunk's end) value^T; in reverse the rows are
    queries, decayed from the chunk's start, and the values their cotangents. Sums: a program has a block f x e, a head
    and a segment of SPAN chunks. First PARTS leaves what each segment adds, then JOIN starts each from those before it.
    Recurrences: a program has a block of e, and solves for the rows that depend on the state.
    """

    constants = ("STORE", "INITIAL", "JOIN", "PARTS", "END")

    def __init__(self, variant: Variant, reverse: bool) -> None:
        self.reverse = reverse
        self.known, self.solved = streams(variant, reverse)
        self.total = variant.total
        self.tensors = (*self.known, *self.solved[:1])
        if reverse and variant.total:
            self.tensors = (*self.tensors, "total_cotangent")
        self.buffers = ("states", "initial", "end")
        if variant.rule == "sum":
            self.buffers = (*self.buffers, "parts", "part_fades")
        else:
            self.buffers = (*self.buffers, "base", "reads", "rows")
        if variant.total:
            self.buffers = (*self.buffers, "norms", "initial_norm", "end_norm", "part_norms")
        if variant.decay != "none":
            self.buffers = (*self.buffers, "sums")
        if variant.scaled:
            rows = (*self.known[:1], *self.solved)
            self.buffers = (*self.buffers, *(scaled_name(x, not reverse) for x in rows))
            self.scaled_head = None if reverse else "(b * H + h * (H // HS))"
        super().__init__(variant, "states_reverse" if reverse else "states")

    def body(self) -> None:
        self.program()
        self.begin()
        with self.block("for number in range(first_chunk, last_chunk):"):
            self.let("chunk", "CHUNKS - 1 - number" if self.reverse else "number")
            self.step()
        self.finish()

    def program(self) -> None:
        """Which block, head and segment this is."""
        self.lanes()
        self.block_of_program("f", "(tl.program_id(0) // E_BLOCKS)")
        self.block_of_program("e", "(tl.program_id(0) % E_BLOCKS)")
        if self.total:
            self.let("first_e", "tl.program_id(0) % E_BLOCKS == 0")
        heads = "H" if self.reverse else "HS"
        self.heads("tl.program_id(1)", heads)
        self.let("state_head", "head")
        self.let("count", "tl.num_programs(1)")
        self.let("segment", "tl.program_id(2) + FIRST")
        self.let("first_chunk", "segment * SPAN")
        self.let("last_chunk", "tl.minimum(first_chunk + SPAN, CHUNKS)")
        if self.variant.decay != "none":
            self.let("decay_at", f"(b * HG + h // ({heads} // HG)) * T")
        for tensor in self.tensors:
            self.base(tensor, "h" if self.reverse or tensor not in ("key", "value") else "h // (HS // HK)")
        self.let("inner", "f[:, None] * E + e[None, :]")
        self.let("inner_ok", "(f < F)[:, None] & (e < E)[None, :]")

    def begin(self) -> None:
        """The state that the segment starts from."""
        decay = self.variant.decay
        self.let("state", "tl.zeros([BLOCK_F, BLOCK_E], tl.float32)")
        if self.total:
            self.let("norm", "tl.zeros([BLOCK_F], tl.float32)")
        with self.block("if INITIAL:"):
            self.let("state", "tl.load(initial + head * F * E + inner, mask=inner_ok, other=0.0)")
            if self.total:
                self.let("norm", "tl.load(initial_norm + head * F + f, mask=f < F, other=0.0)")
        if self.variant.rule != "sum":
            return
        if decay == "scalar":
            self.let("fade", "tl.sum(tl.zeros([BLOCK_F], tl.float32), 0) + 1.0")
        elif decay == "channel":
            self.let("fade", "tl.zeros([BLOCK_F], tl.float32) + 1.0")
        with self.block("if JOIN:"), self.block("for other in range(0, segment):"):
            self.let("slot", "other * count + head")
            self.let("part", "tl.load(parts + slot * F * E + inner, mask=inner_ok, other=0.0)")
            if decay == "scalar":
                self.let("part_fade", "tl.load(part_fades + slot)")
            elif decay == "channel":
                self.let("part_fade", "tl.load(part_fades + slot * F + f, mask=f < F, other=0.0)")
            fading = {"none": "", "scalar": " * part_fade", "channel": " * part_fade[:, None]"}[decay]
            self.let("state", f"state{fading} + part")
            if self.total:
                self.let("part", "tl.load(part_norms + slot * F + f, mask=f < F, other=0.0)")
                self.let("norm", f"norm{'' if decay == 'none' else ' * part_fade'} + part")

    def step(self) -> None:
        """One chunk."""
        decay = self.variant.decay
        with self.block("if STORE:"):
            self.let("slot", "state_head * CHUNKS + chunk")
            self.line("tl.store(states + slot * F * E + inner, state.to(states.dtype.element_ty), mask=inner_ok)")
            if self.total:
                self.line("tl.store(norms + slot * F + f, norm, mask=(f < F) & first_e)")
        self.last_position()
        self.prefix_last()
        if self.solved:
            self.positions("0")
            self.solve()
        if decay != "none":
            self.let("state", f"state * {self.over_chunk()}")
            if self.total:
                self.let("norm", f"norm * {self.over_chunk(row=True)}")
            if self.variant.rule == "sum":
                self.let("fade", f"fade * {self.over_chunk(row=True)}")
        with self.when(self.variant.tiled, "for tile in range(0, TILES):"):
            if not self.solved:
                self.positions("tile")
            if self.known:
                self.add(self.known[0], self.known[1], strict=False)
        if self.solved:
            self.add(self.solved[0], "", strict=self.reverse)

    def solve(self) -> None:
        """`solved`: the values of rows that read the state, by `base` + `reads` @ S, kept as `rows`."""
        self.let("base_at", "base + (head * T + t)[:, None] * E + e[None, :]")
        self.let("e_ok", "t_ok[:, None] & (e < E)[None, :]")
        self.let("reads_at", "reads + (head * T + t)[:, None] * F + f[None, :]")
        self.let("read", "_load_tile(reads_at, t_ok, f < F, True, not EVEN_F)")
        self.let("given", "tl.load(base_at, mask=e_ok, other=0.0).to(tl.float32)")
        self.let("solved", f"given + {dot('read', 'state.to(read.dtype)')}")
        self.let("kept", "rows + (head * T + t)[:, None] * E + e[None, :]")
        self.line("tl.store(kept, solved.to(rows.dtype.element_ty), mask=e_ok)")

    def add(self, x: str, value: str, strict: bool) -> None:
        """Add the rows of a stream to the state; their values are `solved` where `value` names none."""
        self.decayed_rows("x_rows", x, strict, to_end=not self.reverse)
        if value:
            self.rows_of("value_rows", value)
            self.let("state", dot("tl.trans(x_rows)", "value_rows", "state"))
        else:
            self.let("state", dot("tl.trans(x_rows)", "solved.to(x_rows.dtype)", "state"))
        if self.total and self.reverse:
            self.weights_of_rows("total_rows", "total_cotangent")
            self.let("norm", "norm + tl.sum(x_rows.to(tl.float32) * total_rows[:, None], 0)")
        elif self.total:
            self.let("norm", "norm + tl.sum(x_rows.to(tl.float32), 0)")

    def finish(self) -> None:
        """What a segment adds, or the state at the end of all."""
        decay = self.variant.decay
        if self.variant.rule == "sum":
            with self.block("if PARTS:"):
                self.let("slot", "segment * count + head")
                self.line("tl.store(parts + slot * F * E + inner, state, mask=inner_ok)")
                if decay == "scalar":
                    self.line("tl.store(part_fades + slot, fade)")
                elif decay == "channel":
                    self.line("tl.store(part_fades + slot * F + f, fade, mask=f < F)")
                if self.total:
                    self.line("tl.store(part_norms + slot * F + f, norm, mask=(f < F) & first_e)")
        with self.block("if END:"), self.block("if last_chunk == CHUNKS:"):
            self.line("tl.store(end + head * F * E + inner, state.to(end.dtype.element_ty), mask=inner_ok)")
            if self.total:
                self.line("tl.store(end_norm + head * F + f, norm, mask=(f < F) & first_e)")


def streams(variant: Variant, reverse: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(x, value) of the rows that are known, and (x,) of those that are solved for; empty where there are none."""
    if reverse:
        read: Read = variant.reads[0]
        return (read.x, read.cotangent), tuple(one.x for one in variant.reads[1:])
    known: list[Write] = [one for one in variant.writes if one.value == "value"]
    return (
        tuple(name for one in known for name in (one.x, one.value)),
        tuple(one.x for one in variant.writes if one.value == "solved"),
    )

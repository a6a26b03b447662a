"""Weights of the pairs of one chunk, without their decay or with it.

With one decay for all features a weight is a product times a factor of the pair. With a decay for each feature it is
not: there the pairs (i, j) of a chunk are taken by the highest bit in which i and j differ, its `level`. Both lie in
one block of 2^(level + 1) positions, i in its upper half and j in its lower, and the decay between them is that from
j to the last position of the lower half times that from there to i. So a level is one matrix product of rows scaled
by factors of which none exceeds 1 (for decays that do not grow). Inside blocks over which the decay stays within what
a float holds, one product does for all levels: its rows are scaled towards the middle of their block.
"""

from __future__ import annotations

from collections.abc import Callable

from attnc.compiler.emit.chunked_kernel import ChunkedWriter, Read, Variant, Write, dot, scaled_name


def scores_name(read: Read, write: Write) -> str:
    """The buffer of a pair's weights (head, chunk, i, j)."""
    return f"scores_{read.x}_{write.x}"


def stored_scores(variant: Variant) -> tuple[tuple[Read, Write], ...]:
    """Pairs whose weights a kernel of their own computes."""
    if variant.decay != "channel" or not variant.intra:
        return ()
    return tuple((read, write) for read in variant.reads for write in variant.writes)


class PairWriter(ChunkedWriter):
    """A kernel that needs weights of pairs."""

    def factors(self, strict: bool, turned: bool = False) -> None:
        """`factors`: the mask of the pairs of a chunk, or its decay; rows are keys where `turned`."""
        later, earlier = ("[None, :]", "[:, None]") if turned else ("[:, None]", "[None, :]")
        name = "factors_strict" if strict else "factors"
        self.let("live", f"(lane{later} {'>' if strict else '>='} lane{earlier}) & t_ok{later}")
        if self.variant.decay == "scalar":
            prefix = "prefix_before" if strict else "prefix"
            self.let(name, f'tl.exp2(tl.where(live, {prefix}{later} - prefix{earlier}, float("-inf")))')
        else:
            self.let(name, "tl.where(live, 1.0, 0.0)")

    def stored(self, read: Read, write: Write, turned: bool = False) -> str:
        """The loaded weights of a pair."""
        first, second = ("lane[None, :]", "lane[:, None]") if turned else ("lane[:, None]", "lane[None, :]")
        place = f"((head * CHUNKS + chunk) * BLOCK_C + {first}) * BLOCK_C + {second}"
        return f"tl.load({scores_name(read, write)} + {place})"

    def merged(self) -> None:
        """`merged`: in blocks of 2^merged positions no factor towards the middle, at `reference`, exceeds 2^LIMIT."""
        self.let("merged", "tl.full([], LEVELS, tl.int32)")
        self.middles()
        self.let("steepest", "tl.max(tl.max(tl.abs(prefix - reference), 1), 0)")
        with self.block("while steepest > LIMIT:"):
            self.let("merged", "merged - 1")
            self.middles()
            self.let("steepest", "tl.max(tl.max(tl.abs(prefix - reference), 1), 0)")

    def middles(self) -> None:
        """`reference`: prefix sums at the middle of each lane's block of 2^merged."""
        self.let("middle", "((lane >> merged) << merged) + ((1 << merged) >> 1)")
        self.gather("reference", "tl.minimum(chunk * BLOCK_C + middle, T - 1)", "t_ok")

    def level(self) -> None:
        """`apart`, `toward` and, of rows read before their update, `toward_strict`: pairs of a level, rows' factors."""
        self.let("middle", "((lane >> (level + 1)) << (level + 1)) + (1 << level) - 1")
        self.gather("reference", "tl.minimum(chunk * BLOCK_C + middle, T - 1)", "t_ok")
        self.let("upper", "(((lane >> level) & 1) == 1)[:, None]")
        self.let("apart", "((lane[:, None] ^ lane[None, :]) >> level == 1) & (lane[:, None] > lane[None, :])")
        self.let("toward_keys", "tl.exp2(tl.where(upper, 0.0, reference - prefix))")
        for strict in self.kinds():
            prefix = "prefix_before" if strict else "prefix"
            self.let(f"toward{'_strict' if strict else ''}", f"tl.exp2(tl.where(upper, {prefix} - reference, 0.0))")

    def block_level(self) -> None:
        """The same for all pairs inside blocks of 2^merged positions."""
        self.middles()
        self.let("near", "(lane[:, None] ^ lane[None, :]) >> merged == 0")
        self.let("toward_keys", "tl.exp2(reference - prefix)")
        for strict in self.kinds():
            prefix = "prefix_before" if strict else "prefix"
            self.let(f"toward{'_strict' if strict else ''}", f"tl.exp2({prefix} - reference)")

    def kinds(self) -> tuple[bool, ...]:
        """Whether reads of this kernel are strict: the kinds that occur."""
        return tuple(dict.fromkeys(read.strict for read in self.variant.reads))

    def by_level(self, work: Callable[[Callable[[bool], str]], None]) -> None:
        """Do `work` for every level above the merged blocks, then for these; it is given the mask by strictness."""
        self.merged()
        with self.block("for level in range(merged, LEVELS):"):
            self.level()
            work(lambda strict: "apart")
        self.block_level()
        work(lambda strict: f"near & (lane[:, None] {'>' if strict else '>='} lane[None, :])")


class Scores(PairWriter):
    """Weights of the pairs of a chunk under a decay for each feature."""

    constants = ("LEVELS", "LIMIT")

    def __init__(self, variant: Variant, read: Read, write: Write) -> None:
        self.read, self.write = read, write
        self.tensors = (read.x, write.x)
        self.buffers = (scores_name(read, write), "sums")
        self.leaves_read = write is variant.writes[0]
        self.leaves_write = read is variant.reads[0]
        self.buffers += (scaled_name(read.x, False),) if self.leaves_read else ()
        self.buffers += (scaled_name(write.x, True),) if self.leaves_write else ()
        super().__init__(variant, scores_name(read, write))

    def body(self) -> None:
        read, write = self.read, self.write
        self.heads("tl.program_id(2)", "H")
        self.chunk_of_tile()
        self.decay_rows()
        self.base(read.x)
        self.base(write.x, "h // (H // HK)" if write.x == "key" else "h")
        self.last_position()
        self.let("weights", "tl.zeros([BLOCK_C, BLOCK_C], tl.float32)")
        with self.blocks("f"):
            self.block_lanes("f")
            self.rows_of("x_rows", read.x)
            self.rows_of("keys", write.x)
            self.prefix()
            if read.strict:
                self.prefix(strict=True)
            self.by_level(self.add_level)
            self.store_scaled()
        name = scores_name(read, write)
        place = "((head * CHUNKS + chunk) * BLOCK_C + lane[:, None]) * BLOCK_C + lane[None, :]"
        self.line(f"tl.store({name} + {place}, weights.to({name}.dtype.element_ty))")

    def kinds(self) -> tuple[bool, ...]:
        return (self.read.strict,)

    def add_level(self, mask: Callable[[bool], str]) -> None:
        """The pairs of one level."""
        toward = "toward_strict" if self.read.strict else "toward"
        self.let("x_scaled", f"(x_rows * {toward}).to(x_rows.dtype)")
        self.let("keys_scaled", "(keys * toward_keys).to(keys.dtype)")
        self.let("products", dot("x_scaled", "tl.trans(keys_scaled)"))
        self.let("weights", f"weights + tl.where({mask(self.read.strict)}, products, 0.0)")

    def store_scaled(self) -> None:
        """The rows of this block, decayed; each is left by one kernel."""
        if self.leaves_read:
            factor = self.from_start("prefix_before" if self.read.strict else "prefix")
            self.store_tile(scaled_name(self.read.x, False), "head", "t", "T", "f", f"(x_rows * {factor})", "t_ok")
        if self.leaves_write:
            self.prefix_last()
            self.store_tile(scaled_name(self.write.x, True), "head", "t", "T", "f", f"(keys * {self.to_end()})", "t_ok")


class Outputs(PairWriter):
    """out = (query decayed from the chunk's start) @ S + weights @ values, and the sum of the weights."""

    def __init__(self, variant: Variant) -> None:
        self.stored_pairs = [pair for pair in stored_scores(variant) if pair[0] is variant.reads[0]]
        inputs = [name for write in variant.writes for name in (write.x, write.value)] if variant.intra else []
        self.tensors = ("query", *inputs)
        if variant.scaled:
            self.tensors = tuple(write.value for write in variant.writes)
        self.buffers = ("states", "out", *(scores_name(*pair) for pair in self.stored_pairs))
        self.buffers += ("norms", "total") if variant.total else ()
        self.buffers += (scaled_name("query", False),) if variant.scaled else ()
        self.buffers += ("sums",) if variant.decay != "none" and not variant.scaled else ()
        super().__init__(variant, "outputs")

    def body(self) -> None:
        variant = self.variant
        self.heads("tl.program_id(2)", "H")
        self.chunk_of_tile()
        self.block_of_program("e", "tl.program_id(0)")
        self.decay_rows()
        self.let("state_head", "b * HS + h // (H // HS)")
        for tensor in self.tensors:
            self.base(tensor, "h // (H // HK)" if tensor in ("key", "value") else "h")
        self.let("out_rows", "tl.zeros([BLOCK_C, BLOCK_E], tl.float32)")
        inline = variant.writes if variant.intra and not self.stored_pairs else ()
        for write in inline:
            self.let(f"weights_{write.x}", "tl.zeros([BLOCK_C, BLOCK_C], tl.float32)")
        with self.blocks("f"):
            self.block_lanes("f")
            self.feature_block(inline)
        if variant.total:
            self.totals()
        if variant.decay == "scalar":
            self.prefix()
            self.let("out_rows", f"out_rows * {self.from_start()}")
            if variant.total:
                self.let("total_rows", "total_rows * tl.exp2(prefix)")
        if variant.intra:
            self.own_chunk()
        self.store_tile("out", "head", "row", "N", "e", "out_rows", "row_ok")
        if variant.total:
            self.line("tl.store(total + head * N + row, total_rows, mask=row_ok & (start_e == 0))")

    def feature_block(self, inline: tuple[Write, ...]) -> None:
        """What a block of features adds."""
        self.queries(inline)
        self.state_of("state", "states", "state_head")
        self.let("out_rows", dot("queries.to(state.dtype)", "state", "out_rows", "STATE_PRECISION"))

    def queries(self, inline: tuple[Write, ...] = ()) -> None:
        """`queries`: the rows at a block of features; those of a decay for each feature decayed from the start."""
        if self.variant.decay == "channel":
            self.decayed_rows("queries", "query", strict=False, to_end=False)
            return
        self.rows_of("queries", "query")
        for write in inline:
            self.rows_of("keys", write.x)
            self.let(f"weights_{write.x}", dot("queries", "tl.trans(keys)", f"weights_{write.x}"))

    def totals(self) -> None:
        """What the chunks before add to the sums of the weights.

        A loop of its own: beside the products, Triton 3.6 compiles it to wrong results on Hopper.
        """
        self.let("total_rows", "tl.zeros([BLOCK_C], tl.float32)")
        with self.blocks("f"):
            self.block_lanes("f")
            self.queries()
            self.norm_of("norm", "norms", "state_head")
            self.let("total_rows", "total_rows + tl.sum(queries.to(tl.float32) * norm[None, :], 1)")

    def own_chunk(self) -> None:
        """What keys of the same chunk give."""
        variant = self.variant
        if not self.stored_pairs:
            self.factors(strict=False)
        for write in variant.writes:
            name = f"weights_{write.x}"
            if self.stored_pairs:
                self.let(name, self.stored(variant.reads[0], write))
            else:
                self.let(name, f"{name} * factors")
            if variant.total:
                self.let("total_rows", f"total_rows + tl.sum({name}.to(tl.float32), 1)")
            self.rows_of("values", write.value)
            self.let("out_rows", dot(f"{name}.to(values.dtype)", "values", "out_rows"))

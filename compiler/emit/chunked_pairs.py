"""Weights of the pairs of one chunk, without their decay or with it.

With one decay for all features a weight is a product times a factor of the pair. With a decay for each feature it is
not: there the pairs (i, j) of a chunk are taken by the highest bit in which i and j differ, its `level`. Both lie in
one block of 2^(level + 1) positions, i in its upper half and j in its lower, and the decay between them is that from
j to the last position of the lower half times that from there to i. So a level is one matrix product of rows scaled
by factors of which none exceeds 1 (for decays that do not grow), and the levels and the diagonal are all pairs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from attnc.compiler.emit.chunked_kernel import LAYOUTS, ChunkedWriter, Read, Variant, Write, dot


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

    def level(self) -> None:
        """`upper`, `apart` and `toward` of a level: which rows are later, the pairs, and the rows' factors."""
        self.let("half", "1 << level")
        self.let("middle", "((lane >> (level + 1)) << (level + 1)) + half - 1")
        self.gather("reference", "tl.minimum(chunk * BLOCK_C + middle, T - 1)", "t_ok")
        self.let("upper", "((lane >> level) & 1) == 1")
        self.let("differing", "(lane[:, None] ^ lane[None, :]) >> level")
        self.let("apart", "(differing == 1) & (lane[:, None] > lane[None, :])")
        self.let("toward", "tl.exp2(tl.where(upper[:, None], prefix - reference, reference - prefix))")

    def strict_toward(self) -> None:
        """The factors of rows that read before their own update."""
        self.let("toward_strict", "tl.exp2(tl.where(upper[:, None], prefix_before - reference, 0.0))")

    @contextmanager
    def levels(self) -> Iterator[None]:
        with self.block("for level in range(0, LEVELS):"):
            self.level()
            yield


class Scores(PairWriter):
    """Weights of the pairs of a chunk under a decay for each feature."""

    constants = ("LEVELS",)

    def __init__(self, variant: Variant, read: Read, write: Write) -> None:
        self.read, self.write = read, write
        self.tensors = (read.x, write.x)
        self.buffers = (scores_name(read, write), "sums")
        super().__init__(variant, scores_name(read, write))

    def body(self) -> None:
        read, write = self.read, self.write
        self.heads("tl.program_id(2)", "H")
        self.chunk_of_tile()
        self.decay_rows()
        self.base(read.x)
        self.base(write.x, "h // (H // HK)" if write.x == "key" else "h")
        self.let("weights", "tl.zeros([BLOCK_C, BLOCK_C], tl.float32)")
        if not read.strict:
            self.let("own", "tl.zeros([BLOCK_C], tl.float32)")
        with self.blocks("f"):
            self.block_lanes("f")
            self.rows_of("x_rows", read.x)
            self.rows_of("keys", write.x)
            self.prefix()
            if read.strict:
                self.prefix(strict=True)
            else:
                self.let("own", "own + tl.sum(x_rows.to(tl.float32) * keys.to(tl.float32), 1)")
            with self.levels():
                toward = "toward"
                if read.strict:
                    self.strict_toward()
                    toward = "toward_strict"
                self.let("x_scaled", f"(x_rows * {toward}).to(x_rows.dtype)")
                self.let("keys_scaled", "(keys * toward).to(keys.dtype)")
                self.let("products", dot("x_scaled", "tl.trans(keys_scaled)"))
                self.let("weights", "weights + tl.where(apart, products, 0.0)")
        if not read.strict:
            self.let("weights", "tl.where(lane[:, None] == lane[None, :], own[:, None], weights)")
        name = scores_name(read, write)
        place = "((head * CHUNKS + chunk) * BLOCK_C + lane[:, None]) * BLOCK_C + lane[None, :]"
        self.line(f"tl.store({name} + {place}, weights.to({name}.dtype.element_ty))")


class Outputs(PairWriter):
    """out = (query decayed from the chunk's start) @ S + weights @ values, and the sum of the weights."""

    def __init__(self, variant: Variant) -> None:
        self.stored_pairs = [pair for pair in stored_scores(variant) if pair[0] is variant.reads[0]]
        inputs = [name for write in variant.writes for name in (write.x, write.value)] if variant.intra else []
        self.tensors = ("query", *inputs)
        self.buffers = ("states", "out", *(scores_name(*pair) for pair in self.stored_pairs))
        self.buffers += ("norms", "total") if variant.total else ()
        self.buffers += ("sums",) if variant.decay != "none" else ()
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
        if variant.total:
            self.let("total_rows", "tl.zeros([BLOCK_C], tl.float32)")
        inline = variant.writes if variant.intra and not self.stored_pairs else ()
        for write in inline:
            self.let(f"weights_{write.x}", "tl.zeros([BLOCK_C, BLOCK_C], tl.float32)")
        with self.blocks("f"):
            self.block_lanes("f")
            self.feature_block(inline)
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
        self.rows_of("queries", "query")
        self.state_of("state", "states", "state_head")
        for write in inline:
            self.rows_of("keys", write.x)
            self.let(f"weights_{write.x}", dot("queries", "tl.trans(keys)", f"weights_{write.x}"))
        if self.variant.decay == "channel":
            self.prefix()
            self.let("queries", f"(queries * {self.from_start()}).to(queries.dtype)")
        self.let("out_rows", dot("queries.to(state.dtype)", "state", "out_rows", "STATE_PRECISION"))
        if self.variant.total:
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

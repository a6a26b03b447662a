"""Gradient kernels of the chunked skeleton. They need the states and, in reverse, the gradients of the states."""

from __future__ import annotations

from collections.abc import Callable

from attnc.compiler.emit.chunked_kernel import KEY, Read, Variant, Write, dot, scaled_name
from attnc.compiler.emit.chunked_pairs import PairWriter, scores_name, stored_scores


class ValueGradients(PairWriter):
    """d_value = weights^T cotangents + (key decayed to the chunk's end) @ dS, over the query heads of a key head."""

    def __init__(self, variant: Variant) -> None:
        self.stored_pairs = [pair for pair in stored_scores(variant) if pair[1].x == "key"]
        rows = [name for read in variant.reads for name in (read.x, read.cotangent)] if variant.intra else []
        self.tensors = ("key", *rows)
        if variant.scaled:
            self.tensors = tuple(read.cotangent for read in variant.reads)
        self.buffers = ("d_states", "d_value", *(scores_name(*pair) for pair in self.stored_pairs))
        self.buffers += (scaled_name("key", True),) if variant.scaled else ()
        self.buffers += ("sums",) if variant.decay != "none" and not variant.scaled else ()
        super().__init__(variant, "value_gradients")

    def body(self) -> None:
        self.chunk_of_tile()
        self.block_of_program("e", "tl.program_id(0)")
        self.let("d_value_rows", "tl.zeros([BLOCK_C, BLOCK_E], tl.float32)")
        self.last_position()
        with self.members():
            self.member()
            for tensor in self.tensors:
                self.base(tensor, "key_head % HK" if tensor == "key" else "h")
            self.query_head()
        self.store_tile("d_value", "key_head", "t", "M", "e", "d_value_rows", "key_ok")

    def query_head(self) -> None:
        variant = self.variant
        inline = variant.reads if variant.intra and not self.stored_pairs else ()
        self.let("carried", "tl.zeros([BLOCK_C, BLOCK_E], tl.float32)")
        for read in inline:
            self.let(f"weights_{read.x}", "tl.zeros([BLOCK_C, BLOCK_C], tl.float32)")
        with self.blocks("f"):
            self.block_lanes("f")
            self.state_of("d_state", "d_states", "head")
            if variant.decay == "channel":
                if not variant.scaled:
                    self.prefix_last()
                self.decayed_rows("keys", "key", strict=False, to_end=True)
            else:
                self.rows_of("keys", "key")
            for read in inline:
                self.rows_of("x_rows", read.x)
                self.let(f"weights_{read.x}", dot("keys", "tl.trans(x_rows)", f"weights_{read.x}"))
            self.let("carried", dot("keys.to(d_state.dtype)", "d_state", "carried", "STATE_PRECISION"))
        if variant.decay == "scalar":
            self.prefix()
            self.prefix_last()
            self.let("carried", f"carried * {self.to_end()}")
        self.let("d_value_rows", "d_value_rows + carried")
        for read in variant.reads if variant.intra else ():
            name = f"weights_{read.x}"
            if self.stored_pairs:
                self.let(name, self.stored(read, KEY, turned=True))
            else:
                if read.strict and variant.decay == "scalar":
                    self.prefix(strict=True)
                self.factors(read.strict, turned=True)
                self.let(name, f"{name} * {'factors_strict' if read.strict else 'factors'}")
            self.rows_of("cotangents", read.cotangent)
            self.let("d_value_rows", dot(f"{name}.to(cotangents.dtype)", "cotangents", "d_value_rows"))


class FeatureGradients(PairWriter):
    """Gradients of what reads and writes the states, and of the decay, for one block of features.

    The log decay at t takes part in every weight that spans it: its gradient is the sum over later positions u of
    x_u dx_u of the reads less that of the writes. Inside the chunk that is summed here; what lies after it is, exactly,
    the sum over e of S dS at its end.
    """

    constants = ("LEVELS", "LIMIT")

    def __init__(self, variant: Variant) -> None:
        names = [name for read in variant.reads for name in (read.x, read.cotangent)]
        names += [name for write in variant.writes for name in (write.x, write.value)]
        self.tensors = tuple(names)
        outputs = [read.gradient for read in variant.reads] + [write.gradient for write in variant.writes]
        self.buffers = ("states", "d_states", *outputs)
        if variant.total:
            self.tensors += ("total_cotangent",)
            self.buffers += ("norms", "d_norms")
        if variant.decay != "none":
            self.buffers += ("sums", "d_decay")
        super().__init__(variant, "feature_gradients")

    def body(self) -> None:
        self.chunk_of_tile()
        self.block_of_program("f", "tl.program_id(0)")
        self.last_position()
        shared = self.variant.rule == "sum"
        if shared:
            self.let("d_key_rows", "tl.zeros([BLOCK_C, BLOCK_F], tl.float32)")
        with self.members():
            self.member()
            for tensor in self.tensors:
                self.base(tensor, "key_head % HK" if tensor in ("key", "value") else "h")
            self.query_head()
            if shared:
                self.let("d_key_rows", "d_key_rows + dx_key")
        if shared:
            self.store_tile("d_key", "key_head", "t", "M", "f", "d_key_rows", "key_ok")

    def query_head(self) -> None:
        variant = self.variant
        self.let("state_head", "b * HS + h // (H // HS)")
        for x in (*(read.x for read in variant.reads), *(write.x for write in variant.writes)):
            self.rows_of(f"x_{x}", x)
            self.let(f"dx_{x}", "tl.zeros([BLOCK_C, BLOCK_F], tl.float32)")
        for read, write in self.pairs():
            self.let(f"d_{read.x}_{write.x}", "tl.zeros([BLOCK_C, BLOCK_C], tl.float32)")
        if variant.decay != "none":
            self.let("after", "tl.zeros([BLOCK_F], tl.float32)")
        with self.blocks("e"):
            self.block_lanes("e")
            self.value_block()
        self.totals()
        self.carried()
        if variant.intra:
            (self.own_channels if variant.decay == "channel" else self.own_products)()
        for read in variant.reads:
            ok, place, length = ("row_ok", "row", "N") if read.x == "query" else ("key_ok", "t", "M")
            self.store_tile(read.gradient, "head", place, length, "f", f"dx_{read.x}", ok)
        for write in variant.writes if variant.rule != "sum" else ():
            self.store_tile(write.gradient, "head", "t", "M", "f", f"dx_{write.x}", "key_ok")
        if variant.decay != "none":
            self.decay_gradient()

    def pairs(self) -> list[tuple[Read, Write]]:
        if not self.variant.intra:
            return []
        return [(read, write) for read in self.variant.reads for write in self.variant.writes]

    def value_block(self) -> None:
        """What a block of values adds: to the gradients of the states' readers and writers, and of the pairs."""
        variant = self.variant
        self.state_of("state", "states", "state_head")
        self.state_of("d_state", "d_states", "head")
        for read in variant.reads:
            self.rows_of(f"cotangent_{read.x}", read.cotangent)
            name = f"dx_{read.x}"
            self.let(name, dot(f"cotangent_{read.x}.to(state.dtype)", "tl.trans(state)", name, "STATE_PRECISION"))
        for write in variant.writes:
            self.rows_of(f"value_{write.x}", write.value)
            name = f"dx_{write.x}"
            self.let(name, dot(f"value_{write.x}.to(d_state.dtype)", "tl.trans(d_state)", name, "STATE_PRECISION"))
        for read, write in self.pairs():
            name = f"d_{read.x}_{write.x}"
            self.let(name, dot(f"cotangent_{read.x}", f"tl.trans(value_{write.x})", name))
        if variant.decay != "none":
            self.let("after", "after + tl.sum(state.to(tl.float32) * d_state.to(tl.float32), 1)")

    def totals(self) -> None:
        """The sum of the weights is one more value, which is 1 for every key."""
        if not self.variant.total:
            return
        self.weights_of_rows("total_rows", "total_cotangent")
        self.norm_of("norm", "norms", "state_head")
        self.norm_of("d_norm", "d_norms", "head")
        self.let("dx_query", "dx_query + total_rows[:, None] * norm[None, :]")
        self.let("dx_key", "dx_key + tl.where(key_ok[:, None], d_norm[None, :], 0.0)")
        if self.variant.intra:
            self.let("d_query_key", "d_query_key + total_rows[:, None]")
        if self.variant.decay != "none":
            self.let("after", "after + norm * d_norm")

    def carried(self) -> None:
        """The decay between the rows and the states."""
        variant = self.variant
        if variant.decay == "none":
            return
        self.prefix()
        self.prefix_last()
        for read in variant.reads:
            prefix = self.prefix(strict=True) if read.strict else "prefix"
            self.let(f"dx_{read.x}", f"dx_{read.x} * {self.from_start(prefix)}")
        self.let("after", f"after * {self.over_chunk(row=True)}")
        for write in variant.writes:
            self.let(f"dx_{write.x}", f"dx_{write.x} * {self.to_end()}")
            self.let("after", f"after + tl.sum(x_{write.x}.to(tl.float32) * dx_{write.x}, 0)")

    def own_products(self) -> None:
        """Pairs of the chunk, whose decay is one factor of the pair."""
        for read, write in self.pairs():
            if write is self.variant.writes[0]:
                self.factors(read.strict)
            factors = "factors_strict" if read.strict else "factors"
            self.let("d_pairs", f"(d_{read.x}_{write.x} * {factors}).to(x_{write.x}.dtype)")
            self.let(f"dx_{read.x}", dot("d_pairs", f"x_{write.x}", f"dx_{read.x}"))
            self.let(f"dx_{write.x}", dot("tl.trans(d_pairs)", f"x_{read.x}", f"dx_{write.x}"))

    def own_channels(self) -> None:
        """Pairs of the chunk, level by level."""
        self.by_level(self.add_level)

    def add_level(self, mask: Callable[[bool], str]) -> None:
        """The pairs of one level."""
        for write in self.variant.writes:
            self.let(f"scaled_{write.x}", f"(x_{write.x} * toward_keys).to(x_{write.x}.dtype)")
        for read in self.variant.reads:
            toward = "toward_strict" if read.strict else "toward"
            self.let("x_scaled", f"(x_{read.x} * {toward}).to(x_{read.x}.dtype)")
            for write in self.variant.writes:
                masked = f"tl.where({mask(read.strict)}, d_{read.x}_{write.x}, 0.0)"
                self.let("d_pairs", f"{masked}.to(x_{write.x}.dtype)")
                self.let(f"dx_{read.x}", f"dx_{read.x} + {toward} * {dot('d_pairs', f'scaled_{write.x}')}")
                self.let(f"dx_{write.x}", f"dx_{write.x} + toward_keys * {dot('tl.trans(d_pairs)', 'x_scaled')}")

    def decay_gradient(self) -> None:
        """`d_decay` (block of f if the decay is one for all, head, t): what later positions of the sequence give."""
        variant = self.variant
        scalar = variant.decay == "scalar"

        def product(x: str) -> str:
            both = f"x_{x}.to(tl.float32) * dx_{x}"
            return f"tl.sum({both}, 1)" if scalar else both

        self.let("steps", " + ".join(product(read.x) for read in variant.reads))
        self.let("steps", "steps - " + " - ".join(product(write.x) for write in variant.writes))
        if variant.intra:
            self.let(
                "steps", "tl.cumsum(steps, 0, reverse=True) + " + ("tl.sum(after, 0)" if scalar else "after[None, :]")
            )
            for read in variant.reads:
                if read.strict:
                    self.let("steps", f"steps - {product(read.x)}")
        if scalar:
            self.let("block_rows", "(tl.program_id(0).to(tl.int64) * (tl.num_programs(2) // HK * H) + head) * T")
            self.line("tl.store(d_decay + block_rows + t, steps, mask=t_ok)")
        else:
            self.store_tile("d_decay", "head", "t", "T", "f", "steps", "t_ok")

"""Recurrences of rank one: the linear system of a chunk, solved once, so that its rows need the state once.

A row reads w_t = y_t^T S before its update, and writes what it read. Over a chunk that starts at S, with L the strict
weights of y and the written rows: w = b + L w + (y decayed from the start) S, so w = base + reads @ S with
base = (I - L)^-1 b, reads = (I - L)^-1 (y decayed). Backward is the same with the transposed inverse. Where the keys
write what was read beside their values, the delta rule, it solves for both at once: u = v + w, b = v.
"""

from __future__ import annotations

from attnc.compiler.emit.chunked_kernel import KEY, QUERY, RIGHT, Read, Variant, Write, dot, scaled_name
from attnc.compiler.emit.chunked_pairs import PairWriter, scores_name


class Solve(PairWriter):
    """`base` (head, t, e) and `reads` (head, t, f) of a chunk; forward also its `inverse` (head, chunk, i, j)."""

    constants = ("LEVELS", "INVERSE_PRECISION")

    def __init__(self, variant: Variant, reverse: bool) -> None:
        self.reverse = reverse
        self.solved: Write = next(one for one in variant.writes if one.value == "solved")
        self.strict: tuple[Read, Write] = (RIGHT, self.solved)
        if reverse:
            used = [(QUERY, self.solved)]
            self.tensors = ("query", "cotangent", self.solved.x)
        else:
            used = [self.strict, *([(RIGHT, KEY)] if variant.rule == "dplr" else [])]
            self.tensors = ("right", "key", "value", *(("left",) if variant.rule == "dplr" else ()))
        self.used = used
        self.buffers = ("inverse", "base", "reads")
        self.buffers += ("sums",) if variant.decay != "none" else ()
        self.buffers += tuple(scores_name(*pair) for pair in used) if variant.decay == "channel" else ()
        if variant.scaled:
            self.buffers += (scaled_name(self.solved.x if reverse else "right", reverse),)
        super().__init__(variant, "solve_reverse" if reverse else "solve")

    def body(self) -> None:
        self.heads("tl.program_id(2)", "H")
        self.chunk_of_tile()
        self.decay_rows()
        self.last_position()
        for tensor in self.tensors:
            self.base(tensor)
        self.products()
        self.let(
            "inverse_at", "inverse + ((head * CHUNKS + chunk) * BLOCK_C + lane[:, None]) * BLOCK_C + lane[None, :]"
        )
        if self.reverse:
            self.let("turned", "tl.trans(tl.load(inverse_at))")
        else:
            self.invert()
            self.line("tl.store(inverse_at, solution.to(inverse.dtype.element_ty))")
            self.let("turned", "solution.to(inverse.dtype.element_ty)")
        with self.blocks("e"):
            self.block_lanes("e")
            self.right_sides()
            self.let("solved_rows", dot("turned", "given"))
            self.store_tile("base", "head", "t", "T", "e", "solved_rows", "t_ok")
        with self.blocks("f"):
            self.block_lanes("f")
            self.readers()
            self.let("solved_rows", dot("turned", "x_rows"))
            self.store_tile("reads", "head", "t", "T", "f", "solved_rows", "t_ok")

    def products(self) -> None:
        """`weights_x_y` of every pair that is used, with its decay."""
        channel = self.variant.decay == "channel"
        names = {pair: f"weights_{pair[0].x}_{pair[1].x}" for pair in self.used}
        if channel:
            for pair, name in names.items():
                self.let(name, self.stored(*pair, turned=self.reverse))
            return
        for name in names.values():
            self.let(name, "tl.zeros([BLOCK_C, BLOCK_C], tl.float32)")
        with self.blocks("f"):
            self.block_lanes("f")
            for (read, write), name in names.items():
                self.rows_of("x_rows", read.x)
                self.rows_of("keys", write.x)
                product = ("keys", "tl.trans(x_rows)") if self.reverse else ("x_rows", "tl.trans(keys)")
                self.let(name, dot(*product, name))
        strict = not self.reverse
        if self.variant.decay == "scalar":
            self.prefix()
            if strict:
                self.prefix(strict=True)
        self.factors(strict, turned=self.reverse)
        for name in names.values():
            self.let(name, f"{name} * {'factors_strict' if strict else 'factors'}")

    def invert(self) -> None:
        """`solution`: the inverse of I - L, by doubling the blocks of the diagonal that are inverted.

        Of blocks of 2^level inverted in D, and B what lies under them in blocks of twice the size:
        (D^-1 - B)^-1 = D + D B D, since B D B = 0.
        """
        read, write = self.strict
        self.let("system", f"weights_{read.x}_{write.x}")
        self.let("solution", "tl.where(lane[:, None] == lane[None, :], 1.0, 0.0)")
        with self.block("for level in range(0, LEVELS):"):
            self.let("differing", "(lane[:, None] ^ lane[None, :]) >> level")
            self.let("under", "tl.where((differing == 1) & (lane[:, None] > lane[None, :]), system, 0.0)")
            self.let("under", dot("solution", "under", precision="INVERSE_PRECISION"))
            change = dot("under", "solution", precision="INVERSE_PRECISION")
            self.let("solution", f"solution + {change}")

    def right_sides(self) -> None:
        """`given`: what the system is solved for at a block of e."""
        if self.reverse:
            self.rows_of("cotangents", "cotangent")
            name = f"weights_{QUERY.x}_{self.solved.x}"
            self.let("given", dot(f"{name}.to(cotangents.dtype)", "cotangents"))
            self.let("given", "given.to(turned.dtype)")
            return
        self.rows_of("given", "value")
        if self.variant.rule == "dplr":
            self.let("given", dot(f"weights_{RIGHT.x}_{KEY.x}.to(given.dtype)", "given") + ".to(turned.dtype)")

    def readers(self) -> None:
        """`x_rows`: what reads the state (in reverse, its gradient) at a block of f."""
        if self.reverse:
            self.prefix_last()
        self.decayed_rows("x_rows", self.solved.x if self.reverse else "right", not self.reverse, to_end=self.reverse)
        self.let("x_rows", "x_rows.to(turned.dtype)")

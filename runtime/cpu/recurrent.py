"""States with a diagonal decay and a change of rank one (the delta family) on a CPU, in chunks.

    S_t = diag(exp g_t) S_{t-1} + x_t (y_t^T S_{t-1}) + k_t v_t^T,   out_t = q_t^T S_t

Within a chunk the reads w_t = y_t^T S_{t-1} depend on one another through a strictly triangular matrix; solving with
it (the WY form of DeltaNet, arXiv 2406.06484, with decays as in Kimi Linear, arXiv 2510.26692) leaves products:

    w = (I - A_yx)^-1 (A_yk V + (y exp G) S),   A_yx[t, j] = sum_c y_tc x_jc exp(G_{t-1, c} - G_jc) for j < t

The cost is linear in the sequence. Sums are kept in float32, in float64 for float64; equal inputs give equal bits.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from attnc.runtime.cpu.decays import chunked, decayed, kept, scores, sums, to_end
from attnc.runtime.cpu.reaches import Shapes
from attnc.runtime.cpu.stretches import ELEMENTS, Arrays, Recurrence

CHUNK = 64


def recur(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor | None,
    left: Tensor,
    right: Tensor,
    *,
    offset: int = 0,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The reads (b, h, i, e), and the state (b, h, d, e) behind the last position, in the type of sums.

    query (b, h, i, d), i counted from position `offset`; key, left (x) and right (y) (b, h, t, d), value (b, h, t, e),
    decay None or log decays, at most 0, (b, h, t) or (b, h, t, d). b may be 1 long, h may divide the most heads, t of a
    decay may be 1 long. `state`: what earlier positions left.
    """
    plan = Recurred(_shapes(query, key, value, decay, left, right), offset)
    return plan.forward(query, [key, value, decay, left, right], state)


def recur_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor | None,
    left: Tensor,
    right: Tensor,
    grad_out: Tensor,
    *,
    offset: int = 0,
    state: Tensor | None = None,
    grad_state: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, decay, left, right and the first state. Nothing is kept from forward."""
    plan = Recurred(_shapes(query, key, value, decay, left, right), offset)
    return plan.backward(query, [key, value, decay, left, right], state, grad_out, grad_state)


def advance(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor | None,
    left: Tensor,
    right: Tensor,
    state: Tensor,
) -> tuple[Tensor, Tensor]:
    """One more token: query, key, left, right (b, h, d), value (b, h, e), decay None, (b, h) or (b, h, d), state
    (b, h, d, e). Gives the read (b, h, e) and the new state."""
    query, key, value, left, right = (one.to(state.dtype) for one in (query, key, value, left, right))
    read = right[..., None, :] @ state
    if decay is not None:
        factor = decay.to(state.dtype).exp()
        state = state * (factor[..., None, None] if decay.dim() == 2 else factor[..., None])
    state = state + left[..., :, None] * read + key[..., :, None] * value[..., None, :]
    return (query[..., None, :] @ state).squeeze(-2), state


def _shapes(query: Tensor, key: Tensor, value: Tensor, decay: Tensor | None, left: Tensor, right: Tensor) -> Shapes:
    found = Shapes.of(query, key, value, decay)
    batch, heads = (max(left.shape[n], right.shape[n], most) for n, most in enumerate((found.batch, found.heads)))
    return Shapes(batch, heads, found.rows, found.keys, found.features, found.width, found.dtype)


class Recurred:
    """One such state and its reads."""

    def __init__(self, shapes: Shapes, offset: int) -> None:
        self.shapes = shapes
        self.offset = offset

    def forward(self, query: Tensor, tokens: list[Tensor | None], state: Tensor | None) -> tuple[Tensor, Tensor]:
        s = self.shapes
        carried = self.run(self.offset).forward(self.before(tokens), self.first_state(query, state))[1]
        out, carried = self.run(s.rows).forward([query, *self.after(tokens)], carried)
        return (query.new_zeros(s.batch, s.heads, 0, s.width, dtype=s.dtype) if out is None else out), carried

    def first_state(self, query: Tensor, state: Tensor | None) -> Tensor:
        s = self.shapes
        if state is not None:
            return state.to(s.dtype).expand(s.batch, s.heads, s.features, s.width)
        return query.new_zeros(s.batch, s.heads, s.features, s.width, dtype=s.dtype)

    def before(self, tokens: list[Tensor | None]) -> list[Tensor | None]:
        return [None, *(self._narrow(one, 0, self.offset) for one in tokens)]

    def after(self, tokens: list[Tensor | None]) -> list[Tensor | None]:
        return [self._narrow(one, self.offset, self.shapes.rows) for one in tokens]

    def _narrow(self, one: Tensor | None, start: int, length: int) -> Tensor | None:
        return one if one is None or (one.shape[2] == 1 and self.shapes.keys != 1) else one.narrow(2, start, length)

    def backward(
        self,
        query: Tensor,
        tokens: list[Tensor | None],
        state: Tensor | None,
        grad_out: Tensor,
        grad_state: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor]:
        first = self.first_state(query, state)
        flowing = torch.zeros_like(first) if grad_state is None else grad_state.to(first.dtype)
        start, main = self.run(self.offset), self.run(self.shapes.rows)
        carried = start.forward(self.before(tokens), first)[1]
        (grad_query, *late), flowing = main.backward([query, *self.after(tokens)], carried, grad_out, flowing)
        (_, *early), flowing = start.backward(self.before(tokens), first, None, flowing)
        joined = [self._joined(*pair) for pair in zip(tokens, early, late, strict=True)]
        return (grad_query, *joined, flowing)  # type: ignore[return-value]

    def _joined(self, token: Tensor | None, early: Tensor | None, late: Tensor | None) -> Tensor | None:
        """The gradient of an array from those of its parts."""
        if token is None or early is None or late is None:
            return None
        return early + late if token.shape[2] == 1 and self.shapes.keys != 1 else torch.cat([early, late], 2)

    def run(self, length: int) -> Recurrence:
        """The recurrence over so many positions, a few chunks a stretch."""
        s = self.shapes
        per_chunk = 8 * CHUNK * CHUNK + 2 * s.features * s.width + 8 * CHUNK * (s.features + s.width)
        count = max(1, ELEMENTS // max(1, per_chunk * s.batch * s.heads))
        return Recurrence(self.step, self.step, length, CHUNK * min(count, CHUNK))

    def step(self, arrays: Arrays, state: Tensor) -> tuple[Tensor | None, Tensor]:
        """Some chunks: their reads (b, h, t, e), where there is a query, and the state behind them."""
        query, key, value, decay, left, right = arrays
        s = self.shapes
        assert key is not None
        length = key.shape[2]
        chunk = min(CHUNK, max(length, 1))

        def cut(array: Tensor | None) -> Tensor:
            assert array is not None
            return chunked(array.to(s.dtype), s.batch, s.heads, chunk, length=length)

        k, v, x, y = cut(key), cut(value), cut(left), cut(right)
        rows = before = None
        if decay is not None:
            rows = sums(chunked(decay.double(), s.batch, s.heads, chunk, length=length))
            before = pad(rows, (*(0, 0) * (rows.dim() - 3), 1, -1))  # sums up to the position before
        at = torch.arange(chunk, device=key.device)
        earlier, seen = at < at[:, None], at <= at[:, None]
        # w = own + through @ S, for the state S before the chunk
        solve = torch.eye(chunk, dtype=s.dtype, device=key.device) - scores(y, x, before, rows, earlier)
        sides = torch.cat([scores(y, k, before, rows, earlier) @ v, decayed(y, before)], -1)
        solved = torch.linalg.solve_triangular(solve, sides, upper=False, unitriangular=True)
        own, through = solved.split([s.width, s.features], -1)
        states, reads, after = self.advance(
            state, own, through, to_end(x, rows), to_end(k, rows).mT @ v, kept(rows, s.dtype)
        )
        if query is None:
            return None, after
        q = cut(query)
        out = decayed(q, rows) @ states + scores(q, x, rows, rows, seen) @ reads + scores(q, k, rows, rows, seen) @ v
        return out.reshape(s.batch, s.heads, -1, s.width)[:, :, :length], after

    def advance(
        self, state: Tensor, own: Tensor, through: Tensor, left: Tensor, written: Tensor, kept: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """From chunk to chunk: the states before each (z, n, d, e), the reads w (z, n, c, e), and the last state."""
        s = self.shapes
        state = state.reshape(-1, s.features, s.width)
        states, reads = [], []
        for n in range(own.shape[1]):
            states.append(state)
            read = own[:, n] + through[:, n] @ state
            reads.append(read)
            state = (state if kept is None else state * kept[:, n]) + left[:, n].mT @ read + written[:, n]
        after = state.view(s.batch, s.heads, s.features, s.width)
        return torch.stack(states, 1), torch.stack(reads, 1), after

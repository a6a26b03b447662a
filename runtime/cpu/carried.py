"""Carried sums on a CPU: a state runs along the keys in chunks, so the cost is linear in their number.

    out_i = sum over j in the reach of i of w_ij v_j,   w_ij = sum_f Q_if K_jf exp(sum of g_uf for j < u <= i)

Within a chunk the pairs are formed; what lies before it is read from a state (f, e), decayed. The chunked form is that
of gated linear attention (arXiv 2312.06635), with the masks of shifted, periodic and packed reaches. Sums are kept in
float32, in float64 for float64. Equal inputs give equal bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from attnc.runtime.cpu.decays import chunked, decayed, kept, scores, sums, to_end
from attnc.runtime.cpu.reaches import Reach, Runs, Shapes
from attnc.runtime.cpu.stretches import ELEMENTS, Arrays, Recurrence

CHUNK = 64


def carry(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor | None = None,
    reach: Reach | None = None,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The sums (b, h, i, e), and the state (b, h, f, e) behind the last key, in the type of sums.

    Linear in the number of keys; memory as well: the arrays, and the intermediates of some chunks.
    query (b, h, i, f), key (b, h, j, f), value (b, h, j, e), decay None or log decays, at most 0, (b, h, j) or
    (b, h, j, f). b may be 1 long, h may divide the most heads, j of a decay may be 1 long. `state`: what earlier keys
    left to the first run here, for a reach of periods or of lag 0; then `reach.offset` counts from the first key here.

    Raises ValueError for a state with another reach, or runs of `same` that are not contiguous.
    """
    plan = Carried(Shapes.of(query, key, value, decay), reach or Reach(), decay is not None)
    plan.check(state)
    return plan.forward(query, key, value, decay, state)


def carry_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor | None,
    grad_out: Tensor,
    reach: Reach | None = None,
    state: Tensor | None = None,
    grad_state: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """Gradients of query, key, value, decay and the first state, from those of the result and the last state.

    Nothing is kept from forward: states are run once more.
    """
    plan = Carried(Shapes.of(query, key, value, decay), reach or Reach(), decay is not None)
    return plan.backward(query, key, value, decay, state, grad_out, grad_state)


def advance(query: Tensor, key: Tensor, value: Tensor, decay: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    """One more token: S = exp(g) S + k v^T, read by q^T S. query, key (b, h, f), value (b, h, e), state (b, h, f, e),
    decay None, (b, h) or (b, h, f). Gives the result (b, h, e) and the new state."""
    if decay is not None:
        factor = decay.to(state.dtype).exp()
        state = state * (factor[..., None, None] if decay.dim() == 2 else factor[..., None])
    state = state + key.to(state.dtype)[..., :, None] * value.to(state.dtype)[..., None, :]
    return (query.to(state.dtype)[..., None, :] @ state).squeeze(-2), state


class Carried:
    """One carried sum: its rows, moved to the position that they read the state at, and the keys before them."""

    def __init__(self, shapes: Shapes, reach: Reach, decays: bool) -> None:
        self.shapes = shapes
        self.reach = reach
        self.decays = decays
        offset, rows, keys = reach.offset, shapes.rows, shapes.keys
        if reach.kind == "lag":
            self.skipped = min(max(reach.amount - offset, 0), rows)  # rows that see nothing
            self.lead = 0
            first = offset + self.skipped - reach.amount
        elif reach.kind == "period":
            self.skipped, first = 0, offset // reach.amount * reach.amount
            self.lead = offset - first  # positions of the first period before the first row
        else:
            self.skipped, self.lead, first = 0, 0, keys
        self.before = min(first, keys)  # keys that every row sees
        self.length = self.lead + rows - self.skipped

    def check(self, state: Tensor | None) -> None:
        reach = self.reach
        if reach.same is not None:
            if reach.kind == "all":
                raise ValueError("rows that see all keys of their run are no carried sum")
            if bool((reach.same.diff(dim=-1) < 0).any()):
                raise ValueError("the array that must agree at row and key has to be sorted along the sequence")
        if state is not None and (reach.kind == "all" or (reach.kind == "lag" and reach.amount)):
            raise ValueError("a sum over all keys, or that lags, does not go on from a state")

    # Forward

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, decay: Tensor | None, state: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        s = self.shapes
        out = query.new_zeros(s.batch, s.heads, s.rows, s.width, dtype=s.dtype)
        carried = self.first_state(query, state)
        before, after = self.arrays(query, key, value, decay)
        carried = self.run(self.before).forward(before, carried)[1]
        if self.reach.kind == "all":
            whole = query.to(s.dtype).expand(s.batch, -1, -1, -1)
            out += _by_heads(whole, s.heads) @ carried
            return out, carried
        if self.length:
            found, carried = self.run(self.length).forward(after, carried)
            assert found is not None
            out[:, :, self.skipped :] = found[:, :, self.lead :]
        return out, carried

    def first_state(self, query: Tensor, state: Tensor | None) -> Tensor:
        s = self.shapes
        if state is not None:
            return state.to(s.dtype).expand(s.batch, s.heads, s.features, s.width)
        return query.new_zeros(s.batch, s.heads, s.features, s.width, dtype=s.dtype)

    def arrays(
        self, query: Tensor, key: Tensor, value: Tensor, decay: Tensor | None
    ) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """What the steps read, before the first row's position and from it on; each pair is disjoint views or copies.

        query, key, value, decay, same (b, 1, t), same of the position before.
        """
        same = None if self.reach.same is None else self.reach.same[:, None]
        previous = None if same is None else torch.cat([same[..., :1], same[..., :-1]], -1)
        tokens = [key, value, decay, same, previous]
        before = [None, *(one if one is None or one.shape[2] == 1 else one[:, :, : self.before] for one in tokens)]
        if self.reach.kind == "all":
            return before, []
        return before, [self.rows(query, decay), *(self.following(one) for one in tokens)]

    def following(self, array: Tensor | None) -> Tensor | None:
        """An array of tokens at the positions of the rows; behind the last token 0, or the last int."""
        if array is None or (array.shape[2] == 1 and self.shapes.keys != 1):
            return array
        found = array[:, :, self.before : self.before + self.length]
        missing = self.length - found.shape[2]
        if not missing:
            return found
        if not array.is_floating_point() and array.shape[2]:
            return torch.cat([found, array[:, :, -1:].expand(-1, -1, missing)], 2)
        return pad(found, (*(0, 0) * (array.dim() - 3), 0, missing))

    def rows(self, query: Tensor, decay: Tensor | None) -> Tensor:
        """The rows that see something, at the positions that they read the state at, with the decay from there on."""
        found = query[:, :, self.skipped :]
        if decay is not None and self.reach.kind == "lag" and self.reach.amount:
            found = found * self.elapsed(decay).to(self.shapes.dtype)
        if self.reach.same is not None and self.reach.kind == "lag" and self.reach.amount:
            found = found * self.stayed(self.reach.same)
        return pad(found, (0, 0, self.lead, 0)) if self.lead else found

    def elapsed(self, decay: Tensor) -> Tensor:
        """exp of the log decays between the position that a row reads the state at and the row, (b, h, i, f or 1)."""
        amount, first = self.reach.amount, self.reach.offset + self.skipped
        if decay.shape[2] == 1 and self.shapes.keys != 1:
            factor = (decay.double() * amount).exp()
        else:
            prefix = pad(sums(decay), (*(0, 0) * (decay.dim() - 3), 1, 0))
            rows = torch.arange(first, self.reach.offset + self.shapes.rows, device=decay.device) + 1
            ends, starts = (at.clamp(max=self.shapes.keys) for at in (rows, rows - amount))
            factor = (prefix[:, :, ends] - prefix[:, :, starts]).exp()
        factor = factor if decay.dim() == 4 else factor.unsqueeze(-1)
        return _by_heads(factor, self.shapes.heads) if factor.shape[1] != 1 else factor

    def stayed(self, same: Tensor) -> Tensor:
        """1 where the position that a row reads the state at belongs to the row's run, else 0: (b, 1, i, 1)."""
        rows = torch.arange(self.reach.offset + self.skipped, self.reach.offset + self.shapes.rows, device=same.device)
        rows = rows.clamp(max=self.shapes.keys - 1)
        agree = same[:, rows] == same[:, (rows - self.reach.amount).clamp(min=0)]
        return agree[:, None, :, None].to(self.shapes.dtype)

    # Backward

    def backward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        decay: Tensor | None,
        state: Tensor | None,
        grad_out: Tensor,
        grad_state: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
        s = self.shapes
        leaves = [None if one is None else one.detach().requires_grad_() for one in (query, key, value, decay)]
        with torch.enable_grad():
            before, after = self.arrays(*leaves)  # type: ignore[arg-type]
        first = self.first_state(query, state)
        flowing = torch.zeros_like(first) if grad_state is None else grad_state.to(s.dtype)
        results: list[tuple[Arrays, Sequence[Tensor | None]]] = []
        start = self.run(self.before)
        if self.reach.kind == "all":
            carried = start.forward([_detached(one) for one in before], first)[1]
            given = grad_out.to(s.dtype)
            whole = _by_heads(query.to(s.dtype).expand(s.batch, -1, -1, -1), s.heads)
            flowing = flowing + whole.mT @ given
            results.append(([leaves[0]], [_reduced(given @ carried.mT, query)]))
        elif self.length:
            carried = start.forward([_detached(one) for one in before], first)[1]
            given = pad(grad_out[:, :, self.skipped :].to(s.dtype), (0, 0, self.lead, 0))
            found, flowing = self.run(self.length).backward([_detached(one) for one in after], carried, given, flowing)
            results.append((after, found))
        found, flowing = start.backward([_detached(one) for one in before], first, None, flowing)
        results.append((before, found))
        return (*self.collect(leaves, results), flowing)  # type: ignore[return-value]

    @staticmethod
    def collect(
        leaves: Sequence[Tensor | None], results: Sequence[tuple[Arrays, Sequence[Tensor | None]]]
    ) -> list[Tensor | None]:
        """Gradients of the leaves from those of the arrays made of them."""
        pairs = [
            (one, gradient)
            for arrays, gradients in results
            for one, gradient in zip(arrays, gradients, strict=True)
            if one is not None and gradient is not None and one.requires_grad
        ]
        wanted = [leaf for leaf in leaves if leaf is not None]
        made = iter(
            torch.autograd.grad(
                [one for one, _ in pairs],
                wanted,
                [gradient.to(one.dtype) for one, gradient in pairs],
                allow_unused=True,
                materialize_grads=True,
            )
        )
        return [None if leaf is None else next(made) for leaf in leaves]

    # Steps

    def run(self, length: int) -> Recurrence:
        """The recurrence over so many positions, a few chunks a stretch."""
        s = self.shapes
        chunk = self.chunk
        width = s.features + s.width
        pairs = 0 if self.reach.kind == "period" and self.reach.amount >= chunk else chunk * chunk
        per_chunk = 3 * pairs + 2 * s.features * s.width + 4 * chunk * width * (1 + self.decays)
        count = max(1, ELEMENTS // max(1, per_chunk * s.batch * s.heads))
        return Recurrence(self.step, self.step, length, chunk * min(count, CHUNK))

    @property
    def chunk(self) -> int:
        """Positions a chunk: whole periods, so that they start where a chunk starts."""
        if self.reach.kind != "period":
            return CHUNK
        return self.reach.amount * max(1, CHUNK // self.reach.amount)

    def step(self, arrays: Arrays, state: Tensor) -> tuple[Tensor | None, Tensor]:
        """Some chunks: their outputs (b, h, t, e), where there is a query, and the state behind them."""
        query, key, value, decay, same, previous = arrays
        s = self.shapes
        assert key is not None
        assert value is not None
        length = key.shape[2]
        chunk = self.fitting(length)

        def cut(array: Tensor) -> Tensor:
            return chunked(array.to(s.dtype), s.batch, s.heads, chunk, length=length)

        keys, values = cut(key), cut(value)
        prefix = None if decay is None else sums(chunked(decay.double(), s.batch, s.heads, chunk, length=length))
        runs = None if same is None or previous is None else Runs.of(same, previous, s, chunk, length)
        written, held = to_end(keys, prefix), kept(prefix, s.dtype)
        if runs is not None:
            written = written * runs.ending.unsqueeze(-1)
            whole = runs.through[..., None, None]
            held = whole if held is None else held * whole
        states, after = advanced(state.reshape(-1, s.features, s.width), written.mT @ values, held)
        after = after.view(s.batch, s.heads, s.features, s.width)
        if query is None:
            return None, after
        queries = cut(query)
        read = decayed(queries, prefix)
        if runs is not None:
            read = read * runs.starting.unsqueeze(-1)
        out = read @ states
        if self.reach.kind != "period" or self.reach.amount < chunk:  # else no pair of a chunk sees each other
            live = self.live(chunk, key.device)
            live = live if runs is None else live & runs.agree()
            out = out + scores(queries, keys, prefix, prefix, live) @ values
        return out.reshape(s.batch, s.heads, -1, s.width)[:, :, :length], after

    def fitting(self, length: int) -> int:
        """Positions a chunk where there are so many: no longer than they are, unless periods would be cut."""
        if self.reach.kind == "period" and self.reach.amount < length:
            return self.chunk
        return min(self.chunk, max(length, 1))

    def live(self, chunk: int, device: torch.device) -> Tensor:
        """Which pairs of one chunk see each other, (c, c)."""
        at = torch.arange(chunk, device=device)
        if self.reach.kind == "period":
            return at // self.reach.amount < (at // self.reach.amount)[:, None]
        return at <= at[:, None]


def advanced(state: Tensor, written: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor]:
    """The states before each chunk (z, n, f, e) and behind the last, from what chunks write and keep of them."""
    states = []
    for n in range(written.shape[1]):
        states.append(state)
        state = (state if kept is None else state * kept[:, n]) + written[:, n]
    return torch.stack(states, 1) if states else written, state


def _by_heads(array: Tensor, heads: int) -> Tensor:
    """(b, h', ..) -> (b, heads, ..), each head repeated."""
    return array if array.shape[1] == heads else array.repeat_interleave(heads // array.shape[1], 1)


def _reduced(gradient: Tensor, array: Tensor) -> Tensor:
    """The gradient of an array whose batch and heads were repeated."""
    if array.shape[1] != gradient.shape[1]:
        gradient = gradient.unflatten(1, (array.shape[1], -1)).sum(2)
    return gradient.sum(0, keepdim=True) if array.shape[0] != gradient.shape[0] else gradient


def _detached(array: Tensor | None) -> Tensor | None:
    return None if array is None else array.detach()

"""What the chunked steps mean, in float64 and step by step; and errors of the kernels' results and gradients."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attnc.runtime.cpu.reaches import Reach
from attnc.runtime.cuda.launch_chunked_carry import carry_backward, carry_forward
from attnc.runtime.cuda.launch_chunked_recur import Recurrence, recur_backward, recur_forward
from attnc.runtime.tolerance import error, tolerance

LAG = Reach()


@dataclass(frozen=True)
class Sum:
    """A carried sum to try. `decay`: none, scalar or channel; `strength`: the largest decay; `resets`: -inf here."""

    batch: int = 1
    heads: int = 1
    key_heads: int = 1
    decay_heads: int = 1
    rows: int = 37
    keys: int = 37
    f: int = 16
    e: int = 16
    decay: str = "none"
    reach: Reach = LAG
    total: bool = False
    states: bool = False
    strength: float = 1.0
    resets: tuple[int, ...] = ()
    keep: bool = False


@dataclass(frozen=True)
class Recurring:
    """A recurrence to try. `step`: the largest beta; `equal`: all keys are the same."""

    batch: int = 1
    heads: int = 1
    rows: int = 21
    keys: int = 21
    f: int = 18
    e: int = 18
    decay: str = "none"
    delta: bool = True
    offset: int = 0
    states: bool = False
    strength: float = 1.0
    step: float = 1.0
    equal: bool = False
    keep: bool = False


def sum_errors(case: Sum, device: str, dtype: torch.dtype) -> dict[str, float]:
    """Errors of out, total, final state and every gradient, by name, each as a part of what is allowed."""
    given = sum_operands(case, device, dtype)
    names = [name for name, one in given.items() if one is not None]
    exact = {name: given[name].double().requires_grad_() for name in names}  # type: ignore[union-attr]
    wanted = plain_sum(case, **exact)
    cotangents = {name: random(one.shape, device, dtype if name == "out" else None) for name, one in wanted.items()}
    loss = torch.stack([(wanted[name] * cotangents[name].double()).sum() for name in wanted]).sum()
    expected = torch.autograd.grad(loss, [exact[name] for name in names], allow_unused=True, materialize_grads=True)
    query, key, value = (exact[name].detach().to(dtype) for name in ("query", "key", "value"))
    decay, initial = given["decay"], given["initial"]
    result = carry_forward(
        *(query, key, value, decay),
        reach=case.reach,
        total=case.total,
        initial=initial,
        final=case.states,
        keep=case.keep,
    )
    found = carry_backward(
        *(query, key, value, decay),
        cotangents["out"],
        reach=case.reach,
        total_cotangent=cotangents.get("total"),
        initial=initial,
        final_cotangent=cotangents.get("final"),
        kept=[*result.kept.values()],
    )
    pairs = {name: (getattr(result, name), wanted[name]) for name in wanted}
    pairs |= {f"d_{name}": (getattr(found, name), one) for name, one in zip(names, expected, strict=True)}
    return {name: error(*pair) / tolerance(dtype, case.keys) for name, pair in pairs.items()}


def random(shape: tuple[int, ...], device: str, dtype: torch.dtype | None = None) -> Tensor:
    """Normal numbers that the type holds; float32 where none is named."""
    return torch.randn(shape, dtype=torch.float64).to(device, dtype or torch.float32)


def sum_operands(case: Sum, device: str, dtype: torch.dtype) -> dict[str, Tensor | None]:
    """Strided operands; positive features where a total is wanted, so that it is not a difference of large numbers."""
    torch.manual_seed(0)
    query = random((case.batch, case.rows, case.heads, case.f), device, dtype).transpose(1, 2)
    key = (random((case.batch, case.keys, case.key_heads, case.f), device) / case.f**0.5).to(dtype).transpose(1, 2)
    value = random((case.batch, case.key_heads, case.e, case.keys), device, dtype).transpose(2, 3)
    if case.total:
        query, key = query.abs(), key.abs()
    positions = max(case.keys, case.rows + max(case.reach.offset, 0))
    shape = (case.batch, case.decay_heads, positions, *((case.f,) if case.decay == "channel" else ()))
    decay = None
    if case.decay != "none":
        decay = -torch.rand(shape, dtype=torch.float64).to(device, torch.float32) * case.strength
        decay[:, :, list(case.resets)] = -200.0
    heads = max(case.heads if case.decay_heads > case.key_heads else 0, case.key_heads)
    initial = random((case.batch, heads, case.f, case.e + case.total), device) if case.states else None
    if case.total and initial is not None:
        initial[..., -1].abs_()
    return {"query": query, "key": key, "value": value, "decay": decay, "initial": initial}


def plain_sum(
    case: Sum, query: Tensor, key: Tensor, value: Tensor, decay: Tensor | None = None, initial: Tensor | None = None
) -> dict[str, Tensor]:
    """All weights of all pairs."""
    heads = max(case.heads, case.key_heads, case.decay_heads if decay is not None else 1)
    query, key, value = (one.repeat_interleave(heads // one.shape[1], 1) for one in (query, key, value))
    i = torch.arange(case.rows, device=query.device)[:, None] + case.reach.offset
    j = torch.arange(case.keys, device=query.device)[None]
    amount = case.reach.amount
    live = {"lag": j <= i - amount, "period": j < i // max(amount, 1) * amount, "all": j >= 0 * i}[case.reach.kind]
    if decay is None:
        through = torch.zeros((1, 1, max(case.keys, case.rows + max(case.reach.offset, 0)), 1), dtype=torch.float64).to(
            query
        )
    else:
        through = decay.repeat_interleave(heads // decay.shape[1], 1).cumsum(2)
        through = through if decay.dim() == 4 else through[..., None]
    at_rows = through[:, :, i[:, 0].clamp(min=0)]
    spans = at_rows[:, :, :, None] - through[:, :, None, : case.keys]
    factors = torch.exp(spans.masked_fill(~live[..., None], 0.0))
    weights = torch.einsum("bhif,bhjf,bhijf->bhij", query, key, factors.expand(*factors.shape[:4], query.shape[3]))
    weights = weights.masked_fill(~live, 0.0)
    value = torch.cat([value, torch.ones_like(value[..., :1])], -1) if case.total else value
    found = {"out": weights @ value}
    if initial is not None:
        whole = initial.repeat_interleave(heads // initial.shape[1], 1)
        found["out"] = found["out"] + (query * at_rows.exp()) @ whole
        last = through[:, :, -1:]
        kept = torch.exp(last - through[:, :, : case.keys]) * key
        final = kept.transpose(2, 3) @ value + last.transpose(2, 3).exp() * whole
        found["final"] = final.unflatten(1, (initial.shape[1], -1))[:, :, 0]
    if case.total:
        found["total"], found["out"] = found["out"][..., -1], found["out"][..., :-1]
    return found


def recurrence_errors(case: Recurring, device: str, dtype: torch.dtype) -> dict[str, float]:
    """As `sum_errors`."""
    torch.manual_seed(0)
    given, initial = recurrence_operands(case, device, dtype)
    fields = ("query", "key", "value", "right", "left", "decay")
    names = [name for name in fields if getattr(given, name) is not None]
    exact = {name: getattr(given, name).double().requires_grad_() for name in names}
    start = None if initial is None else initial.double().requires_grad_()
    out, end = plain_recurrence(replace(given, **exact), start)
    cotangent, end_cotangent = random(out.shape, device, dtype), random(end.shape, device)
    loss = (out * cotangent.double()).sum() + ((end * end_cotangent.double()).sum() if case.states else 0.0)
    leaves = [*(exact[name] for name in names), *([start] if start is not None else [])]
    expected = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    result = recur_forward(given, initial=initial, final=case.states, keep=case.keep)
    from_end = end_cotangent if case.states else None
    found = recur_backward(given, cotangent, initial=initial, final_cotangent=from_end, kept=[*result.kept.values()])
    pairs = {"out": (result.out, out)}
    if result.final is not None:
        pairs["final"] = (result.final, end)
    every = [*names, *(["initial"] if start is not None else [])]
    pairs |= {f"d_{name}": (getattr(found, name), one) for name, one in zip(every, expected, strict=True)}
    return {name: error(*pair) / tolerance(dtype, case.keys) for name, pair in pairs.items()}


def recurrence_operands(case: Recurring, device: str, dtype: torch.dtype) -> tuple[Recurrence, Tensor | None]:
    """A delta rule with its decay in `right`, or a general change that does not grow."""

    def unit(*shape: int) -> Tensor:
        return torch.nn.functional.normalize(random(shape, device).double(), dim=-1)

    rows = (case.batch, case.heads, case.keys)
    key = unit(*rows, case.f)
    if case.equal:
        key = key[:, :, :1].expand(key.shape)
    beta = torch.rand((*rows, 1), dtype=torch.float64).to(device) * case.step
    decay = None
    kept: Tensor | float = 1.0
    if case.decay != "none":
        shape = (*rows, case.f) if case.decay == "channel" else rows
        decay = -torch.rand(shape, dtype=torch.float64).to(device, torch.float32) * case.strength
        kept = decay.double().exp() if case.decay == "channel" else decay.double().exp()[..., None]
    value = random((*rows, case.e), device).double()
    if case.delta:
        right, left = -beta * key * kept, None
        value = beta * value
    else:
        right = unit(*rows, case.f)
        left = (0.1 * unit(*rows, case.f) - 0.7 * beta * right * kept).to(dtype)
    query = random((case.batch, case.heads, case.rows, case.f), device, dtype)
    initial = random((case.batch, case.heads, case.f, case.e), device) if case.states else None
    return Recurrence(query, key.to(dtype), value.to(dtype), right.to(dtype), left, decay, case.offset), initial


def plain_recurrence(given: Recurrence, initial: Tensor | None) -> tuple[Tensor, Tensor]:
    """(out, the last state), one position after the other."""
    key, value, right, decay = given.key, given.value, given.right, given.decay
    left = key if given.left is None else given.left
    state = key.new_zeros((*key.shape[:2], key.shape[3], value.shape[3])) if initial is None else initial
    states = [state]
    for t in range(key.shape[2]):
        read = right[:, :, t, None] @ state
        if decay is not None:
            kept = decay[:, :, t].exp()
            state = state * (kept[..., None] if decay.dim() == 4 else kept[..., None, None])
        state = state + left[:, :, t, :, None] @ read + key[:, :, t, :, None] @ value[:, :, t, None]
        states.append(state)
    before = states[1 + given.offset : 1 + given.offset + given.query.shape[2]]
    return torch.stack([given.query[:, :, i][:, :, None] @ one for i, one in enumerate(before)], 2)[:, :, :, 0], states[
        -1
    ]

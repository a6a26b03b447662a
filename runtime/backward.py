"""The gradients of a call: what lies around the branches, which both back ends share.

A branch with weights p = exp(score - lse) and output o has, for a cotangent do of its output and dlse of its lse,

    dv = p^T do,  dscore = p * (do v^T - delta),  delta_i = sum_e do_ie o_ie - dlse_i

(FlashAttention-2, arXiv 2307.08691, section 3.1). Branches that are merged form one softmax over the union of their
keys, so each has the lse and delta of the whole. A back end works out dscore tile by tile and gives the gradients of
q, k, v and of the score's leaves (see `compiler.differentiate`); torch carries those of the leaves on to the inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from attnc.compiler.build import unlowered
from attnc.compiler.differentiate import Leaf, ScoreGradient, differentiate
from attnc.compiler.ir import Node
from attnc.compiler.plan import Branch, Plan
from attnc.dsl.types import Base
from attnc.runtime.call import Call
from attnc.runtime.evaluate import Environment
from attnc.runtime.steps.placing import RowPlaces


@dataclass(frozen=True)
class BranchGradients:
    """What a back end gives for one branch.

    q, k and v as the inputs are shaped (k and v summed over the query heads of a key head), of the inputs' dtype or a
    wider one. `leaves`, in the order of `ScoreGradient.leaves`, float32 or float64: (B, H, N) for side `row`,
    (B, H, M) for side `key`, and for `pair` the gradient of the table's values, `table_shape` of them.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    leaves: tuple[Tensor, ...]


@dataclass(frozen=True)
class Engine:
    """The back end.

    `execute(plan, call, dtype)`: (out, lse) of the plan. `backward(plan, number, call, do, lse, delta)`: do
    (B, H, N, E) of any real dtype and strides; lse and delta (B, H, N) of the dtype of sums, lse natural and +inf
    where a row has no key, so that exp(score - lse) is 0 there. `whole(plan, call, out, lse, do)`: the gradients of a
    plan of one branch from what `execute` left, where there is a shorter way.
    """

    execute: Callable[[Plan, Call, torch.dtype], tuple[Tensor, Tensor]]
    backward: Callable[[Plan, int, Call, Tensor, Tensor, Tensor], BranchGradients]
    products: Callable[[Plan, Tensor, Tensor], Tensor] | None = None  # row sums of x * y, where torch's take longer
    whole: Callable[[Plan, Call, Tensor, Tensor, Tensor], BranchGradients | None] | None = None
    chunked: bool = False  # whether states run along the sequence in generated kernels, else in torch


@lru_cache(maxsize=1024)
def score_gradient(score: Node) -> ScoreGradient:
    """`differentiate`, once a score. Raises a located AttnError where an op has no gradient rule."""
    return differentiate(score)


@lru_cache(maxsize=1024)
def real_inputs(root: Node) -> frozenset[str]:
    """The real inputs that a value follows smoothly; those that only steer a condition or an int are not among them."""
    found: set[str] = set()
    seen: set[Node] = set()
    stack = [root]
    while stack:
        node = stack.pop()
        if node in seen or node.type.base is not Base.REAL:
            continue
        seen.add(node)
        if node.op == "input" and node.attribute not in ("q", "k", "v"):
            found.add(str(node.attribute))
        stack += node.args
    return frozenset(found)


def differentiable(plan: Plan) -> set[str]:
    """Names of the inputs that have a gradient, q, k and v among them. Raises as `score_gradient` does."""
    found = {"q", "k", "v"}
    for branch in plan.branches:
        for leaf in score_gradient(branch.score).leaves:
            found |= real_inputs(leaf.value)
        found |= {str(node.attribute) for node in score_gradient(branch.score).pairs}
        if branch.sink is not None:
            found |= real_inputs(branch.sink)
    return found


def table_shape(leaf: Leaf, call: Call) -> tuple[int, ...]:
    """Shape of the gradient of a `pair` leaf's table: (B, H, X), or (B, H, N or M, X) where it varies over i or j."""
    table = leaf.value.args[0]
    along = [call.sizes[index] for index in ("i", "j") if table.depends_on(index)]
    return call.sizes["b"], call.sizes["h"], *along, *(call.sizes[axis] for axis in table.type.axes)


@contextmanager
def recording() -> Iterator[None]:
    """Records operations for autograd inside of an operator's kernel too, where torch has switched it off."""
    included = torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False)
    with included, torch.enable_grad():
        yield


class Gradients:
    """The gradients of one call, by name. `wanted` are those asked for, all of them `differentiable`."""

    def __init__(self, plan: Plan, call: Call, engine: Engine, wanted: Collection[str]) -> None:
        self.plan = plan
        self.engine = engine
        # What is summed here is small beside the tiles; torch's float32 sums on a CPU depend on the threads' order.
        self.real = torch.float32 if call.q.is_cuda else torch.float64
        self.inputs = {
            name: tensor.detach().to(self.real).requires_grad_() if name in wanted else tensor.detach()
            for name, tensor in call.inputs.items()
        }
        self.call = replace(call, inputs=self.inputs)
        self.given = call
        self.wanted = wanted
        self.found: dict[str, Tensor] = {}

    def of(self, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> dict[str, Tensor]:
        """Gradients in the shapes and dtypes of the inputs, zero where nothing flows.

        out and grad_out (B, H, N, E), lse and grad_lse (B, H, N).
        """
        made = None
        if self.engine.whole is not None and grad_lse is None:
            made = self.engine.whole(self.plan, self.given, out, lse, grad_out)
        if made is not None:
            self.found = {"q": made.q, "k": made.k, "v": made.v}
            return {name: self.finished(name) for name in self.wanted}
        lse = lse.nan_to_num(nan=math.nan, posinf=math.inf, neginf=math.inf)
        delta = self.delta(out, grad_out, grad_lse)
        for number in range(len(self.plan.branches)):
            self.branch(number, grad_out, lse, delta)
        return {name: self.finished(name) for name in self.wanted}

    def delta(self, out: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> Tensor:
        """sum_e do * o - dlse: (B, H, N)"""
        dtype = self.given.compute_dtype
        if self.engine.products is not None:
            product = self.engine.products(self.plan, grad_out, out)
        else:
            product = (grad_out.to(dtype) * out.to(dtype)).sum(-1)
        return product if grad_lse is None else product - grad_lse.to(dtype)

    def branch(self, number: int, grad_out: Tensor, lse: Tensor, delta: Tensor) -> None:
        """Adds what one branch gives."""
        branch = self.plan.branches[number]
        for node in score_gradient(branch.score).pairs:
            if node.attribute in self.wanted:
                help = "pass it without requires_grad (`.detach()`), or write it as values of the row and of the key"
                raise unlowered(node, "the gradient of an input over pairs of positions", help)
        made = self.engine.backward(self.plan, number, self.given, grad_out, lse, delta)
        for name, gradient in (("q", made.q), ("k", made.k), ("v", made.v)):
            self.add(name, gradient)
        with recording():
            for leaf, gradient in zip(score_gradient(branch.score).leaves, made.leaves, strict=True):
                self.carry(*self.leaf_value(leaf), gradient)
            if branch.sink is not None and real_inputs(branch.sink) & set(self.wanted):
                self.sink(branch, branch.sink, lse, delta)

    def leaf_value(self, leaf: Leaf) -> tuple[Node, Tensor]:
        """A leaf (of a table: the whole table) and its value at every position."""
        if leaf.side == "pair":
            table = leaf.value.args[0]
            indices = [index for index in ("i", "j") if table.depends_on(index)]
            return table, self.environment("b", "h", *indices).value(table)
        return leaf.value, self.environment("b", "h", "i" if leaf.side == "row" else "j").value(leaf.value)

    def sink(self, branch: Branch, sink: Node, lse: Tensor, delta: Tensor) -> None:
        """A sink is a key without a value: dsink = -exp(sink - lse) delta."""
        rows = RowPlaces.of(self.plan, self.call)
        if rows is not None:
            lse, delta = rows.ordered(lse), rows.ordered(delta)
        value = self.environment("b", "h", "i").value(sink)
        self.carry(sink, value, -torch.exp(value.detach() - lse) * delta)

    def carry(self, node: Node, value: Tensor, gradient: Tensor) -> None:
        """Takes the gradient of a value on to the inputs that it is made of."""
        names = sorted(real_inputs(node) & set(self.wanted))
        if not names:
            return
        made = torch.autograd.grad(
            [value.expand(gradient.shape)],
            [self.inputs[name] for name in names],
            [gradient.to(self.real)],
            allow_unused=True,
            materialize_grads=True,
        )
        for name, part in zip(names, made, strict=True):
            self.add(name, part)

    def environment(self, *indices: str) -> Environment:
        return Environment(self.plan, self.call, self.call.positions(*indices), self.real)

    def add(self, name: str, gradient: Tensor) -> None:
        held = self.found.get(name)
        self.found[name] = gradient if held is None else held + gradient

    def finished(self, name: str) -> Tensor:
        """The gradient as the operator returns it: contiguous, of the input's dtype."""
        call = self.given
        tensor = {"q": call.q, "k": call.k, "v": call.v}.get(name, call.inputs.get(name))
        assert tensor is not None
        gradient = self.found.get(name)
        if gradient is None:
            return tensor.new_zeros(tensor.shape)
        return gradient.to(tensor.dtype).contiguous()

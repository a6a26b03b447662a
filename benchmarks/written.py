"""Contenders for patterns that no library has: the formula in torch, eager and compiled, and dense causal attention."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.formulas import FORMULAS, Formula, mla_absorbed
from benchmarks.ready import Ready, UnavailableError, first_line
from benchmarks.timing import seconds_of
from benchmarks.work import Problem

FEW = 64  # queries up to which the formula of latents takes their projections over


def eager(problem: Problem) -> Ready:
    """The formula, operator by operator."""
    return _ready(problem, _formula(problem))


def compiled(problem: Problem) -> Ready:
    """The formula under torch.compile."""
    formula = _formula(problem)
    torch._dynamo.reset()
    return _ready(problem, torch.compile(formula, dynamic=False))


def causal_cudnn(problem: Problem) -> Ready:
    """Dense causal attention of as many heads and tokens by cuDNN: what a pattern has to beat to be worth it."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if not problem.q.is_cuda:
        raise UnavailableError("cuDNN's kernel needs a CUDA device")
    q, k, v = problem.q, *(_like_heads(problem, x) for x in (problem.k, problem.v))

    def call() -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] == k.shape[2])

    try:
        return Ready(call, seconds_of(call, problem.device), exact=False)
    except RuntimeError as error:
        raise UnavailableError(f"cuDNN refuses: {first_line(error)}") from error


def _like_heads(problem: Problem, x: Tensor) -> Tensor:
    """A tensor of every head; where the pattern's is a latent, one of the width of q."""
    batch, heads, _, width = problem.q.shape
    if x.shape[1] == heads and x.shape[3] == width:
        return x
    return torch.randn(batch, heads, x.shape[2], width, device=x.device, dtype=x.dtype, requires_grad=x.requires_grad)


def _formula(problem: Problem) -> Formula:
    pattern = problem.work.pattern
    formula = FORMULAS.get(pattern)
    if formula is None:
        raise UnavailableError(f"no formula is written for {pattern}")
    few = pattern == "mla" and problem.q.shape[2] <= min(FEW, problem.k.shape[2] - 1)
    return mla_absorbed if few else formula


def _ready(problem: Problem, formula: Formula) -> Ready:
    """In 16 bits the formula rounds every step: another result, within more than the pattern's tolerance."""
    call = partial(formula, problem.q, problem.k, problem.v, **problem.settings)
    try:
        first = seconds_of(call, problem.device)
    except Exception as error:  # memory, or the compiler's own failures, which have no common type
        raise UnavailableError(f"torch fails: {first_line(error)}") from error
    return Ready(call, first, exact=problem.dtype in (torch.float32, torch.float64))

"""Gradients beside the peers': `python -m benchmarks.training [SUITE] --markdown out.md`.

For every row the same tensors and the same cotangent: the gradients of attnc are first compared with the float64
reference's at a small size and with FlexAttention's (or cuDNN's) at the timed size, then the backward alone is timed,
interleaved. Also: whether two steps give equal bits, and the peak memory of window training as the length doubles.
Needs a CUDA device; exits with 1 if a gradient is wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import multiprocessing
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import attnc
from attnc.runtime.tolerance import error, tolerance
from benchmarks.by_hand import CHOOSING
from benchmarks.compiling import chosen_works
from benchmarks.contenders import CONTENDERS, LABELS
from benchmarks.ready import PREPARING, UnavailableError, first_line, within
from benchmarks.run import SUITES
from benchmarks.suites import fixed
from benchmarks.timing import side_by_side
from benchmarks.work import EXAMPLES, Problem, Size, Work

AIMS = {
    "causal D128": 1.1,
    "causal D64": 1.1,
    "window 1024": 1.2,
    "dilated 256x8": 4.0,
    "strided 128/128": 15.0,
    "longformer 256/64": 1.2,
    "documents": 1.2,
}
PEERS = ("cudnn", "flex", "fla", "by_hand")
JOBS = 8  # processes that compile a peer's gradients beforehand
LIMIT = 150  # seconds that they may take
LENGTHS = (32768, 65536, 131072)
Step = Callable[[], tuple[Tensor, ...]]


def main() -> int:
    """Runs the rows; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training")
    parser.add_argument("suite", nargs="?", default="fixed", choices=SUITES)
    parser.add_argument("--row", action="append", metavar="TEXT", help="rows whose name contains this; repeatable")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="where to write the table")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks.training needs a CUDA device", file=sys.stderr)
        return 2
    works = chosen_works(arguments.suite, "cuda", False, arguments.row)
    if arguments.suite == "fixed" and arguments.row is None:
        works = [work for work in works if work.name in AIMS]
    compile_beside(works)
    return 0 if run(works, arguments.markdown, arguments.suite == "fixed" and arguments.row is None) else 1


def run(works: Sequence[Work], markdown: Path | None, memory_too: bool = False) -> bool:
    """Measures the rows and writes the table after each; whether all gradients are right."""
    lines = [*heading(), *TABLE]
    wrong = 0
    for work in works:
        try:
            line, agrees = row(work)
        except Exception as failure:  # one row's failure, whatever it is, must not lose the others
            line, agrees = f"| {work.name} | {first_line(failure)} |", False
        wrong += not agrees
        lines.append(line)
        print(line, flush=True)
        torch.cuda.empty_cache()
        if markdown:
            markdown.write_text("\n".join(lines) + "\n", "utf-8")
    if memory_too:
        lines += ["", *memory()]
        print("\n".join(lines))
        if markdown:
            markdown.write_text("\n".join(lines) + "\n", "utf-8")
    return not wrong


def compile_beside(works: Sequence[Work]) -> None:
    """Compiles FlexAttention's gradients, a process a row; they are found again by the caches on disk."""
    wanted = [work.name for work in works if work.mask is not None and "flex" in work.peers]
    if not wanted:
        return
    with multiprocessing.get_context("spawn").Pool(min(JOBS, len(wanted)), maxtasksperchild=1) as pool:
        answers = [pool.apply_async(compile_one, (name,)) for name in wanted]
        until = time.perf_counter() + LIMIT
        for answer in answers:
            with contextlib.suppress(multiprocessing.TimeoutError):
                answer.get(timeout=max(until - time.perf_counter(), 0.1))


def compile_one(name: str) -> None:
    """One row of the fixed suite; whatever goes wrong is met again where it is measured."""
    work = next(work for work in fixed.gpu_works() if work.name == name)
    with contextlib.suppress(Exception):
        gradients(training_problem(work, work.timed), "flex")[0]()


TABLE = [
    "| work | attnc bwd ms | cuDNN bwd | Flex bwd | x Flex | aim | attnc fwd+bwd | Flex fwd+bwd | error | bits |",
    "|---|---|---|---|---|---|---|---|---|---|",
]


def heading() -> list[str]:
    """Where and when."""
    import triton

    place = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}"
    return [
        f"# Backward, bfloat16: {place}, {datetime.date.today()}",
        "",
        "`python -m benchmarks.training`. Medians of interleaved samples, milliseconds. `error`: the largest",
        "relative difference of a gradient from the float64 reference's (small size) and from the peer's (timed size).",
        "`bits`: whether two steps are equal to the bit.",
        "",
    ]


def gradients(problem: Problem, name: str) -> tuple[Step, Step]:
    """(backward alone, forward and backward) of a contender."""
    ready = CONTENDERS[name](problem)
    leaves = (problem.q, problem.k, problem.v)
    out = ready.call()
    cotangent = torch.randn(out.shape, generator=torch.Generator("cuda").manual_seed(2), device="cuda").to(out.dtype)
    backward = partial(torch.autograd.grad, out, leaves, cotangent, retain_graph=True)

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(ready.call(), leaves, cotangent)

    return backward, both


def training_problem(work: Work, size: Size) -> Problem:
    """The row's tensors, asking for gradients."""
    problem = Problem(work, size, "cuda", torch.bfloat16)
    for leaf in (problem.q, problem.k, problem.v):
        leaf.requires_grad_()
    return problem


def small_error(work: Work) -> float:
    """Against the float64 reference, in units of what is allowed."""
    problem = training_problem(work, work.small)
    leaves = (problem.q, problem.k, problem.v)
    out = problem.pattern(*leaves, **problem.settings)
    cotangent = torch.randn_like(out)
    given = torch.autograd.grad(out, leaves, cotangent)
    expected = torch.autograd.grad(problem.pattern.reference(*leaves, **problem.settings), leaves, cotangent.double())
    allowed = tolerance(torch.bfloat16, problem.k.shape[2])
    return max(error(one, other) for one, other in zip(given, expected, strict=True)) / allowed


def row(work: Work) -> tuple[str, bool]:
    """One line of the table, and whether the gradients agree."""
    small = small_error(work)
    problem = training_problem(work, work.timed)
    steps: dict[str, tuple[Step, Step]] = {"attnc": gradients(problem, "attnc")}
    for peer in PEERS:
        if peer not in work.peers and peer != "cudnn":
            continue
        try:
            with within(PREPARING):
                steps[peer] = gradients(problem, peer)
        except UnavailableError as reason:
            print(f"{work.name}: {LABELS[peer]}: {reason}", file=sys.stderr)
        except Exception as failure:  # a peer's failure must not lose the row
            print(f"{work.name}: {LABELS[peer]}: {first_line(failure)}", file=sys.stderr)
    mine = steps["attnc"][0]()
    equal = all(torch.equal(one, other) for one, other in zip(mine, steps["attnc"][0](), strict=True))
    timed = 0.0
    for name, (step, _) in steps.items():
        if name != "attnc" and not (name == "by_hand" and work.pattern in CHOOSING):
            timed = max(timed, *(error(one, other.double()) for one, other in zip(mine, step(), strict=True)))
    allowed = 2 * tolerance(torch.bfloat16, problem.k.shape[2])
    first = partial(side_by_side, device="cuda", least=20, seconds=1.0)
    alone = first({name: partial(summed, step[0]) for name, step in steps.items()})
    both = first({name: partial(summed, step[1]) for name, step in steps.items()})
    shown = {name: f"{alone[name].median:.3f}" if name in alone else "-" for name in ("attnc", *PEERS)}
    whole = {name: f"{both[name].median:.3f}" if name in both else "-" for name in ("attnc", "flex")}
    for other in ("fla", "by_hand"):
        if other in alone:
            shown["flex"] = f"{LABELS[other]} {shown[other]}"
            whole["flex"] = (
                f"{LABELS[other]} {both[other].median:.3f}, {both[other].median / both['attnc'].median:.2f}x"
            )
    ratio = f"{alone['flex'].median / alone['attnc'].median:.2f}" if "flex" in alone else "-"
    agrees = small <= 1 and timed <= allowed and equal
    cells = [work.name, shown["attnc"], shown["cudnn"], shown["flex"], ratio, f"{AIMS.get(work.name, '-')}"]
    cells += [whole["attnc"], whole["flex"], f"{small:.2f} of allowed, {timed:.1e}", "equal" if equal else "DIFFER"]
    return f"| {' | '.join(cells)} |", agrees


def summed(step: Step) -> Tensor:
    """A step as a call that gives one tensor."""
    return step()[0]


def memory() -> list[str]:
    """Peak of a window training step beyond its inputs, as the length doubles."""
    pattern = attnc.load(EXAMPLES / "sliding_window.attn").sliding_window
    lines = ["Peak memory of a step of sliding_window(1024), B1 H8 D128 bf16, beyond q, k, v:", ""]
    for length in LENGTHS:
        shape = (1, 8, length, 128)
        leaves = [torch.randn(shape, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in "qkv"]
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = pattern(*leaves, window=1024)
        torch.autograd.grad(out, leaves, torch.ones_like(out))
        peak = torch.cuda.max_memory_allocated() - before
        lines.append(f"- {length} tokens: {peak / 2**20:.0f} MiB, {peak / length:.0f} bytes a token")
    return lines


if __name__ == "__main__":
    sys.exit(main())

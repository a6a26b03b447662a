"""Compiles FlexAttention's kernels in parallel beforehand: one after the other they take longer than all the rest.

Its compiled code is found again by the caches on disk, which `benchmarks.run` has made fresh, so that the seconds told
are those of a first use.
"""

from __future__ import annotations

import importlib
import multiprocessing
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from benchmarks.contenders import CONTENDERS
from benchmarks.ready import first_line
from benchmarks.work import Problem, Work

if TYPE_CHECKING:
    from types import ModuleType

HARD = ("flex",)  # contenders that compile for long
LIMIT = 150  # seconds that one row may take


def suite_module(suite: str) -> ModuleType:
    """The module of a suite."""
    return importlib.import_module(f"benchmarks.suites.{suite}")


def chosen_works(suite: str, device: str, quick: bool, names: Sequence[str] | None = None) -> list[Work]:
    """The rows of a suite for a device, all or those whose name contains one of `names`."""
    works: list[Work] = suite_module(suite).works(device)
    found = [work for work in works if names is None or any(name in work.name for name in names)]
    return [work.quick() for work in found] if quick else found


def compile_one(suite: str, device: str, quick: bool, name: str, contender: str) -> float | str:
    """Seconds to the first result of one contender in one row, or why there is none. Runs in a process of its own."""
    work = next((work for work in chosen_works(suite, device, quick) if work.name == name), None)
    if work is None:  # a row that was made to another length is compiled in its turn
        return "not in the suite"
    try:
        with torch.no_grad():
            problem = Problem(work, work.timed, device, torch.bfloat16)
            return CONTENDERS[contender](problem).first_seconds
    except Exception as error:  # the row itself will meet it again, and report it
        return first_line(error)


def compile_beside(
    suite: str, device: str, quick: bool, works: Sequence[Work], jobs: int
) -> Mapping[str, dict[str, float]]:
    """Seconds by row and contender; what failed or took too long is left out."""
    wanted = [(work.name, contender) for work in works for contender in HARD if contender in work.peers and work.mask]
    seconds: dict[str, dict[str, float]] = {work.name: {} for work in works}
    if not wanted or not device.startswith("cuda"):
        return seconds
    with multiprocessing.get_context("spawn").Pool(min(jobs, len(wanted)), maxtasksperchild=1) as pool:
        waiting = [
            (name, contender, pool.apply_async(compile_one, (suite, device, quick, name, contender)))
            for name, contender in wanted
        ]
        for name, contender, answer in waiting:
            try:
                found = answer.get(timeout=LIMIT)
            except multiprocessing.TimeoutError:
                continue
            if isinstance(found, float):
                seconds[name][contender] = found
            else:
                print(f"{name}: {contender}: {found}", flush=True)
    return seconds

"""Tests that can fail: each pass is broken on purpose, and the property that guards it must notice."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from attnc.compiler import algebra, conditions, domains, schedule, tabulate
from attnc.compiler import simplify as simplification
from attnc.compiler.domains import DomainBuilder, Keys
from attnc.compiler.emit import bounds
from attnc.compiler.emit.bounds import Exact, Limits, TileBounds
from attnc.compiler.emit.kernel import Kernel
from attnc.compiler.emit.ranges import Ranges
from attnc.compiler.emit.streamed import StreamedForward
from attnc.compiler.ir import Graph, Node
from attnc.compiler.membership import Tables
from attnc.compiler.plan import Bounds, Domain, KeySet, Rows, Run
from attnc.compiler.trends import DOWN
from attnc.runtime.cpu import executor, pieces, tiles
from attnc.runtime.cuda import launch
from tests.compiler.pairs import Case, check_domains, check_execution, check_values, example, pattern_of

Change = Callable[[pytest.MonkeyPatch], None]
Check = Callable[[Case], None]


def kernels(case: Case) -> None:
    check_execution(case, launch.execute)
    check_values(case, launch.execute)


def batched(case: Case) -> None:
    check_execution(case, executor.execute)
    check_values(case, executor.execute)


def text(condition: str, **settings: int) -> Case:
    head = "pattern p(w: int = 3, p: int = 4):\n    input doc: int[b, t]\n    input columns: int[h, x]\n"
    values = {"doc": torch.tensor([[2, 0, 2, 1, 1, 0, 2, 2, 0]]), "columns": torch.tensor([[1, 4], [7, 1]])}
    return Case(
        pattern_of(f"{head}    out = softmax[j](q @ k * scale where {condition}) @ v\n"), 9, 9, settings, values
    )


CASES: dict[str, Callable[[], Case]] = {
    "window": lambda: Case(example("sliding_window"), 40, 70, {"window": 20}),
    "longformer": lambda: Case(example("longformer"), 70, 70, {"radius": 5, "globals": 3}),
    "streaming": lambda: Case(example("streaming"), 70, 70, {"sinks": 5, "window": 20}),
    "dilated": lambda: Case(example("dilated_window"), 24, 24, {"window": 3, "dilation": 4}),
    "strided": lambda: Case(example("strided"), 70, 70, {"local": 6, "stride": 5}),
    "sparse_fixed": lambda: Case(example("sparse_fixed"), 24, 24, {"block": 6, "summary": 2}),
    "swin": lambda: Case(example("swin"), 48, 48, {"height": 6, "width": 8, "window": 3, "shift": 1}),
    "bias": lambda: Case(example("relative_bias"), 40, 40, {"buckets": 8, "distance": 16, "scale": 1.0}),
    "bigbird": lambda: Case(example("bigbird"), 40, 40, {"block": 4, "randoms": 2}),
    "sink": lambda: Case(example("sink_logit"), 150, 150, {}, {"sink": torch.full((2,), -1.0e4)}),
    "causal": lambda: Case(example("causal"), 150, 150),
    "documents": lambda: text("doc[i] == doc[j]"),
    "columns": lambda: text("j in columns[h] or i == j"),
    "either": lambda: text("i - j == w or j < 2 and i < 5"),
    "neither": lambda: text("not (j < w or i < 2) or i // p == j // p and j < 6"),
    "local": lambda: Case(example("local_window"), 70, 70, {"radius": 10}),
    "wide": lambda: Case(example("sliding_window"), 100, 160, {"window": 75}),
    "blocks": lambda: text("j // p in columns[h] or i == j"),
    "turned": lambda: text("i - 2 * j <= w"),
    "uneven": lambda: text("3 * j <= 2 * i + w"),
}


@dataclass(frozen=True)
class Mutation:
    """A change, the case that shows it and the check that must fail."""

    name: str
    case: str
    check: Check
    change: Change


def returns(place: Any, name: str, turn: Callable[[Any, Any], Any]) -> Change:
    """What a function gives is turned into something else: `turn(result, first argument)`."""

    def change(patch: pytest.MonkeyPatch) -> None:
        original = getattr(place, name)

        def changed(*args: Any, **keywords: Any) -> Any:
            return turn(original(*args, **keywords), args[0])

        patch.setattr(place, name, changed)

    return change


def instead(place: Any, name: str, other: Any) -> Change:
    return lambda patch: patch.setattr(place, name, other)


def moved(by: int) -> Callable[[Node, DomainBuilder], Node]:
    return lambda bound, builder: builder.graph.make("add", bound, builder.graph.literal(by))


def written(old: str, new: str) -> Change:
    """A line of the forward kernel is another. The pattern must occur."""

    def turn(kernel: Kernel, _: StreamedForward) -> Kernel:
        changed, count = re.subn(old, new, kernel.text)
        assert count, f"no {old} in the kernel"
        return replace(kernel, text=changed)

    return returns(StreamedForward, "kernel", turn)


def cut_early(patch: pytest.MonkeyPatch) -> None:
    """Row tiles of a few key tiles are cut into parts."""
    patch.setattr(schedule, "SMALLEST_PART", 1)
    patch.setattr(schedule, "PARTS_PER_PROCESSOR", 100)


def split_and(change: Change) -> Change:
    """The same where row tiles are cut into parts."""

    def both(patch: pytest.MonkeyPatch) -> None:
        cut_early(patch)
        change(patch)

    return both


def without_mask(key_set: KeySet, builder: DomainBuilder) -> KeySet:
    return replace(key_set, mask=builder.graph.literal(True))


def all_inner(run: Run, _: DomainBuilder) -> Run:
    return Run(run.outer, run.outer)


def no_guard(keys: Any, _: DomainBuilder) -> Any:
    keys.guards.clear()
    return keys


def undivided(ends: Any, _: TileBounds) -> Any:
    """Every part runs from the start."""
    return "0", ends[1]


def outer_only(exact: Any, of: TileBounds) -> Any:
    return exact or Exact(tuple(Limits(of.name("lo0"), of.name("hi0"), True, True) for _ in of.key_set.runs[:1]))


def negated_wrongly(graph: Graph, node: Node) -> Node | None:
    """not (x < y) -> y < x"""
    if node.op == "not" and node.args[0].op in ("lt", "le"):
        x, y = node.args[0].args
        return graph.make(node.args[0].op, y, x)
    return None


def first_argument(node: Node | None, _: Graph) -> Node | None:
    return node and node.args[0]


def rounded_down(bound: Any, divisor: Any) -> Any:
    return bound and bound.map(lambda value: algebra.FloorDiv(value, divisor))


def everything(self: DomainBuilder, keys: Keys, walk: Any) -> set[Node]:
    return set(keys.atoms)


def ungrouped(domain: Domain, _: DomainBuilder) -> Domain:
    return replace(domain, rows=Rows())


def outer_twice(found: tuple[Bounds, Bounds] | None, _: Tables) -> tuple[Bounds, Bounds] | None:
    return found and (found[0], found[0])


def non_empty(intervals: list[tuple[int, int]]) -> list[tuple[int, int]]:
    return [one for one in intervals if one[0] < one[1]]


def narrowed(hull: pieces.Hull, _: tiles.Tiling) -> pieces.Hull:
    return replace(hull, lo=[lo + 20 for lo in hull.lo])


def rephased(found: Any, solver: Any) -> Any:
    return found and replace(found, phase=solver.graph.make("add", found.phase, solver.graph.literal(1)))


def wraps(place: Any, name: str, wrap: Callable[[Any], Any]) -> Change:
    return lambda patch: patch.setattr(place, name, wrap(getattr(place, name)))


def uncovered(subtract: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, keys, covered, rows: subtract(self, keys, [], rows)


def shifted(read: Callable[..., Node]) -> Callable[..., Node]:
    def changed(graph: Graph, node: Node, tables: Any) -> Node:
        taken = read(graph, node, tables)
        table, place = taken.args
        beside = graph.make("add", place, graph.literal(1))
        return graph.make("take", table, beside, type=taken.type, attribute=taken.attribute)

    return changed


def counting(op: str) -> Any:
    """`Tables._ranked` with another comparison of the two ranks."""
    return lambda node, tables: tables.graph.make(op, *node.args)


MUTATIONS = [
    # simplify, conditions, algebra
    Mutation("a wrong rule", "neither", check_domains, instead(simplification, "RULES", (negated_wrongly,))),
    Mutation("a conjunction is lost", "either", check_domains, returns(domains, "disjunction", lambda x, _: x[:-1])),
    Mutation("not is forgotten", "strided", check_domains, instead(domains, "negate", lambda graph, node: node)),
    Mutation("|x| loses a side", "longformer", check_domains, returns(conditions, "split_absolute", first_argument)),
    Mutation("division rounds down", "uneven", check_domains, instead(algebra, "_ceiling", rounded_down)),
    Mutation("an interval is not turned", "turned", check_domains, instead(algebra, "_complement", lambda x: x)),
    Mutation("a phase too far", "dilated", check_domains, returns(algebra, "_congruence", rephased)),
    Mutation("every order is certain", "strided", check_domains, instead(domains, "at_most", lambda *_: True)),
    # domains
    Mutation("an upper bound short by one", "window", check_domains, returns(DomainBuilder, "smallest", moved(-1))),
    Mutation("an upper bound long by one", "window", check_domains, returns(DomainBuilder, "smallest", moved(1))),
    Mutation("a lower bound short by one", "window", check_domains, returns(DomainBuilder, "largest", moved(1))),
    Mutation("a lower bound long by one", "window", check_domains, returns(DomainBuilder, "largest", moved(-1))),
    Mutation("no mask", "window", check_domains, returns(DomainBuilder, "consecutive", without_mask)),
    Mutation("no mask on a walk", "strided", check_domains, returns(DomainBuilder, "subtract", without_mask)),
    Mutation("wrong inner bounds", "documents", check_domains, returns(DomainBuilder, "run", all_inner)),
    Mutation("a guard is forgotten", "longformer", check_domains, returns(DomainBuilder, "solve_atoms", no_guard)),
    Mutation("overlaps stay", "strided", check_domains, wraps(DomainBuilder, "subtract", uncovered)),
    Mutation("a walk is trusted", "sparse_fixed", check_domains, instead(DomainBuilder, "walked_exactly", everything)),
    Mutation("classes in one tile", "dilated", check_domains, returns(DomainBuilder, "build", ungrouped)),
    # tables
    Mutation("tables without gaps", "documents", check_domains, returns(Tables, "equal_bounds", outer_twice)),
    Mutation("all are members", "blocks", check_domains, returns(Tables, "_ranked", counting("le"))),
    Mutation("a table read beside", "bias", batched, wraps(tabulate, "_read", shifted)),
    # emit: the running softmax
    Mutation("sums are not rescaled", "causal", kernels, written(r"total \* fade", "total")),
    Mutation("values are not rescaled", "causal", kernels, written(r"acc \* fade\[:, None\]", "acc")),
    Mutation("the maximum stands still", "causal", kernels, written(r"\n( +)largest = peak", r"\n\1largest = largest")),
    Mutation("dead scores stay", "window", kernels, written(r's = tl\.where\(.*, s, float\("-inf"\)\)', "s = s")),
    Mutation("keys past a bound count", "local", kernels, written(r"\(j\[None, :\] < hi", "(j[None, :] <= hi")),
    Mutation("a condition is not asked", "documents", kernels, returns(TileBounds, "exact", outer_only)),
    # emit: which tiles
    Mutation("tiles are visited twice", "streaming", kernels, instead(Ranges, "sweep", lambda *_: None)),
    Mutation("no first tile", "window", kernels, written(r"(tile0_0 = .*) // BLOCK_N", r"\1 // BLOCK_N + 1")),
    Mutation("no last tile", "causal", kernels, written(r"tl\.cdiv\((last0_0), BLOCK_N\)", r"\1 // BLOCK_N")),
    Mutation("full too early", "wide", kernels, written(r"tl\.cdiv\((full_first0_0), BLOCK_N\)", r"\1 // BLOCK_N")),
    Mutation("full too long", "causal", kernels, written(r"(full_last0_0) // BLOCK_N", r"tl.cdiv(\1, BLOCK_N)")),
    Mutation("extremes at the wrong end", "window", kernels, instead(bounds, "trend", lambda *_: DOWN)),
    Mutation("all tiles are full", "window", kernels, written(r"if APART or \(\(tile_n .*:", "if tile_n < 0:")),
    Mutation("steps begin beside", "strided", kernels, written(r"(origin_1 = .*)", r"\1 + 1")),
    Mutation("digits of the grid beside", "swin", kernels, written(r"(low_from_0 = .*)", r"\1 + 1")),
    Mutation("another line", "bigbird", kernels, written(r"(line_1 = tl\.minimum\(line_1), ", r"\1 + 1, ")),
    Mutation("parts overlap", "causal", kernels, split_and(returns(TileBounds, "share", undivided))),
    Mutation("every part has the sink", "sink", kernels, split_and(written(r"if part == 0:", "if part >= 0:"))),
    # the CPU back end
    Mutation("tiles are never masked", "window", batched, instead(pieces, "gaps", lambda *_: ())),
    Mutation("pieces overlap", "streaming", batched, instead(pieces, "union", non_empty)),
    Mutation("hulls are too small", "window", batched, returns(tiles.Tiling, "hull", narrowed)),
]


@pytest.mark.parametrize("check", [check_domains, batched, kernels], ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", CASES)
def test_nothing_broken_passes(name: str, check: Check) -> None:
    check(CASES[name]())


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name.replace(" ", "-"))
def test_a_broken_pass_is_noticed(mutation: Mutation, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[mutation.case]()
    mutation.change(monkeypatch)
    with pytest.raises(AssertionError, match=r"pair|live|differ|class|statistic|weights"):
        mutation.check(case)


def test_parts_of_split_tiles_join(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a mutation: the cut tiles of the two mutations above are right, and there are some."""
    cut_early(monkeypatch)
    lists: list[Any] = []

    def note(listed: Any, _: Any) -> Any:
        lists.append(listed)
        return listed

    returns(launch, "program_list", note)(monkeypatch)
    for name in ("causal", "sink", "longformer"):
        kernels(CASES[name]())
    assert len([listed for listed in lists if listed is not None]) >= 2

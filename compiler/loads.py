"""The cost model: what the launches of a step do in one call, as sympy expressions, and how long a device takes.

Symbols are those of `attnc explain`: B H Hk N M D E and `itemsize`; `live`, the pairs of all heads that have a weight
(`totals` has their closed form); F and C, features and positions of a chunk of a carried state. Every tensor is read
or written once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import sympy

from attnc.compiler.algebra import Expr
from attnc.compiler.composition import Carry, Choose, Recur
from attnc.compiler.plan import Plan
from attnc.compiler.totals import value_of

B, H, HK, N, M, D, E = sympy.symbols("B H Hk N M D E", integer=True, nonnegative=True)
F, C, P, L, LIVE, ITEM = sympy.symbols("F C P L live itemsize", integer=True, nonnegative=True)
FOUR = sympy.Integer(4)  # bytes of row statistics and of states
CHUNK = 64

QUERIES, KEYS = B * H * N, B * HK * M
# Operations of a pair by what a kernel does. Weights are made again for gradients: three products for q's, four for
# those of k and v (FlashAttention-2, arXiv 2307.08691, section 3.1).
OF_A_PAIR = {"forward": 2 * (D + E), "rows": 4 * D + 2 * E, "keys": 4 * (D + E)}


@dataclass(frozen=True)
class Load:
    """Some launches of one pass. `branch` and `side` (which side stays) where they walk a domain of a plan."""

    name: str
    operations: Expr
    exponentials: Expr
    moved: Expr
    launches: int
    branch: int = 0
    side: str = ""

    def at(self, values: Mapping[str, int]) -> Amount:
        """What it comes to for values by name."""
        operations, exponentials, moved = (
            int(value_of(one, values)) for one in (self.operations, self.exponentials, self.moved)
        )
        return Amount(operations, exponentials, moved, self.launches)


@dataclass(frozen=True)
class Amount:
    """A load in numbers."""

    operations: int
    exponentials: int
    moved: int
    launches: int = 1


@dataclass(frozen=True)
class Tiles:
    """What kernels visit: pairs of tiles over live pairs, and the turns of their loops."""

    waste: float
    turns: float


@dataclass(frozen=True)
class Rates:
    """What a device does at most in a second. `operations`: of matrix products by bytes of an element.

    `exponentials`: 0 where not known. Seconds beside what is counted: of a `launch`, and of a `turn` of a loop, all
    processors together. `source`: where from.
    """

    name: str
    bytes: float
    operations: Mapping[int, float]
    exponentials: float
    launch: float
    turn: float
    source: str

    def floor(self, amount: Amount, itemsize: int) -> float:
        """Seconds below which nothing can be: every byte once, every operation at the full rate."""
        return max(amount.moved / self.bytes, self.products(amount.operations, itemsize))

    def products(self, operations: float, itemsize: int) -> float:
        """Seconds of matrix products."""
        return operations / self.operations[itemsize] if operations else 0.0

    def work(self, operations: float, exponentials: float, itemsize: int) -> float:
        """Seconds. An exponential waits for one product and the next waits for it, so their times add up."""
        own = exponentials / self.exponentials if self.exponentials else 0.0
        return self.products(operations, itemsize) + own

    def predicted(self, amount: Amount, itemsize: int, tiles: Tiles | None = None) -> float:
        """Seconds. `tiles`: what is visited; None: what is live, in no turns."""
        work = self.work(amount.operations, amount.exponentials, itemsize)
        if tiles is not None:
            work = work * tiles.waste + tiles.turns * self.turn
        return max(amount.moved / self.bytes, work) + amount.launches * self.launch


# Float32 takes three passes of TF32, each at half the rate of bfloat16. Special functions: 16 a cycle on each of 132
# multiprocessors (CUDA C++ programming guide, throughput of native arithmetic instructions, 9.0) at 1.755 GHz. A turn:
# tiles of 64 x 32 beside 64 x 64 in causal attention (benchmarks/results/tiles-h100.md).
KNOWN = {
    "NVIDIA H100 80GB HBM3": Rates(
        "NVIDIA H100 80GB HBM3",
        bytes=3.005e12,
        operations={2: 806.7e12, 4: 806.7e12 / 6},
        exponentials=132 * 16 * 1.755e9,
        launch=7e-6,
        turn=0.5e-9,
        source="copies, a product and an empty launch, measured",
    )
}


def forward_loads(plan: Plan) -> list[Load]:
    """A softmax of rows over keys and its sum of values: a kernel a branch; two products a pair."""
    return [
        Load(
            f"forward_{number}",
            OF_A_PAIR["forward"] * LIVE,
            LIVE,
            ITEM * (QUERIES + KEYS) * (D + E) + FOUR * QUERIES,
            1,
            number,
            "i",
        )
        for number in range(len(plan.branches))
    ]


def gradient_loads(plan: Plan) -> list[Load]:
    """Its gradients. `plan`: with transposed domains."""
    statistics = 2 * FOUR * QUERIES  # lse and delta
    read = ITEM * (QUERIES + KEYS) * (D + E) + statistics
    loads = [Load("row_products", sympy.Integer(0), sympy.Integer(0), QUERIES * (2 * ITEM * E + FOUR), 1)]
    for number, branch in enumerate(plan.branches):
        rows = Load(
            f"backward_rows_{number}", OF_A_PAIR["rows"] * LIVE, LIVE, read + ITEM * QUERIES * D, 1, number, "i"
        )
        passes = max(len(branch.transposed), 1)
        keys = Load(
            f"backward_keys_{number}",
            OF_A_PAIR["keys"] * LIVE,
            LIVE,
            passes * read + ITEM * KEYS * (D + E),
            passes,
            number,
            "j",
        )
        loads += [rows, keys]
    return loads


def choice_load(step: Choose) -> Load:
    """A selection by scores: the product of every line with every place, `P`; what is listed, `L` entries, is written.

    Places that a condition leaves out are counted, the taking of the best is not.
    """
    moved = ITEM * (QUERIES + B * HK * P) * D + FOUR * L
    return Load(step.name, 2 * D * QUERIES * P, sympy.Integer(0), moved, 1)


def state_load(step: Carry | Recur) -> Load:
    """A state F x E that runs along the keys: into the states and out of them, and pairs within chunks."""
    pairs = 2 * C * N * (F + E) if isinstance(step, Carry) else C * M * (8 * F + 4 * E)
    states = 2 * FOUR * B * H * M * F * E / C  # before each chunk: written, and read
    moved = ITEM * (QUERIES + KEYS) * (F + E) + states
    launches = (2 if isinstance(step, Carry) else 3) + (step.decay is not None)
    return Load(step.name, B * H * (2 * F * E * (N + M) + pairs), sympy.Integer(0), moved, launches)

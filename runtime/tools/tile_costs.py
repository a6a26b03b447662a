"""What tiles of a shape cost by the cost model, to say which shapes are worth measuring."""

from __future__ import annotations

from attnc.compiler.loads import KNOWN, OF_A_PAIR, Amount, Tiles
from attnc.compiler.plan import Domain, Plan
from attnc.compiler.schedule import TileShape
from attnc.compiler.totals import value_of
from attnc.runtime.call import Call
from attnc.runtime.cuda.kernel_call import padded
from attnc.runtime.cuda.work import RowTiles, splits, work_of


def tile_seconds(plan: Plan, domain: Domain, call: Call, role: str, shape: TileShape) -> float:
    """Seconds of a kernel, comparable between shapes; 0 where tensors steer its tiles. `role`: see `candidates`.

    Rates are those of a known device whatever the device at hand: their ratios differ little.
    """
    if role not in OF_A_PAIR or not splits(domain):
        return 0.0
    value = call.k if call.v is None else call.v
    widths = {"D": padded(call.sizes["d"]), "E": padded(value.shape[3])}
    itemsize = call.q.element_size()
    pairs = tile_pairs(plan, domain, call, shape, "j" if role == "keys" else "i")
    amount = Amount(pairs * int(value_of(OF_A_PAIR[role], widths)), pairs, 0)
    tiles = Tiles(1.0, pairs / (shape.block_m * shape.block_n))
    return next(iter(KNOWN.values())).predicted(amount, itemsize, tiles)


def tile_pairs(plan: Plan, domain: Domain, call: Call, shape: TileShape, at: str) -> int:
    """Pairs of the tiles of one domain in a tile shape, over all heads."""
    rows = RowTiles.of(plan, domain, call, shape, at)
    tiles = sum(work_of(plan, domain, call, shape, rows))
    return tiles * shape.block_m * shape.block_n * call.sizes["b"] * call.sizes["h"]

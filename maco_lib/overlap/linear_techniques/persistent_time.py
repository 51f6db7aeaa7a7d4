"""How long the persistent kernel takes, from a few constants, and which tiles it takes the least with. Without torch.

    T = end + max(all waves of tiles + the sums of the last wave's, the first wave + all transfers)

A wave is as many tiles, or pairs of them, as there are clusters at a time. The constants were set by runs on 2 H200s
before table `linear_all_reduce` of h200-x2 was measured.
"""

import functools
from dataclasses import dataclass, replace
from typing import NamedTuple

from maco_lib.kernels.tile_order import ROWS, TileOrder


class Tiling(NamedTuple):
    """Columns of a tile, and whether two neighbours are multiplied at once (see `kernels.tile_order`)."""

    columns: int
    pairs: bool

    def __str__(self) -> str:
        return f"2 × {self.columns}" if self.pairs else f"{self.columns}"


TILINGS = (Tiling(128, False), Tiling(160, False), Tiling(96, True), Tiling(128, True))
STEP = 64
ITEMSIZE = 2
# On H200s: a step of 64 along K of a tile and of a pair, the rest of a tile or pair; what a GPU fetches from its peers
# in a us; what follows the last fetch.
TILE_STEP_US = {Tiling(128, False): 0.376, Tiling(160, False): 0.4625, Tiling(96, True): 0.29, Tiling(128, True): 0.378}
PAIR_STEP_US = {Tiling(96, True): 0.555, Tiling(128, True): 0.74}
TILE_US, FETCHED_BYTES_PER_US, END_US = 0.6, 340e3, 8.0


@dataclass(frozen=True)
class PersistentTime:
    """In µs.

    waves: all waves of tiles. first: one of them. last_sums: to fetch what the others sum in the last wave, which
    nothing hides. fetched: to fetch everything. end: what follows the last fetch.
    """

    waves: float
    first: float
    last_sums: float
    fetched: float
    end: float = END_US

    @property
    def total(self) -> float:
        return max(self.waves + self.last_sums, self.first + self.fetched) + self.end

    @property
    def limit(self) -> str:
        """What it waits for: "matmul" or "transfers"."""
        return "matmul" if self.waves + self.last_sums >= self.first + self.fetched else "transfers"


def order_of(num_rows: int, num_columns: int, tiling: Tiling, num_ranks: int, max_clusters: int) -> TileOrder:
    """The order of a result's tiles.

    In one group for two ranks: the least waiting for partials. For more in several, as partials are fetched while a
    rank computes others' tiles, sums while it computes its own, which are fewer: both are to go on all the time. A
    group of about a wave, as a rank's own tiles of one are computed with the others' of the next, in which their
    partials are fetched; and no fewer than ranks, so that few sums are left to be fetched after the last.
    """
    order = TileOrder(
        -(-num_rows // ROWS), -(-num_columns // tiling.columns), num_ranks, max_clusters, pairs=tiling.pairs
    )
    if num_ranks == 2:
        return order
    return replace(order, num_groups=max(num_ranks, round(order.pieces / max_clusters)))


def time_of(order: TileOrder, k: int, tiling: Tiling) -> PersistentTime:
    """For tiles in this order, and `k` of each rank."""
    num_steps = -(-k // STEP)
    single = num_steps * TILE_STEP_US[tiling] + TILE_US
    pair = num_steps * PAIR_STEP_US[tiling] + TILE_US if order.pair_waves else 0.0
    tile_us = ROWS * tiling.columns * ITEMSIZE / FETCHED_BYTES_PER_US
    own = order.num_tiles / order.num_ranks / order.whole_groups
    others = order.num_ranks - 1
    fetched = 2 * others / order.num_ranks * order.num_tiles * tile_us
    waves = order.pair_waves * pair + order.single_waves * single
    return PersistentTime(waves, pair or single, min(order.last_wave, own) * others * tile_us, fetched)


def persistent_time(
    num_rows: int, num_columns: int, k: int, tiling: Tiling, num_ranks: int, max_clusters: int
) -> PersistentTime:
    """For x (num_rows, k) and weight (num_columns, k) on each rank."""
    return time_of(order_of(num_rows, num_columns, tiling, num_ranks, max_clusters), k, tiling)


@functools.lru_cache(maxsize=4096)
def fastest_tiling(num_rows: int, num_columns: int, k: int, num_ranks: int, max_clusters: int) -> Tiling:
    """The one predicted to be the fastest, of `TILINGS`."""
    shape = (num_rows, num_columns, k)
    return min(TILINGS, key=lambda tiling: persistent_time(*shape, tiling, num_ranks, max_clusters).total)


def terms_us(num_rows: int, num_columns: int, k: int, num_ranks: int, max_clusters: int) -> tuple[float]:
    """Time with the tiles that it takes."""
    tiling = fastest_tiling(num_rows, num_columns, k, num_ranks, max_clusters)
    return (persistent_time(num_rows, num_columns, k, tiling, num_ranks, max_clusters).total,)

"""How long the persistent kernel takes, from a few constants, and which tiles it takes the least with. Without torch.

    T = end + max(all waves of tiles + the sums of the last wave's, the first wave + all transfers)

A wave is as many tiles, or pairs of them, as there are clusters at a time; with more than two ranks it is longer by the
partials of the others, which are added one after the other. The constants were fitted to runs on H200s before those of
today's tables: 30 points of `linear_all_reduce` on 2 GPUs, and 360 on 4, of every tiling in 4, 8 and 16 groups.
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


TILINGS = (Tiling(128, False), Tiling(128, True), Tiling(160, False), Tiling(96, True))
# Of those predicted to take so much more than the fastest at most, the first: the model is no better.
TIE = 1.02
STEP = 64
ITEMSIZE = 2
# On H200s: a step of 64 along K of a tile and of a pair, the rest of a tile or pair; what the partials of each rank but
# the first other add to an own tile; what a GPU fetches from its peers in a us; what comes before the first wave and
# after the last fetch, of 2 ranks and for each further one.
TILE_STEP_US = {
    Tiling(128, False): 0.344,
    Tiling(160, False): 0.435,
    Tiling(96, True): 0.2655,
    Tiling(128, True): 0.344,
}
PAIR_STEP_US = {Tiling(96, True): 0.508, Tiling(128, True): 0.677}
TILE_US, ADDED_US, FETCHED_BYTES_PER_US, END_US, END_OF_RANK_US = 2.44, 3.4, 329e3, 3.6, 5.3
# More groups were up to 4 % slower: 19 to 62 of them on 4 ranks.
GROUPS_PER_RANK = 4


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
    end: float

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
    partials are fetched; no fewer than ranks, so that few sums are left to be fetched after the last, and no more than
    `GROUPS_PER_RANK` times as many.
    """
    order = TileOrder(
        -(-num_rows // ROWS), -(-num_columns // tiling.columns), num_ranks, max_clusters, pairs=tiling.pairs
    )
    if num_ranks == 2:
        return order
    waves = round(order.pieces / max_clusters)
    return replace(order, num_groups=min(max(num_ranks, waves), GROUPS_PER_RANK * num_ranks))


def time_of(order: TileOrder, k: int, tiling: Tiling) -> PersistentTime:
    """For tiles in this order, and `k` of each rank."""
    num_steps = -(-k // STEP)
    single = num_steps * TILE_STEP_US[tiling] + TILE_US
    pair = num_steps * PAIR_STEP_US[tiling] + TILE_US if order.pair_waves else 0.0
    tile_us = ROWS * tiling.columns * ITEMSIZE / FETCHED_BYTES_PER_US
    own = order.num_tiles / order.num_ranks / order.whole_groups
    others = order.num_ranks - 1
    further = max(others - 1, 0)
    fetched = 2 * others / order.num_ranks * order.num_tiles * tile_us
    added = (2 * order.pair_waves + order.single_waves) / order.num_ranks * further * ADDED_US
    waves = order.pair_waves * pair + order.single_waves * single + added
    end = END_US + further * END_OF_RANK_US
    return PersistentTime(waves, pair or single, min(order.last_wave, own) * others * tile_us, fetched, end)


def persistent_time(
    num_rows: int, num_columns: int, k: int, tiling: Tiling, num_ranks: int, max_clusters: int
) -> PersistentTime:
    """For x (num_rows, k) and weight (num_columns, k) on each rank."""
    return time_of(order_of(num_rows, num_columns, tiling, num_ranks, max_clusters), k, tiling)


@functools.lru_cache(maxsize=4096)
def fastest_tiling(num_rows: int, num_columns: int, k: int, num_ranks: int, max_clusters: int) -> Tiling:
    """The first of `TILINGS` that is predicted to be the fastest, or hardly slower (`TIE`)."""
    shape = (num_rows, num_columns, k)
    times = {tiling: persistent_time(*shape, tiling, num_ranks, max_clusters).total for tiling in TILINGS}
    return next(tiling for tiling, us in times.items() if us <= TIE * min(times.values()))


def terms_us(num_rows: int, num_columns: int, k: int, num_ranks: int, max_clusters: int) -> tuple[float]:
    """Time with the tiles that it takes."""
    tiling = fastest_tiling(num_rows, num_columns, k, num_ranks, max_clusters)
    return (persistent_time(num_rows, num_columns, k, tiling, num_ranks, max_clusters).total,)

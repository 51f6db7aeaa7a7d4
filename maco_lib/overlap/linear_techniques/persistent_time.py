"""How long the persistent kernel takes, from a few constants, and which tiles it takes the least with. Without torch.

    T = end + max(all waves of tiles + the sums of the last wave's, the first wave + all transfers)

A wave is as many tiles as there are clusters at a time. The constants were set by runs on 2 H200s
before table `linear_all_reduce` of h200-x2 was measured, whose 36 problems of M = 512 to 16384 it is within 8 % of.
"""

import functools
from dataclasses import dataclass

from maco_lib.kernels.tile_order import ROWS, TileOrder

TILE_COLUMNS = (128, 160, 192, 256)
STEP = 64
ITEMSIZE = 2
# On H200s: a step of 64 along K, by the tile's columns; the rest of a tile; what a GPU fetches from its peers in a us;
# what follows the last fetch.
STEP_US = {128: 0.376, 160: 0.4625, 192: 0.549, 256: 0.75}
TILE_US, FETCHED_BYTES_PER_US, END_US = 0.6, 340e3, 8.0
GROUPS_PER_RANK = 2


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


def order_of(num_rows: int, num_columns: int, k: int, bn: int, num_ranks: int, max_clusters: int) -> TileOrder:
    """The order of a result's tiles of `bn` columns.

    In one group where the transfers take the longest, or only two ranks share: the least waiting for partials. Else in
    many: a rank's own tiles of the last group are few, and so are the sums to be fetched after the last wave.
    """
    shape = (-(-num_rows // ROWS), -(-num_columns // bn), num_ranks, max_clusters)
    one, many = TileOrder(*shape), TileOrder(*shape, num_groups=GROUPS_PER_RANK * num_ranks)
    return one if num_ranks == 2 or time_of(many, k, bn).limit == "transfers" else many


def time_of(order: TileOrder, k: int, bn: int) -> PersistentTime:
    """For tiles of `bn` columns in this order, and `k` of each rank."""
    wave = -(-k // STEP) * STEP_US[bn] + TILE_US
    tile_us = ROWS * bn * ITEMSIZE / FETCHED_BYTES_PER_US
    last = order.num_tiles - (order.num_waves - 1) * order.max_clusters
    own = order.num_tiles / order.num_ranks / order.whole_groups
    others = order.num_ranks - 1
    fetched = 2 * others / order.num_ranks * order.num_tiles * tile_us
    return PersistentTime(order.num_waves * wave, wave, min(last, own) * others * tile_us, fetched)


def persistent_time(
    num_rows: int, num_columns: int, k: int, bn: int, num_ranks: int, max_clusters: int
) -> PersistentTime:
    """For x (num_rows, k) and weight (num_columns, k) on each rank, with tiles of `bn` columns."""
    return time_of(order_of(num_rows, num_columns, k, bn, num_ranks, max_clusters), k, bn)


@functools.lru_cache(maxsize=4096)
def fastest_columns(num_rows: int, num_columns: int, k: int, num_ranks: int, max_clusters: int) -> int:
    """Columns of the tiles predicted to be the fastest, of `TILE_COLUMNS`."""
    shape = (num_rows, num_columns, k)
    return min(TILE_COLUMNS, key=lambda bn: persistent_time(*shape, bn, num_ranks, max_clusters).total)


def predicted_us(num_rows: int, num_columns: int, k: int, num_ranks: int, max_clusters: int) -> float:
    """Time with the tiles that it takes."""
    bn = fastest_columns(num_rows, num_columns, k, num_ranks, max_clusters)
    return persistent_time(num_rows, num_columns, k, bn, num_ranks, max_clusters).total

"""The order in which every rank computes the tiles of a matmul that is summed over the ranks, and who sums which.

A tile here is a cluster's: 256 rows by some columns. Tiles go column by column through bands of rows, so that those in
flight together share operands in the L2 cache. Each of `num_groups` groups of them is divided among the ranks. A rank
computes the tiles of the others first, those of the next rank, then of the one after it, so that at any time every
rank is read by one other; and its own of a group after the others' of the next group: their partials have arrived.
"""

from dataclasses import dataclass

import numpy as np

CTAS = 2
ROWS = 128 * CTAS
BAND = 8  # tiles; 2048 rows


@dataclass(frozen=True)
class TileOrder:
    """For a result of num_m x num_n tiles, on GPUs that run `max_clusters` clusters at a time.

    height: so many rows of tiles are finished before the next so many are begun; 0: no such order.

    Raises ValueError where there are no tiles.
    """

    num_m: int
    num_n: int
    num_ranks: int
    max_clusters: int
    num_groups: int = 1
    height: int = 0

    def __post_init__(self) -> None:
        if self.num_m < 1 or self.num_n < 1:
            raise ValueError(f"{self.num_m} x {self.num_n} is no number of tiles")

    @property
    def num_tiles(self) -> int:
        return self.num_m * self.num_n

    @property
    def num_clusters(self) -> int:
        """Cluster c computes tiles c, c + num_clusters, ... of its rank's order."""
        return min(self.max_clusters, self.num_tiles)

    @property
    def num_waves(self) -> int:
        return -(-self.num_tiles // self.max_clusters)

    @property
    def whole_groups(self) -> int:
        """Groups in which every rank has a tile; then a rank's own tile comes after the others' partials of it."""
        return max(1, min(self.num_groups, self.num_tiles // self.num_ranks))

    @property
    def num_slots(self) -> int:
        """Tiles that the rank with the most of them owns, at most."""
        return -(-self.num_tiles // self.num_ranks) + self.whole_groups

    def raster(self) -> list[tuple[int, int]]:
        """(m, n) of every tile, neighbours near each other."""
        height = self.height or self.num_m
        ends = [(begin, min(begin + height, self.num_m)) for begin in range(0, self.num_m, height)]
        bands = [range(first, min(first + BAND, end)) for begin, end in ends for first in range(begin, end, BAND)]
        return [(m, n) for band in bands for n in range(self.num_n) for m in band]

    def table(self) -> np.ndarray:
        """(num_ranks, num_tiles, 4) of int32: m, n, owner and slot of the tiles, in the order of each rank.

        slot: counts an owner's tiles from 0; the same on every rank.
        """
        raster = self.raster()
        parts: list[list[list[tuple[int, int, int, int]]]] = []  # [group][owner]
        slots = [0] * self.num_ranks
        for group in np.array_split(np.arange(len(raster)), self.whole_groups):
            parts.append([])
            for owner, share in enumerate(np.array_split(group, self.num_ranks)):
                parts[-1].append([(*raster[index], owner, slots[owner] + place) for place, index in enumerate(share)])
                slots[owner] += len(share)
        orders = []
        for rank in range(self.num_ranks):
            order = []
            for number, group in enumerate(parts):
                order += [tile for owner in self.others(rank) for tile in group[owner]]
                order += parts[number - 1][rank] if number else []
            orders.append(order + parts[-1][rank])
        return np.array(orders, dtype=np.int32)

    def others(self, rank: int) -> list[int]:
        """The other ranks, beginning with the next one."""
        return [(rank + step) % self.num_ranks for step in range(1, self.num_ranks)]

    def fetches(self, rank: int) -> tuple[np.ndarray, np.ndarray]:
        """What each cluster of `rank` fetches: begin (num_clusters + 1,) and, from begin[c] to begin[c + 1], tiles.

        A tile: m, n, 2 * peer + is_partial, slot. A cluster fetches the partials of its own tiles and, of every peer's,
        the sums that the peer's cluster of the same number forms; in the order in which they become ready, partials
        first: no two ranks then wait for each other.
        """
        table = self.table()
        ready: list[list[tuple[int, ...]]] = [[] for _ in range(self.num_clusters)]
        places = [{(m, n): place for place, (m, n, _, _) in enumerate(order.tolist())} for order in table]
        for place, (m, n, owner, slot) in enumerate(table[rank].tolist()):
            for peer in self.others(rank) if owner == rank else ():
                ready[place % self.num_clusters].append((places[peer][m, n], 0, m, n, 2 * peer + 1, slot))
        for peer in self.others(rank):
            for place, (m, n, owner, slot) in enumerate(table[peer].tolist()):
                if owner == peer:
                    ready[place % self.num_clusters].append((place, 1, m, n, 2 * peer, slot))
        begin = np.cumsum([0, *map(len, ready)], dtype=np.int32)
        tiles = [tile[2:] for cluster in ready for tile in sorted(cluster)]
        return begin, np.array(tiles, dtype=np.int32).reshape(-1, 4)

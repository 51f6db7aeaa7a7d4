"""The order in which every rank computes the tiles of a matmul that is summed over the ranks, and who sums which.

A tile here is a cluster's: 256 rows by some columns. It is what is transferred and summed; multiplied it may be with
its right neighbour, in a pair, which takes less time than one after the other. Tiles go column by column through bands
of rows, so that those in flight together share operands in the L2 cache. Each of `num_groups` groups of them is divided
among the ranks. A rank computes the tiles of the others first, those of the next rank, then of the one after it, so
that at any time every rank is read by one other; and its own of a group after the others' of the next group: their
partials have arrived.
"""

import heapq
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

CTAS = 2
ROWS = 128 * CTAS
BAND = 8  # tiles; 2048 rows


class Work(NamedTuple):
    """What a cluster multiplies at once: `width` tiles (1, or 2: a pair) from tile (m, n) on.

    slot: counts its owner's tiles from 0, the same on every rank; of a pair's second tile it is one more.
    """

    m: int
    n: int
    width: int
    owner: int
    slot: int


class Placed(NamedTuple):
    """A piece of work, its place in the order of its rank's pieces, and the cluster that does it."""

    work: Work
    place: int
    cluster: int


@dataclass(frozen=True)
class TileOrder:
    """For a result of num_m x num_n tiles, on GPUs that run `max_clusters` clusters at a time.

    pairs: neighbours are multiplied at once, but for the last tiles: single ones fill the last wave better, and leave
    less to be fetched after it. staggered: half of the clusters begin with a single tile, and are half a pair ahead
    from then on: there is something to be fetched earlier, and half as much at a time twice as often. last: so many
    tiles of each rank's order are the last ones that are multiplied singly; 0, or too few tiles for a wave of pairs
    before them: those after the last full wave of pairs.

    Raises ValueError where there are no tiles.
    """

    num_m: int
    num_n: int
    num_ranks: int
    max_clusters: int
    num_groups: int = 1
    pairs: bool = False
    staggered: bool = False
    last: int = 0

    def __post_init__(self) -> None:
        if self.num_m < 1 or self.num_n < 1:
            raise ValueError(f"{self.num_m} x {self.num_n} is no number of tiles")

    @property
    def num_tiles(self) -> int:
        return self.num_m * self.num_n

    @property
    def num_clusters(self) -> int:
        return min(self.max_clusters, self.num_tiles)

    @property
    def ahead(self) -> int:
        """Tiles of each rank's order that are multiplied singly before any pair: an even number."""
        return -(-self.max_clusters // 4) * 2 if self.staggered else 0

    @property
    def in_pairs(self) -> int:
        """So many tiles of each rank's order are multiplied in pairs, the others singly."""
        wave, left = 2 * self.max_clusters, self.num_tiles - self.ahead
        if not self.pairs:
            return 0
        if self.last and left - self.last >= wave:
            return (left - self.last) // 2 * 2
        return max(left - 1, 0) // wave * wave  # a rest that would fill a wave of pairs, too, is done singly

    @property
    def pieces(self) -> int:
        """What is divided among the ranks: pairs where there are any, else tiles."""
        return self.num_m * -(-self.num_n // 2) if self.in_pairs else self.num_tiles

    @property
    def whole_groups(self) -> int:
        """Groups in which every rank has a piece; then a rank's own comes after the others' partials of it."""
        return max(1, min(self.num_groups, self.pieces // self.num_ranks))

    @property
    def num_slots(self) -> int:
        """Tiles that the rank with the most of them owns, at most."""
        return (-(-self.pieces // self.num_ranks) + self.whole_groups) * (2 if self.in_pairs else 1)

    def raster(self) -> list[tuple[int, int, int]]:
        """(m, n, width) of every piece, neighbours near each other."""
        width = 2 if self.in_pairs else 1
        bands = [range(first, min(first + BAND, self.num_m)) for first in range(0, self.num_m, BAND)]
        columns = range(0, self.num_n, width)
        return [(m, n, min(width, self.num_n - n)) for band in bands for n in columns for m in band]

    def pieces_in_order(self) -> list[list[Work]]:
        """By rank, in the order in which it computes them."""
        raster = self.raster()
        parts: list[list[list[Work]]] = []  # [group][owner]
        slots = [0] * self.num_ranks
        for group in np.array_split(np.arange(len(raster)), self.whole_groups):
            parts.append([])
            for owner, share in enumerate(np.array_split(group, self.num_ranks)):
                parts[-1].append([])
                for m, n, width in (raster[index] for index in share):
                    parts[-1][-1].append(Work(m, n, width, owner, slots[owner]))
                    slots[owner] += width
        orders = []
        for rank in range(self.num_ranks):
            order = []
            for number, group in enumerate(parts):
                order += [piece for owner in self.others(rank) for piece in group[owner]]
                order += parts[number - 1][rank] if number else []
            orders.append(order + parts[-1][rank])
        return orders

    def placed(self) -> list[list[Placed]]:
        """By rank, its work in order: each piece goes to the cluster that is free first.

        That is the one with the fewest tiles; of those with as many the one with the fewest pieces, as a pair takes
        less time than two tiles.
        """
        every = []
        for order in self.pieces_in_order():
            begun, done = 0, []
            free = [(0, 0, cluster) for cluster in range(self.num_clusters)]
            for place, piece in enumerate(order):
                is_split = not self.ahead <= begun <= self.ahead + self.in_pairs - piece.width
                for work in singles(piece) if is_split else (piece,):
                    tiles, pieces, cluster = heapq.heappop(free)
                    done.append(Placed(work, place, cluster))
                    heapq.heappush(free, (tiles + work.width, pieces + 1, cluster))
                begun += piece.width
            every.append(done)
        return every

    def others(self, rank: int) -> list[int]:
        """The other ranks, beginning with the next one."""
        return [(rank + step) % self.num_ranks for step in range(1, self.num_ranks)]

    def tables(self, rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """What each cluster of `rank` computes and what it fetches: begin and work, begin and fetches, all int32.

        From begin[c] to begin[c + 1] are those of cluster c. Work: m, n, 2 * owner + is_pair, slot. Fetches, a tile
        each: m, n, 2 * peer + is_partial, slot; the partials of the rank's own tiles, and the sums of the peers'. They
        are dealt to the clusters in turn, whoever computes the tile: the tiles that are due at a time may all be of a
        few clusters, and these fetch slower than the link carries. In the order of their ranks' places, partials first:
        no two ranks then wait for each other.
        """
        placed = self.placed()
        when = [{(each.work.m, n): each.place for each in order for n in columns(each.work)} for order in placed]
        work: list[list[tuple[int, ...]]] = [[] for _ in range(self.num_clusters)]
        fetches: list[tuple[int, ...]] = []  # place, whether it is a sum, then what the table holds
        for (m, n, width, owner, slot), _, cluster in placed[rank]:
            work[cluster].append((m, n, 2 * owner + (width == 2), slot))
            for peer in self.others(rank) if owner == rank else ():
                for step in range(width):
                    fetches.append((when[peer][m, n + step], 0, m, n + step, 2 * peer + 1, slot + step))
        for peer in self.others(rank):
            for (m, n, width, owner, slot), place, _ in placed[peer]:
                if owner == peer:
                    fetches += [(place, 1, m, n + step, 2 * peer, slot + step) for step in range(width)]
        in_order = [fetch[2:] for fetch in sorted(fetches)]
        dealt = [in_order[cluster :: self.num_clusters] for cluster in range(self.num_clusters)]
        return *joined(work), *joined(dealt)


def columns(work: Work) -> range:
    return range(work.n, work.n + work.width)


def singles(piece: Work) -> list[Work]:
    """Its tiles, each by itself."""
    return [piece._replace(n=n, width=1, slot=piece.slot + n - piece.n) for n in columns(piece)]


def joined(lists: list[list[tuple[int, ...]]]) -> tuple[np.ndarray, np.ndarray]:
    """Where each list begins, and the end; and the rows of all."""
    begin = np.cumsum([0, *map(len, lists)], dtype=np.int32)
    return begin, np.array([row for rows in lists for row in rows], dtype=np.int32).reshape(-1, 4)

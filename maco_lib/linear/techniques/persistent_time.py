"""How long the persistent kernel takes, from a few constants, and which tiles it takes the least with. Without torch.

    T = end + side by side(all waves of tiles + the sums of the last wave's, the first wave + all transfers + a hop)
    side by side(a, b) = (a⁹ + b⁹)^(1/9)

A wave is as many tiles, or pairs of them, as there are clusters at a time; all waves, until the last cluster is done.
Multiplying and fetching go on side by side but each waits for the other now and then, most where they take equally
long. A hop: from a tile in a rank's memory to a peer that uses it; partials take one before the sums do.

The constants of tiles and fetches were fitted to runs of nine tilings in up to five numbers of groups, at 36 sizes on 2
and 36 on 4 H200s: there to which was the fastest, as GPUs run into the power limit at different sizes; and to the times
of 69 other runs that did so less, 33 of them h200-x2's table as of commit 23942ff. Those of the hop, the end and the
stall to the tables of h100-x2, h100-x4 and h200-x2 (without the fence), with a factor for the steps of each tiling on
each machine.
"""

import functools
import heapq
import re
from dataclasses import dataclass, replace
from typing import NamedTuple

from maco_lib.kernels.tile_order import ROWS, TileOrder


def side_by_side(one_us: float, other_us: float, norm: float) -> float:
    """What two take that go on at the same time: the longer, and more where they take equally long."""
    return (one_us**norm + other_us**norm) ** (1 / norm)


class Tiling(NamedTuple):
    """Columns of a tile, whether two neighbours are multiplied at once, and staggered (see `kernels.tile_order`).

    evened: as many single tiles are the last ones as are the first, and not all those after the last full wave of
    pairs; of tiles wider than `EVENED_COLUMNS`, which leave more to be fetched after the last, more.
    """

    columns: int
    pairs: bool = False
    staggered: bool = False
    evened: bool = False

    def __str__(self) -> str:
        """ "2x128-staggered-evened", part of a plan's name."""
        return f"{'2x' * self.pairs}{self.columns}{'-staggered' * self.staggered}{'-evened' * self.evened}"


def ascii_tiling(text: str) -> str:
    """Its name, where tables from before there were names call it "2 × 128 staggered evened"."""
    return text.replace(" × ", "x").replace(" ", "-")


@functools.cache
def parse_tiling(text: str) -> Tiling | None:
    """That which is called so by `str`, or by an older table; None where the model has no constants for it."""
    parts = re.fullmatch(r"(2x)?(\d+)(?:(-staggered)(-evened)?)?", ascii_tiling(text))
    if parts is None or not {int(parts[2]), int(parts[2]) * (2 if parts[1] else 1)} <= STEP_US.keys():
        return None
    return Tiling(int(parts[2]), *(part is not None for part in parts.group(1, 3, 4)))


TILINGS = (
    Tiling(64), Tiling(64, True), Tiling(64, True, True), Tiling(64, True, True, True), Tiling(96, True),
    Tiling(128, True), Tiling(128, True, True), Tiling(128, True, True, True),
)  # fmt: skip
STEP = 64
ITEMSIZE = 2
# On H200s, in us. Of so many columns multiplied at once: a step of 64 along K. Of a tile or pair: the rest.
STEP_US = {64: 0.192, 96: 0.255, 128: 0.341, 192: 0.508, 256: 0.682}
PIECE_US = 1.6
# Once: from pairs to single tiles; the hop; before the first wave and after the last fetch. On more than 2 ranks own
# tiles also wait for partials that others compute at the same time, so much of a piece.
SWITCH_US, HOP_US, END_US, STALL = 3.0, 5.0, 3.0, 0.2
# What a GPU fetches from its peers.
FETCHED_BYTES_PER_US = 330e3
# Of `side_by_side`, for multiplying and fetching.
NORM = 9
# More groups were up to 4 % slower: 19 to 62 of them on 4 ranks.
GROUPS_PER_RANK = 4
# Tiles of so many columns in a group: about a wave. Fewer than so many waves are two groups, and so is a matmul that
# takes less than so much of the transfers' time.
GROUP_COLUMNS, FEW_WAVES, SHORT_MATMUL = 128, 1.5, 0.75
# Tiles of so many columns are evened by as many single tiles as are the first.
EVENED_COLUMNS = 64


@dataclass(frozen=True)
class PersistentTime:
    """In µs.

    waves: all waves of tiles. first: one of them. last_sums: to fetch what the others sum in the last wave, which
    nothing hides. fetched: to fetch everything. end: what comes before the first wave and after the last fetch.
    """

    waves: float
    first: float
    last_sums: float
    fetched: float
    end: float

    @property
    def matmul(self) -> float:
        return self.waves + self.last_sums

    @property
    def transfers(self) -> float:
        return self.first + HOP_US + self.fetched

    @property
    def total(self) -> float:
        return side_by_side(self.matmul, self.transfers, NORM) + self.end

    @property
    def limit(self) -> str:
        """What it waits for most: "matmul" or "transfers"."""
        return "matmul" if self.matmul >= self.transfers else "transfers"


def transfer_us(tiling: Tiling, num_tiles: float) -> float:
    """To fetch so many tiles."""
    return num_tiles * ROWS * tiling.columns * ITEMSIZE / FETCHED_BYTES_PER_US


def num_fetched(order: TileOrder) -> float:
    """Tiles that a rank fetches: partials of its own, sums of the others'."""
    return 2 * (order.num_ranks - 1) / order.num_ranks * order.num_tiles


def order_of(num_rows: int, num_columns: int, k: int, tiling: Tiling, num_ranks: int, max_clusters: int) -> TileOrder:
    """The order of a result's tiles, for `k` of each rank.

    In one group for two ranks: the least waiting for partials. For more in several, as partials are fetched while a
    rank computes others' tiles, sums while it computes its own, which are fewer: both are to go on all the time. A
    group of about a wave, as a rank's own tiles of one are computed with the others' of the next, in which their
    partials are fetched; no fewer than ranks, so that few sums are left to be fetched after the last, and no more than
    `GROUPS_PER_RANK` times as many. But two where there are few waves, and where the transfers take longer than the
    matmul: they go on all the time, and own tiles that wait for them would hold up the others'.
    """
    order = TileOrder(
        -(-num_rows // ROWS), -(-num_columns // tiling.columns), num_ranks, max_clusters, pairs=tiling.pairs,
        staggered=tiling.staggered,
    )  # fmt: skip
    if tiling.evened:
        order = replace(order, last=order.ahead * tiling.columns // EVENED_COLUMNS)
    if num_ranks <= 2:
        return order
    waves = order.num_tiles * tiling.columns / GROUP_COLUMNS / max_clusters
    multiplied = waves * -(-k // STEP) * STEP_US[GROUP_COLUMNS]
    if waves < FEW_WAVES or multiplied < SHORT_MATMUL * transfer_us(tiling, num_fetched(order)):
        return replace(order, num_groups=2)
    return replace(order, num_groups=min(max(num_ranks, round(waves)), GROUPS_PER_RANK * num_ranks))


def finished(order: TileOrder, single_us: float, pair_us: float) -> list[tuple[float, int]]:
    """When clusters that take so long for a tile or a pair are done with theirs, and how many tiles at that time.

    As `TileOrder.placed` deals them out, but for columns that have no neighbour to be a pair with.
    """
    clusters = [(0, 0, 0.0, order.num_clusters)]  # tiles and pieces of each, when they are done, how many clusters
    ahead = order.ahead if order.in_pairs else 0
    done = []
    for tiles, width, us in (
        (ahead, 1, single_us), (order.in_pairs, 2, pair_us), (order.num_tiles - ahead - order.in_pairs, 1, single_us)
    ):  # fmt: skip
        left = tiles // width
        while left:
            begun, pieces, when, number = heapq.heappop(clusters)
            taken = min(left, number)
            heapq.heappush(clusters, (begun + width, pieces + 1, when + us, taken))
            if taken < number:
                heapq.heappush(clusters, (begun, pieces, when, number - taken))
            done.append((when + us, taken * width))
            left -= taken
    return done


def time_of(order: TileOrder, k: int, tiling: Tiling) -> PersistentTime:
    """For tiles in this order, and `k` of each rank."""
    num_steps, others = -(-k // STEP), order.num_ranks - 1
    single = pair = num_steps * STEP_US[tiling.columns] + PIECE_US
    if order.in_pairs:
        pair = num_steps * STEP_US[2 * tiling.columns] + PIECE_US
    done = finished(order, single, pair)
    waves = max(when for when, _ in done)
    last = sum(tiles for when, tiles in done if when > waves - single / 2)  # at about the same time
    own = order.num_tiles / order.num_ranks / order.whole_groups
    last_sums = transfer_us(tiling, min(last, own) * others)
    if order.in_pairs:
        waves += SWITCH_US
    first = single if tiling.staggered else pair
    end = END_US + (STALL * pair if others > 1 else 0.0)
    return PersistentTime(waves, first, last_sums, transfer_us(tiling, num_fetched(order)), end)


def persistent_time(
    num_rows: int, num_columns: int, k: int, tiling: Tiling, num_ranks: int, max_clusters: int
) -> PersistentTime:
    """For x (num_rows, k) and weight (num_columns, k) on each rank."""
    return time_of(order_of(num_rows, num_columns, k, tiling, num_ranks, max_clusters), k, tiling)


@functools.lru_cache(maxsize=4096)
def fastest_tiling(num_rows: int, num_columns: int, k: int, num_ranks: int, max_clusters: int) -> Tiling:
    """That of `TILINGS` which is predicted to be the fastest; of equal ones, the first."""
    shape = (num_rows, num_columns, k)
    return min(TILINGS, key=lambda tiling: persistent_time(*shape, tiling, num_ranks, max_clusters).total)

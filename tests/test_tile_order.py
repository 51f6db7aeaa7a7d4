"""The order of tiles on several ranks: all are computed and fetched as often as needed, and nobody waits for ever."""

import dataclasses
from collections import Counter

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from maco_lib.kernels.tile_order import TileOrder, columns

ORDERS = st.builds(
    TileOrder,
    num_m=st.integers(1, 20),
    num_n=st.integers(1, 20),
    num_ranks=st.integers(2, 8),
    max_clusters=st.integers(1, 80),
    num_groups=st.sampled_from((1, 2, 4, 8)),
    pairs=st.booleans(),
    staggered=st.booleans(),
    last=st.integers(0, 90),
)
FEWER_TILES_THAN_RANKS = TileOrder(1, 2, 4, 66, 4)
HALF_A_WAVE_MORE = TileOrder(9, 11, 2, 66)
MANY_GROUPS = TileOrder(8, 20, 8, 66, 8)
PAIRS_AND_AN_ODD_COLUMN = TileOrder(16, 43, 4, 66, 8, pairs=True)
STAGGERED = TileOrder(16, 44, 4, 66, 8, pairs=True, staggered=True)
SO_MANY_LAST = TileOrder(8, 64, 2, 66, pairs=True, staggered=True, last=34)


def checked(test):
    for case in (FEWER_TILES_THAN_RANKS, HALF_A_WAVE_MORE, MANY_GROUPS, PAIRS_AND_AN_ODD_COLUMN, STAGGERED,
                 SO_MANY_LAST):  # fmt: skip
        test = example(case)(test)
    return settings(deadline=None, max_examples=60)(given(ORDERS)(test))


def places(order: TileOrder) -> list[dict[tuple[int, int], tuple[int, int]]]:
    """By rank: (place, cluster) of each tile."""
    return [
        {(work.m, n): (place, cluster) for work, place, cluster in placed for n in columns(work)}
        for placed in order.placed()
    ]


def owned(order: TileOrder, rank: int = 0) -> dict[tuple[int, int], tuple[int, int]]:
    """(owner, slot) of each tile, as `rank` knows it."""
    works = [work for work, _, _ in order.placed()[rank]]
    return {(work.m, n): (work.owner, work.slot + n - work.n) for work in works for n in columns(work)}


def by_cluster(begin: np.ndarray, rows: np.ndarray) -> list[list[tuple[tuple[int, int], int, bool, int]]]:
    """By cluster: (tile, owner or peer, whether it is a pair or a partial, slot)."""
    assert begin.dtype == rows.dtype == np.int32 and begin[0] == 0 and begin[-1] == len(rows)
    parts = [((m, n), kind // 2, kind % 2 == 1, slot) for m, n, kind, slot in rows.tolist()]
    return [parts[first:last] for first, last in zip(begin[:-1], begin[1:], strict=True)]


def computed(order: TileOrder, rank: int) -> list[list[tuple[tuple[int, int], int, bool, int]]]:
    return by_cluster(*order.tables(rank)[:2])


def fetched(order: TileOrder, rank: int) -> list[list[tuple[tuple[int, int], int, bool, int]]]:
    return by_cluster(*order.tables(rank)[2:])


def tiles(tile: tuple[int, int], is_pair: bool) -> list[tuple[int, int]]:
    return [tile, (tile[0], tile[1] + 1)][: 1 + is_pair]


@checked
def test_every_rank_computes_every_tile_once_and_agrees_on_owner_and_slot(order):
    every = owned(order)
    assert set(every) == {(m, n) for m in range(order.num_m) for n in range(order.num_n)}
    for rank in range(order.num_ranks):
        assert owned(order, rank) == every
        works = [work for cluster in computed(order, rank) for work in cluster]
        done = [(each, owner, slot + step) for tile, owner, is_pair, slot in works
                for step, each in enumerate(tiles(tile, is_pair))]  # fmt: skip
        assert sorted(done) == sorted((tile, *at) for tile, at in every.items())
    counts = Counter(owner for owner, _ in every.values())
    assert sorted(every.values()) == [(owner, slot) for owner in sorted(counts) for slot in range(counts[owner])]
    assert max(counts.values()) <= order.num_slots


@checked
def test_partials_of_own_tiles_and_sums_of_the_others_are_fetched_once_and_every_cluster_fetches_as_many(order):
    every = owned(order)
    for rank in range(order.num_ranks):
        by_cluster = fetched(order, rank)
        got = [(tile, peer, partial, slot) for rows in by_cluster for tile, peer, partial, slot in rows]
        wanted = []
        for tile, (owner, slot) in every.items():
            if owner == rank:
                wanted += [(tile, peer, True, slot) for peer in order.others(rank)]
            else:
                wanted.append((tile, owner, False, slot))
        assert sorted(got) == sorted(wanted)
        counts = [len(rows) for rows in by_cluster]
        assert max(counts) - min(counts) <= 1


@checked
def test_an_own_tile_comes_after_the_others_partials_of_it(order):
    when = places(order)
    for tile, (owner, _) in owned(order).items():
        # With fewer pieces than ranks some have no other's to begin with.
        latest = when[owner][tile][0] - (order.pieces >= order.num_ranks)
        assert all(when[peer][tile][0] <= latest for peer in order.others(owner))


@checked
def test_clusters_have_the_same_to_do_and_the_last_tiles_are_single(order):
    for placed in order.placed():
        load = Counter()
        for work, _, cluster in placed:
            load[cluster] += work.width
        assert set(load) == set(range(order.num_clusters))
        assert max(load.values()) - min(load.values()) <= 1 + (order.in_pairs > 0)
        singly = order.num_tiles - order.in_pairs - (order.ahead if order.in_pairs else 0)
        assert singly >= 1 and all(work.width == 1 for work, _, _ in placed[-singly:])
        if order.num_n % 2 == 0:
            assert sum(work.width for work, _, _ in placed if work.width == 2) == order.in_pairs
        if order.last and order.in_pairs % (2 * order.max_clusters):
            assert singly - order.last in (0, 1)


@checked
def test_pairs_come_in_full_waves_where_it_is_not_said_how_many_tiles_are_the_last_ones(order):
    if order.last:
        order = dataclasses.replace(order, last=0)
    wave, rest = 2 * order.max_clusters, order.num_tiles - order.in_pairs - order.ahead
    assert order.in_pairs % wave == 0
    assert not order.pairs or rest <= wave  # negative: fewer tiles than would be ahead


@checked
def test_staggered_half_of_the_clusters_begin_with_a_single_tile(order):
    for placed in order.placed():
        first = {cluster: work.width for work, _, cluster in reversed(placed)}
        if order.in_pairs and order.num_n % 2 == 0:
            singly = sum(width == 1 for width in first.values())
            assert singly == (min(order.ahead, order.num_clusters) if order.staggered else 0)
            assert order.ahead == 0 or abs(order.ahead - order.max_clusters / 2) < 2


@checked
def test_every_rank_finishes_if_clusters_compute_and_fetch_in_order(order):
    """Whoever can go on does, until nobody can. What can be done stays so, so no other pace comes less far."""
    computes = {(rank, c): rows for rank in range(order.num_ranks) for c, rows in enumerate(computed(order, rank))}
    fetches = {(rank, c): rows for rank in range(order.num_ranks) for c, rows in enumerate(fetched(order, rank))}
    finished, arrived = set(), set()

    def can_compute(rank: int, tile: tuple[int, int], owner: int, is_pair: bool, slot: int) -> bool:
        parts = [(rank, peer, each) for peer in order.others(rank) for each in tiles(tile, is_pair)]
        return owner != rank or arrived.issuperset(parts)

    progress = True
    while progress:
        progress = False
        for (rank, _), works in computes.items():
            while works and can_compute(rank, *works[0]):
                tile, _, is_pair, _ = works.pop(0)
                finished |= {(rank, each) for each in tiles(tile, is_pair)}
                progress = True
        for (rank, _), rows in fetches.items():
            while rows and (rows[0][1], rows[0][0]) in finished:
                tile, peer, partial, _ = rows.pop(0)
                if partial:
                    arrived.add((rank, peer, tile))
                progress = True
    assert not any(computes.values()) and not any(fetches.values())


@pytest.mark.parametrize("sizes", [(0, 3), (3, 0)])
def test_no_tiles_are_no_order(sizes):
    with pytest.raises(ValueError, match=f"{sizes[0]} x {sizes[1]} is no number of tiles"):
        TileOrder(*sizes, 2, 66)

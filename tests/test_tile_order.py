"""The order of tiles on several ranks: all are computed and fetched as often as needed, and nobody waits for ever."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from maco_lib.kernels.tile_order import TileOrder

ORDERS = st.builds(
    TileOrder,
    num_m=st.integers(1, 20),
    num_n=st.integers(1, 20),
    num_ranks=st.integers(2, 8),
    max_clusters=st.integers(1, 80),
    num_groups=st.sampled_from((1, 2, 4, 8)),
)
FEWER_TILES_THAN_RANKS = TileOrder(1, 2, 4, 66, 4)
HALF_A_WAVE_MORE = TileOrder(9, 11, 2, 66)
MANY_GROUPS = TileOrder(8, 20, 8, 66, 8)


def checked(test):
    for case in (FEWER_TILES_THAN_RANKS, HALF_A_WAVE_MORE, MANY_GROUPS):
        test = example(case)(test)
    return settings(deadline=None, max_examples=60)(given(ORDERS)(test))


def places(order: TileOrder) -> list[dict[tuple[int, int], int]]:
    """By rank, when it computes each tile."""
    return [{(m, n): place for place, (m, n, _, _) in enumerate(tiles.tolist())} for tiles in order.table()]


def owned(order: TileOrder) -> dict[tuple[int, int], tuple[int, int]]:
    """(owner, slot) of each tile."""
    return {(m, n): (owner, slot) for m, n, owner, slot in order.table()[0].tolist()}


def fetched(order: TileOrder, rank: int) -> list[list[tuple[tuple[int, int], int, bool, int]]]:
    """By cluster: (tile, peer, whether it is a partial, slot)."""
    begin, fetches = order.fetches(rank)
    rows = [((m, n), kind // 2, kind % 2 == 1, slot) for m, n, kind, slot in fetches.tolist()]
    assert begin[0] == 0 and begin[-1] == len(rows)
    return [rows[first:last] for first, last in zip(begin[:-1], begin[1:], strict=True)]


@checked
def test_every_rank_computes_every_tile_once_and_agrees_on_owner_and_slot(order):
    table, every = order.table(), owned(order)
    assert table.dtype == np.int32
    assert set(every) == {(m, n) for m in range(order.num_m) for n in range(order.num_n)}
    for tiles in table.tolist():
        assert len(tiles) == order.num_tiles
        assert {(m, n): (owner, slot) for m, n, owner, slot in tiles} == every
    counts = Counter(owner for owner, _ in every.values())
    assert sorted(every.values()) == [(owner, slot) for owner in sorted(counts) for slot in range(counts[owner])]
    assert max(counts.values()) <= order.num_slots


@checked
def test_partials_of_own_tiles_and_sums_of_the_others_are_fetched_once_by_the_cluster_that_is_due(order):
    when, every = places(order), owned(order)
    for rank in range(order.num_ranks):
        got = [(tile, peer, partial, slot, cluster)
               for cluster, rows in enumerate(fetched(order, rank)) for tile, peer, partial, slot in rows]  # fmt: skip
        wanted = []
        for tile, (owner, slot) in every.items():
            cluster = when[owner][tile] % order.num_clusters
            if owner == rank:
                wanted += [(tile, peer, True, slot, cluster) for peer in order.others(rank)]
            else:
                wanted.append((tile, owner, False, slot, cluster))
        assert sorted(got) == sorted(wanted)


@checked
def test_an_own_tile_comes_after_the_others_partials_of_it(order):
    when = places(order)
    for tile, (owner, _) in owned(order).items():
        # With fewer tiles than ranks some have no other's to begin with.
        latest = when[owner][tile] - (order.num_tiles >= order.num_ranks)
        assert all(when[peer][tile] <= latest for peer in order.others(owner))


@checked
def test_every_rank_finishes_if_clusters_compute_and_fetch_in_order(order):
    """Whoever can go on does, until nobody can. What can be done stays so, so no other pace comes less far."""
    table, num_clusters = order.table().tolist(), order.num_clusters
    computes = {
        (rank, cluster): table[rank][cluster::num_clusters]
        for rank in range(order.num_ranks)
        for cluster in range(num_clusters)
    }
    fetches = {(rank, c): rows for rank in range(order.num_ranks) for c, rows in enumerate(fetched(order, rank))}
    computed, arrived = set(), set()

    def can_compute(rank: int, tile: tuple[int, int], owner: int) -> bool:
        return owner != rank or all((rank, peer, tile) in arrived for peer in order.others(rank))

    progress = True
    while progress:
        progress = False
        for (rank, _), tiles in computes.items():
            while tiles and can_compute(rank, tuple(tiles[0][:2]), tiles[0][2]):
                computed.add((rank, tuple(tiles.pop(0)[:2])))
                progress = True
        for (rank, _), rows in fetches.items():
            while rows and (rows[0][1], rows[0][0]) in computed:
                tile, peer, partial, _ = rows.pop(0)
                if partial:
                    arrived.add((rank, peer, tile))
                progress = True
    assert not any(computes.values()) and not any(fetches.values())


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 20), st.integers(1, 80), st.integers(1, 40))
def test_one_rank_finishes_so_many_rows_before_the_next(num_m, num_n, max_clusters, height):
    order = TileOrder(num_m, num_n, 1, max_clusters, height=height)
    (tiles,) = order.table().tolist()
    assert sorted(tile[:2] for tile in tiles) == [[m, n] for m in range(num_m) for n in range(num_n)]
    assert [m // height for m, *_ in tiles] == sorted(m // height for m in range(num_m) for _ in range(num_n))
    assert [tile[2:] for tile in tiles] == [[0, slot] for slot in range(order.num_tiles)]
    begin, fetches = order.fetches(0)
    assert len(begin) == order.num_clusters + 1 and not begin.any() and fetches.shape == (0, 4)


@pytest.mark.parametrize("sizes", [(0, 3), (3, 0)])
def test_no_tiles_are_no_order(sizes):
    with pytest.raises(ValueError, match=f"{sizes[0]} x {sizes[1]} is no number of tiles"):
        TileOrder(*sizes, 2, 66)

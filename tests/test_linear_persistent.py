"""The technique "persistent": right on every shape it takes, the same bits everywhere and every time, captured."""

from collections import Counter

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import run_ranks

from maco_lib import state as states
from maco_lib.kernels.tile_order import TileOrder
from maco_lib.linear.techniques import persistent, techniques
from maco_lib.linear.techniques.persistent_time import (
    TILINGS,
    Tiling,
    fastest_tiling,
    finished,
    order_of,
    parse_tiling,
    persistent_time,
    time_of,
)
from maco_lib.linear.techniques.problem import Problem
from maco_lib.overlap import LinearPlan, linear_all_reduce

NUM_GPUS = max(2, torch.cuda.device_count())
SUM_BY_THEMSELVES = [name for name, technique in techniques().items() if not technique.takes_backend]
# (M, N, K of a rank): whole tiles, parts of tiles, fewer tiles than ranks, several waves, one row.
SHAPES = [(512, 512, 256), (777, 1000, 136), (1, 8, 8), (300, 264, 72), (2048, 4096, 2048), (4100, 5120, 520)]
TILES, PAIRS, STAGGERED = Tiling(64), Tiling(64, True), Tiling(64, True, True)
EVENED = Tiling(64, True, True, True)


class Example:
    """x and weight differ between the ranks, bias and residual do not."""

    def __init__(self, rank: int, m: int, n: int, k: int, dtype: torch.dtype, bias: bool = False, residual=False):
        device = torch.device("cuda", rank)
        own, shared = torch.Generator(device).manual_seed(100 + rank), torch.Generator(device).manual_seed(7)
        normal = lambda generator, *shape: torch.randn(shape, generator=generator, device=device)  # noqa: E731
        self.x = normal(own, m, k).to(dtype)
        self.weight = (normal(own, n, k) / (k * dist.get_world_size()) ** 0.5).to(dtype)
        self.bias = normal(shared, n).to(dtype) if bias else None
        self.residual = normal(shared, m, n).to(dtype) if residual else None

    def run(self, tiling: Tiling | None = None) -> torch.Tensor:
        plan = LinearPlan("persistent", tiling=str(tiling or ""))
        return linear_all_reduce(self.x, self.weight, self.bias, self.residual, plan=plan)

    def exact(self) -> torch.Tensor:
        total = self.x.double() @ self.weight.double().t()
        dist.all_reduce(total)
        for each in (self.bias, self.residual):
            total = total if each is None else total + each.double()
        return total

    def plain(self) -> torch.Tensor:
        total = torch.nn.functional.linear(self.x, self.weight, self.bias if dist.get_rank() == 0 else None)
        dist.all_reduce(total)
        return total if self.residual is None else total + self.residual


def error(result: torch.Tensor, exact: torch.Tensor) -> float:
    return float((result.double() - exact).norm() / exact.norm())


def right(rank: int, num_ranks: int) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        for index, shape in enumerate(SHAPES):
            example = Example(rank, *shape, dtype, bias=index % 2 == 1, residual=index % 3 == 1)
            exact, result = example.exact(), example.run()
            assert error(result, exact) <= 1.2 * error(example.plain(), exact), (shape, dtype)
            everyones = [torch.empty_like(result) for _ in range(num_ranks)]
            dist.all_gather(everyones, result)
            assert all(torch.equal(each, result) for each in everyones), (shape, dtype)
    # Several waves, the last of them short, so that some tiles are multiplied in pairs, some singly.
    m, n = 2600, 5000
    for tiling in TILINGS:
        example = Example(rank, m, n, 264, torch.bfloat16, bias=True, residual=True)
        assert error(example.run(tiling), example.exact()) < 3e-3, tiling


def misaligned(rank: int, num_ranks: int) -> None:
    example = Example(rank, 300, 520, 256, torch.bfloat16)
    right_result = example.run()
    wide = torch.zeros(300, 259, dtype=torch.bfloat16, device=example.x.device)
    wide[:, 3:].copy_(example.x)
    example.x = wide[:, 3:]
    assert torch.equal(example.run(), right_result)
    example.x = example.x[:, :250].contiguous()
    example.weight = example.weight[:, :250].contiguous()
    with pytest.raises(ValueError, match=r"multiples of 8.*\(520, 250\)"):
        example.run()
    example = Example(rank, 16, 64, 64 + 8 * rank, torch.bfloat16)
    with pytest.raises(ValueError, match="different shapes"):
        example.run()
    example = Example(rank, 16, 64, 64, torch.float32)
    with pytest.raises(ValueError, match="float32"):
        example.run()


def repeated(rank: int, num_ranks: int) -> None:
    """Thousands of times the same bits, one launch after the other and replayed without gaps between them, other shapes
    and data between them, and no memory taken.

    The data change from launch to launch: only then is it seen if what an earlier launch left is summed."""
    chosen = [((1024, 1024, 512), None), ((256, 5120, 2048), None), ((1024, 4096, 3072), None)]
    for shape, tiling in chosen + [((2048, 4096, 1024), tiling) for tiling in TILINGS]:
        examples = [Example(rank, *shape, torch.bfloat16) for _ in range(3)]
        examples[1].x.neg_()
        examples[2].x.mul_(2)
        other = Example(rank, 700, 520, 128, torch.bfloat16)
        firsts, between = [example.run(tiling) for example in examples], other.run()
        assert torch.equal(firsts[1], -firsts[0]) and torch.equal(firsts[2], 2 * firsts[0])
        num_different = torch.zeros((), dtype=torch.int64, device=between.device)

        def launches(examples=examples, other=other, firsts=firsts, between=between, num=num_different, tiling=tiling):
            for index in range(30):
                num += (examples[index % 3].run(tiling) != firsts[index % 3]).any()
                if index % 10 == 0:
                    num += (other.run() != between).any()

        graph = torch.cuda.CUDAGraph()
        launches()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            launches()
        torch.cuda.synchronize()
        used = torch.cuda.mem_get_info()[0]
        for run, times in ((launches, 100), (graph.replay, 150)):
            num_different.zero_()
            for _ in range(times):
                run()
            num = int(num_different)
            assert num == 0, f"{shape}, {tiling}, {run.__name__}: {num} of {33 * times} results differ"
        assert used - torch.cuda.mem_get_info()[0] < 2**26
        graph.reset()


def captured(rank: int, num_ranks: int) -> None:
    example = Example(rank, 1024, 1024, 512, torch.bfloat16, residual=True)
    first = example.run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        once = example.run()
        twice = example.run()
    example.x.neg_()
    for _ in range(20):
        graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(once, twice)
    expected = 2 * example.residual.double() - first.double()
    assert error(once, expected) < 1e-2


def fences(rank: int, num_ranks: int) -> None:
    """Behind either fence the same bits, by kernels of their own in one process."""
    example = Example(rank, 1024, 1024, 512, torch.bfloat16)
    first, result = example.run(), torch.empty(1024, 1024, dtype=torch.bfloat16, device=example.x.device)
    problem = Problem(example.x, example.weight, None, None, result, "", dist.group.WORLD)
    launches = states.of(dist.group.WORLD, example.x.device).get(persistent.Exchange).launches
    before = len(launches)
    for strict in (True, False, True):
        result.fill_(torch.nan)
        persistent.run(problem, strict=strict)
        assert torch.equal(result, first), strict
    assert len(launches) == before + 2


@pytest.mark.gpu(num_gpus=2)
@pytest.mark.parametrize(
    "program", [right, misaligned, repeated, captured, fences], ids=lambda program: program.__name__
)
def test_persistent_on_every_gpu(program):
    run_ranks(program, num_ranks=NUM_GPUS, backend="nccl", timeout_s=120)


def refused(rank: int, num_ranks: int) -> None:
    x, weight = torch.ones(4, 8, dtype=torch.bfloat16), torch.ones(16, 8, dtype=torch.bfloat16)
    for technique in SUM_BY_THEMSELVES:
        with pytest.raises(ValueError, match=f"'{technique}'.*Hopper GPUs, x is on cpu"):
            linear_all_reduce(x, weight, plan=LinearPlan(technique))


def test_what_sums_by_itself_is_refused_where_there_is_no_hopper_gpu():
    run_ranks(refused)


@pytest.mark.parametrize("technique", SUM_BY_THEMSELVES)
def test_a_plan_that_sums_by_itself_takes_no_backend(technique):
    assert str(LinearPlan(technique)) == technique
    with pytest.raises(ValueError, match=f"backend = 'nccl': {technique} sums by itself"):
        LinearPlan(technique, "nccl")


def test_a_plan_has_tiles_that_the_kernel_has():
    plans = [LinearPlan("persistent", tiling=str(tiling)) for tiling in TILINGS]
    assert [str(plan) for plan in plans] == [f"persistent:{tiling}" for tiling in TILINGS]
    assert [parse_tiling(plan.tiling) for plan in plans] == list(TILINGS) and parse_tiling("") is None
    for wrong in ({"technique": "persistent", "tiling": "48"}, {"technique": "decode", "tiling": "64"}):
        valid = "'', '64', '2x64'" if wrong["technique"] == "persistent" else "''$"
        with pytest.raises(ValueError, match=f"tiling = '{wrong['tiling']}': for {wrong['technique']} it is {valid}"):
            LinearPlan(**wrong)


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_tiles_are_chosen_by_the_waves_and_what_is_left_to_fetch(num_ranks):
    for m, n, k in ((2048, 4096, 2048), (4096, 5120, 12800), (16384, 8192, 14336), (1, 8, 64)):
        times = {tiling: persistent_time(m, n, k, tiling, num_ranks, 66).total for tiling in TILINGS}
        assert times[fastest_tiling(m, n, k, num_ranks, 66)] == min(times.values())
        assert all(persistent_time(m, n, 2 * k, tiling, num_ranks, 66).total > us for tiling, us in times.items())


def test_waves_end_when_the_last_cluster_is_done_and_leave_what_it_and_others_like_it_finished():
    def waves(rows: int, tiling: Tiling, num_ranks: int) -> tuple[int, float, int]:
        """(tiles in pairs, when the last are done if a pair takes 10 and a tile 6 us, how many then)."""
        order = order_of(rows, 4096, 2048, tiling, num_ranks, 66)
        done = finished(order, 6.0, 10.0)
        assert sum(tiles for _, tiles in done) == order.num_tiles
        ends = max(when for when, _ in done)
        return order.in_pairs, ends, sum(tiles for when, tiles in done if when == ends)

    for num_ranks in (2, 4):
        # 4096 x 4096 in tiles of 256 x 64 is 1024 of them, 15.5 waves of 66 clusters; 256 rows more are 64 tiles more.
        assert waves(4096, TILES, num_ranks) == (0, 16 * 6, 34) and waves(4097, TILES, num_ranks) == (0, 17 * 6, 32)
        # In pairs seven waves of 66, then the other 100 tiles in two; 64 more are a wave of pairs more and one of 32.
        assert waves(4096, PAIRS, num_ranks) == (924, 7 * 10 + 2 * 6, 34)
        assert waves(4097, PAIRS, num_ranks) == (1056, 8 * 10 + 6, 32)
        # With 34 ahead, 66 tiles are left after seven waves, and 130 after 64 more: no wave of pairs more.
        assert waves(4096, STAGGERED, num_ranks) == (924, 7 * 10 + 2 * 6, 34)
        assert waves(4097, STAGGERED, num_ranks) == (924, 7 * 10 + 3 * 6, 32)
        # Evened, 34 are the last ones and 16 pairs more than seven waves: of the 32 clusters that began with pairs the
        # other 16 take a single tile each, and then 18 clusters one more.
        assert waves(4096, EVENED, num_ranks) == (956, 7 * 10 + 2 * 6, 18)


@settings(deadline=None, max_examples=100)
@given(
    st.builds(
        TileOrder, num_m=st.integers(1, 20), num_n=st.integers(1, 20).map(lambda n: 2 * n), num_ranks=st.integers(2, 4),
        max_clusters=st.integers(1, 80), num_groups=st.sampled_from((1, 4)), pairs=st.booleans(),
        staggered=st.booleans(), last=st.integers(0, 90),
    )
)  # fmt: skip
def test_clusters_are_done_when_the_order_gives_them_their_tiles(order):
    wanted = finished(order, 6.0, 10.0)
    for placed in order.placed():
        when, done = Counter(), Counter()
        for work, _, cluster in placed:
            when[cluster] += 10.0 if work.width == 2 else 6.0
            done[when[cluster]] += work.width
        together = Counter()
        for time, tiles in wanted:
            together[time] += tiles
        assert together == done


def test_more_than_two_ranks_take_a_group_for_each_wave_and_two_where_the_transfers_take_longer():
    def num_groups(num_rows: int, tiling: Tiling, num_ranks: int = 4, k: int = 8192) -> int:
        return order_of(num_rows, 4096, k, tiling, num_ranks, 66).num_groups

    assert num_groups(16384, TILES, num_ranks=2) == 1
    assert num_groups(512, TILES) == 2
    assert num_groups(1024, TILES) == 4
    assert num_groups(6144, TILES) == num_groups(6144, PAIRS) == num_groups(6144, Tiling(128)) == round(768 / 66)
    assert num_groups(16384, TILES) == 16
    assert num_groups(16384, TILES, k=1024) == 2
    grouped = order_of(4096, 4096, 8192, TILES, 4, 66)
    one = TileOrder(grouped.num_m, grouped.num_n, 4, 66)
    assert time_of(grouped, 8192, TILES).last_sums < time_of(one, 8192, TILES).last_sums


def test_a_short_k_leaves_it_waiting_for_the_transfers_and_a_long_one_for_the_matmul():
    assert persistent_time(8192, 4096, 512, TILES, 2, 66).limit == "transfers"
    assert persistent_time(8192, 4096, 16384, TILES, 2, 66).limit == "matmul"


@pytest.mark.parametrize("tiling", TILINGS, ids=str)
def test_tiles_are_known_by_their_names(tiling):
    assert parse_tiling(str(tiling)) == tiling
    for wrong in ("160", "nan", "2x64-evened", "2 × 64 evened"):  # no constants; not told; evened what is not staggered
        assert parse_tiling(wrong) is None

"""The technique "signalled": bands that are whole tiles, right over every backend, the same bits, captured."""

import itertools
import re

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import run_ranks
from test_linear import Example, assert_equal_on_every_rank

from maco_lib import comm
from maco_lib.kernels.tile_order import CTAS, ROWS, TileOrder
from maco_lib.overlap import LinearPlan, linear_all_reduce
from maco_lib.overlap.linear_measure import cuts
from maco_lib.overlap.linear_plan import BAND_BACKENDS
from maco_lib.overlap.linear_techniques import problem, signalled

NUM_GPUS = max(2, torch.cuda.device_count())
# (M, N, K of all ranks by their number): whole tiles, parts of tiles, one band, several waves, bands of unequal length.
SHAPES = [(512, 512, 256), (777, 1000, 136), (100, 264, 72), (4096, 4096, 512), (2600, 5120, 520)]


@settings(deadline=None)
@given(st.integers(1, 20_000), st.integers(1, 20), st.integers(1, 66), st.integers(2, 9))
def test_bands_cover_all_rows_and_wait_for_their_tiles_flags(num_rows, num_n, max_clusters, num_bands):
    pieces = signalled.bands(num_rows, num_bands)
    assert len(pieces) <= num_bands
    assert [piece.start for piece in pieces] == [0, *(piece.stop for piece in pieces[:-1])]
    assert pieces[-1].stop == num_rows and all(piece.stop % ROWS == 0 for piece in pieces[:-1])
    height = -(-pieces[0].stop // ROWS)
    (placed,) = TileOrder(-(-num_rows // ROWS), num_n, 1, max_clusters, height=height).placed()
    for piece in pieces:
        begin, end = signalled.flags_of(piece, num_n)
        slots = [work.slot for work, _, _ in placed if piece.start <= work.m * ROWS < piece.stop]
        assert sorted(slot * CTAS + cta for slot in slots for cta in range(CTAS)) == list(range(begin, end))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "num_chunks = 1: for signalled it is an int of 2 or more"),
        ({"num_chunks": 4, "dim": "n"}, "dim = 'n': signalled cuts 'm' only"),
    ],
)
def test_a_wrong_plan_is_named(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        LinearPlan("signalled", **options)


def test_a_plan_reads_as_its_parts_and_is_another_one_where_the_rows_make_fewer_bands():
    plan = LinearPlan("signalled", "maco_staged_8", 4)
    assert str(plan) == "signalled, 4 along m, maco_staged_8" and plan.overlapped
    assert cuts(plan, 1024) and cuts(plan, 769) and not cuts(plan, 768) and not cuts(plan, 1)


def refused(rank: int, num_ranks: int) -> None:
    x, weight = torch.ones(600, 8, dtype=torch.bfloat16), torch.ones(16, 8, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="'signalled'.*Hopper GPUs, x is on cpu"):
        linear_all_reduce(x, weight, plan=LinearPlan("signalled", num_chunks=2))


def test_it_is_refused_where_there_is_no_hopper_gpu():
    run_ranks(refused)


@pytest.mark.parametrize("k", [64, 20, 9, 1, 0])
def test_any_share_of_k_is_multiplied_so_that_no_rank_refuses_alone(monkeypatch, k):
    ran = []

    def on_side_stream(part, blocks):
        assert part.x.shape[1] % 8 == 0 == part.x.stride(0) % 8 and part.x.shape[1] == part.weight.shape[1] >= 8
        ran.append(torch.cat([block.product for block in blocks]).shape)
        part.result.copy_(part.x @ part.weight.t())

    monkeypatch.setattr(signalled, "misplaced", lambda problem: "")
    monkeypatch.setattr(signalled, "on_side_stream", on_side_stream)
    x, weight, result = torch.randn(600, k), torch.randn(16, k), torch.full((600, 16), torch.nan)
    signalled.run(problem.Problem(x, weight, None, None, result, "gloo", None), 2)
    assert ran == [(600, 16)]
    torch.testing.assert_close(result, x @ weight.t())
    with pytest.raises(ValueError, match="N = 12 is no multiple of 8"):
        signalled.run(problem.Problem(x, weight[:12], None, None, result[:, :12], "gloo", None), 2)


# -- on GPUs -----------------------------------------------------------------------------------------------------------


def plans(rank: int) -> list[LinearPlan]:
    here = comm.available("all_reduce", torch.device("cuda", rank), dist.group.WORLD)
    names = [name for name in ("nccl", *BAND_BACKENDS) if name in here]
    return [LinearPlan("signalled", name, num) for name, num in itertools.product(names, (2, 4))]


def of(rank: int, num_ranks: int, shape: tuple[int, int, int], dtype=torch.bfloat16, **options) -> Example:
    m, n, k = shape
    return Example(rank, num_ranks, (m,), n, k * num_ranks, dtype, **options)


def right(rank: int, num_ranks: int) -> None:
    for (seed, shape), dtype in itertools.product(enumerate(SHAPES), (torch.bfloat16, torch.float16)):
        example = of(rank, num_ranks, shape, dtype, seed=seed, bias=seed % 2 == 0, residual=seed % 3 != 0)
        bound = 1.2**2 * example.squared_error(example.plain())
        for plan in plans(rank):
            result = example.run(plan)
            assert example.squared_error(result) <= bound, (plan, shape, dtype)
            assert_equal_on_every_rank(result)
            assert torch.equal(example.run(plan), result), (plan, shape, dtype)
    # Shares of K that differ between the ranks, and are no multiples of 8; of the last rank also none at all.
    for k in (8 * num_ranks + 1, num_ranks - 1):
        example = Example(rank, num_ranks, (600,), 264, k, torch.bfloat16)
        bound = 1.2**2 * example.squared_error(example.plain())
        for plan in plans(rank):
            result = example.run(plan)
            assert example.squared_error(result) <= bound, (plan, k)
            assert_equal_on_every_rank(result)
    wrong = of(rank, num_ranks, (600, 64, 64), torch.float32)
    with pytest.raises(ValueError, match="'signalled'.*float32"):
        wrong.run(plans(rank)[0])


def repeated(rank: int, num_ranks: int) -> None:
    """A thousand times the same bits, other shapes and data between them, and no memory taken."""
    examples = [of(rank, num_ranks, shape) for shape in ((1024, 1024, 512), (1024, 1024, 512), (700, 520, 128))]
    examples[1].x.neg_()
    for plan in plans(rank):
        firsts = [example.run(plan) for example in examples]
        torch.cuda.synchronize()
        free = torch.cuda.mem_get_info()[0]
        differs = torch.zeros((), dtype=torch.bool, device=firsts[0].device)
        for index in range(1000):
            for example, first in zip(examples[: 2 + (index % 10 == 0)], firsts, strict=False):
                differs |= (example.run(plan) != first).any()
        assert not differs, plan
        assert free - torch.cuda.mem_get_info()[0] < 2**26, plan


def captured(rank: int, num_ranks: int) -> None:
    for plan in plans(rank):
        example = of(rank, num_ranks, (1024, 1024, 512))
        first = example.run(plan)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            once, twice = example.run(plan), example.run(plan)
        other = of(rank, num_ranks, (1024, 1024, 512), seed=1)
        for name in ("x", "weight", "bias", "residual"):
            getattr(example, name).copy_(getattr(other, name))
        for _ in range(20):
            graph.replay()
        wanted = other.run(plan)
        torch.cuda.synchronize()
        assert torch.equal(once, wanted) and torch.equal(twice, wanted) and not torch.equal(first, wanted), plan
        graph.reset()


def interrupted(rank: int, num_ranks: int) -> None:
    """What failed between two bands leaves no flag behind that the next call would take for its own."""
    example, plan = of(rank, num_ranks, (4096, 4096, 4096)), plans(rank)[-1]
    wanted, whole = example.run(plan), problem.Problem.sum
    sums = []

    def failing(self, block):
        if sums:
            raise RuntimeError("the link is down")
        sums.append(whole(self, block))

    problem.Problem.sum = failing
    with pytest.raises(RuntimeError, match="the link is down"):
        example.run(plan)
    problem.Problem.sum = whole
    (flags,) = (made.flags[-1] for made in signalled._SIGNALS[dist.group.WORLD].values())
    assert not flags.any()
    assert torch.equal(example.run(plan), wanted) and not flags.any()


@pytest.mark.gpu(num_gpus=2)
@pytest.mark.parametrize("program", [right, repeated, captured, interrupted], ids=lambda program: program.__name__)
def test_signalled_on_every_gpu(program):
    run_ranks(program, num_ranks=NUM_GPUS, backend="nccl", timeout_s=120)

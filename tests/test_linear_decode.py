"""The technique "decode": right on every shape it takes, the same bits everywhere and every time, captured."""

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from test_linear_persistent import Example, error

from maco_lib.kernels.decode_tiles import MAX_ROWS, MAX_TILE_ROWS, tile_rows_of
from maco_lib.linear.techniques.decode import in_whole_lines
from maco_lib.overlap import LinearPlan, linear_all_reduce

DECODE = LinearPlan("decode")
NUM_GPUS = max(2, torch.cuda.device_count())
# (M, N, K of a rank): one row and as many as there may be, few columns and several tiles to a CTA, any K.
SHAPES = [(1, 4096, 2048), (64, 5120, 1280), (16, 8192, 264), (7, 20000, 520), (33, 100, 77), (2, 4, 8)]


def run(example: Example) -> torch.Tensor:
    return linear_all_reduce(example.x, example.weight, example.bias, example.residual, plan=DECODE)


def right(rank: int, num_ranks: int) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        for index, shape in enumerate(SHAPES * 2):
            example = Example(rank, *shape, dtype, bias=index % 2 == 1, residual=index % 4 > 1)
            exact, result = example.exact(), run(example)
            assert error(result, exact) <= 1.2 * error(example.plain(), exact) + 1e-3, (shape, dtype)
            everyones = [torch.empty_like(result) for _ in range(num_ranks)]
            dist.all_gather(everyones, result)
            assert all(torch.equal(each, result) for each in everyones), (shape, dtype)
            assert all(torch.equal(run(example), result) for _ in range(50)), (shape, dtype)
    for wrong, message in (((MAX_ROWS + 1, 64, 64), f"up to {MAX_ROWS} rows"), ((4, 66, 64), "multiple of 4")):
        with pytest.raises(ValueError, match=f"'decode': a result of .*{message}"):
            run(Example(rank, *wrong, torch.bfloat16))
    with pytest.raises(ValueError, match="'decode'.*float32"):
        run(Example(rank, 4, 64, 64, torch.float32))


def captured(rank: int, num_ranks: int) -> None:
    """Layer after layer with nothing between, other collectives of the same inboxes among them."""
    examples = [Example(rank, *shape, torch.bfloat16, residual=True) for shape in SHAPES]

    def layers():
        results = []
        for example in examples * 3:
            results.append(run(example))
            linear_all_reduce(example.x, example.weight, plan=LinearPlan(backend="maco_ll"))
        return results

    wanted = layers()[: len(SHAPES)]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        results = layers()
    for _ in range(50):
        for result in results:
            result.zero_()
        graph.replay()
        assert all(torch.equal(*pair) for pair in zip(results, wanted * 3, strict=True))


@pytest.mark.gpu(num_gpus=2)
@pytest.mark.parametrize("program", [right, captured], ids=lambda program: program.__name__)
def test_decode_on_every_gpu(program):
    run_ranks(program, num_ranks=NUM_GPUS, backend="nccl", timeout_s=120)


def test_all_ctas_take_about_as_many_rows_of_the_weight():
    for num_columns in (4096, 5120, 8192):
        rows = tile_rows_of(num_columns, 132)
        assert rows % 8 == 0 and 120 <= num_columns / rows <= 132, (num_columns, rows)
    for num_columns in (1, 100, 8448, 8449, 100_000):
        rows = tile_rows_of(num_columns, 132)
        assert 0 < rows <= MAX_TILE_ROWS and rows % 8 == 0


def test_operands_are_laid_out_for_tma_with_zeros_where_columns_lack():
    for shape, num_columns in (((33, 77), 80), ((1, 77), 80), ((5, 16), 16), ((4, 0), 8)):
        tensor = torch.randn(*shape).bfloat16()
        laid_out = in_whole_lines(tensor)
        assert laid_out.shape == (shape[0], num_columns) and laid_out.stride() == (num_columns, 1)
        assert torch.equal(laid_out[:, : shape[1]], tensor) and not laid_out[:, shape[1] :].any()
    kept = torch.randn(4, 24).bfloat16()[:, :17]
    assert in_whole_lines(kept) is kept and in_whole_lines(kept.t()).is_contiguous()

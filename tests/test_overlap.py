"""The overlap primitive as a user meets it: right results, several in flight, errors that say what is wrong."""

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from maco_lib import turns as turns_module
from maco_lib.overlap import overlap, start


def device_of(rank: int) -> torch.device:
    return torch.device("cuda", rank) if dist.get_backend() == "nccl" else torch.device("cpu")


def ones(rank: int, *shape: int) -> torch.Tensor:
    return torch.full(shape, float(rank + 1), device=device_of(rank))


def results_are_right(rank: int, num_ranks: int) -> None:
    total = sum(range(1, num_ranks + 1))
    a, b = torch.randn(2, 64, 64, device=device_of(rank))
    tensor = ones(rank, 1000)
    product, summed = overlap(lambda: a @ b, tensor)
    assert torch.equal(product, a @ b)
    assert summed is tensor and (summed == total).all()

    scattered = start(ones(rank, 4 * num_ranks, 3), "reduce_scatter").wait()
    assert scattered.shape == (4, 3) and (scattered == total).all()
    gathered = start(ones(rank, 4, 3), "all_gather").wait()
    assert gathered.shape == (4 * num_ranks, 3)
    assert gathered[::4, 0].tolist() == [other + 1.0 for other in range(num_ranks)]
    exchanged = start(ones(rank, num_ranks, 5), "all_to_all").wait()
    assert exchanged[:, 0].tolist() == [other + 1.0 for other in range(num_ranks)]


def several_are_in_flight(rank: int, num_ranks: int) -> None:
    total = sum(range(1, num_ranks + 1))
    tensors = [ones(rank, 10_000) * (index + 1) for index in range(8)]
    handles = [start(tensor, check=index == 0) for index, tensor in enumerate(tensors)]
    for index, handle in reversed(list(enumerate(handles))):
        assert (handle.wait() == total * (index + 1)).all()
        assert handle.wait() is tensors[index]  # waiting twice is harmless


def errors_are_clear(rank: int, num_ranks: int) -> None:
    def message(call) -> str:
        with pytest.raises(ValueError) as caught:
            call()
        return str(caught.value)

    x = ones(rank, 8)
    assert "'sum'" in message(lambda: start(x, "sum")) and "all_to_all" in message(lambda: start(x, "sum"))
    assert "contiguous" in message(lambda: start(ones(rank, 4, 4).t()[:, :2]))
    assert "torch.int64" in message(lambda: start(torch.zeros(3, dtype=torch.long)))
    assert "torch.bfloat16" in message(lambda: start(torch.zeros(3, dtype=torch.long)))
    assert "list" in message(lambda: start([1.0]))
    assert "(3,)" in message(lambda: start(ones(rank, 3), "reduce_scatter"))
    elsewhere = torch.zeros(8, device="meta" if x.device.type == "cpu" else "cpu")
    assert f"on {elsewhere.device}" in message(lambda: start(elsewhere))
    wrong = message(lambda: start(ones(rank, 8 + rank), check=True))
    assert "rank 0 calls all_reduce of (8,)" in wrong and "rank 1 calls all_reduce of (9,)" in wrong
    # What one rank refuses, all are told of.
    for mistake, told in (
        (torch.zeros(8, dtype=torch.long), "torch.int64"), ([1.0], "list"), (ones(rank, 4, 2).t(), "contiguous"),
    ):  # fmt: skip
        for call in (lambda x: start(x, check=True), lambda x: overlap(int, x, check=True)):
            alone = message(lambda: call(mistake if rank else x))  # noqa: B023
            assert told in alone and alone.startswith("rank 1 refuses the call: ValueError: ") == (rank == 0), alone

    def fail():
        raise KeyError("compute failed")

    with pytest.raises(KeyError):
        overlap(fail, x)
    assert (x == sum(range(1, num_ranks + 1))).all()  # the collective was finished all the same


def group_of_one_is_the_identity(rank: int, num_ranks: int) -> None:
    groups = [dist.new_group([other]) for other in range(num_ranks)]
    x = ones(rank, 6)
    for name in ("all_reduce", "reduce_scatter", "all_gather", "all_to_all"):
        assert start(x, name, groups[rank]).wait() is x
    with pytest.raises(ValueError, match="not in the group"):
        start(x, group=groups[1 - rank])


def primitives(rank: int, num_ranks: int) -> None:
    results_are_right(rank, num_ranks)
    several_are_in_flight(rank, num_ranks)
    errors_are_clear(rank, num_ranks)
    group_of_one_is_the_identity(rank, num_ranks)


def test_overlap_on_two_gloo_ranks():
    run_ranks(primitives)


def test_without_a_process_group_the_tensor_comes_back():
    x = torch.randn(4)
    product, same = overlap(lambda: 6 * 7, x)
    assert product == 42 and same is x


@pytest.mark.parametrize("capturing", [False, True])
def test_a_capture_that_failed_does_not_stop_later_planned_collectives(monkeypatch, capturing):
    """Without a GPU: a wait for what was captured, and never run, fails; so does one in a capture for what was not."""

    class Stream:
        def wait_event(self, event):
            raise RuntimeError("operation not permitted on an event last recorded in a capturing stream")

    gpu = torch.device("cuda", 0)
    now, before = Stream(), Stream()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: now)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 8, raising=False)
    monkeypatch.setattr(turns_module, "stream_of", lambda handle, device: before)
    monkeypatch.setattr(turns_module, "capture_of", lambda stream: 2 if capturing and stream is now else 0)
    turns = turns_module.Turns(gpu)
    turns.stream, turns.end, turns.unawaited, turns.has_ended, turns.captured_in = 7, object(), object(), True, 1
    if capturing:
        with pytest.raises(RuntimeError, match="begun before this capture: wait"):
            turns.take()
    else:
        turns.take()
    assert (turns.stream == 7) == capturing


def captured(rank: int, num_ranks: int) -> None:
    a = torch.randn(512, 512, device=device_of(rank))
    tensor, product = ones(rank, 4096), torch.empty_like(a)
    # A graph cannot make communicators and cuBLAS handles: once before.
    overlap(lambda: torch.mm(a, a, out=product), tensor.clone())
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        overlap(lambda: torch.mm(a, a, out=product), tensor)
    tensor.fill_(rank + 1.0)
    graph.replay()
    torch.cuda.synchronize()
    assert (tensor == sum(range(1, num_ranks + 1))).all(), f"rank {rank}: the sum is {tensor.unique().tolist()}"
    # Capture may pick another cuBLAS kernel than an eager product, so the judge is float64, not `a @ a`: two roundings
    # and float32 accumulation of k products.
    exact, eps = a.double() @ a.double(), torch.finfo(torch.float32).eps
    relative = float((product.double() - exact).norm() / exact.norm())
    assert relative <= (2 + a.shape[1] ** 0.5) * eps, f"rank {rank}: the product's relative error is {relative:.2g}"
    graph.reset()


@pytest.mark.gpu(num_gpus=2)
def test_overlap_on_two_gpus():
    run_ranks(primitives, backend="nccl")


@pytest.mark.gpu(num_gpus=2)
def test_overlap_is_captured_in_a_graph():
    run_ranks(captured, backend="nccl")

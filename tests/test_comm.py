"""Collectives on real ranks: right results, wrong ones caught, what cannot run says why."""

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from maco_lib import comm
from maco_lib.kernels import inbox
from maco_lib.timing import first_error

GROUP_OF = {"cpu": "gloo", "cuda": "nccl"}


def check_every_backend(rank: int, num_ranks: int) -> None:
    cuda = dist.get_backend() == "nccl"
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    group = dist.group.WORLD
    for name in comm.COLLECTIVES:
        names = comm.available(name, device, group)
        assert names[0] == GROUP_OF[device.type]
        for backend in names:
            for dtype in (torch.bfloat16, torch.float32):
                numel = 8 * num_ranks * 1001
                operation = comm.backend(backend).operation(name, numel, dtype, device, group)
                reference = comm.Reference(name, numel, dtype, device, rank, num_ranks, seed=numel)
                assert comm.check(operation, reference) == "", (backend, name, dtype)
                again = comm.Reference(name, numel, dtype, device, rank, num_ranks, seed=numel + 1)
                assert comm.check(operation, again) == "", (backend, name, dtype)


def check_wrong_results_are_caught(rank: int, num_ranks: int) -> None:
    group, device, numel = dist.group.WORLD, torch.device("cpu"), 4096 * num_ranks
    for name in comm.COLLECTIVES:
        operation = comm.backend("gloo").operation(name, numel, torch.bfloat16, device, group)
        reference = comm.Reference(name, numel, torch.bfloat16, device, rank, num_ranks, seed=7)

        def spoil_one_element(operation=operation):
            operation.run()
            if rank == 1:
                operation.result[123] *= 1.2

        error = comm.check(operation, reference, spoil_one_element)
        if rank == 1:
            assert "1 of" in error and "at 123" in error, error
        else:
            assert error == ""
        assert first_error(error, group).startswith(f"rank 1: {name}: 1 of")
        assert comm.check(operation, reference, lambda: None) != "", f"a {name} that does nothing passed"


def test_gloo_runs_every_collective_and_spoiled_results_are_caught():
    run_ranks(gloo_checks)


def gloo_checks(rank: int, num_ranks: int) -> None:
    check_every_backend(rank, num_ranks)
    check_wrong_results_are_caught(rank, num_ranks)
    reasons = {
        name: backend.unavailable("all_reduce", torch.device("cpu"), dist.group.WORLD)
        for name, backend in comm.BACKENDS.items()
    }
    assert reasons.pop("gloo") is None
    assert all("cpu" in reason for reason in reasons.values()), reasons
    assert comm.all_reduce(torch.empty(0), "gloo", async_op=True) is None


@pytest.mark.gpu(num_gpus=2)
def test_every_gpu_backend_gives_the_right_result():
    run_ranks(check_every_backend, backend="nccl", timeout_s=180)


@pytest.mark.parametrize("num_ranks", range(2, 9))
def test_the_inbox_has_room_for_the_largest_sum_that_goes_through_it(num_ranks):
    in_lines, in_long_lines = (comm.backend(name).max_bytes for name in ("maco_ll", "maco_ll128"))
    assert (num_ranks - 1) * in_lines * 2 <= inbox.LINE_BYTES
    blocks = -(-in_long_lines // (inbox.BLOCK_WORDS * inbox.LINE_DATA))
    assert inbox.has_room(blocks, inbox.BLOCK_WORDS, num_ranks, one_shot=num_ranks == 2)
    assert not inbox.has_room(4 * blocks, inbox.BLOCK_WORDS, num_ranks, one_shot=num_ranks == 2)


def test_bandwidths_follow_their_definitions():
    # 8 MiB in 50 µs on 4 ranks, by hand.
    assert comm.algbw(8 * 2**20, 50e-6) == pytest.approx(167.77216)
    assert comm.busbw("all_reduce", 8 * 2**20, 50e-6, 4) == pytest.approx(167.77216 * 1.5)
    assert comm.busbw("all_gather", 8 * 2**20, 50e-6, 4) == pytest.approx(167.77216 * 0.75)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: comm.collective("allreduce"), "'allreduce'.*all_reduce, reduce_scatter"),
        (lambda: comm.backend("mpi"), "'mpi'.*nccl, "),
        (lambda: comm.collective("reduce_scatter").numels(7, 2), "7 elements"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()

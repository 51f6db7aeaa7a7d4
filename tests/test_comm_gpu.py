"""The all-reduces that other libraries bring: right, deterministic, equal on every rank, capturable; a clean exit.

The checks on GPUs need two of them; the rest says what is refused before any is touched.
"""

import gc
import importlib.util
import os
import weakref

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from maco_lib import comm
from maco_lib import state as states
from maco_lib.comm import mailbox, nccl, nccl_symmetric, peers, symmetric, vllm_custom
from maco_lib.comm.nccl_symmetric import NcclSymmetric
from maco_lib.comm.vllm_custom import VllmCustom
from maco_lib.timing import capture, first_error

NUM_REPEATS = 1000
NUM_REPLAYS = 300
# Every GPU there is: shares, flags and rotations differ from two ranks to more.
NUM_GPUS = max(2, torch.cuda.device_count())
NCCL = NcclSymmetric("nccl_symmetric")
VLLM = VllmCustom("vllm_custom")


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).contiguous().view(torch.uint8)


def same_everywhere(tensor: torch.Tensor, num_ranks: int) -> bool:
    own = bits(tensor)
    copies = [torch.empty_like(own) for _ in range(num_ranks)]
    dist.all_gather(copies, own)
    return all(torch.equal(copy, own) for copy in copies)


class Case:
    """One size and type on this rank: random input, and whether a result is its sum on all ranks, bit for bit."""

    def __init__(self, numel: int, dtype: torch.dtype, rank: int, num_ranks: int, seed: int = 1):
        self.device = torch.device("cuda", rank)
        self.num_ranks, self.label = num_ranks, f"{numel} x {dtype}"
        self.reference = comm.Reference("all_reduce", numel, dtype, self.device, rank, num_ranks, seed)
        self.source = self.reference.source

    def judge(self, result: torch.Tensor, what: str) -> None:
        error = first_error(self.reference.error(result), dist.group.WORLD)
        assert not error, f"{what}, {self.label}: {error}"
        assert same_everywhere(result, self.num_ranks), f"{what}, {self.label}: the ranks' sums differ"


def operations_are_right(backend, rank: int, num_ranks: int) -> None:
    # From a part of one access, over what is no whole number of them, to more than the first workspace holds.
    for numel in (1, 1001, 2**16, 2**20 + 3, 2**25 + 8):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            device = torch.device("cuda", rank)
            operation = backend.operation("all_reduce", numel, dtype, device, dist.group.WORLD)
            for seed in (1, 2):
                case = Case(numel, dtype, rank, num_ranks, seed)
                operation.result.fill_(torch.nan)
                operation.source.copy_(case.source)
                operation.run()
                case.judge(operation.result, "operation")


def repeats_are_identical(backend, rank: int, num_ranks: int) -> None:
    for numel in (1001, 2**20):
        case = Case(numel, torch.bfloat16, rank, num_ranks)
        operation = backend.operation("all_reduce", numel, torch.bfloat16, case.device, dist.group.WORLD)
        first, num_different = None, torch.zeros((), dtype=torch.int64, device=case.device)
        for _ in range(NUM_REPEATS):
            operation.source.copy_(case.source)
            operation.run()
            first = operation.result.clone() if first is None else first
            num_different += (bits(operation.result) != bits(first)).sum()
        assert int(num_different) == 0, f"{case.label}: {int(num_different)} bytes differ in {NUM_REPEATS} repeats"
        case.judge(first, "repeat")


def graphs_are_right(backend, rank: int, num_ranks: int) -> None:
    """A captured operation and a captured sum of the caller's tensor, replayed on new data, beside eager runs."""
    numel, dtype = 2**18 + 8, torch.bfloat16
    given, tensor = (torch.zeros(numel, dtype=dtype, device=f"cuda:{rank}") for _ in range(2))
    backend.all_reduce(tensor, dist.group.WORLD)
    operation = backend.operation("all_reduce", numel, dtype, given.device, dist.group.WORLD)

    def run() -> None:
        operation.source.copy_(given)
        operation.run()

    def run_on_tensor() -> None:
        tensor.copy_(given)
        backend.all_reduce(tensor, dist.group.WORLD)

    graphs = []
    for function in (run, run_on_tensor):
        graph, why = capture(function, 3)
        assert not first_error(why, dist.group.WORLD), why
        graphs.append(graph)
    for seed in (3, 4):
        case = Case(numel, dtype, rank, num_ranks, seed)
        given.copy_(case.source)
        graphs[0].replay()
        case.judge(operation.result, "replayed operation")
        run()
        case.judge(operation.result, "eager run after a replay")
        graphs[1].replay()
        case.judge(tensor, "replayed sum of a tensor")
    torch.cuda.synchronize()
    for graph in graphs:
        graph.reset()


def back_to_back_is_right(backend, place, rank: int, num_ranks: int) -> None:
    """Replayed with nothing between them, on data that differ from launch to launch: what the one before has left in
    mailboxes, or at a peer's, would be seen in the sum."""
    for numel in (1001, 2**16, 2**19, 2**22):
        cases = [Case(numel, torch.bfloat16, rank, num_ranks, seed) for seed in (5, 6, 7)]
        tensors = [place((numel,), torch.bfloat16) for _ in cases]

        def launches(cases=cases, tensors=tensors) -> None:
            for tensor, case in zip(tensors, cases, strict=True):
                tensor.copy_(case.source)
            for tensor in tensors:
                backend.all_reduce(tensor, dist.group.WORLD)

        launches()
        firsts = [tensor.clone() for tensor in tensors]
        for case, first in zip(cases, firsts, strict=True):
            case.judge(first, "eager sum")
        num_wrong = torch.zeros((), dtype=torch.int64, device=cases[0].device)
        graph, why = capture(launches, 1)
        assert not first_error(why, dist.group.WORLD), why
        for _ in range(NUM_REPLAYS):
            graph.replay()
            for tensor, first in zip(tensors, firsts, strict=True):
                num_wrong += (bits(tensor) != bits(first)).any()
        wrong = int(num_wrong)
        graph.reset()
        assert wrong == 0, f"{cases[0].label}: {wrong} of {3 * NUM_REPLAYS} sums in replays differ"


def tensors_are_right(backend, place, rank: int, num_ranks: int) -> None:
    """The caller's tensors: from `place(shape, dtype)` (no copy), from anywhere, and the middle of either."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for shape in ((64, 1024), (17, 3)):
            case = Case(shape[0] * shape[1], dtype, rank, num_ranks)
            for tensor in (place(shape, dtype), torch.empty(shape, dtype=dtype, device=case.device)):
                tensor.copy_(case.source.view(shape))
                assert backend.all_reduce(tensor, dist.group.WORLD) is None
                case.judge(tensor, "tensor")
        case = Case(997, dtype, rank, num_ranks)
        for whole in (place((1000,), dtype), torch.empty(1000, dtype=dtype, device=case.device)):
            whole.fill_(7)
            whole[1:998].copy_(case.source)
            backend.all_reduce(whole[1:998], dist.group.WORLD)
            case.judge(whole[1:998], "part of a tensor")
            assert whole[0] == 7 and (whole[998:] == 7).all(), f"{case.label}: wrote beside the tensor"
        # A whole number of granules where none may begin.
        case = Case(1024, dtype, rank, num_ranks)
        whole = torch.full((1030,), 7, dtype=dtype, device=case.device)
        whole[1:1025].copy_(case.source)
        backend.all_reduce(whole[1:1025], dist.group.WORLD)
        case.judge(whole[1:1025], "misaligned whole granules")
        assert whole[0] == 7 and (whole[1025:] == 7).all(), f"{case.label}: wrote beside the tensor"


def refusals_name_the_value(backend, rank: int, num_ranks: int) -> None:
    device = torch.device("cuda", rank)
    assert backend.unavailable("all_reduce", device, dist.group.WORLD) is None
    assert "all_gather" in backend.unavailable("all_gather", device, dist.group.WORLD)
    with pytest.raises(ValueError, match="float64"):
        backend.all_reduce(torch.zeros(16, dtype=torch.float64, device=device), dist.group.WORLD)


def check_all(backend, place, rank: int, num_ranks: int) -> None:
    refusals_name_the_value(backend, rank, num_ranks)
    operations_are_right(backend, rank, num_ranks)
    tensors_are_right(backend, place, rank, num_ranks)
    repeats_are_identical(backend, rank, num_ranks)
    graphs_are_right(backend, rank, num_ranks)
    back_to_back_is_right(backend, place, rank, num_ranks)
    assert dist.get_backend() == "nccl"
    ours = Case(4096, torch.float32, rank, num_ranks)
    dist.all_reduce(ours.source)
    ours.judge(ours.source, "the caller's group afterwards")


def nccl_symmetric_works(rank: int, num_ranks: int) -> None:
    device = torch.device("cuda", rank)
    check_all(NCCL, lambda shape, dtype: NCCL.empty(shape, dtype, device, dist.group.WORLD), rank, num_ranks)


def ours_work(rank: int, num_ranks: int) -> None:
    device = torch.device("cuda", rank)
    for name in (name for name in comm.BACKENDS if name.startswith("maco_")):
        print(name, flush=True)
        check_all(comm.backend(name), lambda shape, dtype: comm.symmetric_empty(shape, dtype, device), rank, num_ranks)


def vllm_custom_works(rank: int, num_ranks: int) -> None:
    device = torch.device("cuda", rank)
    check_all(VLLM, lambda shape, dtype: comm.symmetric_empty(shape, dtype, device), rank, num_ranks)


def denormals(num_units: torch.Tensor) -> torch.Tensor:
    """float32 multiples, int64 below 2**23, of the least denormal (1.4e-45): by their bits, which are that number."""
    signs = (num_units < 0).to(torch.int32) << 31
    return (num_units.abs().to(torch.int32) | signs).view(torch.float32)


def denormals_are_summed(rank: int, num_ranks: int) -> None:
    """Every sum of these is exact, so in every order the same: a backend that flushes denormals gives zeros."""
    device = torch.device("cuda", rank) if dist.get_backend() == "nccl" else torch.device("cpu")
    flushing = []
    for name in comm.available("all_reduce", device, dist.group.WORLD):
        for numel in (1000, 2**18, 2**22):
            draws = torch.Generator().manual_seed(numel)
            every_rank = torch.randint(1, 2**19, (num_ranks, numel), generator=draws)
            every_rank *= torch.randint(0, 2, (num_ranks, numel), generator=draws) * 2 - 1
            expected = denormals(every_rank.sum(0)).to(device)
            backend = comm.backend(name)
            operation = backend.operation("all_reduce", numel, torch.float32, device, dist.group.WORLD)
            operation.source.copy_(denormals(every_rank[rank]))
            operation.run()
            num_wrong = int((bits(operation.result) != bits(expected)).sum())
            if error := first_error(f"{num_wrong} bytes differ" * bool(num_wrong), dist.group.WORLD):
                flushing.append(f"{name}, {numel} elements: {error}")
    assert not flushing, "denormals do not survive: " + "; ".join(flushing)


def released_and_used_again(rank: int, num_ranks: int) -> None:
    tensor = torch.full((1000,), rank + 1.0, device=f"cuda:{rank}")
    communicators = dist.distributed_c10d._world.pg_map
    for _ in range(2):
        total = tensor.clone()
        NCCL.all_reduce(total, dist.group.WORLD)
        assert (total == sum(range(1, num_ranks + 1))).all()
        nccl_symmetric.release(dist.group.WORLD)
        assert list(communicators) == [dist.group.WORLD]
    nccl_symmetric.release(dist.group.WORLD)


@pytest.mark.gpu(num_gpus=2)
def test_ours_on_every_gpu():
    run_ranks(ours_work, NUM_GPUS, backend="nccl", timeout_s=300)


@pytest.mark.parametrize("kind", ["gloo", pytest.param("nccl", marks=pytest.mark.gpu(num_gpus=2))])
def test_float32_denormals_survive_every_sum(kind):
    run_ranks(denormals_are_summed, NUM_GPUS if kind == "nccl" else 2, backend=kind)


@pytest.mark.gpu(num_gpus=2)
def test_nccl_symmetric_on_every_gpu():
    # The ranks leave their buffers to the destruction of the group; a pool still registered would abort them.
    run_ranks(nccl_symmetric_works, NUM_GPUS, backend="nccl", timeout_s=300)


@pytest.mark.gpu(num_gpus=2)
def test_nccl_symmetric_is_released_and_used_again(monkeypatch):
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("NCCL_DEBUG_SUBSYS", "TUNING")
    output = run_ranks(released_and_used_again, backend="nccl")
    # NCCL falls back without a word where it cannot: its log is the only witness of the kernels that ran.
    assert output.count("AllReduce [Symmetric]") == 2, output


@pytest.mark.gpu(num_gpus=2)
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_vllm_custom_on_every_gpu():
    run_ranks(vllm_custom_works, NUM_GPUS, backend="nccl", timeout_s=300)


@pytest.mark.parametrize(
    "make",
    [
        lambda group: states.of(group, torch.device("cuda", 0)).get(peers.Peers),
        lambda group: states.of(group, torch.device("cuda", 0)).get(mailbox.Mailbox),
        lambda group: nccl.limited_group(group, torch.device("cuda", 0), 4),
        lambda group: nccl_symmetric.memory(group, torch.device("cuda", 0), 16),
        lambda group: symmetric.memory(group, torch.device("cuda", 0)).allocate(64),
    ],
)
def test_what_all_ranks_make_is_not_made_in_a_capture(monkeypatch, make):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    group = type("Group", (), {"group_name": "a group"})()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="while a graph is captured: call once before"):
            make(group)


def on_hosts(rank: int, num_ranks: int) -> None:
    """As if these ranks had 8 GPUs each: on one host, then on two."""
    torch.cuda.device_count, torch.cuda.can_device_access_peer = lambda: 8, lambda *pair: True
    group, gpu = dist.group.WORLD, torch.device("cuda", rank)
    assert symmetric.obstacle(gpu, group) == ""
    os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    assert symmetric.unreachable(gpu, group) == f"ranks {1 - rank} of the group are on other hosts"
    alone = [dist.new_group([other]) for other in range(num_ranks)][rank]
    assert symmetric.unreachable(gpu, alone) == ""
    os.environ["WORLD_SIZE"] = "1"  # torchrun started another process, which started these
    assert symmetric.obstacle(gpu, group) == ""


def test_memory_of_another_host_cannot_be_reached():
    run_ranks(on_hosts)


class FakeKernels:
    """vLLM's objects as its source has them: which row of its table each launch reads, without a GPU."""

    def __init__(self):
        self.objects: dict[int, dict] = {}
        self.read: list[list[int]] = []

    def init_custom_ar(self, signals, table, rank, fully_connected) -> int:
        self.objects[number := max(self.objects, default=0) + 1] = {"table": table, "registered": 0, "captured": 0}
        return number

    def register_buffer(self, number, addresses) -> None:
        self.objects[number]["registered"] += 1

    def all_reduce(self, number, source, result, registered_buffer, its_size) -> None:
        made, row = self.objects[number], 0
        if torch.cuda.is_current_stream_capturing():
            row = made["registered"] + made["captured"]
            made["captured"] += 1
        addresses = made["table"].view(torch.int64).view(-1, vllm_custom.MAX_RANKS)
        self.read.append(addresses[row].tolist())

    def dispose(self, number) -> None:
        del self.objects[number]


def test_vllm_custom_takes_next_to_no_memory_for_a_source_however_often_it_is_captured(monkeypatch):
    kernels, capturing = FakeKernels(), [False]
    monkeypatch.setattr(torch.ops, "_C_custom_ar", kernels, raising=False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    source = vllm_custom.Source([10, 20], [300, 400], 0, torch.device("cpu"))
    assert source.table.nbytes <= 1024
    for capturing[0] in (False, True, False, True, True):
        source.sum(None, None)
    for _ in range(2**16):
        source.sum(None, None)
    assert len(kernels.objects) == 1
    assert len(kernels.read) == 2**16 + 5 and all(row == [300, 400, 0, 0, 0, 0, 0, 0] for row in kernels.read)
    with pytest.raises(RuntimeError, match="while a graph is captured: call once before"):
        vllm_custom.Source([10, 20], [300, 400], 0, torch.device("cpu"))


class Owner:
    def finalize(self) -> None:
        print(f"finalized while the group exists: {dist.is_initialized()}", flush=True)


def own_something(rank: int, num_ranks: int) -> None:
    nccl_symmetric.finalize_before_destruction(Owner())


def released(rank: int, num_ranks: int) -> None:
    """`release` without a GPU: what it has to let go of beside registered pools, which there are none of here."""
    world = dist.distributed_c10d._world
    owner = object.__new__(nccl_symmetric.RegisteredMemory)
    owner.pools, owner.communicator = [], dist.new_group(list(range(num_ranks)))
    nccl_symmetric.finalize_before_destruction(owner)
    states.of(None, torch.device("cpu")).made[nccl_symmetric.RegisteredMemory, 16] = owner
    communicator, owner = weakref.ref(owner.communicator), weakref.ref(owner)
    num_groups = len(world.pg_map)
    for _ in range(2):  # a second time there is nothing to release
        nccl_symmetric.release(dist.group.WORLD)
        gc.collect()
        assert owner() is None and communicator() is None
        assert len(world.pg_map) == num_groups - 1 and not world.comms
    dist.barrier()


def test_release_lets_go_of_the_communicator():
    run_ranks(released)


def released_too_late(rank: int, num_ranks: int) -> None:
    owner = object.__new__(nccl_symmetric.RegisteredMemory)
    owner.pools, owner.communicator = [], dist.new_group(list(range(num_ranks)))
    nccl_symmetric.finalize_before_destruction(owner)
    world = dist.group.WORLD
    states.of(world, torch.device("cpu")).made[nccl_symmetric.RegisteredMemory, 16] = owner
    dist.destroy_process_group()
    nccl_symmetric.release(world)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # for whoever destroys it at the end


def test_release_after_the_default_group_has_gone_has_nothing_to_destroy():
    run_ranks(released_too_late)


def test_owners_are_finalized_before_the_group_is_destroyed_and_at_exit():
    output = run_ranks(own_something)
    assert output.count("finalized while the group exists: True") == 2, output
    assert output.count("finalized while the group exists: False") == 2, output


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: NCCL.require("all_gather", torch.bfloat16), "'all_gather'.*all_reduce"),
        (lambda: NCCL.require("all_reduce", torch.float64), "float64.*bfloat16"),
        (lambda: VLLM.require("all_reduce", torch.int32), "int32.*bfloat16"),
        (lambda: VLLM.operation("all_reduce", 2**29, torch.float32, torch.device("cpu"), None), "2147483648 bytes"),
        (lambda: VLLM.all_reduce(torch.empty(2**29, dtype=torch.float32, device="meta"), None), "2147483648 bytes"),
    ],
)
def test_what_they_cannot_do_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()

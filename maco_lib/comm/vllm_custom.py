"""vLLM's custom all-reduce: its CUDA kernels, without an engine, on our symmetric memory.

One-shot with 2 ranks and for small tensors (below 512 KiB with 4 ranks, 256 KiB with more), else two-shot; out of
place. What vLLM runs below 8 MiB, in place of NCCL: made to win at the sizes of decoding. bf16, fp16, fp32; summed in
float32 in one order, so bitwise equal on every rank.

Only the library of vLLM's kernels is loaded: `import vllm` would change settings of torch in this process. vLLM shares
its buffers through CUDA IPC; the kernels take any address that the GPU can read, so here they work in a `Region`.
"""

import functools
import importlib.util
import mmap
import pathlib
from dataclasses import dataclass

import torch
import torch.distributed as dist

from maco_lib import state as states
from maco_lib.comm.record import Operation
from maco_lib.comm.symmetric import GRANULE_BYTES, Memory, Region, SymmetricAllReduce, memory, require_no_capture, whole
from maco_lib.state import State

NUM_RANKS = (2, 4, 6, 8)
# vLLM's RankData: the addresses of one source, for at most 8 ranks.
MAX_RANKS = 8


@functools.cache
def load() -> str:
    """Load vLLM's kernels as `torch.ops._C_custom_ar`; "" or why they cannot be had."""
    package = importlib.util.find_spec("vllm")
    if package is None or not package.submodule_search_locations:
        return "vLLM is not installed"
    folder = pathlib.Path(package.submodule_search_locations[0])
    # The one that has them and no other: libraries for different processors cannot be loaded together.
    library = next((path for path in sorted(folder.glob("_C*.so")) if mentions(path, b"_C_custom_ar")), None)
    if library is None:
        return "the installed vLLM has no custom all-reduce: it was built for another device"
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        return f"vLLM's kernels cannot be loaded: {error}"
    return ""


def mentions(path: pathlib.Path, name: bytes) -> bool:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(name) >= 0


class Source:
    """One input of vLLM's all-reduce: where it begins on every rank, in a table that stays where it is for graphs.

    An eager launch reads the row of vLLM's table of addresses that was registered. The kth captured launch of a vLLM
    object reads the kth row after it, which vLLM fills in after the capture, in a collective call. Here every captured
    launch has an object of its own, which has registered nothing: it reads the one row that is filled from the start,
    however many are captured, and graphs need no such step.
    """

    def __init__(self, signals: list[int], addresses: list[int], rank: int, device: torch.device):
        require_no_capture("tell vLLM's all-reduce of a tensor")
        row = addresses + [0] * (MAX_RANKS - len(addresses))
        self.table = torch.tensor(row, dtype=torch.int64, device=device)
        # Filled before any stream launches: those need not be ordered after this one.
        torch.cuda.synchronize(device)
        self.signals, self.rank = signals, rank
        self.kernels = torch.ops._C_custom_ar
        self.owner = self.new_owner()
        self.kernels.register_buffer(self.owner, addresses)

    def new_owner(self) -> int:
        """One of vLLM's objects that launch: on the host only, and needed no longer than until it has launched."""
        # Not fully connected would mean: no kernel above 2 ranks. `unreachable` has made sure of the access.
        return self.kernels.init_custom_ar(self.signals, self.table.view(torch.uint8), self.rank, True)

    def sum(self, source: torch.Tensor, result: torch.Tensor) -> None:
        if not torch.cuda.is_current_stream_capturing():
            self.kernels.all_reduce(self.owner, source, result, 0, 0)
            return
        owner = self.new_owner()
        try:
            self.kernels.all_reduce(owner, source, result, 0, 0)
        finally:
            self.kernels.dispose(owner)


class Signals:
    """The flags at which the kernels of a group meet, and behind them the sums of two-shot. Made once, collective."""

    def __init__(self, state: State, max_bytes: int):
        if why := load():
            raise ValueError(why)
        group, device = state.group, state.device
        self.rank, self.device = group.rank(), device
        num_ranks = group.size()
        # The last rank's share is the longest, by less than one access (16 bytes) per rank.
        shares = max_bytes // num_ranks + num_ranks * GRANULE_BYTES if num_ranks > 2 else 0
        self.region = state.get(Memory).allocate(whole(torch.ops._C_custom_ar.meta_size() + shares))
        self.region.base.zero_()
        self.sources: dict[tuple[int, ...], Source] = {}
        # Nobody may signal into flags that their owner has yet to clear.
        torch.cuda.synchronize(device)
        dist.barrier(group, device_ids=[device.index])

    def source(self, region: Region, source: torch.Tensor) -> Source:
        offset = source.data_ptr() - region.base.data_ptr()
        addresses = tuple(start + offset for start in region.addresses)
        if addresses not in self.sources:
            self.sources[addresses] = Source(self.region.addresses, list(addresses), self.rank, self.device)
        return self.sources[addresses]


@dataclass(frozen=True)
class VllmCustom(SymmetricAllReduce):
    """`max_bytes`: the largest tensor; above 2 ranks, max_bytes / P of memory are kept for the sums of two-shot.

    Needs vLLM for CUDA, 2, 4, 6 or 8 GPUs of one host that can access each other's memory, bf16, fp16 or fp32.
    """

    max_bytes: int = 2**30
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    in_place = False

    def unavailable(self, collective: str, device: torch.device, group: dist.ProcessGroup) -> str | None:
        """Why it cannot run here, or None."""
        if why := super().unavailable(collective, device, group):
            return why
        if group.size() not in NUM_RANKS:
            return f"vLLM's kernels are for {', '.join(map(str, NUM_RANKS))} ranks, not {group.size()}"
        return load() or None

    def require_size(self, num_bytes: int) -> None:
        if num_bytes > self.max_bytes:
            raise ValueError(f"{self.name}: {num_bytes} bytes are above max_bytes = {self.max_bytes}")

    def operation(
        self, name: str, numel: int, dtype: torch.dtype, device: torch.device, group: dist.ProcessGroup
    ) -> Operation:
        """As its base's; raises ValueError on more than `max_bytes`, too."""
        self.require_size(numel * dtype.itemsize)
        operation = super().operation(name, numel, dtype, device, group)
        # Known before the first launch, which may be a captured one.
        region = memory(group, device).find(operation.source)
        states.of(group, device).get(Signals, self.max_bytes).source(region, operation.source)
        return operation

    def all_reduce(self, tensor: torch.Tensor, group: dist.ProcessGroup, async_op: bool = False) -> None:
        """As its base's; raises ValueError on more than `max_bytes`, too. The first call on a tensor is eager."""
        self.require_size(tensor.nbytes)
        super().all_reduce(tensor, group)

    def reduce(self, region: Region, source: torch.Tensor, result: torch.Tensor, group: dist.ProcessGroup) -> None:
        states.of(group, source.device).get(Signals, self.max_bytes).source(region, source).sum(source, result)


BACKENDS = (VllmCustom("vllm_custom"),)
PLACE = 7

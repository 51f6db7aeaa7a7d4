"""One kernel that multiplies and sums over the ranks while it multiplies (`kernels.persistent`), on Hopper GPUs.

Every tile can be fetched as soon as it is finished, so transfers begin after the first tiles and end shortly after the
last; no SM is given up for them. Wins where both the matmul and the all-reduce are long. What it cannot hide: the first
wave of tiles, before which there is nothing to transfer, and the sums of the last wave, which all SMs finish together.

Its CTAs wait for those of the other ranks, and need all SMs: no other collective of these ranks may run beside it on
another stream. Those of this library take turns with it (`turns.Turns`); torch's own are the caller's to order.
"""

from collections.abc import Collection
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric

from maco_lib import state as states
from maco_lib.comm.symmetric import Memory, Region, require_no_capture, unreachable
from maco_lib.comm.watch import Watch
from maco_lib.kernels.launch import Launches
from maco_lib.kernels.tile_order import CTAS, ROWS, TileOrder
from maco_lib.linear.techniques.persistent_time import TILINGS, Tiling, fastest_tiling, order_of, parse_tiling
from maco_lib.linear.techniques.problem import Problem
from maco_lib.linear.techniques.technique import Argument, Technique
from maco_lib.state import State
from maco_lib.timing import gather

DTYPES = (torch.bfloat16, torch.float16)
MULTIPLE = 8  # of N and K: TMA's rows are multiples of 16 bytes
# The backend that is there where ranks reach each other's memory, and can write into the others' inboxes.
LINES = "maco_ll"
NUM_FLAGS = 2**20
FLAGS_PER_TILE = 3 * CTAS
# Rows of one launch: more are cut, so that there are few tables of tiles however M changes.
MAX_ROWS = 2**16
BEFORE = "before with the same shape"
NARROWEST = min(tiling.columns for tiling in TILINGS)


class Exchange:
    """Where a group's ranks leave tiles and flags for each other. Made at the first call; collective."""

    def __init__(self, state: State):
        require_no_capture("make a group's flags", BEFORE)
        group, device = state.group, state.device
        self.state, self.device, self.rank, self.num_ranks = state, device, group.rank(), group.size()
        # The ranks compute the same tiles at a time, also on GPUs that differ.
        num_sms = torch.cuda.get_device_properties(device).multi_processor_count
        self.max_clusters = min(gather(num_sms, group)) // CTAS
        self.weights: set[tuple[int, int]] = set()
        self.memory, self.watch, self.launches = state.get(Memory), state.get(Watch), Launches()
        self.own_flags = symmetric.empty(NUM_FLAGS, dtype=torch.int32, device=device).zero_()
        self.handle = symmetric.rendezvous(self.own_flags, group.group_name)
        self.flags = tuple(self.handle.buffer_ptrs)
        # Partials and sums apart: a rank may write the next call's partials while another reads this call's sums.
        self.areas: dict[str, Region] = {}
        self.inboxes: list[torch.Tensor] = []  # the last one is used, the others by graphs that were captured with them
        self.schedules: dict[TileOrder, object] = {}
        self.parts = Launches()  # of a problem, as `divide` gives them
        # Nobody may raise flags that their owner has yet to clear.
        torch.cuda.synchronize(device)
        dist.barrier(group, device_ids=[device.index])

    def agree(self, n: int, k: int) -> None:
        """Raise ValueError unless all ranks have weights of the same shape; compared once for each. Collective."""
        if (n, k) not in self.weights:
            require_no_capture("make an agreement on the weight", BEFORE)
            every = gather((n, k), self.state.group)
            if len(set(every)) > 1:
                raise ValueError(f"technique 'persistent': the ranks' weights have different shapes: {every}")
            self.weights.add((n, k))

    def area(self, name: str, num_bytes: int) -> tuple[int, ...]:
        """Addresses, by rank, of memory of at least `num_bytes`; collective when it has to grow."""
        area = self.areas.get(name)
        if area is None or area.base.nbytes < num_bytes:
            require_no_capture(f"make {num_bytes} bytes for {name}", BEFORE)
            self.areas[name] = self.memory.grown(area, num_bytes)
            self.parts.clear()  # they say where the areas are
        return tuple(self.areas[name].addresses)

    def inbox(self, num_bytes: int) -> int:
        """The address of this rank's own memory of at least `num_bytes`."""
        if not self.inboxes or self.inboxes[-1].nbytes < num_bytes:
            require_no_capture(f"make an inbox of {num_bytes} bytes", BEFORE)
            size = 1 << (num_bytes - 1).bit_length()
            self.inboxes.append(torch.empty(size, dtype=torch.uint8, device=self.device))
            self.parts.clear()
        return self.inboxes[-1].data_ptr()

    def schedule(self, order: TileOrder) -> object:
        """The tables of `order` for this rank, a `kernels.persistent.Schedule`."""
        from maco_lib.kernels.persistent import Schedule

        if order not in self.schedules:
            require_no_capture("make the table of tiles", BEFORE)
            self.schedules[order] = Schedule.of(order, self.rank, self.device)
        return self.schedules[order]

    def addresses(self, order: TileOrder, bn: int) -> object:
        """Where tiles of `bn` columns and flags lie, a `kernels.persistent.Addresses`."""
        from maco_lib.kernels.persistent import Addresses

        num_bytes = order.num_slots * ROWS * bn * 2
        partials, sums = self.area("partials", num_bytes * self.num_ranks), self.area("sums", num_bytes)
        inbox = self.inbox(num_bytes * self.num_ranks)
        return Addresses(partials, sums, self.flags, inbox, num_bytes, self.watch.address)


def misplaced(problem: Problem) -> str:
    """Why the kernel is not for this device or type, or ""."""
    dtype, device = problem.x.dtype, problem.x.device
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 9:
        return f"it is for Hopper GPUs, x is on {device}"
    if dtype not in DTYPES:
        return f"it is for {' and '.join(map(str, DTYPES))}, x is of {dtype}"
    return ""


def misshapen(problem: Problem) -> str:
    """Why the kernel cannot multiply with this weight, or ""."""
    n, k = problem.weight.shape
    if n % MULTIPLE or k % MULTIPLE:
        return f"N and K are to be multiples of {MULTIPLE}, weight is {tuple(problem.weight.shape)}"
    return "" if k else "K is 0"


def for_tma(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor`, or a copy where its rows do not begin at multiples of 16 bytes."""
    fits = tensor.stride(1) == 1 and tensor.stride(0) * tensor.itemsize % 16 == 0 and tensor.data_ptr() % 16 == 0
    return tensor if fits else tensor.clone(memory_format=torch.contiguous_format)


def run(
    problem: Problem, tiling: Tiling | None = None, trace: torch.Tensor | None = None, strict: bool | None = None
) -> None:
    """Fill `problem.result`. Collective.

    tiling: one of `TILINGS`; None: that predicted to be the fastest. trace, strict: as `kernels.persistent`'s.
    Copies x or weight where they are not laid out for TMA. Raises ValueError on a problem that the kernel cannot run,
    and where K differs between the ranks.
    """
    from maco_lib.kernels.persistent import persistent

    state = states.of(problem.group, problem.result.device)
    shared = state.known(Exchange)
    key = problem.x.shape, problem.weight.shape, problem.x.dtype, tiling
    parts = shared.parts.get(key) if shared else None
    if parts is None:
        parts = divide(problem, tiling)
        shared = state.get(Exchange)
        shared.parts.keep(key, parts)
    x, weight = for_tma(problem.x), for_tma(problem.weight)
    bias = None if problem.bias is None else for_tma(problem.bias[None])[0]
    residual = None if problem.residual is None else for_tma(problem.residual.contiguous())
    state.turns.take()
    for rows, columns, order, schedule, addresses in parts:
        whole = len(parts) == 1
        persistent(
            x if whole else x[rows], weight, bias, residual if whole or residual is None else residual[rows],
            problem.result if whole else problem.result[rows], columns, order, schedule, addresses, shared.rank,
            shared.launches, state.together, trace, strict,
        )  # fmt: skip
    state.turns.give()


def divide(problem: Problem, tiling: Tiling | None) -> list[tuple[slice, int, TileOrder, object, object]]:
    """Of each launch its rows, columns of a tile, order of the tiles, its tables, and where tiles lie. Collective.

    Raises ValueError as `run`.
    """
    if why := misplaced(problem) or unreachable(problem.result.device, problem.group):
        raise ValueError(f"technique 'persistent': {why}")
    (num_rows, num_columns), k = problem.result.shape, problem.x.shape[1]
    shared = states.of(problem.group, problem.result.device).get(Exchange)
    shared.agree(num_columns, k)
    # After that, so that no rank refuses alone.
    if why := misshapen(problem):
        raise ValueError(f"technique 'persistent': {why}")
    most = NUM_FLAGS // FLAGS_PER_TILE // shared.num_ranks // -(-num_columns // NARROWEST) * ROWS
    step = min(MAX_ROWS, max(ROWS, most))
    orders = []
    for first in range(0, num_rows, step):
        rows = slice(first, min(first + step, num_rows))
        of_part = (rows.stop - first, num_columns, k)
        tiles = tiling or fastest_tiling(*of_part, shared.num_ranks, shared.max_clusters)
        orders.append((rows, tiles.columns, order_of(*of_part, tiles, shared.num_ranks, shared.max_clusters)))
    # The first is the largest: the memory of all has its size with it.
    return [(*part, shared.schedule(part[2]), shared.addresses(part[2], part[1])) for part in orders]


def suits(layer: Any, backends: Collection[str]) -> bool:
    """Whether our own matmuls are for weights like this, on every rank, as `Technique.suits`."""
    aligned = layer.n % MULTIPLE == 0 and layer.k % MULTIPLE == 0
    return layer.dtype in DTYPES and aligned and layer.even and LINES in backends


def candidates(kind: str, backends: list[str]) -> list[str]:
    return [f"persistent:{tiling}" for tiling in TILINGS if kind == "cuda"]


NAMES = ["", *map(str, TILINGS)]
TECHNIQUE = Technique(
    "persistent",
    lambda problem, plan: run(problem, parse_tiling(plan.tiling)),
    candidates,
    Argument("tiling", "TILING", NAMES.__contains__, ", ".join(map(repr, NAMES))),
    takes_backend=False,
    suits=suits,
    place=2,
)

"""One matmul, not cut, that tells when each of its tiles is finished; bands of rows are summed as they are complete.

The matmul is `kernels.persistent` for one rank: it takes the tiles band after band and raises a flag for each. On a
side stream a kernel of one CTA waits for the flags of a band, then the backend sums it. Against `chunked` the bands
cost the matmul nothing: no partial wave of tiles each, no launch. The price is `NUM_FREE_SMS` SMs, left to the sums
from beginning to end, and a matmul of ours, for Hopper.

Meant for problems where a chunk is a few waves of tiles, so that cutting costs more than the SMs do, and for backends
and groups that `persistent` is not for. Hides at most (B - 1) / B of the all-reduce with B bands. A backend that fills
more than the free SMs works, and takes turns on them until the matmul ends.

The matmul never waits for the sums, and what waits for it keeps no SM that it needs: no deadlock, whatever runs first.
"""

import dataclasses
import weakref

import torch
import torch.distributed as dist

from maco_lib.kernels.tile_order import CTAS, ROWS, TileOrder
from maco_lib.overlap.linear_techniques import sequential
from maco_lib.overlap.linear_techniques.chunked import cut
from maco_lib.overlap.linear_techniques.decode import in_whole_lines
from maco_lib.overlap.linear_techniques.persistent import (
    MAX_ROWS,
    MULTIPLE,
    for_tma,
    misplaced,
    require_preparation,
)
from maco_lib.overlap.linear_techniques.persistent_time import fastest_tiling, order_of
from maco_lib.overlap.linear_techniques.problem import EVERYTHING, Block, Problem
from maco_lib.overlap.streams import highest_priority, side_stream

# 8 nearly fill NVLink (`kernels.sum_shares`), but the sums also have to keep up with a copy to the result each.
NUM_FREE_SMS = 16


def bands(num_rows: int, num_bands: int) -> list[slice]:
    """`num_rows` in at most `num_bands` pieces, as `cut`, of the tiles of a cluster."""
    return cut(num_rows, num_bands, ROWS)


def flags_of(rows: slice, num_n: int) -> tuple[int, int]:
    """(begin, end) of the flags of a band's tiles, where the tiles are `num_n` columns wide."""
    return rows.start // ROWS * num_n * CTAS, -(-rows.stop // ROWS) * num_n * CTAS


class Signals:
    """A rank's flags, and the tables of its tiles. The last flags are used, the others by graphs captured with them."""

    def __init__(self, device: torch.device):
        self.device = device
        self.num_sms = torch.cuda.get_device_properties(device).multi_processor_count
        self.flags: list[torch.Tensor] = []
        self.schedules: dict[TileOrder, object] = {}

    def flags_for(self, num_tiles: int) -> torch.Tensor:
        """At least that many tiles' flags, all down."""
        num_flags = num_tiles * CTAS
        if not self.flags or len(self.flags[-1]) < num_flags:
            require_preparation(f"{num_flags} flags")
            size = 1 << (num_flags - 1).bit_length()
            self.flags.append(torch.zeros(size, dtype=torch.int32, device=self.device))
        return self.flags[-1]

    def schedule(self, order: TileOrder) -> object:
        """The tables of `order`, a `kernels.persistent.Schedule`."""
        from maco_lib.kernels.persistent import Schedule

        if order not in self.schedules:
            require_preparation("the table of tiles")
            self.schedules[order] = Schedule.of(order, 0, self.device)
        return self.schedules[order]


_SIGNALS: "weakref.WeakKeyDictionary[dist.ProcessGroup, dict[torch.device, Signals]]" = weakref.WeakKeyDictionary()


def signals(group: dist.ProcessGroup, device: torch.device) -> Signals:
    """Those of a group on this rank's device: calls for one group come one after the other, as its collectives do."""
    of_group = _SIGNALS.setdefault(group, {})
    if device not in of_group:
        of_group[device] = Signals(device)
    return of_group[device]


def unaligned(problem: Problem) -> str:
    """Why the matmul is not for a result of so many columns, or ""; the same on every rank."""
    num_columns = problem.result.shape[1]
    return f"N = {num_columns} is no multiple of {MULTIPLE}" if num_columns % MULTIPLE else ""


def run(problem: Problem, num_bands: int) -> None:
    """Fill `problem.result`. Collective. One band, where M is at most a tile, is run as `sequential`.

    Copies x or weight where they are not laid out for TMA, with columns of zeros if need be: any K will do, so no rank
    refuses its share alone. Raises ValueError on a problem that the matmul is not for.
    """
    if why := misplaced(problem) or unaligned(problem):
        raise ValueError(f"technique 'signalled': {why}")
    for first in range(0, len(problem.result), MAX_ROWS):
        rows = slice(first, first + MAX_ROWS)
        residual = None if problem.residual is None else problem.residual[rows]
        part = dataclasses.replace(problem, x=problem.x[rows], residual=residual, result=problem.result[rows])
        pieces = bands(len(part.result), num_bands)
        if len(pieces) == 1:
            sequential.run(part)
        else:
            blocks = part.blocks([(piece, EVERYTHING[1]) for piece in pieces])
            operands = {"x": in_whole_lines(part.x), "weight": in_whole_lines(part.weight)}
            on_side_stream(dataclasses.replace(part, **operands), blocks)


def on_side_stream(problem: Problem, blocks: list[Block]) -> None:
    """x and weight are laid out for TMA."""
    (num_rows, num_columns), device, k = problem.result.shape, problem.result.device, problem.x.shape[1]
    shared = signals(problem.group, device)
    max_clusters = (shared.num_sms - NUM_FREE_SMS) // CTAS
    tiling = fastest_tiling(num_rows, num_columns, k, 1, max_clusters)
    num_n, height = -(-num_columns // tiling.columns), blocks[0].piece[0].stop // ROWS
    order = dataclasses.replace(order_of(num_rows, num_columns, k, tiling, 1, max_clusters), height=height)
    flags, schedule = shared.flags_for(order.num_tiles), shared.schedule(order)
    current, side = torch.cuda.current_stream(device), side_stream(device, highest_priority())
    side.wait_stream(current)
    try:
        multiply(problem, blocks, tiling.columns, order, schedule, flags)
        with torch.cuda.stream(side):
            sum_bands(problem, blocks, flags, num_n)
    except BaseException:
        current.wait_stream(side)
        flags.zero_()  # some that nobody waited for may be up
        raise
    current.wait_stream(side)


def multiply(
    problem: Problem, blocks: list[Block], bn: int, order: TileOrder, schedule: object, flags: torch.Tensor
) -> None:
    """This rank's product of all blocks, on the current stream."""
    from maco_lib.kernels.persistent import Addresses, persistent

    bias = None
    if problem.bias is not None and problem.group.rank() == 0:
        bias = for_tma(problem.bias[None])[0]
    # Whole tiles fill whole granules, so the blocks lie one after the other without gaps.
    product = blocks[0].product.as_strided(problem.result.shape, (problem.result.shape[1], 1))
    here = Addresses([0], [0], [flags.data_ptr()], 0, 0)
    persistent(problem.x, problem.weight, bias, None, product, bn, order, schedule, here, 0)


def sum_bands(problem: Problem, blocks: list[Block], flags: torch.Tensor, num_n: int) -> None:
    """Wait for each block's tiles, sum it, and bring it to the result, on the current stream. Collective."""
    from maco_lib.kernels.wait_tiles import wait_tiles

    for block in blocks:
        wait_tiles(flags, *flags_of(block.piece[0], num_n))
        problem.sum(block)
        problem.finish(block)

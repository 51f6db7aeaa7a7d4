"""A matmul for decoding: few rows of x, so its time is that of reading the weight once, which it does at full speed.

Tiles of the weight's rows are split along K into as many shares as the GPU runs CTAs at a time: shares are equal, and
all are read at once, whatever N and K. The last CTA of a tile to end adds the shares up in their order, in float32: the
same bits every time, rounded once.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

MAX_ROWS = 64
# Loads are of so many elements, 16 bytes.
VECTOR = 8
# Of a tile; all are loaded at once when they are added up.
MAX_SPLITS = 8
# Counters of arrived shares that a launch may need.
MAX_TILES = 1024
# Shared memory of an SM, and what the GPU takes of it for itself with every CTA.
SM_SHARED_BYTES, CTA_SHARED_BYTES = 228 * 2**10, 2**10

PREFETCH = tl.constexpr("cp.async.bulk.prefetch.L2.global [$1], $2; mov.b32 $0, 0;")


class Tile(NamedTuple):
    """How a kernel works: the weight's rows and columns of a step, warps, and steps in shared memory."""

    rows: int
    columns: int
    num_warps: int
    num_stages: int


TILE = Tile(64, 128, 4, 5)


@triton.jit
def finish(
    total, bias, product, partials, arrived, rows, columns, num_rows, num_columns, num_splits,
    shared: tl.constexpr, biased: tl.constexpr, max_splits: tl.constexpr,
):  # fmt: skip
    """Store a tile of the product, of this CTA alone or, where `shared`, once all shares of it have arrived."""
    tile, split = tl.program_id(0), tl.program_id(1)
    there = columns < num_columns
    inside = (rows < num_rows)[:, None] & there[None, :]
    places = rows[:, None] * num_columns + columns[None, :]
    last = True
    if shared:
        tl.store(partials + split * num_rows * num_columns + places, total, mask=inside)
        tl.debug_barrier()
        last = tl.atomic_add(arrived + tile, 1, sem="acq_rel", scope="gpu") == num_splits - 1
    if last:
        if shared:
            # As the next launch expects it.
            tl.store(arrived + tile, 0)
            total = tl.zeros_like(total)
            for number in tl.static_range(max_splits):
                share = partials + number * num_rows * num_columns + places
                total += tl.load(share, mask=inside & (number < num_splits), other=0.0, cache_modifier=".cg")
        if biased:
            total += tl.load(bias + columns, mask=there, other=0.0).to(tl.float32)[None, :]
        tl.store(product + places, total.to(product.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_rows", "num_splits"])
def decode_matmul_kernel(
    x, weight, bias, product, partials, arrived, num_rows, num_columns, vectors, x_vectors, weight_vectors, num_splits,
    block_m: tl.constexpr, block_n: tl.constexpr, block_k: tl.constexpr, num_stages: tl.constexpr,
    ragged: tl.constexpr, shared: tl.constexpr, biased: tl.constexpr, early: tl.constexpr,
    vector: tl.constexpr, max_splits: tl.constexpr,
):  # fmt: skip
    k = vectors * vector
    num_steps = tl.cdiv(k, block_k)
    first = tl.program_id(1) * num_steps // num_splits
    end = (tl.program_id(1) + 1) * num_steps // num_splits
    columns = tl.program_id(0) * block_n + tl.arange(0, block_n)
    # Beyond the last, the last is read again, which needs no mask.
    weight_rows = weight + tl.minimum(columns, num_columns - 1).to(tl.int64) * (weight_vectors * vector)
    if early:
        tl.extra.cuda.gdc_launch_dependents()
        # Nobody writes weights: the first of them can be on their way while the kernel before still runs.
        begin = first * block_k
        length = tl.minimum(k - begin, num_stages * block_k) * 2 + tl.zeros([block_n], tl.int32)
        places = (weight_rows + begin).to(tl.int64)
        tl.inline_asm_elementwise(PREFETCH, "=r,l,r", [places, length], dtype=tl.int32, is_pure=False, pack=1)
        tl.extra.cuda.gdc_wait()
    rows = tl.arange(0, block_m)
    steps = tl.arange(0, block_k)
    x_places = x + rows[:, None] * (x_vectors * vector) + steps[None, :]
    weight_places = weight_rows[:, None] + steps[None, :]
    there = (rows < num_rows)[:, None]
    sums = tl.zeros([block_n, block_m], tl.float32)
    for step in tl.range(first, end, num_stages=num_stages):
        begin = step * block_k
        if ragged:
            left = (steps < k - begin)[None, :]
            weights = tl.load(weight_places + begin, mask=left, other=0.0)
            values = tl.load(x_places + begin, mask=there & left, other=0.0)
        else:
            weights = tl.load(weight_places + begin)
            values = tl.load(x_places + begin, mask=there, other=0.0)
        sums = tl.dot(weights, values.T, sums)
    finish(
        sums.T, bias, product, partials, arrived, rows, columns, num_rows, num_columns, num_splits,
        shared, biased, max_splits,
    )  # fmt: skip


def decodable(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `decode_matmul` takes them: few rows of bf16 or fp16, each contiguous and at a multiple of 16 bytes."""
    return (
        x.dtype in (torch.bfloat16, torch.float16)
        and 0 < len(x) <= MAX_ROWS
        and x.shape[1] > 0
        and len(weight) > 0
        and len(weight) * len(x) * MAX_SPLITS < 2**31
        and x.shape[1] % VECTOR == 0
        and all(
            tensor.stride(1) == 1 and tensor.stride(0) % VECTOR == 0 and tensor.data_ptr() % 16 == 0
            for tensor in (x, weight)
        )
    )


def num_splits(num_columns: int, k: int, block_m: int, tile: Tile, num_sms: int) -> int:
    """Shares of each tile's K: as many as make one wave of CTAs."""
    num_tiles = triton.cdiv(num_columns, tile.rows)
    if num_tiles > MAX_TILES:
        return 1
    shared_bytes = 2 * tile.num_stages * (tile.rows + block_m) * tile.columns
    num_ctas = SM_SHARED_BYTES // (shared_bytes + CTA_SHARED_BYTES) * num_sms
    return max(1, min(MAX_SPLITS, triton.cdiv(k, tile.columns), num_ctas // num_tiles))


def decode_matmul(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    arrived: torch.Tensor,
    tile: Tile = TILE,
    early: bool = False,
) -> torch.Tensor:
    """x @ weight.T + bias, (M, N), new: summed in float32, rounded once, the same bits every time on the same GPU.

    x: (M, K), weight: (N, K), as `decodable` says; bias: (N,) of their type. arrived: int32 (MAX_TILES,), zeros, which
    it leaves zeros; not for two launches at a time. early: launched before the kernel in front of it has ended, for
    which it waits before it reads x, and lets the next kernel be (programmatic dependent launch).
    """
    (num_rows, k), num_columns = x.shape, len(weight)
    block_m = max(16, triton.next_power_of_2(num_rows))
    num_sms = torch.cuda.get_device_properties(x.device).multi_processor_count
    splits = num_splits(num_columns, k, block_m, tile, num_sms)
    product = x.new_empty(num_rows, num_columns)
    partials = x.new_empty((splits, num_rows, num_columns) if splits > 1 else 1, dtype=torch.float32)
    decode_matmul_kernel[(triton.cdiv(num_columns, tile.rows), splits)](
        x, weight, product if bias is None else bias, product, partials, arrived, num_rows, num_columns,
        k // VECTOR, x.stride(0) // VECTOR, weight.stride(0) // VECTOR, splits,
        block_m=block_m, block_n=tile.rows, block_k=tile.columns,
        num_stages=tile.num_stages, ragged=k % tile.columns != 0, shared=splits > 1, biased=bias is not None,
        early=early, vector=VECTOR, max_splits=MAX_SPLITS, num_warps=tile.num_warps, launch_pdl=early,
    )  # fmt: skip
    return product

"""One-shot all-reduce of a few KiB in lines (`kernels.lines`): every rank sends all it has to all others and adds.

One way over the link and no barrier. Moves 2 (P - 1) S bytes: wins below some hundred KiB, the sizes of decoding.
"""

import torch
import triton
import triton.language as tl

from maco_lib.kernels.lines import LINE_DATA, PACK, begin, pack, put, sum_of_ranks, words
from maco_lib.kernels.sum_shares import ELEMENTS

NUM_WARPS = 8
BLOCK = NUM_WARPS * 32 * PACK


@triton.jit(do_not_specialize=["num_lines"])
def one_shot_kernel(
    buffer, inboxes, counter, num_lines,
    rank: tl.constexpr, num_ranks: tl.constexpr, element: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    epoch, half = begin(counter)
    offsets = tl.program_id(0) * block + tl.arange(0, block)
    inside = offsets < num_lines
    own = tl.load(words(buffer) + offsets, mask=inside, other=0)
    for step in tl.static_range(num_ranks - 1):
        put(inboxes[step] + half, num_ranks - 2 - step, num_lines, offsets, own, epoch, inside, False)
    total = sum_of_ranks(
        own, inboxes[num_ranks - 1] + half, 0, 1, num_lines, offsets, epoch, inside, rank, num_ranks, element, False
    )
    tl.store(words(buffer) + offsets, pack(total, element), mask=inside)


def one_shot(tensor: torch.Tensor, *, inboxes: tuple[int, ...], counter: torch.Tensor, rank: int) -> None:
    """Sum a contiguous tensor of every rank in place, on the current stream. Collective.

    tensor: bf16, fp16 or fp32, a whole number of 8 bytes, at a multiple of 16, (P - 1) times as large at most as
    `lines.LINE_BYTES` / 2, and of at most `lines.MAX_CTAS` x `BLOCK` lines. inboxes: where each rank's is, beginning
    with the next rank, own last; counter: int64, this rank's own, of the launches on it.
    """
    num_lines = tensor.nbytes // LINE_DATA
    one_shot_kernel[(triton.cdiv(num_lines, BLOCK),)](
        tensor.data_ptr(), inboxes, counter.data_ptr(), num_lines,
        rank=rank, num_ranks=len(inboxes), element=ELEMENTS[tensor.dtype], block=BLOCK, num_warps=NUM_WARPS,
    )  # fmt: skip

"""All-reduce of some hundred KiB to a few MiB in lines of 128 bytes that say themselves that they have arrived.

120 bytes of data and 8 of epoch, as in NCCL's LL128 protocol, and like it this relies on NVLink (PCIe would not do) to
deliver what a warp writes to 128 aligned bytes in one instruction at once. So there is no flag behind the data and no
fence, as with the lines of 16 bytes (`kernels.lines`), for 7 % more bytes instead of 100 %. Anywhere in memory, without
a copy: data go through the mailbox. A CTA for each block waits only for the CTAs of the same block:

one-shot    every rank sends its block to all others and adds them up: one way over the link, (P - 1) S bytes
two-shot    a block's owner adds it up and sends the sum to all: two ways, 2 (P - 1) / P S bytes, the least there can be

With a block for each row, residual and RMSNorm follow in the same kernel (see `kernels.sum_norm`).
"""

import ctypes
import functools
import pathlib
from dataclasses import dataclass

import torch

from maco_lib.kernels import compiled
from maco_lib.kernels.inbox import BLOCK_WORDS, HALF_BYTES, LINE_BYTES, LINE_DATA, MAX_CTAS, shape_of

FOLDER = pathlib.Path(__file__).parent
SOURCES = (FOLDER / "long_line.cuh", FOLDER / "ll128.cu")
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@dataclass(frozen=True)
class Constants:
    """What the kernel is compiled for; passes: lines of a thread."""

    rank: int
    num_ranks: int
    dtype: torch.dtype
    warps: int
    passes: int
    one_shot: bool
    norm: bool

    def source(self) -> str:
        constants = {
            "RANKS": self.num_ranks, "RANK": self.rank, "KIND": KINDS[self.dtype], "WARPS": self.warps,
            "PASSES": self.passes, "ONE_SHOT": int(self.one_shot), "NORM": int(self.norm),
            "LAUNCH": f"{MAX_CTAS + 1}ull", "HALF": f"{HALF_BYTES}ull", "BEGIN": f"{LINE_BYTES}ull",
        }  # fmt: skip
        return compiled.defines(constants) + "".join(path.read_text(encoding="utf-8") for path in SOURCES)


@functools.cache
def kernel_of(constants: Constants, device_index: int) -> object:
    """The kernel, compiled and loaded; RuntimeError while a graph is captured."""
    return compiled.function(constants.source(), "ll128_kernel", 0, device_index)


def launch(
    product: torch.Tensor, total: torch.Tensor, block_words: int, one_shot: bool, *,
    inboxes: tuple[int, ...], counter: torch.Tensor, rank: int,
    residual: torch.Tensor | None = None, weight: torch.Tensor | None = None, normed: torch.Tensor | None = None,
    eps: float = 0.0,
) -> None:  # fmt: skip
    """`total` = sum of the ranks' `product`s, + residual, in blocks of so many words, for which the inbox `has_room`.

    With a norm, `normed` = RMSNorm(total) * weight too, a block being a row. Contiguous, of one type of `KINDS`, a
    whole number of 8 bytes, at multiples of 8; total may be product. inboxes, counter: as in `one_shot`. Collective.
    """
    warps, passes = shape_of(block_words)
    num_words, num_ranks = product.nbytes // LINE_DATA, len(inboxes)
    num_blocks = -(-num_words // block_words)
    constants = Constants(rank, num_ranks, product.dtype, warps, passes, one_shot, normed is not None)
    sizes = (block_words, num_words, -(-num_blocks // num_ranks))
    compiled.launch(
        kernel_of(constants, product.device.index), num_blocks, 32 * warps, 0,
        [(ctypes.c_uint64 * num_ranks)(*inboxes), counter, product, residual, weight, normed, total,
         *map(ctypes.c_int32, sizes), ctypes.c_float(eps)],
        product.device,
    )  # fmt: skip


def ll128_sum(tensor: torch.Tensor, *, inboxes: tuple[int, ...], counter: torch.Tensor, rank: int) -> None:
    """Sum a contiguous tensor of every rank in place, on the current stream. Collective.

    tensor: bf16, fp16 or fp32, a whole number of 8 bytes, of a size for which the inbox `has_room`, at a multiple of 8.
    inboxes, counter: as in `one_shot`.
    """
    place = {"inboxes": inboxes, "counter": counter, "rank": rank}
    launch(tensor, tensor, BLOCK_WORDS, len(inboxes) == 2, **place)

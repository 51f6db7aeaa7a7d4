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
import pathlib
from dataclasses import dataclass

import torch

from maco_lib.kernels import compiled
from maco_lib.kernels.inbox import BLOCK_WORDS, HALF_BYTES, LINE_BYTES, LINE_DATA, MAX_CTAS, Box, shape_of
from maco_lib.kernels.launch import Launch
from maco_lib.kernels.patience import code

FOLDER = pathlib.Path(__file__).parent
SOURCES = (FOLDER / "clock.cuh", FOLDER / "patience.cuh", FOLDER / "long_line.cuh", FOLDER / "ll128.cu")
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
            "WHO": code("ll128"),
        }  # fmt: skip
        return compiled.defines(constants) + "".join(path.read_text(encoding="utf-8") for path in SOURCES)


def launch(
    product: torch.Tensor, total: torch.Tensor, block_words: int, one_shot: bool, box: Box,
    residual: torch.Tensor | None = None, weight: torch.Tensor | None = None, normed: torch.Tensor | None = None,
    eps: float = 0.0,
) -> None:  # fmt: skip
    """`total` = sum of the ranks' `product`s, + residual, in blocks of so many words, for which the inbox `has_room`.

    With a norm, `normed` = RMSNorm(total) * weight too, a block being a row. Contiguous, of one type of `KINDS`, a
    whole number of 8 bytes, at multiples of 8; total may be product. Collective.
    """
    num_words, norm = product.nbytes // LINE_DATA, normed is not None
    key = "ll128", product.dtype, num_words, block_words, one_shot, norm, eps
    prepared = box.launches.get(key)
    if prepared is None:
        prepared = box.launches.keep(key, prepare(product.dtype, num_words, block_words, one_shot, norm, eps, box))
    prepared_launch, places = prepared
    places[0].value, places[4].value = product.data_ptr(), total.data_ptr()
    if norm:
        places[1].value, places[2].value, places[3].value = residual.data_ptr(), weight.data_ptr(), normed.data_ptr()
    prepared_launch()


def prepare(
    dtype: torch.dtype, num_words: int, block_words: int, one_shot: bool, norm: bool, eps: float, box: Box
) -> tuple[Launch, list]:
    """(the launch; where it reads product, residual, weight and writes normed, total). Collective."""
    warps, passes = shape_of(block_words)
    num_ranks, num_blocks = len(box.inboxes), -(-num_words // block_words)
    constants = Constants(box.rank, num_ranks, dtype, warps, passes, one_shot, norm)
    kernel = compiled.function(constants.source(), "ll128_kernel", 0, box.device_index)
    box.together(("ll128", dtype, warps, passes, one_shot, norm))
    places = [ctypes.c_uint64() for _ in range(5)]
    sizes = (block_words, num_words, -(-num_blocks // num_ranks))
    arguments = [(ctypes.c_uint64 * num_ranks)(*box.inboxes), ctypes.c_uint64(box.counter), *places]
    arguments += [*map(ctypes.c_int32, sizes), ctypes.c_float(eps), ctypes.c_uint64(box.watch)]
    return Launch(int(kernel), num_blocks, 32 * warps, 0, arguments, box.device_index), places


def ll128_sum(tensor: torch.Tensor, box: Box) -> None:
    """Sum a contiguous tensor of every rank in place, on the current stream. Collective.

    tensor: bf16, fp16 or fp32, a whole number of 8 bytes, of a size for which the inbox `has_room`, at a multiple of 8.
    """
    launch(tensor, tensor, BLOCK_WORDS, len(box.inboxes) == 2, box)

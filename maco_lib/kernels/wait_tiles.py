"""Hold back a stream until a matmul on another one has finished some of its tiles.

One CTA, which needs an SM that the matmul leaves free. The matmul raises a flag for each tile (`persistent.cu` of one
rank) once the kernels that come next in this stream can read it.
"""

import torch
import triton
import triton.language as tl

NUM_WARPS, BLOCK = 4, 1024


@triton.jit(do_not_specialize=["begin", "end"])
def wait_tiles_kernel(flags, begin, end, block: tl.constexpr):
    for start in range(begin, end, block):
        offsets = start + tl.arange(0, block)
        inside = offsets < end
        while tl.min(tl.load(flags + offsets, mask=inside, other=1, volatile=True), axis=0) == 0:
            pass
        tl.atomic_xchg(flags + offsets, 0, mask=inside, sem="acquire", scope="gpu")


def wait_tiles(flags: torch.Tensor, begin: int, end: int) -> None:
    """Wait on the current stream until flags [begin, end) (int32, 0 or 1) are up, and take them down."""
    wait_tiles_kernel[(1,)](flags, begin, end, block=BLOCK, num_warps=NUM_WARPS)

"""Hold SMs for a set time and do nothing: what a communication kernel costs the computation beside it, by itself."""

import triton
import triton.language as tl

# So many warps that a matmul's CTA does not fit beside them.
NUM_WARPS = 32


@triton.jit
def hold_kernel(nanoseconds):
    begin = tl.extra.cuda.globaltimer()
    while tl.extra.cuda.globaltimer() - begin < nanoseconds:
        pass


def hold(num_ctas: int, microseconds: float) -> None:
    """Keep `num_ctas` SMs busy on the current stream; the timer ticks about every µs."""
    hold_kernel[(num_ctas,)](round(microseconds * 1000), num_warps=NUM_WARPS)

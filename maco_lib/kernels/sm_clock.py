"""Read every SM's cycle counter beside the time: two such readings give the clock that the SMs ran at between them.

One CTA of one warp for each SM. It waits for the timer's next tick, up to a µs, and reads the counter right after it:
the tick does not blur the clock, and meanwhile the other CTAs get SMs of their own.
"""

import torch
import triton
import triton.language as tl

# More than any GPU has; their numbers need not be consecutive.
MAX_SMS = 256
SLOTS = tl.constexpr(MAX_SMS)

READ = tl.constexpr("""
{
    .reg .b64 begin;
    .reg .pred again;
    mov.u64 begin, %globaltimer;
wait:
    mov.u64 $1, %globaltimer;
    mov.u64 $0, %clock64;
    setp.eq.u64 again, $1, begin;
    @again bra wait;
}
""")


@triton.jit
def sm_clock_kernel(readings):
    cycles, nanoseconds = tl.inline_asm_elementwise(
        READ, "=&l,=&l", [], dtype=(tl.int64, tl.int64), is_pure=False, pack=1
    )
    sm = tl.extra.cuda.smid()
    tl.store(readings + 2 * sm, cycles, mask=sm < SLOTS)
    tl.store(readings + 2 * sm + 1, nanoseconds, mask=sm < SLOTS)


def read_sm_clocks(readings: torch.Tensor) -> None:
    """Write (cycles, ns) of each SM, by its number, into `readings` (MAX_SMS, 2) int64, on the current stream.

    SMs that no CTA comes to, because others' kernels fill them or there are fewer, keep what was there.
    """
    num_sms = torch.cuda.get_device_properties(readings.device).multi_processor_count
    sm_clock_kernel[(num_sms,)](readings, num_warps=1)

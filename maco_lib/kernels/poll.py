"""The bound of a wait in Triton's kernels (`patience.cuh` is the same in CUDA)."""

import triton
import triton.language as tl

# $0: since when, 0 at first; $1: that of the poll before; $2: polls so far; $3: the watch; $4: who did not come.
LOSE = tl.constexpr("""
{
    .reg .b32 phase;
    .reg .b64 now, bound, waited, place, word;
    .reg .pred is_due, is_first, is_bound, is_over;
    mov.b64 $0, $1;
    and.b32 phase, $2, 1023;
    setp.eq.u32 is_due, phase, 1023;
    @!is_due bra done;
    mov.u64 now, %globaltimer;
    setp.eq.u64 is_first, $1, 0;
    @is_first mov.b64 $0, now;
    @is_first bra done;
    ld.volatile.global.u64 bound, [$3];
    setp.ne.u64 is_bound, bound, 0;
    @!is_bound bra done;
    sub.u64 waited, now, $1;
    setp.gt.u64 is_over, waited, bound;
    @!is_over bra done;
    add.u64 place, $3, 8;
    cvt.u64.u32 word, $4;
    st.volatile.global.u64 [place], word;
    membar.sys;
    trap;
done:
}
""")


@triton.jit
def lose(since, polls, watch, who):
    """After a poll in vain: since when it waits, for the next call; 0 at the first. Traps where that is too long."""
    return tl.inline_asm_elementwise(
        LOSE, "=&l,l,r,l,r", [since, polls, watch, who], dtype=tl.int64, is_pure=False, pack=1
    )

"""How data get to a peer soonest: in lines that say themselves that they have arrived, as in NCCL's LL protocol.

A line is 16 bytes: 4 of data, 4 of epoch, 4 of data, 4 of epoch. Each 8 are written and read whole, so a reader that
finds the epoch it waits for has the data beside it: no flag, no fence, one way over the link. It costs twice the bytes;
a line of 128 bytes (`kernels.ll128`) costs 7 % more, but has to be written by 8 lanes of a warp at once.

A rank's inbox is two halves, used in turn (`kernels.inbox`). The epoch counts the launches of all kernels on it. It is
counted on the device, so replays of a CUDA graph need no reset, and older data never look new. Where in a half the data
lie is each launch's own business: a kernel ends only after something from every peer's launch of the same epoch came,
or something that waited for it, and that launch began after the peer's launch before had ended. So when epoch e + 2
writes into a peer's half, that peer has read e.

A CTA sends all it has before it waits, so a kernel makes progress however few of its CTAs the GPU has room for, as long
as GPUs start CTAs in order.
"""

import triton
import triton.language as tl

from maco_lib.kernels.inbox import HALF_BYTES, MAX_CTAS

LAUNCH, HALF = tl.constexpr(MAX_CTAS + 1), tl.constexpr(HALF_BYTES)

# Threads have this many lines in flight at a time; every kernel gives each thread at least so many.
PACK = 2

PUT = tl.constexpr("""
{
    .reg .b32 low, high;
    .reg .b64 first, second;
    .reg .pred inside;
    mov.b64 {low, high}, $2;
    mov.b64 first, {low, $3};
    mov.b64 second, {high, $3};
    setp.ne.b32 inside, $4, 0;
    @inside st.relaxed.sys.global.v2.b64 [$1], {first, second};
    mov.b32 $0, 0;
}
""")
# $0, $1: data of two lines; $2, $3: their addresses; $4, $5: the epoch; $6, $7: whether to wait for them; $8, $9: the
# watch; $10, $11: who is waited for. How long, as in `kernels.poll`.
TAKE = tl.constexpr("""
{
    .reg .b32 a, b, c, d, e, f, g, h, late, polls, phase;
    .reg .b64 first, second, third, fourth, since, now, bound, waited, place, word;
    .reg .pred one, two, again, is_early, is_first, is_unbound, is_within;
    mov.b64 first, {$4, $4};
    mov.b64 second, first;
    mov.b64 third, first;
    mov.b64 fourth, first;
    mov.b64 $0, 0;
    mov.b64 $1, 0;
    mov.b64 since, 0;
    mov.b32 polls, 0;
    setp.ne.b32 one, $6, 0;
    setp.ne.b32 two, $7, 0;
wait:
    @one ld.relaxed.sys.global.v2.b64 {first, second}, [$2];
    @two ld.relaxed.sys.global.v2.b64 {third, fourth}, [$3];
    mov.b64 {a, b}, first;
    mov.b64 {c, d}, second;
    mov.b64 {e, f}, third;
    mov.b64 {g, h}, fourth;
    xor.b32 b, b, $4;
    xor.b32 d, d, $4;
    xor.b32 f, f, $5;
    xor.b32 h, h, $5;
    or.b32 late, b, d;
    or.b32 late, late, f;
    or.b32 late, late, h;
    setp.ne.b32 again, late, 0;
    @!again bra come;
    add.u32 polls, polls, 1;
    and.b32 phase, polls, 1023;
    setp.ne.u32 is_early, phase, 0;
    @is_early bra wait;
    mov.u64 now, %globaltimer;
    setp.eq.u64 is_first, since, 0;
    @is_first mov.b64 since, now;
    ld.volatile.global.u64 bound, [$8];
    setp.eq.u64 is_unbound, bound, 0;
    @is_unbound bra wait;
    sub.u64 waited, now, since;
    setp.le.u64 is_within, waited, bound;
    @is_within bra wait;
    add.u64 place, $8, 8;
    cvt.u64.u32 word, $10;
    st.volatile.global.u64 [place], word;
    membar.sys;
    trap;
come:
    @one mov.b64 $0, {a, c};
    @two mov.b64 $1, {e, g};
}
""")


@triton.jit
def words(address):
    """The int64s at `address`, loaded as such: 16 bytes a thread would leave holes in what a warp writes to lines."""
    return address.to(tl.pointer_type(tl.int64))


@triton.jit
def put_lines(addresses, data, epoch, inside):
    """Write lines of 8 bytes of data each (int64) to `addresses`, multiples of 16, where `inside`."""
    tl.inline_asm_elementwise(
        PUT, "=r,l,l,r,r", [addresses, data, epoch, inside.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def take_lines(addresses, epoch, inside, watch, who):
    """The data (int64) of the lines at `addresses` once all are of `epoch`; 0 where not `inside`.

    watch, who: for a peer that does not come (`kernels.poll`).
    """
    operands = [addresses, epoch, inside.to(tl.int32), watch, who]
    return tl.inline_asm_elementwise(
        TAKE, "=&l,=&l,l,l,r,r,r,r,l,l,r,r", operands, dtype=tl.int64, is_pure=False, pack=2
    )  # fmt: skip


@triton.jit
def begin(counter):
    """(epoch of this launch, where the half of the inboxes is that it uses). Every CTA calls it, once."""
    own = tl.where(tl.program_id(0) == 0, LAUNCH - tl.num_programs(0) + 1, 1).to(tl.int64)
    launches = tl.atomic_add(words(counter), own, sem="relaxed", scope="gpu") // LAUNCH
    return (launches + 1).to(tl.int32), (launches % 2) * HALF


@triton.jit
def put(half, slot, num_lines, offsets, data, epoch, inside):
    """Write `data`, 8 bytes at each of `offsets`, into a slot of `num_lines` of a peer's half."""
    put_lines(half + (slot * num_lines + offsets).to(tl.int64) * 16, data, epoch, inside)


@triton.jit
def take(half, slot, num_lines, offsets, epoch, inside, watch, who):
    """What a peer has put into this slot of our half, once it has arrived; 0 where not `inside`."""
    return take_lines(half + (slot * num_lines + offsets).to(tl.int64) * 16, epoch, inside, watch, who)


@triton.jit
def unpack(data, element: tl.constexpr):
    """Each 8 bytes (int64) as float32: a tuple of 4 tensors for 2-byte elements, of 2 for float32."""
    width: tl.constexpr = element.primitive_bitwidth
    values = ()
    for number in tl.static_range(64 // width):
        part = data >> (number * width)
        if width == 16:
            values = values + (part.to(tl.int16).to(element, bitcast=True).to(tl.float32),)
        else:
            values = values + (part.to(tl.int32).to(element, bitcast=True),)
    return values


@triton.jit
def pack(values, element: tl.constexpr):
    """The inverse of `unpack`; rounds to `element`."""
    width: tl.constexpr = element.primitive_bitwidth
    data = tl.zeros(values[0].shape, tl.int64)
    for number in tl.static_range(64 // width):
        if width == 16:
            part = values[number].to(element).to(tl.uint16, bitcast=True)
        else:
            part = values[number].to(tl.uint32, bitcast=True)
        data |= part.to(tl.int64) << (number * width)
    return data


@triton.jit
def add(left, right, element: tl.constexpr):
    """The sums of two unpacked tuples."""
    sums = ()
    for number in tl.static_range(64 // element.primitive_bitwidth):
        sums = sums + (left[number] + right[number],)
    return sums


@triton.jit
def sum_of_ranks(
    own, half, first_slot, slots_per_peer, num_lines, offsets, epoch, inside, watch, who: tl.constexpr,
    rank: tl.constexpr, num_ranks: tl.constexpr, element: tl.constexpr,
):  # fmt: skip
    """Our data and what every peer has put, added in the order of the ranks: the same bits on every rank (float32).

    The peer `step` ranks after ours, from 1, puts into slot `first_slot + (step - 1) * slots_per_peer` of our half.
    """
    total = ()
    for number in tl.static_range(num_ranks):
        if number == rank:
            term = unpack(own, element)
        else:
            slot = first_slot + (number - rank - 1 + num_ranks) % num_ranks * slots_per_peer
            term = unpack(take(half, slot, num_lines, offsets, epoch, inside, watch, who + number), element)
        total = term if number == 0 else add(total, term, element)
    return total

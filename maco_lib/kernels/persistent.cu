// One launch that multiplies and sums over the ranks: result = sum over ranks of x @ w.T. See persistent.py.
// A cluster of two CTAs computes 2 x 128 rows by BN columns at a time; in each CTA, by warp:
//   0          loads operands
//   1          loads partials to be added, stores finished tiles
//   2          fetches tiles from the peers
//   3          stores those: partials to the inbox, sums to the result
//   4 to 11    multiply: two warpgroups, 64 rows each
// Of one rank (RANKS = 1) it is a matmul: a tile goes to the result, then flag slot * CTAS + CTA up (wait_tiles.py).
// hopper.cuh comes before this file. Defined at compile time: BN, STAGES, FETCH_BUFFERS, RANKS, RANK, BF16, HAS_BIAS,
// HAS_RESIDUAL, WGMMA_ASM, TRACE, TRACE_TILES.

// In units of a cluster's tile; owner: the rank that sums it; slot: counts the owner's tiles.
struct alignas(16) Tile { int m, n, owner, slot; };
// A tile to be fetched from a peer: one that it has summed, or (is_partial) its partial of one of ours.
struct alignas(16) Fetch { int m, n, peer_and_kind, slot; };
struct Addresses {
    u64 partials[RANKS], sums[RANKS], flags[RANKS];  // of each rank, as this one sees them
    u64 inbox;                                       // where this rank keeps the partials that it has fetched
    u64 area_bytes;  // in `partials` from owner to owner, in `inbox` from source to source
};

enum Event { MULTIPLY, MULTIPLIED, ADDED, STORED, FETCH, FETCHED, TRACE_EVENTS };
#if TRACE
#define TRACE_PARAMETER , u64* trace
#define NOTE(n, event) \
    if ((n) < TRACE_TILES) trace[(blockIdx.x * TRACE_TILES + (n)) * TRACE_EVENTS + event] = now()
__device__ __forceinline__ u64 now() {
    u64 time;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(time));
    return time;
}
#else
#define TRACE_PARAMETER
#define NOTE(n, event)
#endif

constexpr int BM = 128, BK = 64, CTAS = 2;
constexpr u32 A_BYTES = BM * BK * 2, B_BYTES = BN * BK * 2, TILE_BYTES = BM * BN * 2, HALF_BYTES = TILE_BYTES / 2;
constexpr u32 BOX_COLUMNS = 32, BOX_BYTES = 64 * BOX_COLUMNS * 2;
constexpr u32 HALF_ROWS = 8 * BOX_COLUMNS * 2;  // bytes from a thread's upper row to its lower one
constexpr u32 HALF_BOXES = BN / BOX_COLUMNS, NUM_BOXES = 2 * HALF_BOXES;
constexpr u32 STORES_IN_FLIGHT = 2;
enum { PARTIAL_READY, SUM_READY, PARTIAL_FETCHED, NUM_KINDS };  // flags
constexpr int NUM_CONSUMERS = 256;

// A flag, at its reader, goes up when a tile may be read and down when the reader has seen that. All are down between
// launches: a rank ends when it has every sum, so every partial of its was read; and nobody sums anew before it has
// this rank's next partials. Whoever raises one has waited for the tile's bulk stores, so they are in this GPU's L2
// cache, which serves the reads of all. A release would be a fence that also waits for what this SM is fetching: 15 us.
__device__ __forceinline__ u32 flag_index(u32 kind, u32 place, u32 peer) {
    return (place * RANKS + peer) * NUM_KINDS + kind;
}
__device__ __forceinline__ void raise(u64 flags, u32 index) {
    asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(flags + 4ull * index), "r"(1) : "memory");
}
__device__ __forceinline__ void take(u64 flags, u32 index) {
    const u64 flag = flags + 4ull * index;
    u32 value;
    do {
        asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
    } while (value == 0);
    asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(flag), "r"(0) : "memory");
    asm volatile("fence.proxy.async.global;" ::: "memory");  // the bulk copy that follows comes after
}

__device__ __forceinline__ void multiply(float (&sum)[BN / 2], u64 a, u64 b, u32 add) { WGMMA_ASM; }

__device__ __forceinline__ u32 pack(float low, float high) {
    u32 both;
#if BF16
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
#else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
#endif
    return both;
}
__device__ __forceinline__ void add_pair(float& low, float& high, u32 both) {
#if BF16
    low += __uint_as_float(both << 16);
    high += __uint_as_float(both & 0xFFFF0000u);
#else
    float a, b;
    asm("{ .reg .f16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h; }" : "=f"(a), "=f"(b) : "r"(both));
    low += a;
    high += b;
#endif
}

extern "C" __global__ void __cluster_dims__(CTAS, 1, 1) __launch_bounds__(384, 1) persistent_kernel(
    const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap weight_map,
    const __grid_constant__ TensorMap result_map, const __grid_constant__ Addresses at,
    const Tile* __restrict__ own_schedule, const int* __restrict__ fetch_begin, const Fetch* __restrict__ fetches,
    int num_tiles, int num_steps, int num_rows, int num_columns, const u32* __restrict__ bias,
    const u32* __restrict__ residual TRACE_PARAMETER) {
    extern __shared__ unsigned char storage[];
    const u32 base = (shared_address(storage) + 1023) & ~1023u;
    const u32 a_tiles = base, b_tiles = a_tiles + STAGES * A_BYTES, out_tile = b_tiles + STAGES * B_BYTES;
    const u32 fetched = out_tile + TILE_BYTES, barriers = fetched + FETCH_BUFFERS * BOX_BYTES;
    const u32 full = barriers, empty = full + 8 * STAGES, fetched_full = empty + 8 * STAGES;
    const u32 fetched_empty = fetched_full + 8 * FETCH_BUFFERS, partial_full = fetched_empty + 8 * FETCH_BUFFERS;
    const u32 partial_added = partial_full + 8;
    const u32 out_ready = partial_added + 8, out_sent = out_ready + 8;

    u32 cta;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(cta));
    const int first = blockIdx.x / CTAS, step = gridDim.x / CTAS;
    const int warp = threadIdx.x / 32;

    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; s++) {
            barrier_init(full + 8 * s, 1);
            barrier_init(empty + 8 * s, 2 * CTAS);
        }
        for (u32 b = 0; b < FETCH_BUFFERS; b++) {
            barrier_init(fetched_full + 8 * b, 1);
            barrier_init(fetched_empty + 8 * b, 1);
        }
        barrier_init(partial_full, 1);
        barrier_init(partial_added, NUM_CONSUMERS);
        barrier_init(out_ready, NUM_CONSUMERS);
        barrier_init(out_sent, 1);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    asm volatile("barrier.cluster.arrive.release; barrier.cluster.wait.acquire;" ::: "memory");

    if (warp < 4) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (threadIdx.x == 0) {  // operand tiles: all of A's, half of B's for both CTAs
            u32 count = 0;
            for (int i = first; i < num_tiles; i += step) {
                const Tile tile = own_schedule[i];
                const int row = (tile.m * CTAS + cta) * BM, column = tile.n * BN + cta * (BN / 2);
                for (int k = 0; k < num_steps; k++, count++) {
                    const u32 s = count % STAGES, barrier = full + 8 * s;
                    wait(empty + 8 * s, (count / STAGES & 1) ^ 1);
                    expect(barrier, A_BYTES + B_BYTES);
                    load_box(a_tiles + s * A_BYTES, x_map, k * BK, row, barrier);
                    load_box_to_both(b_tiles + s * B_BYTES + cta * (B_BYTES / 2), weight_map, k * BK, column, barrier);
                }
            }
        } else if (threadIdx.x == 32) {  // finished tiles go to this GPU's memory, where the peers fetch them
            u32 count = 0, added = 0;
            for (int i = first; i < num_tiles; i += step, count++) {
                const Tile tile = own_schedule[i];
                const u32 place = tile.slot * CTAS + cta;
                const u64 offset = (u64)place * TILE_BYTES;
                if (tile.owner == RANK) {
                    for (int other = 1; other < RANKS; other++, added++) {
                        const int source = (RANK + other) % RANKS;
                        take(at.flags[RANK], flag_index(PARTIAL_FETCHED, place, source));
                        if (other > 1) wait(partial_added, (added - 1) & 1);
                        expect(partial_full, TILE_BYTES);
                        load_bytes(out_tile, at.inbox + source * at.area_bytes + offset, TILE_BYTES, partial_full);
                    }
                }
                wait(out_ready, count & 1);
                if (tile.owner != RANK) {
                    store_bytes(at.partials[RANK] + tile.owner * at.area_bytes + offset, out_tile, TILE_BYTES);
                } else {
                    const int row = (tile.m * CTAS + cta) * BM;
                    if (RANKS > 1) store_bytes(at.sums[RANK] + offset, out_tile, TILE_BYTES);
                    for (u32 box = 0; box < NUM_BOXES; box++)
                        store_box(result_map, tile.n * BN + box % HALF_BOXES * BOX_COLUMNS, row + box / HALF_BOXES * 64,
                                  out_tile + box * BOX_BYTES);
                }
                commit_stores();
                stores_read<0>();
                arrive(out_sent);
                stores_done();
                NOTE(count, STORED);
                if (RANKS == 1) {
                    raise(at.flags[RANK], place);
                } else if (tile.owner != RANK) {
                    raise(at.flags[tile.owner], flag_index(PARTIAL_READY, place, RANK));
                } else {
                    for (int other = 1; other < RANKS; other++)
                        raise(at.flags[(RANK + other) % RANKS], flag_index(SUM_READY, place, RANK));
                }
            }
        } else if (threadIdx.x == 64) {  // tiles of the peers, box by box
            u32 count = 0;
            for (int j = fetch_begin[first]; j < fetch_begin[first + 1]; j++) {
                const Fetch fetch = fetches[j];
                const int peer = fetch.peer_and_kind / 2, is_partial = fetch.peer_and_kind % 2;
                const u32 place = fetch.slot * CTAS + cta;
                const u64 from = (is_partial ? at.partials[peer] + RANK * at.area_bytes : at.sums[peer]) +
                                 (u64)place * TILE_BYTES;
                take(at.flags[RANK], flag_index(is_partial ? PARTIAL_READY : SUM_READY, place, peer));
                NOTE(j - fetch_begin[first], FETCH);
                for (u32 box = 0; box < NUM_BOXES; box++, count++) {
                    const u32 buffer = count % FETCH_BUFFERS, barrier = fetched_full + 8 * buffer;
                    wait(fetched_empty + 8 * buffer, (count / FETCH_BUFFERS & 1) ^ 1);
                    expect(barrier, BOX_BYTES);
                    load_bytes(fetched + buffer * BOX_BYTES, from + box * BOX_BYTES, BOX_BYTES, barrier);
                }
            }
        } else if (threadIdx.x == 96) {  // and where they go: partials to the inbox, sums to the result
            u32 count = 0;
            for (int j = fetch_begin[first]; j < fetch_begin[first + 1]; j++) {
                const Fetch fetch = fetches[j];
                const int peer = fetch.peer_and_kind / 2, is_partial = fetch.peer_and_kind % 2;
                const u32 place = fetch.slot * CTAS + cta;
                const u64 inbox = at.inbox + peer * at.area_bytes + (u64)place * TILE_BYTES;
                const int row = (fetch.m * CTAS + cta) * BM;
                for (u32 box = 0; box < NUM_BOXES; box++, count++) {
                    const u32 buffer = count % FETCH_BUFFERS, from = fetched + buffer * BOX_BYTES;
                    wait(fetched_full + 8 * buffer, count / FETCH_BUFFERS & 1);
                    if (is_partial)
                        store_bytes(inbox + box * BOX_BYTES, from, BOX_BYTES);
                    else
                        store_box(result_map, fetch.n * BN + box % HALF_BOXES * BOX_COLUMNS,
                                  row + box / HALF_BOXES * 64, from);
                    commit_stores();
                    stores_read<STORES_IN_FLIGHT>();
                    if (count >= STORES_IN_FLIGHT)
                        arrive(fetched_empty + 8 * ((count - STORES_IN_FLIGHT) % FETCH_BUFFERS));
                }
                if (is_partial) {
                    stores_done();
                    raise(at.flags[RANK], flag_index(PARTIAL_FETCHED, place, peer));
                }
                NOTE(j - fetch_begin[first], FETCHED);
            }
            stores_done();
        }
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
        const int group = warp / 4 - 1, thread = threadIdx.x % 128, lane = threadIdx.x % 32;
        const int inner_row = thread / 32 * 16 + lane / 4;  // of the warpgroup's 64; and the one 8 below
        const u32 swizzle = (inner_row >> 1) & 3;
        const u32 out = out_tile + group * HALF_BYTES + inner_row * (BOX_COLUMNS * 2) + (lane % 4) * 4;
        u32 count = 0, num_done = 0, num_partials = 0;
        for (int i = first; i < num_tiles; i += step, num_done++) {
            const Tile tile = own_schedule[i];
            float sum[BN / 2];
            if (threadIdx.x == 128) { NOTE(num_done, MULTIPLY); }
            for (int k = 0; k < num_steps; k++, count++) {
                const u32 s = count % STAGES;
                const u64 a = matrix(a_tiles + s * A_BYTES + group * (A_BYTES / 2)), b = matrix(b_tiles + s * B_BYTES);
                wait(full + 8 * s, count / STAGES & 1);
                asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
                multiply(sum, a, b, k > 0);
                multiply(sum, a + 2, b + 2, 1);
                multiply(sum, a + 4, b + 4, 1);
                multiply(sum, a + 6, b + 6, 1);
                asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
                if (k > 0) {
                    asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
                    if (thread < CTAS) arrive_at(empty + 8 * ((count - 1) % STAGES), thread);
                }
            }
            asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
            if (thread < CTAS) arrive_at(empty + 8 * ((count - 1) % STAGES), thread);
            if (threadIdx.x == 128) { NOTE(num_done, MULTIPLIED); }
            if (tile.owner == RANK) {
                const int row = (tile.m * CTAS + cta) * BM + group * 64 + inner_row;
                const int column = tile.n * BN + lane % 4 * 2;
#pragma unroll 1
                for (int other = 1; other < RANKS; other++, num_partials++) {
                    wait(partial_full, num_partials & 1);
#pragma unroll
                    for (int j = 0; j < BN / 8; j++) {
                        const u32 from = out + j / 4 * BOX_BYTES + ((j % 4) ^ swizzle) * 16;
                        u32 upper, lower;
                        asm volatile("ld.shared.u32 %0, [%1];" : "=r"(upper) : "r"(from) : "memory");
                        asm volatile("ld.shared.u32 %0, [%1];" : "=r"(lower) : "r"(from + HALF_ROWS) : "memory");
                        add_pair(sum[4 * j], sum[4 * j + 1], upper);
                        add_pair(sum[4 * j + 2], sum[4 * j + 3], lower);
                    }
                    arrive(partial_added);
                }
#if HAS_BIAS
#pragma unroll
                for (int j = 0; j < BN / 8; j++) {
                    if (column + 8 * j < num_columns) {
                        const u32 both = bias[(column + 8 * j) / 2];
                        add_pair(sum[4 * j], sum[4 * j + 1], both);
                        add_pair(sum[4 * j + 2], sum[4 * j + 3], both);
                    }
                }
#endif
#if HAS_RESIDUAL
#pragma unroll
                for (int j = 0; j < BN / 8; j++) {
                    if (column + 8 * j < num_columns) {
                        const u64 at_pair = ((u64)row * num_columns + column + 8 * j) / 2;
                        if (row < num_rows) add_pair(sum[4 * j], sum[4 * j + 1], residual[at_pair]);
                        if (row + 8 < num_rows)
                            add_pair(sum[4 * j + 2], sum[4 * j + 3], residual[at_pair + 4ull * num_columns]);
                    }
                }
#endif
            }
            if (RANKS == 1 || tile.owner != RANK) wait(out_sent, (num_done & 1) ^ 1);
#pragma unroll
            for (int j = 0; j < BN / 8; j++) {
                const u32 to = out + j / 4 * BOX_BYTES + ((j % 4) ^ swizzle) * 16;
                asm volatile("st.shared.u32 [%0], %1;" ::"r"(to), "r"(pack(sum[4 * j], sum[4 * j + 1])) : "memory");
                asm volatile("st.shared.u32 [%0], %1;" ::"r"(to + HALF_ROWS),
                             "r"(pack(sum[4 * j + 2], sum[4 * j + 3])) : "memory");
            }
            fence_async_shared();
            arrive(out_ready);
            if (threadIdx.x == 128) { NOTE(num_done, ADDED); }
        }
    }
    __syncwarp();
    // Neither CTA leaves while the other may still arrive at its barriers.
    asm volatile("barrier.cluster.arrive.release; barrier.cluster.wait.acquire;" ::: "memory");
}

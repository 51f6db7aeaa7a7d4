// One launch that multiplies and sums over the ranks: result = sum over ranks of x @ w.T. See persistent.py.
// A cluster of two CTAs computes tiles of 2 x 128 rows by BN columns, one at a time or, where WIDTH is 2, also two side
// by side; in each CTA, by warp:
//   0          loads operands
//   1          loads partials to be added, stores finished tiles
//   2          fetches tiles from the peers
//   3          stores those: partials to the inbox, sums to the result
//   4 to 11    multiply: two warpgroups, 64 rows each
// patience.cuh, hopper.cuh and stages.cuh come before this file. Defined at compile time: WHO (this kernel, in
// patience.py), STRICT (the fence that PTX asks for), BN, WIDTH, STAGES (of WIDTH tiles),
// FETCH_BUFFERS, RANKS, RANK, BF16, HAS_BIAS, HAS_RESIDUAL, WGMMA_1, WGMMA_2 (of one and two tiles), TRACE,
// TRACE_TILES.

// A tile to be fetched from a peer: one that it has summed, or (is_partial) its partial of one of ours.
struct alignas(16) Fetch { int m, n, peer_and_kind, slot; };
struct Addresses {
    u64 partials[RANKS], sums[RANKS], flags[RANKS];  // of each rank, as this one sees them
    u64 inbox;                                       // where this rank keeps the partials that it has fetched
    u64 area_bytes;  // in `partials` from owner to owner, in `inbox` from source to source
    u64 watch;       // as in patience.cuh
};

enum Event { MULTIPLY, MULTIPLIED, ADDED, STORED, FETCH, FETCHED, TRACE_EVENTS };
#if TRACE
#define NOTE(n, event) \
    if ((n) < TRACE_TILES) trace[(blockIdx.x * TRACE_TILES + (n)) * TRACE_EVENTS + event] = now()
__device__ __forceinline__ u64 now() {
    u64 time;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(time));
    return time;
}
#else
#define NOTE(n, event)
#endif

constexpr u32 HALF_BYTES = TILE_BYTES / 2;
constexpr u32 BOX_COLUMNS = 32, BOX_BYTES = 64 * BOX_COLUMNS * 2;
constexpr u32 HALF_ROWS = 8 * BOX_COLUMNS * 2;  // bytes from a thread's upper row to its lower one
constexpr u32 HALF_BOXES = BN / BOX_COLUMNS, NUM_BOXES = 2 * HALF_BOXES;
constexpr u32 STORES_IN_FLIGHT = 2;
enum { PARTIAL_READY, SUM_READY, PARTIAL_FETCHED, NUM_KINDS };  // flags
constexpr int NUM_CONSUMERS = 256;

// Where a CTA's part of a tile lies in partials, sums and inbox.
__device__ __forceinline__ u64 place_offset(u32 slot, u32 cta) { return (u64)(slot * CTAS + cta) * TILE_BYTES; }

// A flag, at its reader, goes up when a tile may be read and down when the reader has seen that. All are down between
// launches: a rank ends when it has every sum, so every partial of its was read; and nobody sums anew before it has
// this rank's next partials. Whoever raises one has waited for the tile's bulk stores and then for a fence: when they
// are done, a part of this GPU's L2 cache has them, while others may still give what an earlier launch left, to another
// SM as to a peer. Without the fence, sums of stale partials were seen in up to 0.8 % of eager launches, and in more of
// those replayed. PTX asks for a fence of the system's scope; that one also waits for what this SM is fetching, and
// costs up to 16 %. One of this GPU's brings the tile to where its L2 cache serves everybody.
__device__ __forceinline__ u32 flag_index(u32 kind, u32 place, u32 peer) {
    return (place * RANKS + peer) * NUM_KINDS + kind;
}
__device__ __forceinline__ void raise(u64 flags, u32 index) { store_relaxed(flags + 4ull * index, 1); }
__device__ __forceinline__ void finish_stores() {  // this thread's in bulk, before their flags
    stores_done();
    if (STRICT)
        fence_system();
    else
        fence_gpu();
}
__device__ __forceinline__ void take(u64 flags, u32 index, u64 watch, u32 peer) {
    const u64 flag = flags + 4ull * index;
    Patience patience(watch);
    while (load_acquire(flag) == 0) patience.lose([=] { return WHO + peer; });
    store_relaxed(flag, 0);
    fence_async_global();  // the bulk copy that follows comes after
}

struct Multiplier {  // one thread of the warps that multiply
    u32 out_tile, partial_full, partial_added, out_ready, out_sent;
    const u32 *bias, *residual;
    int num_steps, num_rows, num_columns;
    u32 cta;
    u32 num_done, num_partials;
    u64* trace;

    // A piece of work from the first multiplication to the finished tile in shared memory.
    template <u32 W>
    __device__ __forceinline__ void run(const Work& work, Ring<W>& ring) {
        const int group = warp_uniform(threadIdx.x / 128 - 1), thread = threadIdx.x % 128, lane = threadIdx.x % 32;
        const int inner_row = thread / 32 * 16 + lane / 4;  // of the warpgroup's 64; and the one 8 below
        const u32 swizzle = (inner_row >> 1) & 3;
        const u32 out = out_tile + group * HALF_BYTES + inner_row * (BOX_COLUMNS * 2) + (lane % 4) * 4;
        // Where column 8 * j of the work lies, for this thread's upper row.
        const auto place = [=](int j) {
            return out - j / (BN / 8) * TILE_BYTES + j % (BN / 8) / 4 * BOX_BYTES + ((j % 4) ^ swizzle) * 16;
        };
        float sum[W * BN / 2];
        if (threadIdx.x == 128) { NOTE(num_done, MULTIPLY); }
        multiply<W>(sum, ring, group, thread, num_steps);
        if (threadIdx.x == 128) { NOTE(num_done, MULTIPLIED); }
        if (work.owner() == RANK) {
            const int row = (work.m * CTAS + cta) * BM + group * 64 + inner_row;
            const int column = work.n * BN + lane % 4 * 2;
#pragma unroll 1
            for (int other = 1; other < RANKS; other++, num_partials++) {
                wait(partial_full, num_partials & 1);
#pragma unroll
                for (int j = 0; j < W * BN / 8; j++) {
                    const u32 upper = load_shared(place(j)), lower = load_shared(place(j) + HALF_ROWS);
                    add_pair(sum[4 * j], sum[4 * j + 1], upper);
                    add_pair(sum[4 * j + 2], sum[4 * j + 3], lower);
                }
                arrive(partial_added);
            }
#if HAS_BIAS
#pragma unroll
            for (int j = 0; j < W * BN / 8; j++) {
                if (column + 8 * j < num_columns) {
                    const u32 both = bias[(column + 8 * j) / 2];
                    add_pair(sum[4 * j], sum[4 * j + 1], both);
                    add_pair(sum[4 * j + 2], sum[4 * j + 3], both);
                }
            }
#endif
#if HAS_RESIDUAL
#pragma unroll
            for (int j = 0; j < W * BN / 8; j++) {
                if (column + 8 * j < num_columns) {
                    const u64 at_pair = ((u64)row * num_columns + column + 8 * j) / 2;
                    if (row < num_rows) add_pair(sum[4 * j], sum[4 * j + 1], residual[at_pair]);
                    if (row + 8 < num_rows)
                        add_pair(sum[4 * j + 2], sum[4 * j + 3], residual[at_pair + 4ull * num_columns]);
                }
            }
#endif
        }
        if (work.owner() != RANK) wait(out_sent, (num_done & 1) ^ 1);
#pragma unroll
        for (int j = 0; j < W * BN / 8; j++) {
            store_shared(place(j), pack(sum[4 * j], sum[4 * j + 1]));
            store_shared(place(j) + HALF_ROWS, pack(sum[4 * j + 2], sum[4 * j + 3]));
        }
        fence_async_shared();
        arrive(out_ready);
        if (threadIdx.x == 128) { NOTE(num_done, ADDED); }
        num_done++;
    }
};

extern "C" __global__ void __cluster_dims__(CTAS, 1, 1) __launch_bounds__(384, 1) persistent_kernel(
    const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap weight_map,
    const __grid_constant__ TensorMap weight_pair_map, const __grid_constant__ TensorMap result_map,
    const __grid_constant__ Addresses at, const int* __restrict__ work_begin, const Work* __restrict__ works,
    const int* __restrict__ fetch_begin, const Fetch* __restrict__ fetches, int num_steps, int num_rows,
    int num_columns, const u32* __restrict__ bias, const u32* __restrict__ residual, u64* __restrict__ trace) {
    extern __shared__ unsigned char storage[];
    const u32 operands = (shared_address(storage) + 1023) & ~1023u;
    const u32 out_tile = operands + RING_BYTES + SPARE_BYTES;  // of a pair the first one's, the second's is before it
    const u32 fetched = out_tile + TILE_BYTES, barriers = fetched + FETCH_BUFFERS * BOX_BYTES;
    const u32 fetched_full = barriers, fetched_empty = fetched_full + 8 * FETCH_BUFFERS;
    const u32 partial_full = fetched_empty + 8 * FETCH_BUFFERS, partial_added = partial_full + 8;
    const u32 out_ready = partial_added + 8, out_sent = out_ready + 8, spare_free = out_sent + 8;
    Ring<1> single(operands, spare_free + 8);
    Ring<WIDTH> wide(operands, single.barriers + (WIDTH == 1 ? 0 : Ring<1>::BARRIER_BYTES));

    const u32 cta = rank_in_cluster();
    const int cluster = blockIdx.x / CTAS, warp = warp_uniform(threadIdx.x / 32);
    const int begin = warp_uniform(work_begin[cluster]), end = warp_uniform(work_begin[cluster + 1]);

    if (threadIdx.x == 0) {
        prefetch_map(x_map);
        prefetch_map(weight_map);
        prefetch_map(weight_pair_map);
        prefetch_map(result_map);
        single.init();
        if (WIDTH == 2) wide.init();
        for (u32 b = 0; b < FETCH_BUFFERS; b++) {
            barrier_init(fetched_full + 8 * b, 1);
            barrier_init(fetched_empty + 8 * b, 1);
        }
        barrier_init(partial_full, 1);
        barrier_init(partial_added, NUM_CONSUMERS);
        barrier_init(out_ready, NUM_CONSUMERS);
        barrier_init(out_sent, 1);
        barrier_init(spare_free, CTAS);
        fence_barrier_init();
    }
    __syncthreads();
    cluster_sync();

    if (warp < 4) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (warp == 0) {
            load_operands(x_map, weight_map, weight_pair_map, works + begin, end - begin, cta, num_steps, single, wide,
                          spare_free);
        } else if (threadIdx.x == 32) {  // finished tiles go to this GPU's memory, where the peers fetch them
            u32 added = 0;
            for (int i = begin; i < end; i++) {
                const Work work = works[i];
                const u32 width = work.width();
                if (work.owner() == RANK) {
                    for (int other = 1; other < RANKS; other++, added++) {
                        const int source = (RANK + other) % RANKS;
                        const u64 inbox = at.inbox + source * at.area_bytes;
                        for (u32 t = 0; t < width; t++)
                            take(at.flags[RANK], flag_index(PARTIAL_FETCHED, (work.slot + t) * CTAS + cta, source),
                                 at.watch, source);
                        if (other > 1) wait(partial_added, (added - 1) & 1);
                        expect(partial_full, width * TILE_BYTES);
                        for (u32 t = 0; t < width; t++)
                            load_bytes(out_tile - t * TILE_BYTES, inbox + place_offset(work.slot + t, cta), TILE_BYTES,
                                       partial_full);
                    }
                }
                wait(out_ready, (i - begin) & 1);
                for (u32 t = 0; t < width; t++) {
                    const u64 offset = place_offset(work.slot + t, cta);
                    const u32 from = out_tile - t * TILE_BYTES;
                    if (work.owner() != RANK) {
                        store_bytes(at.partials[RANK] + work.owner() * at.area_bytes + offset, from, TILE_BYTES);
                    } else {
                        const int row = (work.m * CTAS + cta) * BM;
                        store_bytes(at.sums[RANK] + offset, from, TILE_BYTES);
                        for (u32 box = 0; box < NUM_BOXES; box++)
                            store_box(result_map, (work.n + t) * BN + box % HALF_BOXES * BOX_COLUMNS,
                                      row + box / HALF_BOXES * 64, from + box * BOX_BYTES);
                    }
                }
                commit_stores();
                stores_read<0>();
                arrive(out_sent);
                if (width == 2 && i + 1 < end && works[i + 1].width() == 1)
                    for (u32 other = 0; other < CTAS; other++) arrive_at(spare_free, other);
                finish_stores();
                NOTE(i - begin, STORED);
                for (u32 t = 0; t < width; t++) {
                    const u32 place = (work.slot + t) * CTAS + cta;
                    if (work.owner() != RANK) {
                        raise(at.flags[work.owner()], flag_index(PARTIAL_READY, place, RANK));
                    } else {
                        for (int other = 1; other < RANKS; other++)
                            raise(at.flags[(RANK + other) % RANKS], flag_index(SUM_READY, place, RANK));
                    }
                }
            }
        } else if (threadIdx.x == 64) {  // tiles of the peers, box by box
            u32 count = 0;
            for (int j = fetch_begin[cluster]; j < fetch_begin[cluster + 1]; j++) {
                const Fetch fetch = fetches[j];
                const int peer = fetch.peer_and_kind / 2, is_partial = fetch.peer_and_kind % 2;
                const u32 place = fetch.slot * CTAS + cta;
                const u64 from = (is_partial ? at.partials[peer] + RANK * at.area_bytes : at.sums[peer]) +
                                 place_offset(fetch.slot, cta);
                take(at.flags[RANK], flag_index(is_partial ? PARTIAL_READY : SUM_READY, place, peer), at.watch, peer);
                NOTE(j - fetch_begin[cluster], FETCH);
                for (u32 box = 0; box < NUM_BOXES; box++, count++) {
                    const u32 buffer = count % FETCH_BUFFERS, barrier = fetched_full + 8 * buffer;
                    wait(fetched_empty + 8 * buffer, (count / FETCH_BUFFERS & 1) ^ 1);
                    expect(barrier, BOX_BYTES);
                    load_bytes(fetched + buffer * BOX_BYTES, from + box * BOX_BYTES, BOX_BYTES, barrier);
                }
            }
        } else if (threadIdx.x == 96) {  // and where they go: partials to the inbox, sums to the result
            u32 count = 0;
            for (int j = fetch_begin[cluster]; j < fetch_begin[cluster + 1]; j++) {
                const Fetch fetch = fetches[j];
                const int peer = fetch.peer_and_kind / 2, is_partial = fetch.peer_and_kind % 2;
                const u32 place = fetch.slot * CTAS + cta;
                const u64 inbox = at.inbox + peer * at.area_bytes + place_offset(fetch.slot, cta);
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
                    finish_stores();
                    raise(at.flags[RANK], flag_index(PARTIAL_FETCHED, place, peer));
                }
                NOTE(j - fetch_begin[cluster], FETCHED);
            }
            stores_done();
        }
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
        Multiplier multiplier{out_tile, partial_full, partial_added, out_ready, out_sent, bias, residual,
                              num_steps, num_rows, num_columns, cta, 0, 0, trace};
        for (int i = begin; i < end; i++) {
            const Work work = works[i];
            if (WIDTH == 1 || work.width() == 1)
                multiplier.run<1>(work, single);
            else
                multiplier.run<WIDTH>(work, wide);
        }
    }
    __syncwarp();
    // Neither CTA leaves while the other may still arrive at its barriers.
    cluster_sync();
}

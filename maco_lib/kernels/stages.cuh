// Operands on their way through shared memory: loaded by one warp, for both CTAs of a cluster where both need them,
// and multiplied by two warpgroups. Comes between hopper.cuh and persistent.cu, which says what is defined where.

constexpr int BM = 128, BK = 64, CTAS = 2;
constexpr u32 A_BYTES = BM * BK * 2, B_BYTES = BN * BK * 2, TILE_BYTES = BM * BN * 2;
constexpr u32 RING_BYTES = STAGES * (A_BYTES + WIDTH * B_BYTES), SPARE_BYTES = (WIDTH - 1) * TILE_BYTES;

// In units of a cluster's tile; owner: the rank that sums it; slot: counts the owner's tiles, a pair is two.
struct alignas(16) Work {
    int m, n, owner_and_pair, slot;
    __device__ __forceinline__ int owner() const { return owner_and_pair / 2; }
    __device__ __forceinline__ u32 width() const { return WIDTH == 2 ? owner_and_pair % 2 + 1 : 1; }
};

// The stages of operands for W tiles at once. Those for one and for two lie in the same memory, those for one also
// where a pair's second tile goes out.
template <u32 W>
struct Ring {
    static constexpr u32 BYTES = A_BYTES + W * B_BYTES, SIZE = (RING_BYTES + (W == 1 ? SPARE_BYTES : 0)) / BYTES;
    static constexpr u32 BARRIER_BYTES = 16 * SIZE;
    u32 operands, barriers, stage, parity;
    __device__ __forceinline__ Ring(u32 operands, u32 barriers)
        : operands(operands), barriers(barriers), stage(0), parity(0) {}
    __device__ __forceinline__ void next() {
        if (++stage == SIZE) stage = 0, parity ^= 1;
    }
    __device__ __forceinline__ u32 a() const { return operands + stage * BYTES; }
    __device__ __forceinline__ u32 b() const { return a() + A_BYTES; }
    __device__ __forceinline__ u32 full(u32 s) const { return barriers + 16 * s; }
    __device__ __forceinline__ u32 empty(u32 s) const { return full(s) + 8; }
    __device__ __forceinline__ void init() const {
        for (u32 s = 0; s < SIZE; s++) {
            barrier_init(full(s), 1);
            barrier_init(empty(s), 2 * CTAS);
        }
    }
    // Until both CTAs have multiplied what a stage holds.
    __device__ __forceinline__ void wait_for(u32 s) const { wait(empty(s), s < stage ? parity : parity ^ 1); }
    __device__ __forceinline__ void wait_for_all() const {
        for (u32 s = 0; s < SIZE; s++) wait_for(s);
    }
    __device__ __forceinline__ void wait_for_bytes(u32 begin, u32 end) const {
        for (u32 s = begin / BYTES; s < SIZE && s * BYTES < end; s++) wait_for(s);
    }
    // A step of this CTA's part of B's rows, for both CTAs, and of all of A's.
    __device__ __forceinline__ void load(const TensorMap& x_map, const TensorMap& weight_map, const Work& work, u32 cta,
                                         int k) {
        const int row = (work.m * CTAS + cta) * BM, column = work.n * BN + cta * (W * BN / 2);
        wait_for(stage);
        expect_by_warp(full(stage), BYTES);
        load_box_to_both(b() + cta * (W * B_BYTES / 2), weight_map, k * BK, column, full(stage));
        load_box(a(), x_map, k * BK, row, full(stage));
        next();
    }
};

// Everything that a CTA's part of `works` is multiplied from, by one warp. spare_free: where both CTAs tell that the
// last pair before a single tile has gone out.
__device__ __forceinline__ void load_operands(
    const TensorMap& x_map, const TensorMap& weight_map, const TensorMap& weight_pair_map, const Work* works,
    int num_works, u32 cta, int num_steps, Ring<1>& single, Ring<WIDTH>& wide, u32 spare_free) {
    u32 unchecked = 0, switches = 0;  // stages of single tiles that pairs may still use; from pairs to single ones
    u32 width = 0;
    for (int i = 0; i < num_works; i++) {
        const Work work{warp_uniform(works[i].m), warp_uniform(works[i].n), warp_uniform(works[i].owner_and_pair),
                        warp_uniform(works[i].slot)};
        const bool changes = i > 0 && work.width() != width;
        width = work.width();
        if (WIDTH == 1 || width == 1) {
            if (changes) unchecked = Ring<1>::SIZE, switches++;
            for (int k = 0; k < num_steps; k++) {
                if (unchecked) {
                    const u32 first = single.stage * Ring<1>::BYTES, last = first + Ring<1>::BYTES;
                    wide.wait_for_bytes(first, last);
                    if (last > RING_BYTES) wait(spare_free, (switches - 1) & 1);
                    unchecked--;
                }
                single.load(x_map, weight_map, work, cta, k);
            }
        } else {
            if (changes) {
                single.wait_for_all();
                if (switches) wait(spare_free, (switches - 1) & 1);  // so that none is missed, which turns the parity
            }
            for (int k = 0; k < num_steps; k++) wide.load(x_map, weight_pair_map, work, cta, k);
        }
    }
}

template <u32 W>
__device__ __forceinline__ void wgmma(float (&sum)[W * BN / 2], u64 a, u64 b, u32 add) {
    if constexpr (W == 1) {
        WGMMA_1;
    } else {
        WGMMA_2;
    }
}
// One warpgroup's part: 64 rows.
template <u32 W>
__device__ __forceinline__ void multiply(float (&sum)[W * BN / 2], Ring<W>& ring, int group, int thread,
                                         int num_steps) {
    u32 used = 0;
    for (int k = 0; k < num_steps; k++, ring.next()) {
        const u64 a = matrix(ring.a() + group * (A_BYTES / 2)), b = matrix(ring.b());
        wait(ring.full(ring.stage), ring.parity);
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
        wgmma<W>(sum, a, b, k > 0);
        wgmma<W>(sum, a + 2, b + 2, 1);
        wgmma<W>(sum, a + 4, b + 4, 1);
        wgmma<W>(sum, a + 6, b + 6, 1);
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        if (k > 0) {
            asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
            if (thread < CTAS) arrive_at(used, thread);
        }
        used = ring.empty(ring.stage);
    }
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    if (thread < CTAS) arrive_at(used, thread);
}

// The stages of a decode matmul: loaded by two threads of each CTA, the weight's rows for itself, x for all CTAs of the
// cluster, and multiplied by two warpgroups in turn. Comes between hopper.cuh and decode.cu, which says what is defined
// where; of that this file takes BN, CTAS, BOXES and WGMMA.

constexpr u32 BK = 64, ROW_BYTES = BK * 2;
constexpr int NUM_CONSUMERS = 256, GROUP = 128;

// The stages, in turn. A thread goes through all of them or, as a warpgroup does, through every second one.
struct Stages {
    u32 operands, barriers, stage_bytes, count, at, parity;
    __device__ __forceinline__ void next(u32 step) {
        at += step;
        if (at >= count) at -= count, parity ^= 1;
    }
    __device__ __forceinline__ u32 weight() const { return operands + at * stage_bytes; }
    __device__ __forceinline__ u32 x(u32 tile_rows) const { return weight() + BOXES * tile_rows * ROW_BYTES; }
    __device__ __forceinline__ u32 full() const { return barriers + 16 * at; }
    __device__ __forceinline__ u32 empty() const { return full() + 8; }
    __device__ __forceinline__ void init() const {
        for (u32 s = 0; s < count; s++) {
            barrier_init(barriers + 16 * s, 1);
            barrier_init(barriers + 16 * s + 8, CTAS);
        }
    }
};

// The stages that a CTA's tiles take, for one that loads them.
struct Walk {
    Stages stages;
    int num_steps, tile, step, number;
    __device__ __forceinline__ void next() {
        number++;
        stages.next(1);
        if (++step == num_steps) step = 0, tile += gridDim.x;
    }
    // Until all CTAs of the cluster have multiplied what the stage holds.
    __device__ __forceinline__ void wait_until_free() const {
        if (number >= (int)stages.count) wait(stages.empty(), stages.parity ^ 1);
    }
};

// Of decode.cu: for all CTAs of the cluster; of what is read once.
__device__ __forceinline__ void load_box_to_all(u32 to, const TensorMap& map, int column, int row, u32 barrier);
__device__ __forceinline__ void load_box_once(u32 to, const TensorMap& map, int column, int row, u32 barrier,
                                              u64 policy);

// One thread's part: the rows of the weight for its CTA's tiles, of which `tile` is the cluster's first.
__device__ __forceinline__ void load_weights(const TensorMap& weight_map, const Stages& stages, u32 tile_rows, u32 cta,
                                             int tile, int num_steps, int num_all) {
    u64 policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    for (Walk walk{stages, num_steps, tile, 0, 0}; walk.number < num_all; walk.next()) {
        const u32 full = walk.stages.full();
        walk.wait_until_free();
        expect(full, stages.stage_bytes);
#pragma unroll
        for (u32 box = 0; box < BOXES; box++)
            load_box_once(walk.stages.weight() + box * tile_rows * ROW_BYTES, weight_map,
                          (walk.step * BOXES + box) * BK, (walk.tile + cta) * tile_rows, full, policy);
    }
}
// Another's: this CTA's share of x's boxes, for all CTAs. A CTA may get them before it expects them.
__device__ __forceinline__ void load_x(const TensorMap& x_map, const Stages& stages, u32 tile_rows, u32 cta, int tile,
                                       int num_steps, int num_all) {
    for (Walk walk{stages, num_steps, tile, 0, 0}; walk.number < num_all; walk.next()) {
        walk.wait_until_free();
#pragma unroll
        for (u32 box = 0; box < BOXES; box += CTAS)
            load_box_to_all(walk.stages.x(tile_rows) + (box + cta) * BN * ROW_BYTES, x_map,
                            (walk.step * BOXES + box + cta) * BK, 0, walk.stages.full());
    }
}

__device__ __forceinline__ void wgmma(float (&sum)[BN / 2], u64 a, u64 b, u32 add) { WGMMA; }
// A warpgroup's stages of a tile, from `first` on; of `left` stages in all from the tile's first on.
__device__ __forceinline__ void multiply(float (&sum)[BN / 2], Stages& stages, u32 tile_rows, int first, int num_steps,
                                         int left) {
#pragma unroll
    for (int i = 0; i < BN / 2; i++) sum[i] = 0;
    for (int step = first; step < num_steps; step += 2, stages.next(2)) {
        const u64 a = matrix(stages.weight()), b = matrix(stages.x(tile_rows));
        wait(stages.full(), stages.parity);
#pragma unroll
        for (int i = 0; i < BN / 2; i++) asm volatile("" : "+f"(sum[i])::"memory");
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (u32 box = 0; box < BOXES; box++)
#pragma unroll
            for (u32 k = 0; k < 4; k++)
                wgmma(sum, a + box * (tile_rows * ROW_BYTES / 16) + 2 * k, b + box * (BN * ROW_BYTES / 16) + 2 * k, 1);
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
        for (int i = 0; i < BN / 2; i++) asm volatile("" : "+f"(sum[i])::"memory");
        // Only where it will be filled again: so nothing comes to a CTA that has gone.
        if (step + (int)stages.count < left && threadIdx.x % GROUP < CTAS)
            arrive_at(stages.empty(), threadIdx.x % GROUP);
    }
}

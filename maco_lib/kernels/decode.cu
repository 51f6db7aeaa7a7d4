// A few rows of x times a weight as fast as the weight can be read: x @ w.T (+ bias), put into every rank's inbox, our
// own too, in lines (lines.py). See decode.py.
// A CTA multiplies `tile_rows` of the weight's rows by all of x's over the whole of K, a stage of BOXES boxes of 64
// columns at a time. In it, by warp:
//   0 to 7     multiply: two warpgroups, of the even and of the odd stages, whose sums are added at the end
//   8          loads the weight rows of its CTA
//   9          loads x, which all CTAs of the cluster need: each some of its boxes, for all of them
// For wgmma the weight's rows are the 64 rows of a matrix, of which what is beyond `tile_rows` is not looked at.
// hopper.cuh and decode_stages.cuh come before this file. Defined at compile time: BN (rows of x, padded), CTAS (of a
// cluster), BOXES, RANKS, BF16, WGMMA, LAUNCH and HALF (as in lines.py).

constexpr u32 LINE_ELEMENTS = 4;  // 8 bytes of data
// Sums of the second warpgroup, on their way to the first.
constexpr u32 SUMS_BYTES = BN / 2 * GROUP * 4;

struct Inboxes { u64 of[RANKS]; };  // of each rank, beginning with the next one, own last

__device__ __forceinline__ void load_box_to_all(u32 to, const TensorMap& map, int column, int row, u32 barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
        " [%0], [%1, {%2, %3}], [%4], %5;"
        ::"r"(to), "l"(&map), "r"(column), "r"(row), "r"(barrier), "h"((unsigned short)((1 << CTAS) - 1)) : "memory");
}
// Of what is read once: it does not push x and the lines out of the L2 cache.
__device__ __forceinline__ void load_box_once(u32 to, const TensorMap& map, int column, int row, u32 barrier,
                                              u64 policy) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
        " [%0], [%1, {%2, %3}], [%4], %5;"
        ::"r"(to), "l"(&map), "r"(column), "r"(row), "r"(barrier), "l"(policy) : "memory");
}
__device__ __forceinline__ void consumers_meet() { asm volatile("bar.sync 1, %0;" ::"n"(NUM_CONSUMERS) : "memory"); }
// Each 8 bytes of a line are written whole.
__device__ __forceinline__ void put_line(u64 at, u64 data, u32 epoch) {
    const u64 low = (u64)epoch << 32 | (u32)data, high = (u64)epoch << 32 | data >> 32;
    asm volatile("st.relaxed.sys.global.v2.b64 [%0], {%1, %2};" ::"l"(at), "l"(low), "l"(high) : "memory");
}

extern "C" __global__ void __cluster_dims__(CTAS, 1, 1) __launch_bounds__(NUM_CONSUMERS + 64, 1) decode_kernel(
    const __grid_constant__ TensorMap weight_map, const __grid_constant__ TensorMap x_map,
    const __grid_constant__ Inboxes inboxes, const u64* counter, const unsigned short* __restrict__ bias,
    int tile_rows, int num_stages, int num_tiles, int num_steps, int num_rows, int num_columns) {
    extern __shared__ unsigned char storage[];
    __shared__ u64 launches;
    const u32 cta = rank_in_cluster();
    const u32 stage_bytes = BOXES * (tile_rows + BN) * ROW_BYTES, pitch = tile_rows * 2 + 16;
    const u32 operands = (shared_address(storage) + 1023) & ~1023u, sums = operands + num_stages * stage_bytes;
    const u32 turned = sums + SUMS_BYTES, barriers = turned + BN * pitch;
    Stages stages{operands, barriers, stage_bytes, (u32)num_stages, 0, 0};
    // All CTAs of a cluster take as many tiles: some may be beyond the last, of which there is nothing to load.
    const int first_of_cluster = blockIdx.x - cta;
    const int num_all = (num_tiles - first_of_cluster + (int)gridDim.x - 1) / (int)gridDim.x * num_steps;
    if (threadIdx.x == NUM_CONSUMERS) {
        stages.init();
        fence_barrier_init();
        fence_async_shared();
    }
    asm volatile("griddepcontrol.wait;" ::: "memory");  // for what the kernel before has written
    // Before the next kernel, which counts on, is let in.
    if (threadIdx.x == 0) launches = *(const volatile u64*)counter / LAUNCH;
    asm volatile("barrier.cluster.arrive.release;" ::: "memory");

    if (threadIdx.x == NUM_CONSUMERS)  // needs no other CTA to begin
        load_weights(weight_map, stages, tile_rows, cta, first_of_cluster, num_steps, num_all);
    __syncwarp();
    asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
    if (threadIdx.x == NUM_CONSUMERS + 32) {
        load_x(x_map, stages, tile_rows, cta, first_of_cluster, num_steps, num_all);
        asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    } else if (threadIdx.x < NUM_CONSUMERS) {
        const int group = threadIdx.x / GROUP, thread = threadIdx.x % GROUP, lane = threadIdx.x % 32;
        const int inner = thread / 32 * 16 + lane / 4;  // of the tile's columns; and the one 8 beyond
        const u32 epoch = (u32)launches + 1, num_lines = num_columns / LINE_ELEMENTS;
        const int tile_lines = tile_rows / LINE_ELEMENTS;
        const u64 half = launches % 2 * HALF;
        stages.at = group;
        for (int tile = first_of_cluster, done = 0; tile < num_tiles; tile += gridDim.x, done += num_steps) {
            float sum[BN / 2];
            multiply(sum, stages, tile_rows, group ^ (done & 1), num_steps, num_all - done);
            const int first = (tile + cta) * tile_rows;
            if (group == 1) {
#pragma unroll
                for (int i = 0; i < BN / 2; i++)
                    asm volatile("st.shared.f32 [%0], %1;" ::"r"(sums + (i * GROUP + thread) * 4), "f"(sum[i])
                                 : "memory");
            }
            consumers_meet();
            if (group == 0) {
                float upper = 0, lower = 0;  // the bias, of either column
                if (bias) {
                    float unused = 0;
                    if (first + inner < num_columns) add_pair(upper, unused, bias[first + inner]);
                    if (first + inner + 8 < num_columns) add_pair(lower, unused, bias[first + inner + 8]);
                }
                const u32 place = turned + lane % 4 * 2 * pitch + inner * 2;
#pragma unroll
                for (int i = 0; i < BN / 2; i++) {
                    float other;
                    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(other) : "r"(sums + (i * GROUP + thread) * 4)
                                 : "memory");
                    sum[i] += other;
                }
#pragma unroll
                for (int j = 0; j < BN / 8; j++) {
                    const u32 at = place + j * 8 * pitch;
                    const u32 one = pack(sum[4 * j] + upper, sum[4 * j + 2] + lower);
                    const u32 two = pack(sum[4 * j + 1] + upper, sum[4 * j + 3] + lower);
                    if (inner < tile_rows) {
                        asm volatile("st.shared.u16 [%0], %1;" ::"r"(at), "h"((unsigned short)one) : "memory");
                        asm volatile("st.shared.u16 [%0], %1;" ::"r"(at + pitch), "h"((unsigned short)two) : "memory");
                    }
                    if (inner + 8 < tile_rows) {
                        asm volatile("st.shared.u16 [%0], %1;" ::"r"(at + 16), "h"((unsigned short)(one >> 16))
                                     : "memory");
                        asm volatile("st.shared.u16 [%0], %1;" ::"r"(at + pitch + 16), "h"((unsigned short)(two >> 16))
                                     : "memory");
                    }
                }
            }
            consumers_meet();
            for (int i = threadIdx.x; i < num_rows * tile_lines; i += NUM_CONSUMERS) {
                const u32 row = i / tile_lines, line = i % tile_lines, column = first / LINE_ELEMENTS + line;
                if (column < num_lines) {
                    u64 data;
                    asm volatile("ld.shared.u64 %0, [%1];" : "=l"(data) : "r"(turned + row * pitch + line * 8));
                    for (int step = 0; step < RANKS; step++) {
                        const u64 slot = (u64)(step < RANKS - 1 ? RANKS - 2 - step : step) * num_rows + row;
                        put_line(inboxes.of[step] + half + (slot * num_lines + column) * 16, data, epoch);
                    }
                }
            }
        }
    }
}

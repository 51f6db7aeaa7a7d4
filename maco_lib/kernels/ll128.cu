// An all-reduce in lines of 128 bytes, and what may follow it: residual and RMSNorm. See ll128.py. long_line.cuh comes
// before this file.
// A CTA sums a block; a group of 8 lanes holds a line, each lane 16 bytes: two words of 8 bytes, the last lane's second
// word being the epoch. Defined at compile time: RANKS, RANK, KIND (0: float, 1: bf16, 2: fp16), WARPS, PASSES (lines
// of a group), ONE_SHOT, NORM, LAUNCH, HALF, BEGIN (where long lines are in a half), WHO (this kernel, in
// patience.cuh, which comes before this file too).

constexpr int DATA = 15, GROUP = 8, LINE_BYTES = 128;  // words of data in a line, its lanes
constexpr int VALUES = KIND ? 4 : 2;                   // in a word
constexpr int OTHERS = RANKS - 1;

struct Inboxes { u64 at[RANKS]; };  // beginning with the next rank, own last

// Which of `Inboxes` is a rank's; of a sender, also which of its receiver's slots it fills.
__device__ __forceinline__ constexpr int index_of(int rank, int seen_from) {
    return (rank - seen_from - 1 + RANKS) % RANKS;
}

struct Values { float of[VALUES]; };
__device__ __forceinline__ Values unpack(u64 word) {
    Values values;
    const u32 low = (u32)word, high = (u32)(word >> 32);
#if KIND == 0
    values.of[0] = __uint_as_float(low), values.of[1] = __uint_as_float(high);
#elif KIND == 1
    values.of[0] = __uint_as_float(low << 16), values.of[1] = __uint_as_float(low & 0xffff0000u);
    values.of[2] = __uint_as_float(high << 16), values.of[3] = __uint_as_float(high & 0xffff0000u);
#else
    asm("{ .reg .b16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b; }"
        : "=f"(values.of[0]), "=f"(values.of[1]) : "r"(low));
    asm("{ .reg .b16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b; }"
        : "=f"(values.of[2]), "=f"(values.of[3]) : "r"(high));
#endif
    return values;
}
__device__ __forceinline__ u32 pack_pair(float lower, float upper) {
    u32 pair;
#if KIND == 1
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(upper), "f"(lower));
#else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(upper), "f"(lower));
#endif
    return pair;
}
__device__ __forceinline__ u64 pack(const Values& values) {
#if KIND == 0
    return (u64)__float_as_uint(values.of[1]) << 32 | __float_as_uint(values.of[0]);
#else
    return (u64)pack_pair(values.of[2], values.of[3]) << 32 | pack_pair(values.of[0], values.of[1]);
#endif
}
__device__ __forceinline__ void add(Values& values, u64 word) {
    const Values more = unpack(word);
#pragma unroll
    for (int v = 0; v < VALUES; v++) values.of[v] += more.of[v];
}

struct Pair { u64 word[2]; };
// The sum of all ranks' data in the order of the ranks, packed, with the residual where there is one.
__device__ __forceinline__ Pair sum_of(const Pair& own, const Pair (&others)[OTHERS], const Pair& residual) {
    Pair sum;
#pragma unroll
    for (int w = 0; w < 2; w++) {
        Values values = unpack(RANK == 0 ? own.word[w] : others[index_of(0, RANK)].word[w]);
#pragma unroll
        for (int rank = 1; rank < RANKS; rank++)
            add(values, rank == RANK ? own.word[w] : others[index_of(rank, RANK) % OTHERS].word[w]);
        if (NORM) add(values, residual.word[w]);
        sum.word[w] = pack(values);
    }
    return sum;
}

__device__ __forceinline__ float sum_of_cta(float value) {
    __shared__ float parts[WARPS];
#pragma unroll
    for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = value;
    __syncthreads();
    float total = 0;
#pragma unroll
    for (int warp = 0; warp < WARPS; warp++) total += parts[warp];
    return total;
}

// block_words: of a CTA's block, a row where NORM; num_words: of all. slots: blocks that a rank owns, at most.
extern "C" __global__ void __launch_bounds__(32 * WARPS) ll128_kernel(
    const __grid_constant__ Inboxes inboxes, u64* counter, const u64* product, const u64* residual, const u64* weight,
    u64* normed, u64* total, int block_words, int num_words, int slots, float eps, u64 watch) {
    __shared__ u64 launches;
    const int block = blockIdx.x, begin = block * block_words, count = min(block_words, num_words - begin);
    const int lane = threadIdx.x % GROUP, group = threadIdx.x / GROUP, lines = (block_words + DATA - 1) / DATA;
    if (threadIdx.x == 0)
        launches = atomicAdd(counter, block == 0 ? (u64)LAUNCH - gridDim.x + 1 : 1ull) / LAUNCH;

    // This thread's line of a pass, and its w-th word of it; both count in the block.
    const auto line_of = [&](int pass) { return pass * (WARPS * 32 / GROUP) + group; };
    const auto word_of = [&](int pass, int w) { return line_of(pass) * DATA + 2 * lane + w; };
    Pair own[PASSES], old[PASSES];
    bool has_line[PASSES], has[PASSES][2];
#pragma unroll
    for (int pass = 0; pass < PASSES; pass++) {
        has_line[pass] = line_of(pass) * DATA < count;
#pragma unroll
        for (int w = 0; w < 2; w++) {
            const int word = word_of(pass, w);
            has[pass][w] = word < count && 2 * lane + w < DATA;
            own[pass].word[w] = has[pass][w] ? product[begin + word] : 0;
            old[pass].word[w] = NORM && has[pass][w] ? residual[begin + word] : 0;
        }
    }
    __syncthreads();
    const u32 epoch = (u32)(launches + 1);
    const u64 mark = (u64)epoch << 32 | epoch, half = launches % 2 * HALF + BEGIN;
    const bool marks = lane == GROUP - 1;
    const auto place = [&](u64 inbox, int slot, int pass) {
        return inbox + half + ((u64)slot * lines + line_of(pass)) * LINE_BYTES + lane * 16;
    };
    const auto send = [&](u64 inbox, int slot, int pass, const Pair& data) {
        if (has_line[pass]) put(place(inbox, slot, pass), data.word[0], marks ? mark : data.word[1]);
        __syncwarp();
    };
    const u64 own_inbox = inboxes.at[OTHERS];

    Pair data[PASSES];
    const int owner = block % RANKS, of_owner = block / RANKS;
    if (!ONE_SHOT && owner != RANK) {
        u64 inbox = 0;
#pragma unroll
        for (int rank = 0; rank < RANKS; rank++)
            if (rank == owner) inbox = inboxes.at[index_of(rank, RANK)];
        const int slot = index_of(RANK, owner) * slots + of_owner;
#pragma unroll
        for (int pass = 0; pass < PASSES; pass++) send(inbox, slot, pass, own[pass]);
#pragma unroll
        for (int pass = 0; pass < PASSES; pass++) {
            Patience patience(watch);
            bool late;
            do {
                late = false;
                if (has_line[pass]) {
                    get(place(own_inbox, OTHERS * slots + block, pass), data[pass].word[0], data[pass].word[1]);
                    late = marks && data[pass].word[1] != mark;
                }
                if (late) patience.lose([=] { return WHO + owner; });
            } while (__any_sync(0xffffffffu, late));
        }
    } else {
        if (ONE_SHOT) {
#pragma unroll
            for (int pass = 0; pass < PASSES; pass++) {
#pragma unroll
                for (int step = 1; step < RANKS; step++) {
                    const int slot = index_of(RANK, (RANK + step) % RANKS) * gridDim.x + block;
                    send(inboxes.at[step - 1], slot, pass, own[pass]);
                }
            }
        }
#pragma unroll
        for (int pass = 0; pass < PASSES; pass++) {
            Pair others[OTHERS];
            Patience patience(watch);
            bool late;
            do {
                late = false;
                if (has_line[pass]) {
#pragma unroll
                    for (int other = 0; other < OTHERS; other++) {
                        const int slot = ONE_SHOT ? other * gridDim.x + block : other * slots + of_owner;
                        get(place(own_inbox, slot, pass), others[other].word[0], others[other].word[1]);
                        late |= marks && others[other].word[1] != mark;
                    }
                }
                if (late) patience.lose([&] {
                    int who = RANK;
#pragma unroll
                    for (int other = 0; other < OTHERS; other++)
                        if (others[other].word[1] != mark) who = (RANK + 1 + other) % RANKS;
                    return WHO + who;
                });
            } while (__any_sync(0xffffffffu, late));
            data[pass] = sum_of(own[pass], others, old[pass]);
            if (!ONE_SHOT) {
#pragma unroll
                for (int step = 1; step < RANKS; step++)
                    send(inboxes.at[step - 1], OTHERS * slots + block, pass, data[pass]);
            }
        }
    }

    float squares = 0;
#pragma unroll
    for (int each = 0; each < 2 * PASSES; each++) {
        const int pass = each / 2, w = each % 2;
        if (!has[pass][w]) continue;
        total[begin + word_of(pass, w)] = data[pass].word[w];
        const Values values = unpack(data[pass].word[w]);
#pragma unroll
        for (int v = 0; v < VALUES; v++) squares += values.of[v] * values.of[v];
    }
    if (NORM) {
        const float scale = 1.0f / sqrtf(sum_of_cta(squares) / (VALUES * block_words) + eps);
#pragma unroll
        for (int each = 0; each < 2 * PASSES; each++) {
            const int pass = each / 2, w = each % 2;
            if (!has[pass][w]) continue;
            Values values = unpack(data[pass].word[w]);
            const Values weights = unpack(weight[word_of(pass, w)]);
#pragma unroll
            for (int v = 0; v < VALUES; v++) values.of[v] *= scale * weights.of[v];
            normed[begin + word_of(pass, w)] = pack(values);
        }
    }
}

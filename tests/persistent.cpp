// persistent.cu on CPUs: every thread that does anything, of every CTA of every rank, as a fiber; fibers take turns at
// random, and what is copied in bulk is read and arrives whenever it likes. Launch follows launch, with other data, as
// on a stream: a rank begins when it has ended the one before, whatever the others do. The elements are small whole
// numbers, so the sum is known exactly. Exits with 1 and a line that says what is wrong, or that all wait.
// Arguments: a file of numbers (see test_persistent_kernel.py), seed, number of launches.
// Defined at compile time: RANKS, BN, WIDTH, STAGES, FETCH_BUFFERS, HAS_BIAS, HAS_RESIDUAL.

#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <fstream>
#include <functional>
#include <memory>
#include <random>
#include <unordered_map>
#include <vector>

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short u16;
#define __device__
#define __forceinline__ inline
#define __global__
#define __grid_constant__
#define __restrict__
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __shared__
#define BF16 1
#define TRACE 0
#define TRACE_TILES 0
#define WGMMA_1 (emulate<BN>(sum, a, b, add))
#define WGMMA_2 (emulate<WIDTH * BN>(sum, a, b, add))

constexpr int CTAS_OF_CLUSTER = 2, SMEM_BYTES = 227 * 1024, ELEMENTS_OF_BOX = 64, COLUMNS_STORED = 32;
std::mt19937 generator;
u32 below(u32 limit) { return generator() % limit; }
void fail(const char* what, long rank, long at) {
    printf("%s: rank %ld, %ld\n", what, rank, at);
    fflush(stdout);
    _Exit(1);
}

// bf16
float value_of(u16 bits) {
    const u32 wide = (u32)bits << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
}
u16 bits_of(float value) {
    u32 wide;
    memcpy(&wide, &value, 4);
    return (wide + 0x7fff + (wide >> 16 & 1)) >> 16;
}

struct TensorMap { u16* data; int rows, columns, box_rows; };
struct Launch {
    TensorMap x, weight, weight_pair, result;
    u64 partials[RANKS], sums[RANKS], flags[RANKS], inbox, area_bytes;
    const int* tables[4];
    int num_steps, num_rows, num_columns;
    const u32 *bias, *residual;
};

// Whoever waits for a barrier, a flag or each other gets no turn until it may be there.
struct Fiber;
typedef std::vector<Fiber*> Waiting;
struct Barrier { int count = 0, pending = 0; long bytes = 0; u32 phase = 0; Waiting waiting; };
struct Meeting { int size = 0, come = 0; Waiting waiting; };
struct Cta {
    int rank, index;
    std::vector<unsigned char> smem = std::vector<unsigned char>(SMEM_BYTES);
    std::unordered_map<u32, Barrier> barriers;
    Meeting all, warpgroups[2] = {{128}, {128}};
};
struct Cluster { Cta ctas[CTAS_OF_CLUSTER]; Meeting all; int num_left = 0; };
struct Store {  // in bulk: read first, then there
    Cta* cta;
    u32 from, bytes;
    std::vector<unsigned char> data;
    std::function<void(const std::vector<unsigned char>&)> arrive;
    int state = 0;
    bool is_late = below(3) == 0;
};
typedef std::shared_ptr<Store> StorePointer;
struct Index { u32 x; };
struct Fiber {
    Cluster* cluster;
    Cta* cta;
    Index thread, block;
    std::vector<StorePointer> open;  // not committed
    std::deque<std::vector<StorePointer>> groups;
    bool ended = false;
    ucontext_t context = {};
    std::vector<char> stack = std::vector<char>(1 << 15);
};
Fiber* self;
Index threadIdx, blockIdx;
ucontext_t scheduler;
std::vector<Fiber*> ready;
std::unordered_map<u64, Waiting> flag_waiting;
std::vector<StorePointer> stores;
struct Load {
    Cta* cta;
    u32 to, barrier;
    u64 from;  // where it is read when it lands; 0: it has been
    std::vector<unsigned char> data;
    bool is_swizzled, is_late = below(6) == 0;
};
std::vector<Load> loads;

void leave() {
    swapcontext(&self->context, &scheduler);
    threadIdx = self->thread, blockIdx = self->block;
}
void yield() { ready.push_back(self), leave(); }
void wait_in(Waiting& waiting) { waiting.push_back(self), leave(); }
void wake(Waiting& waiting) {
    ready.insert(ready.end(), waiting.begin(), waiting.end());
    waiting.clear();
}
void meet(Meeting& meeting) {
    if (++meeting.come < meeting.size) return wait_in(meeting.waiting);
    meeting.come = 0;
    wake(meeting.waiting);
}
void __syncthreads() { meet(self->cta->all); }
void __syncwarp() {}  // one fiber stands for a warp that does not multiply; the others go on together anyway

// hopper.cuh
u32 shared_address(const void*) { return 0; }
int same(int value) { return value; }
u32 rank_in_cluster() { return self->cta->index; }
void cluster_meets() { meet(self->cluster->all); }
Barrier& barrier_of(Cta& cta, u32 address) {
    if (!cta.barriers.count(address)) fail("no barrier", cta.rank, address);
    return cta.barriers[address];
}
void update(Barrier& barrier) {
    if (barrier.pending == 0 && barrier.bytes == 0) {
        barrier.phase++, barrier.pending = barrier.count;
        wake(barrier.waiting);
    }
}
void arrive_with(Cta& cta, u32 address, long bytes) {
    Barrier& barrier = barrier_of(cta, address);
    if (barrier.pending == 0) fail("more arrivals than awaited", cta.rank, address);
    barrier.pending--, barrier.bytes += bytes;
    update(barrier);
}
void barrier_init(u32 address, u32 count) {
    Barrier& barrier = self->cta->barriers[address];
    barrier.count = barrier.pending = count;
}
void fence_barrier_init() {}
void expect(u32 address, u32 bytes) { arrive_with(*self->cta, address, bytes); }
void expect_by_warp(u32 address, u32 bytes) { expect(address, bytes); }
void arrive(u32 address) { arrive_with(*self->cta, address, 0); }
void arrive_at(u32 address, u32 cta) { arrive_with(self->cluster->ctas[cta], address, 0); }
void wait(u32 address, u32 parity) {
    while ((barrier_of(*self->cta, address).phase & 1) == parity) wait_in(barrier_of(*self->cta, address).waiting);
    if (below(8) == 0) yield();
}
void prefetch_map(const TensorMap&) {}
std::vector<unsigned char> box_of(const TensorMap& map, int column, int row) {
    std::vector<unsigned char> data(map.box_rows * ELEMENTS_OF_BOX * 2);
    for (int r = 0; r < map.box_rows; r++)
        for (int c = 0; c < ELEMENTS_OF_BOX; c++)
            if (row + r < map.rows && column + c < map.columns)
                ((u16*)data.data())[r * ELEMENTS_OF_BOX + c] = map.data[(size_t)(row + r) * map.columns + column + c];
    return data;
}
void load_box(u32 to, const TensorMap& map, int column, int row, u32 barrier) {
    loads.push_back({self->cta, to, barrier, 0, box_of(map, column, row), true});
}
void load_box_to_both(u32 to, const TensorMap& map, int column, int row, u32 barrier) {
    for (Cta& cta : self->cluster->ctas) loads.push_back({&cta, to, barrier, 0, box_of(map, column, row), true});
}
void load_bytes(u32 to, u64 from, u32 bytes, u32 barrier) {
    const unsigned char* begin = (const unsigned char*)from;
    loads.push_back({self->cta, to, barrier, below(2) ? from : 0, {begin, begin + bytes}, false});
}
u32 swizzled(u32 address, u32 mask) { return address ^ (address >> 7 & mask) << 4; }  // 7: by 128 bytes, 3: by 64
// A late one where nothing else can be done, and now and then.
bool comes(bool is_late) { return !is_late || ready.empty() || below(2000) == 0; }
void land(u32 number) {
    if (!comes(loads[number].is_late)) return;
    std::swap(loads[number], loads.back());
    Load load = std::move(loads.back());
    loads.pop_back();
    if (load.from) memcpy(load.data.data(), (const void*)load.from, load.data.size());
    for (u32 i = 0; i < load.data.size(); i++) {
        const u32 at = load.is_swizzled ? swizzled(load.to + i, 7) : load.to + i;
        load.cta->smem[at] = load.data[i];
    }
    Barrier& barrier = barrier_of(*load.cta, load.barrier);
    barrier.bytes -= load.data.size();
    update(barrier);
}
void store(u32 from, u32 bytes, std::function<void(const std::vector<unsigned char>&)> arrive) {
    self->open.push_back(std::make_shared<Store>(Store{self->cta, from, bytes, {}, std::move(arrive)}));
    stores.push_back(self->open.back());
}
void store_box(const TensorMap& map, int column, int row, u32 from) {
    store(from, map.box_rows * COLUMNS_STORED * 2, [=](const std::vector<unsigned char>& data) {
        for (int r = 0; r < map.box_rows; r++)
            for (int c = 0; c < COLUMNS_STORED; c++)
                if (row + r < map.rows && column + c < map.columns) {
                    const u32 at = swizzled(from + (r * COLUMNS_STORED + c) * 2, 3) - from;
                    memcpy(&map.data[(size_t)(row + r) * map.columns + column + c], &data[at], 2);
                }
    });
}
void store_bytes(u64 to, u32 from, u32 bytes) {
    store(from, bytes, [=](const std::vector<unsigned char>& data) { memcpy((void*)to, data.data(), bytes); });
}
void advance(Store& one) {
    if (!comes(one.is_late)) return;
    if (one.state == 0) {
        const auto begin = one.cta->smem.begin() + one.from;
        one.data.assign(begin, begin + one.bytes);
    }
    if (one.state == 1) one.arrive(one.data);
    one.state++;
}
void commit_stores() { self->groups.push_back(std::move(self->open)), self->open.clear(); }
void until(size_t pending, int state) {
    for (size_t group = 0; group + pending < self->groups.size(); group++)
        for (const StorePointer& one : self->groups[group])
            while (one->state < state) yield();
}
template <int PENDING>
void stores_read() { until(PENDING, 1); }
void stores_done() { until(0, 2), self->groups.clear(); }
void fence_async_shared() {}
void fence_async_global() {}
u32 load_shared(u32 address) {
    u32 value;
    memcpy(&value, &self->cta->smem[address], 4);
    return value;
}
void store_shared(u32 address, u32 value) { memcpy(&self->cta->smem[address], &value, 4); }
u32 load_acquire(u64 address) {
    const u32 value = *(volatile u32*)address;
    if (value == 0) wait_in(flag_waiting[address]);
    return value;
}
void store_relaxed(u64 address, u32 value) {
    if (value && *(volatile u32*)address) fail("a flag is raised that is up", self->cta->rank, address);
    *(volatile u32*)address = value;
    if (value) wake(flag_waiting[address]);
}
void store_release_gpu(u64 address, u32 value) { store_relaxed(address, value); }
u64 matrix(u32 address) { return address >> 4; }
u32 pack(float low, float high) { return (u32)bits_of(high) << 16 | bits_of(low); }
void add_pair(float& low, float& high, u32 both) { low += value_of((u16)both), high += value_of((u16)(both >> 16)); }

// A thread's part of wgmma, which a warpgroup does together: 64 rows by N columns, 16 deep.
template <int N>
void emulate(float (&sum)[N / 2], u64 a, u64 b, u32 add) {
    const auto element = [&](u64 matrix, u32 row, u32 k) {
        u16 bits;
        memcpy(&bits, &self->cta->smem[swizzled((u32)(matrix << 4) + row * 128 + k * 2, 7)], 2);
        return value_of(bits);
    };
    Meeting& warpgroup = self->cta->warpgroups[threadIdx.x / 128 - 1];
    meet(warpgroup);
    const u32 row = threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
    float upper[16], lower[16];
    for (u32 k = 0; k < 16; k++) upper[k] = element(a, row, k), lower[k] = element(a, row + 8, k);
    for (u32 j = 0; j < N / 8; j++)
        for (u32 c = 0; c < 2; c++) {
            float above = 0, below = 0;
            for (u32 k = 0; k < 16; k++) {
                const float w = element(b, 8 * j + column + c, k);
                above += upper[k] * w, below += lower[k] * w;
            }
            sum[4 * j + c] = (add ? sum[4 * j + c] : 0) + above;
            sum[4 * j + 2 + c] = (add ? sum[4 * j + 2 + c] : 0) + below;
        }
    meet(warpgroup);
}

unsigned char storage[1];
#define JOINED(a, b) a##b
#define NAMED(a, b) JOINED(a, b)
#define asm
#define volatile(...)
#define RANK 0
#include "persistent_rank.h"
#define RANK 1
#include "persistent_rank.h"
#define RANK 2
#include "persistent_rank.h"
#define RANK 3
#include "persistent_rank.h"
#undef asm
#undef volatile
void (*const RUN[])(const Launch&) = {rank0::run, rank1::run, rank2::run, rank3::run};

struct Problem {
    int m, n, k, num_clusters, num_slots;
    std::vector<std::vector<int>> tables[RANKS];
};
Problem read_problem(const char* path) {
    std::ifstream file(path, std::ios::binary);
    const auto number = [&] {
        int value = 0;
        if (!file.read((char*)&value, 4)) fail("the file is too short", 0, 0);
        return value;
    };
    Problem problem{number(), number(), number(), number(), number(), {}};
    for (auto& tables : problem.tables)
        for (int t = 0; t < 4; t++) {
            tables.emplace_back(number());
            for (int& value : tables.back()) value = number();
        }
    return problem;
}
std::vector<u16> whole_numbers(size_t count, int most) {
    std::vector<u16> values(count);
    for (u16& value : values) value = bits_of((float)(int(below(2 * most + 1)) - most));
    return values;
}

struct Data { std::vector<u16> x[RANKS], weight[RANKS], bias, residual; };
struct Rank {
    std::vector<u16> result;
    std::vector<unsigned char> partials, sums, inbox;
    std::vector<u32> flags;
    int launch = 0;
    std::vector<std::unique_ptr<Cluster>> clusters;
    std::vector<std::unique_ptr<Fiber>> fibers;
    size_t num_left = 0;
    Launch arguments;
};
Rank ranks[RANKS];

void enter() {
    threadIdx = self->thread, blockIdx = self->block;
    const int rank = self->cta->rank;
    RUN[rank](ranks[rank].arguments);
    self->ended = true, ranks[rank].num_left--;
    swapcontext(&self->context, &scheduler);
}
void begin(int number, const Problem& problem, const Data& data) {
    Rank& rank = ranks[number];
    const auto map = [&](const std::vector<u16>& of, int rows, int columns, int box_rows) {
        return TensorMap{(u16*)of.data(), rows, columns, box_rows};
    };
    std::fill(rank.result.begin(), rank.result.end(), bits_of(-777));
    Launch& launch = rank.arguments;
    launch.x = map(data.x[number], problem.m, problem.k, 128);
    launch.weight = map(data.weight[number], problem.n, problem.k, BN / 2);
    launch.weight_pair = map(data.weight[number], problem.n, problem.k, WIDTH * BN / 2);
    launch.result = map(rank.result, problem.m, problem.n, 64);
    launch.area_bytes = (u64)problem.num_slots * rank0::PLACE_BYTES, launch.inbox = (u64)rank.inbox.data();
    for (int r = 0; r < RANKS; r++) {
        launch.partials[r] = (u64)ranks[r].partials.data(), launch.sums[r] = (u64)ranks[r].sums.data();
        launch.flags[r] = (u64)ranks[r].flags.data();
    }
    for (int t = 0; t < 4; t++) launch.tables[t] = problem.tables[number][t].data();
    launch.num_steps = (problem.k + 63) / 64, launch.num_rows = problem.m, launch.num_columns = problem.n;
    launch.bias = HAS_BIAS ? (const u32*)data.bias.data() : nullptr;
    launch.residual = HAS_RESIDUAL ? (const u32*)data.residual.data() : nullptr;
    rank.clusters.clear(), rank.fibers.clear();
    for (int c = 0; c < problem.num_clusters; c++) {
        rank.clusters.emplace_back(new Cluster{{{number, 0}, {number, 1}}});
        Cluster& cluster = *rank.clusters.back();
        for (Cta& cta : cluster.ctas)
            for (u32 thread = 0; thread < 384; thread++) {
                if (thread < 128 && thread % 32) continue;
                rank.fibers.emplace_back(new Fiber{&cluster, &cta, {thread}, {u32(c * CTAS_OF_CLUSTER + cta.index)}});
                Fiber& fiber = *rank.fibers.back();
                getcontext(&fiber.context);
                fiber.context.uc_stack.ss_sp = fiber.stack.data(), fiber.context.uc_stack.ss_size = fiber.stack.size();
                makecontext(&fiber.context, enter, 0);
                cta.all.size++, cluster.all.size++, rank.num_left++;
                ready.push_back(&fiber);
            }
    }
}
void check(int number, const Problem& problem, const Data& data) {
    for (int row = 0; row < problem.m; row++)
        for (int column = 0; column < problem.n; column++) {
            long sum = 0;
            for (int rank = 0; rank < RANKS; rank++)
                for (int k = 0; k < problem.k; k++)
                    sum += (long)(value_of(data.x[rank][(size_t)row * problem.k + k]) *
                                  value_of(data.weight[rank][(size_t)column * problem.k + k]));
            const size_t at = (size_t)row * problem.n + column;
            if (HAS_BIAS) sum += (long)value_of(data.bias[column]);
            if (HAS_RESIDUAL) sum += (long)value_of(data.residual[at]);
            if (value_of(ranks[number].result[at]) != (float)sum) fail("a wrong sum", number, at);
        }
}

int main(int, char** arguments) {
    const Problem problem = read_problem(arguments[1]);
    generator.seed(atoi(arguments[2]));
    const int num_launches = atoi(arguments[3]);
    std::vector<Data> data(num_launches);
    for (Data& each : data) {
        for (int r = 0; r < RANKS; r++) {
            each.x[r] = whole_numbers((size_t)problem.m * problem.k, 1);
            each.weight[r] = whole_numbers((size_t)problem.n * problem.k, 2);
        }
        each.bias = whole_numbers(problem.n, 9), each.residual = whole_numbers((size_t)problem.m * problem.n, 9);
    }
    for (Rank& rank : ranks) {
        const size_t area = (size_t)problem.num_slots * rank0::PLACE_BYTES;
        rank.result.resize((size_t)problem.m * problem.n);
        rank.partials.resize(area * RANKS), rank.sums.resize(area), rank.inbox.resize(area * RANKS);
        rank.flags.resize((size_t)problem.num_slots * 2 * RANKS * rank0::NUM_KINDS);
    }
    for (int number = 0; number < RANKS; number++) begin(number, problem, data[0]);
    for (u64 turn = 0;; turn++) {
        if (!loads.empty() && (ready.empty() || below(3) == 0)) land(below(loads.size()));
        if (!stores.empty() && (ready.empty() || below(3) == 0)) {
            const u32 chosen = below(stores.size());
            advance(*stores[chosen]);
            if (stores[chosen]->state == 2) std::swap(stores[chosen], stores.back()), stores.pop_back();
        }
        if (ready.empty() && loads.empty() && stores.empty()) fail("all wait", 0, ranks[0].launch);
        if (ready.empty()) continue;
        std::swap(ready[below(ready.size())], ready.back());
        self = ready.back();
        ready.pop_back();
        const int number = self->cta->rank;
        swapcontext(&scheduler, &self->context);
        Rank& rank = ranks[number];
        if (rank.num_left) continue;
        check(number, problem, data[rank.launch]);
        if (++rank.launch < num_launches) {
            begin(number, problem, data[rank.launch]);
        } else {
            rank.num_left = ~size_t(0);
            bool all = true;
            for (const Rank& each : ranks) all &= each.launch == num_launches;
            if (all) break;
        }
    }
    for (const Rank& rank : ranks)
        for (size_t flag = 0; flag < rank.flags.size(); flag++)
            if (rank.flags[flag]) fail("a flag is left up", &rank - ranks, flag);
}

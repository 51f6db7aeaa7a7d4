// Hopper's clusters on a CPU, and what hopper.cuh gives them, with data: every thread that does anything is a fiber,
// fibers take turns at random, TMA swizzles as it does there, what is copied in bulk is read and arrives whenever it
// likes, and wgmma multiplies. In the order of the fibers memory is what it should be, but for one thing that was seen
// on 4 H200s and 4 H100s: what one SM has stored in bulk others of its GPU (the H200s), and the peers (the H100s), may
// read as it was before, until the first has waited for it and then for a fence.
#pragma once

#include "on_cpu.h"

constexpr int CTAS_OF_CLUSTER = 2, SMEM_BYTES = 227 * 1024, ELEMENTS_OF_BOX = 64, COLUMNS_STORED = 32;
void fail(const char* what, long rank, long at) { fail(what, "rank", rank, at); }

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
void enter();
struct Fiber {
    Cluster* cluster;
    Cta* cta;
    Index thread, block;
    std::vector<StorePointer> open;  // not committed
    std::deque<std::vector<StorePointer>> groups;
    bool ended = false;
    Stack stack{1 << 15, enter};
};
Fiber* self;
Index threadIdx, blockIdx;
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
struct Unfenced { Cta* by; u64 to; std::vector<unsigned char> before; };
std::vector<Unfenced> unfenced;
template <typename Condition>
void fence(Condition condition) {
    unfenced.erase(std::remove_if(unfenced.begin(), unfenced.end(), condition), unfenced.end());
}
// As another SM may see it: what was there first, where several have stored since.
void make_old(std::vector<unsigned char>& data, u64 from, const Cta& reader) {
    for (auto one = unfenced.rbegin(); one != unfenced.rend(); one++) {
        if (one->by == &reader) continue;
        const u64 begin = std::max(from, one->to), end = std::min(from + data.size(), one->to + one->before.size());
        for (u64 at = begin; at < end; at++) data[at - from] = one->before[at - one->to];
    }
}

void leave() {
    leave(self->stack);
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
int warp_uniform(int value) { return value; }
u32 rank_in_cluster() { return self->cta->index; }
void cluster_sync() { meet(self->cluster->all); }
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
    make_old(loads.back().data, from, *self->cta);
}
u32 swizzled(u32 address, u32 mask) { return address ^ (address >> 7 & mask) << 4; }  // 7: by 128 bytes, 3: by 64
// A late one where nothing else can be done, and now and then.
bool comes(bool is_late) { return !is_late || ready.empty() || below(2000) == 0; }
void land(u32 number) {
    if (!comes(loads[number].is_late)) return;
    std::swap(loads[number], loads.back());
    Load load = std::move(loads.back());
    loads.pop_back();
    if (load.from) {
        memcpy(load.data.data(), (const void*)load.from, load.data.size());
        make_old(load.data, load.from, *load.cta);
    }
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
    Cta* by = self->cta;
    store(from, bytes, [=](const std::vector<unsigned char>& data) {
        unfenced.push_back({by, to, {(unsigned char*)to, (unsigned char*)to + bytes}});
        memcpy((void*)to, data.data(), bytes);
    });
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
void fence_gpu();
void fence_system() { fence_gpu(); }
void fence_gpu() {
    fence([](const Unfenced& one) { return one.by == self->cta; });
}
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

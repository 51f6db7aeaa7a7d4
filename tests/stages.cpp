// stages.cuh on a CPU: the threads of a cluster's two CTAs as fibers, which take turns at random. Exits with 1 and a
// line that says what was overwritten, or that all of them wait. Arguments: seed, number of cases.
// The real code loads and multiplies; what stores finished tiles stands here as in persistent.cu.

#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <vector>

typedef unsigned int u32;
typedef unsigned long long u64;
struct TensorMap { u32 bytes; };  // of a box

std::mt19937 generator;
u32 below(u32 limit) { return generator() % limit; }

struct Fiber {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(1 << 16);
    std::function<void()> body;
    u32 cta, reader;  // reader: a bit for who multiplies
    bool ended = false;
};
ucontext_t scheduler;
Fiber* self;
void yield() { swapcontext(&self->context, &scheduler); }
void enter() {
    self->body();
    self->ended = true;
    yield();
}
void fail(const char* what, u32 address) {
    printf("%s: byte %u of CTA %u\n", what, address, self ? self->cta : 9);
    exit(1);
}

struct Barrier { int count, pending, bytes; u32 phase; };
std::map<u32, Barrier> barriers[2];
void update(Barrier& barrier) {
    if (barrier.pending == 0 && barrier.bytes == 0) barrier.phase++, barrier.pending = barrier.count;
}
void arrive_with(u32 cta, u32 address, int bytes) {
    Barrier& barrier = barriers[cta].at(address);
    if (barrier.pending == 0) fail("more arrivals than awaited", address);
    barrier.pending--, barrier.bytes += bytes;
    update(barrier);
}

// Who still needs each KiB of a CTA's shared memory: bits of readers, or OUTGOING.
constexpr u32 KIB = 1024, NUM_KIB = 227, OUTGOING = 1 << 8;
u32 needed[2][NUM_KIB];
void claim(u32 cta, u32 address, u32 bytes, u32 who, const char* what) {
    for (u32 kib = address / KIB; kib < (address + bytes) / KIB; kib++) {
        if (needed[cta][kib]) fail(what, kib * KIB);
        needed[cta][kib] = who;
    }
}
void release(u32 cta, u32 address, u32 bytes, u32 who) {
    for (u32 kib = address / KIB; kib < (address + bytes) / KIB; kib++) needed[cta][kib] &= ~who;
}
struct Landing { u32 cta, barrier, bytes; };
std::vector<Landing> landings;
void start_load(u32 cta, u32 to, u32 bytes, u32 barrier) {
    claim(cta, to, bytes, 3, "loaded over what is needed");
    landings.push_back({cta, barrier, bytes});
}

// hopper.cuh
void barrier_init(u32 barrier, u32 count) { barriers[self->cta][barrier] = {int(count), int(count), 0, 0}; }
void expect(u32 barrier, u32 bytes) { arrive_with(self->cta, barrier, bytes); yield(); }
void arrive(u32 barrier) { arrive_with(self->cta, barrier, 0); yield(); }
void arrive_at(u32 barrier, u32 cta);
void wait(u32 barrier, u32 parity) {
    while ((barriers[self->cta].at(barrier).phase & 1) == parity) yield();
}
void load_box(u32 to, const TensorMap& map, int, int, u32 barrier) {
    start_load(self->cta, to, map.bytes, barrier);
    yield();
}
void load_box_to_both(u32 to, const TensorMap& map, int, int, u32 barrier) {
    for (u32 cta = 0; cta < 2; cta++) start_load(cta, to, map.bytes, barrier);
    yield();
}
u64 matrix(u32 address) { return address; }

#define __device__
#define __forceinline__ inline
#define WIDTH 2
#define WGMMA_1 (void)sum, (void)a, (void)b, (void)add
#define WGMMA_2 WGMMA_1
#define asm
#define volatile(...)
#include "stages.cuh"
#undef asm
#undef volatile

constexpr u32 OUT_TILE = RING_BYTES + SPARE_BYTES, PARTIAL_FULL = 1 << 20, OUT_READY = PARTIAL_FULL + 8;
constexpr u32 OUT_SENT = OUT_READY + 8, SPARE_FREE = OUT_SENT + 8, SINGLE = SPARE_FREE + 8;
constexpr u32 WIDE = SINGLE + Ring<1>::BARRIER_BYTES;

// Of each warpgroup one fiber stands for all threads, of which one tells each CTA that a stage was multiplied.
template <u32 W>
void released(u32 base, u32 barrier) {
    const u32 stage = (barrier - base) / 16;
    if (barrier >= base && stage < Ring<W>::SIZE)
        release(self->cta, stage * Ring<W>::BYTES, Ring<W>::BYTES, self->reader);
}
void arrive_at(u32 barrier, u32 cta) {
    if (self->reader && barrier < WIDE) released<1>(SINGLE, barrier);
    if (self->reader && barrier >= WIDE) released<2>(WIDE, barrier);
    arrive_with(cta, barrier, 0);
    yield();
    if (self->reader) arrive_with(1 - cta, barrier, 0);
}

const TensorMap X_MAP{A_BYTES}, WEIGHT_MAP{B_BYTES / 2}, PAIR_MAP{B_BYTES};
std::vector<Work> works;
int num_steps;
bool is_alone;  // one rank: nothing is added, and each tile is its own
bool adds(const Work& work) { return !is_alone && work.owner() == 0; }

void loader() {
    Ring<1> single(0, SINGLE);
    Ring<2> wide(0, WIDE);
    load_operands(X_MAP, WEIGHT_MAP, PAIR_MAP, works.data(), works.size(), self->cta, num_steps, single, wide,
                  SPARE_FREE);
}
void multiplier(int group) {
    Ring<1> single(0, SINGLE);
    Ring<2> wide(0, WIDE);
    u32 num_partials = 0;
    for (u32 i = 0; i < works.size(); i++) {
        float of_one[BN / 2], of_two[BN];
        if (works[i].width() == 1) multiply<1>(of_one, single, group, self->cta, num_steps);
        else multiply<2>(of_two, wide, group, self->cta, num_steps);
        if (adds(works[i])) wait(PARTIAL_FULL, num_partials++ & 1);
        else wait(OUT_SENT, (i & 1) ^ 1);
        for (u32 t = 0; t < works[i].width() && !adds(works[i]); t++)
            for (u32 kib = 0; kib < TILE_BYTES / KIB; kib++) {
                u32& who = needed[self->cta][(OUT_TILE - t * TILE_BYTES) / KIB + kib];
                if (who && who != OUTGOING + i) fail("a finished tile over what is needed", 0);
                who = OUTGOING + i;
            }
        arrive(OUT_READY);
    }
}
void storer() {
    for (u32 i = 0; i < works.size(); i++) {
        const u32 width = works[i].width();
        for (u32 t = 0; t < width && adds(works[i]); t++)
            claim(self->cta, OUT_TILE - t * TILE_BYTES, TILE_BYTES, OUTGOING + i, "a partial over what is needed");
        if (adds(works[i])) arrive(PARTIAL_FULL);
        wait(OUT_READY, i & 1);
        for (u32 pause = below(4); pause; pause--) yield();
        for (u32 t = 0; t < width; t++) release(self->cta, OUT_TILE - t * TILE_BYTES, TILE_BYTES, ~0u);
        arrive(OUT_SENT);
        if (width == 2 && i + 1 < works.size() && works[i + 1].width() == 1)
            for (u32 other = 0; other < 2; other++) arrive_at(SPARE_FREE, other);
    }
}

void run() {
    std::vector<std::unique_ptr<Fiber>> fibers;
    const auto add = [&](u32 cta, u32 reader, std::function<void()> body) {
        fibers.push_back(std::make_unique<Fiber>());
        Fiber& fiber = *fibers.back();
        fiber.body = body, fiber.cta = cta, fiber.reader = reader;
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.data(), fiber.context.uc_stack.ss_size = fiber.stack.size();
        makecontext(&fiber.context, enter, 0);
    };
    landings.clear();
    for (u32 cta = 0; cta < 2; cta++) {
        barriers[cta].clear();
        std::fill(needed[cta], needed[cta] + NUM_KIB, 0);
        add(cta, 0, loader);
        add(cta, 0, storer);
        for (int group = 0; group < 2; group++) add(cta, 1 << group, [=] { multiplier(group); });
    }
    for (u32 cta = 0; cta < 2; cta++) {
        self = fibers[cta * fibers.size() / 2].get();
        Ring<1>(0, SINGLE).init();
        Ring<2>(0, WIDE).init();
        barrier_init(PARTIAL_FULL, 1);
        barrier_init(OUT_READY, 2);
        barrier_init(OUT_SENT, 1);
        barrier_init(SPARE_FREE, CTAS);
    }
    std::vector<u32> pace;
    for (u32 i = 0; i < fibers.size(); i++) pace.push_back(below(4) ? 1 : 20);
    const u32 landing = 1 + below(9);
    for (u32 idle = 0; !fibers.empty(); idle++) {
        if (idle > 2000000) fail("all wait", 0);
        if (!landings.empty() && below(10) < landing) {
            std::swap(landings[below(landings.size())], landings.back());
            const Landing last = landings.back();
            landings.pop_back();
            Barrier& barrier = barriers[last.cta].at(last.barrier);
            barrier.bytes -= last.bytes;
            update(barrier);
        }
        const u32 number = below(fibers.size());
        if (below(20) >= pace[number]) continue;
        self = fibers[number].get();
        swapcontext(&scheduler, &self->context);
        if (self->ended) fibers.erase(fibers.begin() + number), pace.erase(pace.begin() + number), idle = 0;
    }
}

int main(int, char** arguments) {
    generator.seed(atoi(arguments[1]));
    for (int number = 0; number < atoi(arguments[2]); number++) {
        is_alone = below(2), num_steps = 1 + below(below(2) ? 4 : 24);
        works.assign(1 + below(8), Work{});
        for (Work& work : works) work.owner_and_pair = 2 * int(!is_alone && below(2)) + int(below(2));
        run();
    }
}

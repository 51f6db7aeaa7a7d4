// The threads of a cluster on a CPU, as fibers that take turns at random, and what hopper.cuh gives them: barriers, and
// bulk copies that land in any order. What goes wrong is said in a line, and the program exits with 1.
// NUM_CTAS, of the cluster, is defined before this file. Of shared memory each KiB is followed.

#include "on_cpu.h"

struct TensorMap { u32 bytes; };  // of a box

struct Index { u32 x; };
void enter();
struct Fiber {
    u32 cta, reader, pace;  // reader: a bit for who multiplies; pace: turns of 20 that it takes
    Index thread;
    std::function<void()> body;
    bool ended = false;
    Stack stack{1 << 16, enter};
};
std::vector<std::unique_ptr<Fiber>> fibers;
Fiber* self;
u32 idle, num_left[NUM_CTAS];  // turns since anything happened; a CTA's fibers that have not ended
void yield() { leave(self->stack); }
void enter() {
    self->body();
    self->ended = true;
    yield();
}
void fail(const char* what, u32 address, u32 cta) { fail(what, "CTA", cta, address); }
u32 any_pace() { return below(4) ? 1 : 20; }
void add_fiber(u32 cta, u32 reader, u32 pace, u32 thread, std::function<void()> body) {
    fibers.push_back(std::unique_ptr<Fiber>(new Fiber{cta, reader, pace, {thread}, body}));
    num_left[cta]++;
}

struct Barrier { int count, pending, bytes; u32 phase; };
std::map<u32, Barrier> barriers[NUM_CTAS];
// Of a CTA where anything comes to it.
Barrier& barrier_of(u32 cta, u32 address) {
    if (cta >= NUM_CTAS || !num_left[cta]) fail("comes to a CTA that has gone", address, cta);
    if (!barriers[cta].count(address)) fail("comes to no barrier", address, cta);
    return barriers[cta][address];
}
void update(Barrier& barrier) {
    idle = 0;
    if (barrier.pending == 0 && barrier.bytes == 0) barrier.phase++, barrier.pending = barrier.count;
}
void arrive_with(u32 cta, u32 address, int bytes) {
    Barrier& barrier = barrier_of(cta, address);
    if (barrier.pending == 0) fail("more arrivals than awaited", address, cta);
    barrier.pending--, barrier.bytes += bytes;
    update(barrier);
}

// Who still needs each KiB of a CTA's shared memory, bits of readers or others, and what of an operand is there.
constexpr u32 KIB = 1024, NUM_KIB = 227, READERS = 3, ROWS_OF_KIB = 8;
struct Landed {
    const TensorMap* map;
    int column, row;
    bool operator!=(const Landed& other) const {
        return map != other.map || column != other.column || row != other.row;
    }
};
u32 needed[NUM_CTAS][NUM_KIB];
Landed landed[NUM_CTAS][NUM_KIB];
void claim(u32 cta, u32 address, u32 bytes, u32 who, const char* what) {
    for (u32 kib = address / KIB; kib < (address + bytes) / KIB; kib++) {
        if (needed[cta][kib]) fail(what, kib * KIB, cta);
        needed[cta][kib] = who, landed[cta][kib] = {};
    }
}
void release(u32 cta, u32 address, u32 bytes, u32 who) {
    for (u32 kib = address / KIB; kib < (address + bytes) / KIB; kib++) needed[cta][kib] &= ~who;
}
struct Landing {
    u32 cta, to, barrier;
    Landed what;
    bool is_late;
};
std::vector<Landing> landings;
u32 num_late;  // of 8 that are loaded
void start_load(u32 cta, u32 to, const TensorMap& map, int column, int row, u32 barrier) {
    claim(cta, to, map.bytes, READERS, "loaded over what is needed");
    landings.push_back({cta, to, barrier, {&map, column, row}, below(8) < num_late});
}
// A late one where nothing else has happened for a while, and now and then.
void land_any() {
    Landing& chosen = landings[below(landings.size())];
    if (chosen.is_late && idle < 60 * fibers.size() && below(300)) return;
    std::swap(chosen, landings.back());
    const Landing last = landings.back();
    landings.pop_back();
    Barrier& barrier = barrier_of(last.cta, last.barrier);
    for (u32 kib = 0; kib < last.what.map->bytes / KIB; kib++) {
        Landed& there = landed[last.cta][last.to / KIB + kib];
        there = last.what, there.row += kib * ROWS_OF_KIB;
    }
    barrier.bytes -= last.what.map->bytes;
    update(barrier);
}

// hopper.cuh
void barrier_init(u32 barrier, u32 count) { barriers[self->cta][barrier] = {int(count), int(count), 0, 0}; }
void expect(u32 barrier, u32 bytes) { arrive_with(self->cta, barrier, bytes); yield(); }
void expect_by_warp(u32 barrier, u32 bytes) { expect(barrier, bytes); }  // of a warp's threads, one fiber
int warp_uniform(int value) { return value; }
void arrive(u32 barrier) { arrive_with(self->cta, barrier, 0); yield(); }
void arrive_at(u32 barrier, u32 cta);
void wait(u32 barrier, u32 parity) {
    while ((barrier_of(self->cta, barrier).phase & 1) == parity) yield();
}
void load_box(u32 to, const TensorMap& map, int column, int row, u32 barrier) {
    start_load(self->cta, to, map, column, row, barrier);
    yield();
}
void load_box_to_each(u32 to, const TensorMap& map, int column, int row, u32 barrier) {
    for (u32 cta = 0; cta < NUM_CTAS; cta++) start_load(cta, to, map, column, row, barrier);
    yield();
}
u64 matrix(u32 address) { return address / 16; }

void forget_all() {
    fibers.clear(), landings.clear();
    num_late = below(2) * below(4);
    for (u32 cta = 0; cta < NUM_CTAS; cta++) {
        barriers[cta].clear();
        num_left[cta] = 0;
        std::fill(needed[cta], needed[cta] + NUM_KIB, 0);
        std::fill(landed[cta], landed[cta] + NUM_KIB, Landed{});
    }
}
// Until all have ended.
void run_fibers() {
    const u32 landing = 1 + below(9);
    for (idle = 0; !fibers.empty() || !landings.empty(); idle++) {
        if (idle > 200000) fail("all wait", 0, 0);
        if (!landings.empty() && below(10) < landing) land_any();
        if (fibers.empty()) continue;
        const u32 number = below(fibers.size());
        self = fibers[number].get();
        if (below(20) >= self->pace) continue;
        take_turn(self->stack);
        if (self->ended) num_left[self->cta]--, fibers.erase(fibers.begin() + number), idle = 0;
    }
}

// decode_stages.cuh on a CPU: threads of a cluster's CTAS CTAs as fibers, which take turns at random. Exits with 1 and
// a line that says what went wrong. Arguments: seed, number of cases, 1 for an odd number of stages. Defined when
// compiled: CTAS and BOXES.
// The real code loads and multiplies; who does so when stands here as in decode.cu, but that no warpgroup waits for the
// other at the end of a tile. Of a warpgroup there are the threads that arrive at CTAs, the next one, and the first of
// its last warp.

constexpr unsigned NUM_CTAS = CTAS;
#include "fibers.h"

constexpr u32 BN = 16, BARRIERS = 1 << 20, NUM_THREADS = CTAS + 2;  // of a warpgroup
Index gridDim;
u32 tile_rows, num_stages, num_ready;
int first_tile, num_tiles, num_steps, num_all;
TensorMap weight_map, x_map;

void multiplied(u64 a, u64 b);
void instruction(const char* text);
#define threadIdx self->thread
#define WGMMA (void)sum, (void)add, multiplied(a, b)
#define asm
#define volatile(...) instruction(#__VA_ARGS__)
#include "decode_stages.cuh"
#undef asm
#undef volatile

void load_box_to_all(u32 to, const TensorMap& map, int column, int row, u32 barrier) {
    load_box_to_each(to, map, column, row, barrier);
}
void load_box_once(u32 to, const TensorMap& map, int column, int row, u32 barrier, u64) {
    load_box(to, map, column, row, barrier);
}
void arrive_at(u32 barrier, u32 cta) {
    arrive_with(cta, barrier, 0);
    yield();
}

struct Group {
    int tile;                                  // that it multiplies
    std::vector<std::pair<u32, u32>> reading;  // address and bytes, by wgmma, until that was waited for
    u32 num_met, meetings;
    void meet() {
        const u32 meeting = meetings;
        if (++num_met == NUM_THREADS) num_met = 0, meetings++;
        while (meeting == meetings) yield();
    }
} groups[CTAS][2];
Group& own_group() { return groups[self->cta][self->thread.x / GROUP]; }
bool is_first_thread() { return self->thread.x % GROUP == 0; }

// How often each quarter of a box was multiplied, by CTA and tile.
std::map<int, std::vector<u32>> times[CTAS];
void read_box(const TensorMap& map, u32 address, int column, int row) {
    for (u32 kib = 0; kib < map.bytes / KIB; kib++) {
        const Landed right{&map, column, row + int(kib * ROWS_OF_KIB)};
        if (landed[self->cta][address / KIB + kib] != right) fail("multiplied before it landed", address, self->cta);
    }
    if (is_first_thread()) own_group().reading.push_back({address, map.bytes});
}
// A warpgroup's matrices, in units of 16 bytes. Which box they are is known by what lies there.
void multiplied(u64 a, u64 b) {
    const u32 weight = a * 16 / KIB * KIB, x = b * 16 / KIB * KIB, quarter = a % (KIB / 16) / 2;
    const Landed there = landed[self->cta][weight / KIB];
    const int tile = own_group().tile;
    read_box(weight_map, weight, there.column, tile * tile_rows);
    read_box(x_map, x, there.column, 0);
    if (a % (KIB / 16) != b % (KIB / 16)) fail("multiplied with other columns", weight, self->cta);
    if (is_first_thread()) times[self->cta][tile].at(there.column / BK * 4 + quarter)++;
}
void instruction(const char* text) {
    if (strstr(text, "wgmma.fence")) own_group().meet();
    if (!strstr(text, "wgmma.wait_group")) return;
    own_group().meet();
    if (is_first_thread()) {
        for (u32 pause = below(4); pause; pause--) yield();
        for (const auto& [address, bytes] : own_group().reading) release(self->cta, address, bytes, READERS);
        own_group().reading.clear();
    }
    own_group().meet();
}

void weight_loader(Stages stages) {
    stages.init();
    num_ready++;
    load_weights(weight_map, stages, tile_rows, self->cta, first_tile, num_steps, num_all);
}
void x_loader(Stages stages) {
    while (num_ready < CTAS) yield();
    load_x(x_map, stages, tile_rows, self->cta, first_tile, num_steps, num_all);
}
void multiplier(Stages stages) {
    while (num_ready < CTAS) yield();
    const int group = self->thread.x / GROUP;
    stages.at = group;
    for (int tile = first_tile, done = 0; tile < num_tiles; tile += gridDim.x, done += num_steps) {
        float sum[BN / 2];
        groups[self->cta][group].tile = tile + self->cta;  // all of it have ended the tile before
        multiply(sum, stages, tile_rows, group ^ (done & 1), num_steps, num_all - done);
    }
}

void run() {
    forget_all();
    num_ready = 0;
    weight_map.bytes = tile_rows * ROW_BYTES, x_map.bytes = BN * ROW_BYTES;
    num_all = (num_tiles - first_tile + int(gridDim.x) - 1) / int(gridDim.x) * num_steps;
    const Stages stages{0, BARRIERS, BOXES * (tile_rows + BN) * ROW_BYTES, num_stages, 0, 0};
    for (u32 cta = 0; cta < CTAS; cta++) {
        times[cta].clear();
        for (int tile = first_tile; tile < num_tiles; tile += gridDim.x)
            times[cta][tile + cta].assign(num_steps * BOXES * 4, 0);
        add_fiber(cta, 0, any_pace(), NUM_CONSUMERS, [=] { weight_loader(stages); });
        add_fiber(cta, 0, any_pace(), NUM_CONSUMERS + 32, [=] { x_loader(stages); });
        for (u32 group = 0; group < 2; group++) {
            groups[cta][group] = {};
            const u32 pace = any_pace();
            for (u32 i = 0; i < NUM_THREADS; i++)
                add_fiber(cta, 0, pace, group * GROUP + (i <= CTAS ? i : GROUP - 32), [=] { multiplier(stages); });
        }
    }
    run_fibers();
    for (u32 cta = 0; cta < CTAS; cta++)
        for (const auto& [tile, counts] : times[cta])
            for (u32 count : counts)
                if (count != 1) fail(count ? "multiplied twice" : "never multiplied", 0, cta);
}

int main(int, char** arguments) {
    generator.seed(atoi(arguments[1]));
    for (int number = 0; number < atoi(arguments[2]); number++) {
        num_stages = 2 * (1 + below(4)) + atoi(arguments[3]), num_steps = 1 + below(below(2) ? 4 : 24);
        tile_rows = 8 * (1 + below(2));
        gridDim.x = CTAS * (1 + below(3)), first_tile = CTAS * below(gridDim.x / CTAS);
        num_tiles = first_tile + 1 + below(4 * gridDim.x);
        run();
    }
}

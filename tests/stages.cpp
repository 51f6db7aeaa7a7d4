// stages.cuh on a CPU: the threads of a cluster's two CTAs as fibers, which take turns at random. Exits with 1 and a
// line that says what was overwritten, or that all of them wait. Arguments: seed, number of cases.
// The real code loads and multiplies; what stores finished tiles stands here as in persistent.cu.

constexpr unsigned NUM_CTAS = 2;
#include "fibers.h"

void load_box_to_both(u32 to, const TensorMap& map, int column, int row, u32 barrier) {
    load_box_to_each(to, map, column, row, barrier);
}
#define WIDTH 2
#define WGMMA_1 (void)sum, (void)a, (void)b, (void)add
#define WGMMA_2 WGMMA_1
#define asm
#define volatile(...)
#include "stages.cuh"
#undef asm
#undef volatile

constexpr u32 OUTGOING = 1 << 8;  // who needs the first tile that goes out
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
                if (who && who != OUTGOING + i) fail("a finished tile over what is needed", OUT_TILE, self->cta);
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

// Neither CTA leaves while the other may still arrive at its barriers.
u32 staying;
void add(u32 cta, u32 reader, std::function<void()> body) {
    staying++;
    add_fiber(cta, reader, any_pace(), 0, [=] {
        for (body(), staying--; staying;) yield();
    });
}
void run() {
    forget_all();
    for (u32 cta = 0; cta < 2; cta++) {
        add(cta, 0, loader);
        self = fibers.back().get();
        Ring<1>(0, SINGLE).init();
        Ring<2>(0, WIDE).init();
        barrier_init(PARTIAL_FULL, 1);
        barrier_init(OUT_READY, 2);
        barrier_init(OUT_SENT, 1);
        barrier_init(SPARE_FREE, CTAS);
        add(cta, 0, storer);
        for (int group = 0; group < 2; group++) add(cta, 1 << group, [=] { multiplier(group); });
    }
    run_fibers();
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

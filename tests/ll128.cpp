// ll128.cu on a CPU: the threads of every rank as fibers, which take turns at random; lines of 128 bytes arrive whole,
// but whenever they like. Each rank runs launch after launch, a CTA at a time, the least that a GPU may have room for.
// Exits with 1 and a line that says what is wrong, or that all of them wait, and with 2 where a rank gives up, which it
// does where one is absent. Arguments: seed, number of launches, the rank that never comes (-1: none).
// Defined at compile time: RANKS, WARPS, PASSES, ONE_SHOT, NORM; elements are floats.

#include "on_cpu.h"

#define KIND 0
#define LAUNCH 1024ull
#define WHO 1792
#define BEGIN 0
#define HALF (1ull << 20)
#define __shared__ static
using std::min;

void fail(const char* what, int rank, int at) { fail(what, "rank", rank, at); }

constexpr int NUM_THREADS = 32 * WARPS;
struct Index { int x; };
struct alignas(128) Line { unsigned char bytes[128]; };
struct Meeting { int come = 0, round = 0; bool any = false, answer = false; };  // of those who wait for each other
void enter();
struct Fiber {
    int rank, thread;
    u64 num_gets = 0;
    bool ended = false;
    Stack stack{1 << 15, enter};
};
struct Going { u64 to; Line line; };
struct Snapshot { u64 number = ~0ull; Line line; };
struct Rank {
    std::vector<Line> inbox = std::vector<Line>(2 * HALF / 128);
    u64 counter = 0;
    int launch = 0, block = 0, num_blocks = 0, num_left = 0;
    std::vector<Going> going;  // lines that this rank has written and that have not arrived
    Line written[NUM_THREADS / 8];
    int num_written[NUM_THREADS / 8] = {};
    Snapshot seen[NUM_THREADS / 8];
    Meeting groups[NUM_THREADS / 8], warps[WARPS], cta;
    float values[NUM_THREADS];
};
Rank ranks[RANKS];
std::vector<std::unique_ptr<Fiber>> fibers;
Fiber* self;
u64 idle;  // turns since a line was written or has arrived, or a CTA has ended
Index threadIdx, blockIdx, gridDim;  // of the fiber whose turn it is
void yield() { leave(self->stack); }
bool meet(Meeting& meeting, int size, bool says) {
    const int round = meeting.round;
    meeting.any |= says;
    if (++meeting.come == size) {
        meeting.answer = meeting.any, meeting.any = false, meeting.come = 0, meeting.round++;
    }
    while (meeting.round == round) yield();
    return meeting.answer;
}
Rank& here() { return ranks[self->rank]; }
bool __any_sync(u32, bool says) { return meet(here().warps[self->thread / 32], 32, says); }
void __syncwarp() { __any_sync(0, false); }
void __syncthreads() { meet(here().cta, NUM_THREADS, false); }
float __shfl_xor_sync(u32, float value, int step) {
    here().values[self->thread] = value;
    __syncwarp();
    const float other = here().values[self->thread ^ step];
    __syncwarp();
    return other;
}
u64 atomicAdd(u64* place, u64 more) { return (*place += more) - more; }
float __uint_as_float(u32 bits) { float value; memcpy(&value, &bits, 4); return value; }
u32 __float_as_uint(float value) { u32 bits; memcpy(&bits, &value, 4); return bits; }

// long_line.cuh: a line goes when its 8 lanes have written it, and the 8 lanes that read one see it at the same time.
void put(u64 place, u64 first, u64 second) {
    const int group = self->thread / 8, lane = self->thread % 8;
    if (place % 128 != u64(16 * lane)) fail("a lane writes another's bytes", self->rank, self->thread);
    memcpy(here().written[group].bytes + 16 * lane, &first, 8);
    memcpy(here().written[group].bytes + 16 * lane + 8, &second, 8);
    if (++here().num_written[group] == 8) {
        here().num_written[group] = 0;
        here().going.push_back({place - 16 * lane, here().written[group]});
        idle = 0;
    }
    meet(here().groups[group], 8, false);
}
void get(u64 place, u64& first, u64& second) {
    const int group = self->thread / 8, lane = self->thread % 8;
    Snapshot& seen = here().seen[group];
    if (seen.number != self->num_gets) seen = {self->num_gets, *(Line*)(place - 16 * lane)};
    self->num_gets++;
    memcpy(&first, seen.line.bytes + 16 * lane, 8);
    memcpy(&second, seen.line.bytes + 16 * lane + 8, 8);
    meet(here().groups[group], 8, false);
}

#define JOINED(a, b) a##b
#define NAMED(a, b) JOINED(a, b)
#define ll128_kernel NAMED(kernel_of_rank_, RANK)
struct Inboxes { u64 at[RANKS]; };
typedef void (*Kernel)(Inboxes, u64*, const u64*, const u64*, const u64*, u64*, u64*, int, int, int, float, u64);
#define RANK 0
#include "ll128_rank.h"
#define RANK 1
#include "ll128_rank.h"
#define RANK 2
#include "ll128_rank.h"
#define RANK 3
#include "ll128_rank.h"
#define RANK 4
#include "ll128_rank.h"
#define RANK 5
#include "ll128_rank.h"
#define RANK 6
#include "ll128_rank.h"
#define RANK 7
#include "ll128_rank.h"
const Kernel KERNELS[] = {rank0::kernel, rank1::kernel, rank2::kernel, rank3::kernel,
                          rank4::kernel, rank5::kernel, rank6::kernel, rank7::kernel};

struct Launch {
    int block_words, num_words, num_blocks;
    std::vector<float> products[RANKS], residual, weight, normed[RANKS], total[RANKS];
};
std::vector<Launch> launches;
std::vector<float> drawn(int words) {
    std::vector<float> values(2 * words);
    for (float& value : values) value = int(below(2001)) / 1000.0f - 1;
    return values;
}
void enter() {
    Rank& rank = here();
    Launch& launch = launches[rank.launch];
    Inboxes inboxes;
    for (int step = 1; step <= RANKS; step++)
        inboxes.at[step - 1] = (u64)ranks[(self->rank + step) % RANKS].inbox.data();
    const auto words = [](std::vector<float>& values) { return (u64*)values.data(); };
    KERNELS[self->rank](inboxes, &rank.counter, words(launch.products[self->rank]), words(launch.residual),
                        words(launch.weight), words(launch.normed[self->rank]), words(launch.total[self->rank]),
                        launch.block_words, launch.num_words, (launch.num_blocks + RANKS - 1) / RANKS, 1e-5f, 0);
    self->ended = true;
    yield();
}
void start_cta(int number) {
    Rank& rank = ranks[number];
    rank.num_left = NUM_THREADS;
    for (Snapshot& seen : rank.seen) seen.number = ~0ull;
    for (int thread = 0; thread < NUM_THREADS; thread++)
        fibers.push_back(std::unique_ptr<Fiber>(new Fiber{number, thread}));
}
void arrives(Rank& rank, size_t number) {
    std::swap(rank.going[number], rank.going.back());
    *(Line*)rank.going.back().to = rank.going.back().line;
    rank.going.pop_back();
    idle = 0;
}
void check(int number, const Launch& launch) {
    for (int at = 0; at < 2 * launch.num_words; at++) {
        float sum = launch.products[0][at];
        for (int rank = 1; rank < RANKS; rank++) sum += launch.products[rank][at];
        if (NORM) sum += launch.residual[at];
        if (launch.total[number][at] != sum) fail("a wrong sum", number, at);
    }
    for (int block = 0; NORM && block < launch.num_blocks; block++) {
        const float* row = launch.total[number].data() + 2 * block * launch.block_words;
        double squares = 0;
        for (int at = 0; at < 2 * launch.block_words; at++) squares += double(row[at]) * row[at];
        const double scale = 1 / std::sqrt(squares / (2 * launch.block_words) + 1e-5);
        for (int at = 0; at < 2 * launch.block_words; at++) {
            const double wanted = row[at] * scale * launch.weight[at];
            if (std::fabs(launch.normed[number][2 * block * launch.block_words + at] - wanted) > 1e-5)
                fail("a wrong norm", number, at);
        }
    }
}
// What comes after the CTA that has ended: the next one, or, when all it wrote has arrived, the next launch.
void go_on(int number) {
    Rank& rank = ranks[number];
    idle = 0;
    if (++rank.block == launches[rank.launch].num_blocks) {
        while (!rank.going.empty()) arrives(rank, below(rank.going.size()));
        check(number, launches[rank.launch]);
        rank.block = 0;
        if (++rank.launch == int(launches.size())) return;
    }
    start_cta(number);
}

int main(int, char** arguments) {
    generator.seed(atoi(arguments[1]));
    const int most = WARPS * 4 * PASSES * 15, least = (WARPS * 4 * PASSES - 4) * 15;
    launches.resize(atoi(arguments[2]));
    for (Launch& launch : launches) {
        launch.block_words = below(3) ? 1 + int(below(most)) : most - int(below(2)) * (most - least) / 2;
        launch.num_blocks = 1 + below(2) * below(5);  // of one block a rank is soonest in the next launch
        launch.num_words = launch.num_blocks * launch.block_words - (NORM ? 0 : below(launch.block_words));
        for (int rank = 0; rank < RANKS; rank++) {
            launch.products[rank] = drawn(launch.num_words);
            launch.total[rank].resize(2 * launch.num_words), launch.normed[rank].resize(2 * launch.num_words);
        }
        launch.residual = drawn(launch.num_words), launch.weight = drawn(launch.block_words);
    }
    const int absent = atoi(arguments[3]);
    bound_ns = absent < 0 ? 0 : 1000;
    for (int number = 0; number < RANKS; number++)
        if (number != absent) start_cta(number);
    u32 paces[RANKS];  // turns of 40 that a rank's threads take
    std::fill(paces, paces + RANKS, 40);
    for (idle = 0; !fibers.empty(); idle++) {
        if (idle > 3000000) fail("all wait", 0, 0);
        Rank& sender = ranks[below(RANKS)];
        if (!sender.going.empty() && !below(6)) arrives(sender, below(sender.going.size()));
        const u32 number = below(fibers.size());
        self = fibers[number].get();
        if (idle == 0 && !below(2000)) for (u32& pace : paces) pace = below(2) ? 40 : 1 + below(4);
        if (below(40) >= paces[self->rank]) continue;
        Rank& rank = here();
        threadIdx = {self->thread}, blockIdx = {rank.block}, gridDim = {launches[rank.launch].num_blocks};
        take_turn(self->stack);
        if (!self->ended) continue;
        const int of = self->rank;
        std::swap(fibers[number], fibers.back());
        fibers.pop_back();
        if (--ranks[of].num_left == 0) go_on(of);
    }
}

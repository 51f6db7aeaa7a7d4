// persistent.cu on CPUs: every thread that does anything, of every CTA of every rank, as a fiber; fibers take turns at
// random, and what is copied in bulk is read and arrives whenever it likes. Launch follows launch, with other data, as
// on a stream: a rank begins when it has ended the one before, whatever the others do. The elements are small whole
// numbers, so the sum is known exactly. Exits with 1 and a line that says what is wrong, or that all wait.
// Arguments: a file of numbers (see test_persistent_kernel.py), seed, number of launches.
// Defined at compile time: RANKS, BN, WIDTH, STAGES, FETCH_BUFFERS, HAS_BIAS, HAS_RESIDUAL.

#include "hopper.h"

#define __shared__
#define BF16 1
#define TRACE 0
#define WHO 2048
#ifndef STRICT
#define STRICT 0
#endif
#define TRACE_TILES 0
#define WGMMA_1 (emulate<BN>(sum, a, b, add))
#define WGMMA_2 (emulate<WIDTH * BN>(sum, a, b, add))

struct Launch {
    TensorMap x, weight, weight_pair, result;
    u64 partials[RANKS], sums[RANKS], flags[RANKS], inbox, area_bytes;
    const int* tables[4];
    int num_steps, num_rows, num_columns;
    const u32 *bias, *residual;
};

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
    leave(self->stack);
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
    fence([=](const Unfenced& one) { return one.by->rank == number; });  // a kernel's end does
    rank.clusters.clear(), rank.fibers.clear();
    for (int c = 0; c < problem.num_clusters; c++) {
        rank.clusters.emplace_back(new Cluster{{{number, 0}, {number, 1}}});
        Cluster& cluster = *rank.clusters.back();
        for (Cta& cta : cluster.ctas)
            for (u32 thread = 0; thread < 384; thread++) {
                if (thread < 128 && thread % 32) continue;
                rank.fibers.emplace_back(new Fiber{&cluster, &cta, {thread}, {u32(c * CTAS_OF_CLUSTER + cta.index)}});
                cta.all.size++, cluster.all.size++, rank.num_left++;
                ready.push_back(rank.fibers.back().get());
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
        take_turn(self->stack);
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

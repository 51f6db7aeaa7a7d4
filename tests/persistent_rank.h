// persistent.cu as rank RANK compiles it, in a namespace of its own; for persistent.cpp.
#if RANK < RANKS
namespace NAMED(rank, RANK) {
#define persistent_kernel NAMED(kernel_of_rank_, RANK)
#include "stages.cuh"
#include "persistent.cu"
void run(const Launch& launch) {
    Addresses at;
    for (int r = 0; r < RANKS; r++)
        at.partials[r] = launch.partials[r], at.sums[r] = launch.sums[r], at.flags[r] = launch.flags[r];
    at.inbox = launch.inbox, at.area_bytes = launch.area_bytes, at.watch = 0;
    persistent_kernel(launch.x, launch.weight, launch.weight_pair, launch.result, at, launch.tables[0],
                      (const Work*)launch.tables[1], launch.tables[2], (const Fetch*)launch.tables[3], launch.num_steps,
                      launch.num_rows, launch.num_columns, launch.bias, launch.residual, nullptr);
}
#undef persistent_kernel
constexpr u32 PLACE_BYTES = CTAS * TILE_BYTES;
}
#else
namespace NAMED(rank, RANK) {
void run(const Launch&) {}
}
#endif
#undef RANK

// ll128.cu as rank RANK compiles it, in a namespace of its own; for ll128.cpp.
#if RANK < RANKS
namespace NAMED(rank, RANK) {
#include "ll128.cu"
const Kernel kernel = (Kernel)ll128_kernel;
}
#else
namespace NAMED(rank, RANK) { const Kernel kernel = nullptr; }
#endif
#undef RANK

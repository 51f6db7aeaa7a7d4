// What every program that runs a kernel's code on a CPU begins with: CUDA's words, its types, chance.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <fstream>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <unordered_map>
#include <vector>

#define __device__
#define __forceinline__ inline
#define __global__
#define __grid_constant__
#define __restrict__
#define __launch_bounds__(...)
#define __cluster_dims__(...)
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

std::mt19937 generator;
u32 below(u32 limit) { return generator() % limit; }
void fail(const char* what, const char* whose, long of, long at) {
    printf("%s: %s %ld, %ld\n", what, whose, of, at);
    fflush(stdout);
    _Exit(1);  // nothing is destroyed, such as the stack that this runs on
}

// clock.cuh: turns of whoever looks at it. A bound only where a test sets one.
u64 clock_ns = 1, bound_ns = 0;
u64 time_ns() { return clock_ns++; }
u64 read_bound(u64) { return bound_ns; }
void give_up(u64, u32 who) {
    printf("gave up: %u\n", who);
    fflush(stdout);
    _Exit(2);
}
#include "patience.cuh"

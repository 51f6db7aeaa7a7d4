// What every program that runs a kernel's code on a CPU begins with: CUDA's words, its types, chance.
#pragma once

#include <setjmp.h>
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

// What a fiber runs on. setjmp switches; swapcontext would ask the system for the mask of signals each time.
struct Stack {
    std::vector<char> bytes;
    ucontext_t start = {};
    jmp_buf left;
    bool begun = false;
    explicit Stack(size_t size, void (*enter)()) : bytes(size) {
        getcontext(&start);
        start.uc_stack.ss_sp = bytes.data(), start.uc_stack.ss_size = size;
        makecontext(&start, enter, 0);
    }
};
jmp_buf scheduler;
void leave(Stack& stack) {
    if (!_setjmp(stack.left)) _longjmp(scheduler, 1);
}
// Runs it until it leaves.
void take_turn(Stack& stack) {
    if (_setjmp(scheduler)) return;
    if (stack.begun) _longjmp(stack.left, 1);
    stack.begun = true;
    setcontext(&stack.start);
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

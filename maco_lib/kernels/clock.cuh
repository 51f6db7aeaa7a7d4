// What `Patience` reads and says: the GPU's clock, and the words of the watch in the host's memory.

typedef unsigned int u32;
typedef unsigned long long u64;

__device__ __forceinline__ u64 time_ns() {
    u64 time;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(time));
    return time;
}
__device__ __forceinline__ u64 read_bound(u64 watch) {
    u64 bound;
    asm volatile("ld.volatile.global.u64 %0, [%1];" : "=l"(bound) : "l"(watch) : "memory");
    return bound;
}
// Ends the kernel, and the process's use of this GPU.
__device__ __forceinline__ void give_up(u64 watch, u32 who) {
    asm volatile("st.volatile.global.u64 [%0], %1; membar.sys; trap;" ::"l"(watch + 8), "l"((u64)who) : "memory");
}

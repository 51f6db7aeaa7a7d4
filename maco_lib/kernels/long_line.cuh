// How a lane writes and reads its 16 bytes of a line of 128.

typedef unsigned int u32;
typedef unsigned long long u64;

// One instruction for a warp: the 8 lanes of a line fill one transaction of 128 bytes, which arrives whole.
__device__ __forceinline__ void put(u64 place, u64 first, u64 second) {
    asm volatile("st.volatile.global.v2.u64 [%0], {%1, %2};" ::"l"(place), "l"(first), "l"(second) : "memory");
}
__device__ __forceinline__ void get(u64 place, u64& first, u64& second) {
    asm volatile("ld.volatile.global.v2.u64 {%0, %1}, [%2];" : "=l"(first), "=l"(second) : "l"(place) : "memory");
}

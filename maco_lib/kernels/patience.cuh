// How long a thread waits for a peer. `watch`: two words in the host's memory: the bound in ns (0: none), and who did not
// come (0: nobody). At the bound the thread says who and traps: the process gets an error at its next synchronisation,
// and the library says what happened (comm/watch.py). clock.cuh comes before this file.

#ifndef POLLS
#define POLLS 1024  // from one look at the clock to the next
#endif

struct Patience {
    u64 watch, since = 0;
    u32 polls = 0;
    __device__ __forceinline__ explicit Patience(u64 watch) : watch(watch) {}
    // After a poll in vain. who(): the kernel's number and the rank, as patience.py reads it.
    template <typename Who>
    __device__ __forceinline__ void lose(Who who) {
        if (++polls % POLLS) return;
        const u64 now = time_ns();
        if (since == 0) {
            since = now;
            return;
        }
        const u64 bound = read_bound(watch);
        if (bound && now - since > bound) give_up(watch, who());
    }
};

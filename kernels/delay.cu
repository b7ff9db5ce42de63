// Keeps a stream busy: ends `nanoseconds` after it began.
//
// Formula: spin while globaltimer() - start < nanoseconds.
// Launch:  one block of one thread. Any other shape works too; each thread then spins for itself.
//
// `globaltimer` counts nanoseconds, whatever the clocks of the multiprocessors do. It advances in steps, about a microsecond
// on many GPUs: a delay is off by up to a step. Nothing ends it early; bounding `nanoseconds` is up to who launches it.

static __device__ unsigned long long now_ns() {
    unsigned long long now;
    // Volatile: each reading is a new one.
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    return now;
}

extern "C" __global__ void farcall_delay(unsigned long long nanoseconds) {
    const unsigned long long start = now_ns();
    // The difference, not a sum that could wrap.
    while (now_ns() - start < nanoseconds) {
    }
}

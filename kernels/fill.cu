// Sets bytes: the device's `memset`, for any address and length.
//
// Formula: dst[i] = value for 0 <= i < len.
// Launch:  one dimension, any number of blocks and threads: all step through the bytes by the size of the grid (grid-stride).
//          256 threads, and as many blocks as leave a thread four 16-byte stores, but at most 16 a multiprocessor.
// Aligned: 16-byte stores between the first and the last multiple of 16; single bytes, at most 15, before and after.

struct alignas(16) Sixteen {
    unsigned int x, y, z, w;
};

extern "C" __global__ void farcall_fill(unsigned char* dst, unsigned char value, unsigned long long len) {
    const unsigned long long first = static_cast<unsigned long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    const unsigned long long step = static_cast<unsigned long long>(gridDim.x) * blockDim.x;

    // Bytes up to a multiple of 16, which may lie behind the end.
    const unsigned long long to_aligned = -reinterpret_cast<unsigned long long>(dst) & 15;
    const unsigned long long head = to_aligned < len ? to_aligned : len;
    const unsigned long long count = (len - head) / 16;
    const unsigned long long tail = head + count * 16;

    const unsigned int four = value * 0x01010101u;
    const Sixteen sixteen = {four, four, four, four};
    Sixteen* middle = reinterpret_cast<Sixteen*>(dst + head);
    for (unsigned long long i = first; i < count; i += step) {
        middle[i] = sixteen;
    }
    for (unsigned long long i = first; i < head; i += step) {
        dst[i] = value;
    }
    for (unsigned long long i = tail + first; i < len; i += step) {
        dst[i] = value;
    }
}

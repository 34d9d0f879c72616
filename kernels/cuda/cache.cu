// What keeps the cache: rows into slots, moves, block summaries, and queries made ready to score.

#include "common.cuh"

namespace cache {

// grid count, any threads.
template <typename T> __device__ void scatter(const ScatterParams &p) {
    const float *from = p.rows + (int64_t)blockIdx.x * p.width;
    T *to = (T *)p.pool + (int64_t)p.slots[blockIdx.x] * p.width;
    for (int i = threadIdx.x; i < p.width; i += blockDim.x) narrow(to[i], from[i]);
}

// One thread block; a thread moves its own columns, in order: a slot may be left and taken again.
template <typename T> __device__ void move(const MoveParams &p) {
    T *pool = (T *)p.pool;
    for (int column = threadIdx.x; column < p.width; column += blockDim.x)
        for (int i = 0; i < p.count; ++i) pool[(int64_t)p.moves[2 * i + 1] * p.width + column] = pool[(int64_t)p.moves[2 * i] * p.width + column];
}

// The smallest number of T that is not below x.
template <typename T> __device__ __forceinline__ T round_up(float x) {
    T near;
    narrow(near, x);
    if (wide(near) >= x || !isfinite(x)) return near;
    uint16_t bits = *reinterpret_cast<uint16_t *>(&near);
    bits = bits >> 15 ? bits - 1 : bits + 1;
    return *reinterpret_cast<T *>(&bits);
}

// Dimension d of a block's summary.
template <typename T> __device__ __forceinline__ void summarise(const T *k, const int *pages, int block, int block_size, int d, int head_dim, int kind, T *to) {
    float sum = 0.f, high = -INFINITY, low = INFINITY;
    auto key = [&](int slot) { return wide(k[((int64_t)pages[slot / PAGE] * PAGE + slot % PAGE) * head_dim + d]); };
    for (int i = 0; i < block_size; ++i) {
        const float x = key(block * block_size + i);
        sum += x, high = fmaxf(high, x), low = fminf(low, x);
    }
    if (kind == 1) {
        to[d] = round_up<T>(high);
        const T least = round_up<T>(-low);
        narrow(to[head_dim + d], -wide(least));
        return;
    }
    const float mean = sum / block_size;
    narrow(to[d], mean);
    if (kind == 0) return;
    float squares = 0.f;
    for (int i = 0; i < block_size; ++i) {
        const float x = key(block * block_size + i) - mean;
        squares += x * x;
    }
    narrow(to[head_dim + d], sqrtf(squares / block_size));
}

// Where the summary of a block lies.
__device__ __forceinline__ int64_t summary_row(int block, int head, int kv_heads) { return ((int64_t)(block / PAGE) * kv_heads + head) * PAGE + block % PAGE; }

// grid (blocks, kv_heads), head_dim threads.
template <typename T> __device__ void summaries(const SummaryParams &p) {
    const int head = blockIdx.y, block = p.first + blockIdx.x, width = p.kind ? 2 * p.head_dim : p.head_dim;
    T *to = (T *)p.summaries + summary_row(block, head, gridDim.y) * width;
    summarise((const T *)p.k, p.pages + (int64_t)head * p.max_pages, block, p.block_size, threadIdx.x, p.head_dim, p.kind, to);
}

// grid (rows, q_heads), head_dim threads.
template <typename T> __device__ void expand(const ExpandParams &p) {
    const int d = threadIdx.x, first = max(p.start, (p.start / p.tile + p.first_row + (int)blockIdx.x) * p.tile);
    const int end = min(p.start + p.tokens, (first / p.tile + 1) * p.tile);
    float a = 0.f, b = 0.f;
    for (int t = first; t < end; ++t) {
        const float x = wide(((const T *)p.q)[((int64_t)(t - p.start) * p.q_heads + blockIdx.y) * p.head_dim + d]);
        a += p.kind == 1 ? fmaxf(x, 0.f) : x;
        b += p.kind == 1 ? fminf(x, 0.f) : fabsf(x);
    }
    T *to = (T *)p.out + ((int64_t)blockIdx.x * p.q_heads + blockIdx.y) * 2 * p.head_dim;
    narrow(to[d], a / (end - first));
    narrow(to[p.head_dim + d], b / (end - first));
}

} // namespace cache

#define CACHE(NAME, T)                                                                                                                     \
    extern "C" __global__ void scatter_rows_##NAME(const ScatterParams p) { cache::scatter<T>(p); }                                         \
    extern "C" __global__ void move_rows_##NAME(const MoveParams p) { cache::move<T>(p); }                                                  \
    extern "C" __global__ void summarise_blocks_##NAME(const SummaryParams p) { cache::summaries<T>(p); }                                   \
    extern "C" __global__ void expand_queries_##NAME(const ExpandParams p) { cache::expand<T>(p); }
CACHE(f16, half)
CACHE(bf16, __nv_bfloat16)
#undef CACHE

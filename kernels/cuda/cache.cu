// What keeps the cache: rows into slots, moves, block summaries, and queries made ready to score.

#include "common.cuh"

namespace cache {

// grid count; whole warps.
template <typename S> __device__ void scatter(const ScatterParams &p) {
    const float *from = p.rows + (int64_t)blockIdx.x * p.width;
    for (int i = threadIdx.x; i < p.width; i += blockDim.x)
        store_at<S>(p.pool, p.scales, p.slots[blockIdx.x], p.width, i, p.transforms ? hadamard(from[i]) : from[i]);
}

// grid (tokens, kv_heads, 2); a thread for each dimension, whole warps.
template <typename S> __device__ void store(const StoreParams &p) {
    const int t = p.start + blockIdx.x, head = blockIdx.y, d = threadIdx.x;
    const bool of_values = blockIdx.z;
    const int64_t slot = (int64_t)p.pages[(int64_t)head * p.max_pages + t / PAGE] * PAGE + t % PAGE;
    const float x = (of_values ? p.rows[1] : p.rows[0])[((int64_t)blockIdx.x * gridDim.y + head) * p.head_dim + d];
    const bool transforms = std::is_same_v<S, Bytes> && !of_values;
    store_at<S>(of_values ? p.pools[1] : p.pools[0], of_values ? p.scales[1] : p.scales[0], slot, p.head_dim, d, transforms ? hadamard(x) : x);
}

// A word for each thread.
__device__ __forceinline__ void copy(const CopyParams &p) {
    const int words = p.words[blockIdx.y];
    const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x, row = i / words;
    if (row >= p.count) return;
    const int2 move = *(const int2 *)(p.moves + 2 * row);
    p.to[blockIdx.y][(int64_t)move.y * words + i % words] = p.from[blockIdx.y][(int64_t)move.x * words + i % words];
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

// Dimension d of a block's summary, over the tokens that `masks` keeps. Whole warps.
template <typename S>
__device__ __forceinline__ void summarise(const void *k, const void *k_scales, const int *pages, const uint8_t *masks, int block, int block_size, int d, int head_dim,
                                          int kind, void *summaries, void *scales, int64_t row) {
    using T = typename ComputedAs<S>::T;
    float sum = 0.f, high = -INFINITY, low = INFINITY;
    int count = 0;
    auto is_kept = [&](int slot) { return !masks || masks[slot / OCTET] >> slot % OCTET & 1; };
    auto key = [&](int slot) {
        const float x = number_at<S>(k, k_scales, (int64_t)pages[slot / PAGE] * PAGE + slot % PAGE, head_dim, d);
        return std::is_same_v<S, Bytes> ? hadamard(x) : x;
    };
    for (int slot = block * block_size; slot < (block + 1) * block_size; ++slot) {
        if (!is_kept(slot)) continue;
        const float x = key(slot);
        sum += x, high = fmaxf(high, x), low = fminf(low, x), ++count;
    }
    if (count == 0) return;
    const int width = kind ? 2 * head_dim : head_dim;
    if (kind == 1) {
        T *to = (T *)summaries + row * width;
        to[d] = round_up<T>(high);
        const T least = round_up<T>(-low);
        narrow(to[head_dim + d], -wide(least));
        return;
    }
    auto store = [&](int at, float x) {
        if (scales) store_at<Bytes>(summaries, scales, row, width, at, x);
        else store_at<T>(summaries, nullptr, row, width, at, x);
    };
    const float mean = sum / count;
    store(d, mean);
    if (kind == 0) return;
    float squares = 0.f;
    for (int slot = block * block_size; slot < (block + 1) * block_size; ++slot) {
        if (!is_kept(slot)) continue;
        const float x = key(slot) - mean;
        squares += x * x;
    }
    store(head_dim + d, sqrtf(squares / count));
}

// What `masks` has of a head.
__device__ __forceinline__ const uint8_t *masks_of(const uint8_t *masks, int head, int max_pages) {
    return masks ? masks + (int64_t)head * max_pages * (PAGE / OCTET) : nullptr;
}

// Where the summary of a block lies.
__device__ __forceinline__ int64_t summary_row(int block, int head, int kv_heads) { return ((int64_t)(block / PAGE) * kv_heads + head) * PAGE + block % PAGE; }

// grid (blocks, kv_heads), head_dim threads.
template <typename S> __device__ void summaries(const SummaryParams &p) {
    const int head = blockIdx.y, block = p.first + blockIdx.x;
    summarise<S>(p.k, p.k_scales, p.pages + (int64_t)head * p.max_pages, masks_of(p.masks, head, p.max_pages), block, p.block_size, threadIdx.x, p.head_dim, p.kind,
                 p.summaries, p.scales, summary_row(block, head, gridDim.y));
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

// An octet for each thread. grid (octets / 256, kv_heads)
__device__ __forceinline__ void note_verdicts(const VerdictParams &p) {
    const int octet = p.start / OCTET + blockIdx.x * blockDim.x + threadIdx.x, head = blockIdx.y, end = p.start + p.tokens;
    if (octet * OCTET >= end) return;
    uint8_t *mask = p.masks + (int64_t)head * p.max_pages * (PAGE / OCTET) + octet;
    // Of tokens before the step, what is known.
    uint32_t bits = *mask & ~(0xffu << max(0, min(OCTET, p.start - octet * OCTET)));
    for (int t = max(p.start, octet * OCTET); t < min(end, (octet + 1) * OCTET); ++t) {
        const bool keeps = t < p.sinks || p.scores[(int64_t)(t - p.start) * p.kv_heads + head] >= p.tau;
        bits |= (uint32_t)keeps << t % OCTET;
    }
    *mask = bits;
    p.noted[head * ((end + OCTET - 1) / OCTET - p.start / OCTET) + octet - p.start / OCTET] = bits;
}

// Tokens and rows of a thread block, columns at a time, and tokens of a warp.
constexpr int GATE_TOKENS = 16, GATE_ROWS = 8, GATE_COLUMNS = 512, GATE_WARPS = 4, GATE_OWN = GATE_TOKENS / GATE_WARPS;

__device__ __forceinline__ float gelu(float x) { return 0.5f * x * (1.f + erff(x * 0.70710678118654752f)); }

} // namespace cache

// grid (ceil(tokens / GATE_TOKENS), ceil(rows / GATE_ROWS)). A lane sums every 32nd four columns, then a warp's lanes: in one order for any
// number of tokens.
extern "C" __global__ void __launch_bounds__(cache::GATE_WARPS * 32) gate_scores(const GateParams p) {
    using namespace cache;
    constexpr int FOURS = GATE_COLUMNS / 4, EACH = FOURS / 32;
    __shared__ float4 weight[GATE_ROWS][FOURS];
    const int lane = threadIdx.x % 32, first_token = blockIdx.x * GATE_TOKENS + threadIdx.x / 32 * GATE_OWN, first_row = blockIdx.y * GATE_ROWS;
    auto four = [&](const float *from, int row, int rows, int column) {
        return row < rows && column < p.columns ? *(const float4 *)(from + (int64_t)row * p.columns + column) : make_float4(0.f, 0.f, 0.f, 0.f);
    };
    float sums[GATE_OWN][GATE_ROWS] = {};
    for (int column = 0; column < p.columns; column += GATE_COLUMNS) {
        float4 x[GATE_OWN][EACH];
#pragma unroll
        for (int token = 0; token < GATE_OWN; ++token)
#pragma unroll
            for (int i = 0; i < EACH; ++i) x[token][i] = four(p.x, first_token + token, p.tokens, column + 4 * (32 * i + lane));
#pragma unroll
        for (int at = threadIdx.x; at < GATE_ROWS * FOURS; at += GATE_WARPS * 32)
            weight[at / FOURS][at % FOURS] = four(p.weight, first_row + at / FOURS, p.rows, column + 4 * (at % FOURS));
        __syncthreads();
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
#pragma unroll
            for (int row = 0; row < GATE_ROWS; ++row) {
                const float4 w = weight[row][32 * i + lane];
#pragma unroll
                for (int token = 0; token < GATE_OWN; ++token) {
                    float &sum = sums[token][row];
                    sum = fmaf(x[token][i].x, w.x, sum), sum = fmaf(x[token][i].y, w.y, sum);
                    sum = fmaf(x[token][i].z, w.z, sum), sum = fmaf(x[token][i].w, w.w, sum);
                }
            }
        }
        __syncthreads();
    }
    // Each lane a sum.
    static_assert(GATE_OWN * GATE_ROWS == 32);
    float own = 0.f;
#pragma unroll
    for (int token = 0; token < GATE_OWN; ++token) {
#pragma unroll
        for (int row = 0; row < GATE_ROWS; ++row) {
            const float sum = sum_of_warp(sums[token][row]);
            if (lane == token * GATE_ROWS + row) own = sum;
        }
    }
    const int token = first_token + lane / GATE_ROWS, row = first_row + lane % GATE_ROWS;
    if (token >= p.tokens || row >= p.rows) return;
    own += p.bias[row];
    p.out[(int64_t)token * p.rows + row] = p.is_hidden ? gelu(own) : own;
}

namespace cache {

// 16 numbers for each thread.
__device__ __forceinline__ void widen(const WidenParams &p) {
    const int64_t at = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) * 16;
    if (at >= p.count) return;
    const uint4 bytes = *(const uint4 *)((const int8_t *)p.values + at);
    const half scale = ((const half *)p.scales)[at / GROUP];
    const uint2 wide[4] = {widened<half>(bytes.x, scale), widened<half>(bytes.y, scale), widened<half>(bytes.z, scale), widened<half>(bytes.w, scale)};
    uint4 *to = (uint4 *)((half *)p.out + at);
    to[0] = make_uint4(wide[0].x, wide[0].y, wide[1].x, wide[1].y);
    to[1] = make_uint4(wide[2].x, wide[2].y, wide[3].x, wide[3].y);
}

// A number for each thread, whole warps.
__device__ __forceinline__ void transform(const TransformParams &p) {
    const int64_t at = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (at < p.count) ((half *)p.out)[at] = __float2half_rn(hadamard(wide(((const half *)p.x)[at])));
}

} // namespace cache

extern "C" __global__ void __launch_bounds__(256) transform_f16(const TransformParams p) { cache::transform(p); }
extern "C" __global__ void __launch_bounds__(256) note_verdicts(const VerdictParams p) { cache::note_verdicts(p); }
extern "C" __global__ void __launch_bounds__(256) widen_bytes(const WidenParams p) { cache::widen(p); }

#define ROWS(NAME, S)                                                                                                                      \
    extern "C" __global__ void store_step_##NAME(const StoreParams p) { cache::store<S>(p); }                                               \
    extern "C" __global__ void scatter_rows_##NAME(const ScatterParams p) { cache::scatter<S>(p); }                                         \
    extern "C" __global__ void summarise_blocks_##NAME(const SummaryParams p) { cache::summaries<S>(p); }
ROWS(f16, half)
ROWS(bf16, __nv_bfloat16)
ROWS(q8_0, Bytes)
#undef ROWS
#define EXPAND(NAME, T) extern "C" __global__ void expand_queries_##NAME(const ExpandParams p) { cache::expand<T>(p); }
EXPAND(f16, half)
EXPAND(bf16, __nv_bfloat16)
#undef EXPAND
extern "C" __global__ void copy_rows(const CopyParams p) { cache::copy(p); }

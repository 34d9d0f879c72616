// The steps of a decoder layer between products and attention.

#include "weights.cuh"

namespace layer {

constexpr int NORM_THREADS = 1024, MOST = 4; // groups of four neighbours that a thread takes
constexpr int AHEAD = 8;                      // as in NormParams
constexpr int WRITE_WARPS = 16;

// The sum over a thread block of 1024, in every thread.
__device__ __forceinline__ float sum_of_all(float x, float *shared) {
    x = sum_of_warp(x);
    __syncthreads(); // before it is written again
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
    __syncthreads();
    return sum_of_warp(threadIdx.x % 32 < blockDim.x / 32 ? shared[threadIdx.x % 32] : 0.f);
}

__device__ __forceinline__ float squares(float4 x) { return x.x * x.x + x.y * x.y + x.z * x.z + x.w * x.w; }

__device__ __forceinline__ float4 scaled(float4 x, float factor, float4 weight) {
    return make_float4(x.x * factor * weight.x, x.y * factor * weight.y, x.z * factor * weight.z, x.w * factor * weight.w);
}

__device__ __forceinline__ uint2 in_bf16(float4 x) { return make_uint2(pack<__nv_bfloat16>(x.x, x.y), pack<__nv_bfloat16>(x.z, x.w)); }

// Brings what a kernel further on looks up to the L2 cache, by a whole thread block: weights have taken its place there since the last token.
__device__ __forceinline__ void fetch_ahead(const Ahead &ahead) {
    for (int at = threadIdx.x * 128; at < ahead.bytes; at += blockDim.x * 128) asm volatile("prefetch.global.L2 [%0];" ::"l"((const uint8_t *)ahead.from + at));
}

// GROUPS groups of four neighbours for each thread; of MANY tokens a thread block takes one.
template <int THREADS, int GROUPS, bool MANY> __device__ __forceinline__ void add_norm(NormParams p, float *shared, int token = 0) {
    if (MANY) {
        const int64_t first = (int64_t)token * p.columns;
        p.x += first, p.y += p.y ? first : 0, p.out += p.out ? first : 0, p.rounded = p.rounded ? (__nv_bfloat16 *)p.rounded + first : nullptr;
        p.copy = p.copy ? (__nv_bfloat16 *)p.copy + first : nullptr;
    }
    float4 x[GROUPS], weight[GROUPS];
    const float4 none = make_float4(0.f, 0.f, 0.f, 0.f);
    auto place = [&](int i) { return 4 * (int)(threadIdx.x + i * THREADS); };
    // Weights do not depend on the kernel before.
#pragma unroll
    for (int i = 0; i < GROUPS; ++i) weight[i] = place(i) < p.columns ? *(const float4 *)(p.weight + place(i)) : none;
    if constexpr (!MANY) {
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) fetch_ahead(p.ahead[i]);
    }
    follow();
#pragma unroll
    for (int i = 0; i < GROUPS; ++i) x[i] = place(i) < p.columns ? *(const float4 *)(p.x + place(i)) : none;
    if (p.y) {
        float4 y[GROUPS];
        float sum = 0.f;
#pragma unroll
        for (int i = 0; i < GROUPS; ++i) {
            y[i] = place(i) < p.columns ? *(const float4 *)(p.y + place(i)) : none;
            sum += squares(y[i]);
        }
        if (p.y_weight) {
            const float factor = 1.f / sqrtf(sum_of_all(sum, shared) / p.columns + p.eps);
#pragma unroll
            for (int i = 0; i < GROUPS; ++i)
                if (place(i) < p.columns) y[i] = scaled(y[i], factor, *(const float4 *)(p.y_weight + place(i)));
        }
#pragma unroll
        for (int i = 0; i < GROUPS; ++i) {
            x[i] = make_float4(x[i].x + y[i].x, x[i].y + y[i].y, x[i].z + y[i].z, x[i].w + y[i].w);
            if (place(i) < p.columns) *(float4 *)(p.x + place(i)) = x[i];
        }
    }
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < GROUPS; ++i) sum += squares(x[i]);
    const float factor = 1.f / sqrtf(sum_of_all(sum, shared) / p.columns + p.eps);
#pragma unroll
    for (int i = 0; i < GROUPS; ++i) {
        const float4 out = scaled(x[i], factor, weight[i]);
        if (p.out && place(i) < p.columns) *(float4 *)(p.out + place(i)) = out;
        if (!MANY) quantize4(out, p.out_q8, p.columns, place(i));
        if (MANY && p.rounded && place(i) < p.columns) {
            const uint2 rounded = in_bf16(out);
            *(uint2 *)((__nv_bfloat16 *)p.rounded + place(i)) = rounded;
            // Nobody reads it before all layers are done: it is not to take the place of what the next kernels read.
            if (p.copy) __stcs((uint2 *)((__nv_bfloat16 *)p.copy + place(i)), rounded);
        }
    }
}

} // namespace layer

// What the host wrote since the last time: no cache may have it.
extern "C" __global__ void fetch_orders(const FetchParams p) {
    for (int i = threadIdx.x; i < p.count; i += blockDim.x) p.to[i] = __ldcv(p.from + i);
}

// One thread block.
extern "C" __global__ void __launch_bounds__(layer::NORM_THREADS) add_norm(const NormParams p) {
    __shared__ float shared[32];
    using namespace layer;
    if (p.columns <= 4 * NORM_THREADS) add_norm<NORM_THREADS, 1, false>(p, shared);
    else add_norm<NORM_THREADS, MOST, false>(p, shared);
}

// A thread block for each token, by how many threads.
#define ROWS(THREADS, GROUPS)                                                                                                              \
    extern "C" __global__ void __launch_bounds__(THREADS) add_norm_rows_##THREADS##_##GROUPS(const NormParams p) {                         \
        __shared__ float shared[32];                                                                                                       \
        layer::add_norm<THREADS, GROUPS, true>(p, shared, blockIdx.x);                                                                     \
    }
ROWS(256, 1)
ROWS(256, 4)
ROWS(1024, 4)
#undef ROWS

namespace layer {

// cos and sin of an angle: so many radians per position.
__device__ __forceinline__ float2 turned_by(int t, double frequency) {
    // Whole turns off in f64, or a far position would have no angle left in f32.
    const double turns = t * frequency * 0.15915494309189535;
    float sin, cos;
    sincospif(2.f * (float)(turns - floor(turns)), &sin, &cos);
    return make_float2(cos, sin);
}

template <typename S> __device__ void write(const WriteParams &p) {
    using T = typename ComputedAs<S>::T;
    __shared__ float shared[2][256];
    const int head = blockIdx.x, kv_heads = gridDim.x - (p.inputs ? 1 : 0), warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int D = p.head_dim, half_ = D / 2;
    let_next_begin();
    // Where the token goes and by what it is turned is known before the product is.
    const int t = *p.position, q_heads = kv_heads * p.group_size;
    if (head == kv_heads) {
        // Not where the input is made: all would wait until it is in this memory, too, which is far from the rest.
        __nv_bfloat16 *to = (__nv_bfloat16 *)p.inputs + (int64_t)(t & (p.rows - 1)) * p.columns;
        wait_for_last();
        for (int i = 4 * threadIdx.x; i < p.columns; i += 4 * blockDim.x) *(uint2 *)(to + i) = in_bf16(*(const float4 *)(p.input + i));
        return;
    }
    const int64_t slot = (int64_t)p.pages[(int64_t)head * p.max_pages + t / PAGE] * PAGE + t % PAGE;
    for (int i = threadIdx.x; i < half_; i += blockDim.x) {
        const float2 turn = turned_by(t, p.frequencies[i]);
        shared[0][i] = turn.x * p.magnitude, shared[1][i] = turn.y * p.magnitude;
    }
    __syncthreads();
    wait_for_last();
    // A warp takes a head: the queries of the group, the key, the value.
    for (int i = warp; i < p.group_size + 2; i += warps) {
        const bool is_q = i < p.group_size, is_k = i == p.group_size;
        const int row = is_q ? head * p.group_size + i : is_k ? q_heads + head : q_heads + kv_heads + head;
        const float *from = p.qkv + (int64_t)row * D;
        if (i > p.group_size) {
            for (int d = lane; d < D; d += 32) store_at<S>(p.v, p.v_scales, slot, D, d, from[d]);
            continue;
        }
        const float *weight = is_q ? p.q_norm : p.k_norm;
        float factor = 1.f;
        if (weight) {
            float squares = 0.f;
            for (int d = lane; d < D; d += 32) squares += from[d] * from[d];
            factor = 1.f / sqrtf(sum_of_warp(squares) / D + p.eps);
        }
        for (int d = lane; d < half_; d += 32) {
            float a = from[d] * factor, b = from[d + half_] * factor;
            if (weight) a *= weight[d], b *= weight[d + half_];
            const float turned[2] = {a * shared[0][d] - b * shared[1][d], a * shared[1][d] + b * shared[0][d]};
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                if (is_q) store_at<T>(p.q, nullptr, row, D, d + i * half_, turned[i]);
                else store_at<S>(p.k, p.k_scales, slot, D, d + i * half_, std::is_same_v<S, Bytes> ? hadamard(turned[i]) : turned[i]);
            }
        }
    }
}

} // namespace layer

extern "C" __global__ void __launch_bounds__(layer::WRITE_WARPS * 32) write_kv_f16(const WriteParams p) { layer::write<half>(p); }
extern "C" __global__ void __launch_bounds__(layer::WRITE_WARPS * 32) write_kv_bf16(const WriteParams p) { layer::write<__nv_bfloat16>(p); }
extern "C" __global__ void __launch_bounds__(layer::WRITE_WARPS * 32) write_kv_q8_0(const WriteParams p) { layer::write<Bytes>(p); }

namespace layer {

__device__ __forceinline__ void angles(const AnglesParams &p) {
    const int index = blockIdx.x * blockDim.x + threadIdx.x;
    if (index >= p.tokens * p.pairs) return;
    const float2 turn = turned_by(p.start + index / p.pairs, p.frequencies[index % p.pairs]);
    p.cos[index] = turn.x * p.magnitude, p.sin[index] = turn.y * p.magnitude;
}

template <typename T> __device__ __forceinline__ void put(T *to, float4 x) {
    if constexpr (std::is_same_v<T, float>) *(float4 *)to = x;
    else *(uint2 *)to = make_uint2(pack<T>(x.x, x.y), pack<T>(x.z, x.w));
}

template <typename T> __device__ __forceinline__ void rotate(const RotateParams &p) {
    follow();
    const int half_ = p.head_dim / 2, of_head = half_ / 4, heads = p.q_heads + p.kv_heads;
    const int index = blockIdx.x * blockDim.x + threadIdx.x, token = index / (heads * of_head), head = index / of_head % heads;
    if (token >= p.tokens) return;
    const int first = index % of_head * 4;
    const bool is_q = head < p.q_heads;
    const int own = is_q ? head : head - p.q_heads;
    const int64_t row = ((int64_t)token * (is_q ? p.q_heads : p.kv_heads) + own) * p.head_dim + first;
    const float *from = (is_q ? p.q : p.k) + (int64_t)token * (is_q ? p.q_row : p.k_row) + own * p.head_dim + first;
    const float4 a = *(const float4 *)from, b = *(const float4 *)(from + half_);
    const float4 cos = *(const float4 *)(p.cos + (int64_t)token * half_ + first), sin = *(const float4 *)(p.sin + (int64_t)token * half_ + first);
    const float4 low = make_float4(a.x * cos.x - b.x * sin.x, a.y * cos.y - b.y * sin.y, a.z * cos.z - b.z * sin.z, a.w * cos.w - b.w * sin.w);
    const float4 high = make_float4(a.x * sin.x + b.x * cos.x, a.y * sin.y + b.y * cos.y, a.z * sin.z + b.z * cos.z, a.w * sin.w + b.w * cos.w);
    if (is_q) put((T *)p.q_out + row, low), put((T *)p.q_out + row + half_, high);
    else put(p.k_out + row, low), put(p.k_out + row + half_, high);
}

} // namespace layer

extern "C" __global__ void __launch_bounds__(256) rotation_angles(const AnglesParams p) { layer::angles(p); }
extern "C" __global__ void __launch_bounds__(256) rotate_rows_f32(const RotateParams p) { layer::rotate<float>(p); }
extern "C" __global__ void __launch_bounds__(256) rotate_rows_f16(const RotateParams p) { layer::rotate<half>(p); }
extern "C" __global__ void __launch_bounds__(256) rotate_rows_bf16(const RotateParams p) { layer::rotate<__nv_bfloat16>(p); }

// One thread block.
extern "C" __global__ void __launch_bounds__(1024) likeliest(const LikeliestParams p) {
    __shared__ float best_of[32];
    __shared__ int at_of[32], broken_of[32];
    follow();
    for (int i = threadIdx.x; i < p.told_count; i += 1024) p.id[2 + i] = p.told[i];
    float best = -INFINITY;
    int at = 0x7fffffff, broken = 0;
    for (int i = threadIdx.x; i < p.count; i += 1024) {
        const float x = p.logits[i];
        broken |= !(x < INFINITY);
        if (x > best) best = x, at = i;
    }
    auto join = [&](float other, int other_at) {
        if (other > best || other == best && other_at < at) best = other, at = other_at;
    };
#pragma unroll
    for (int step = 16; step; step /= 2) {
        join(__shfl_xor_sync(~0u, best, step), __shfl_xor_sync(~0u, at, step));
        broken |= __shfl_xor_sync(~0u, broken, step);
    }
    if (threadIdx.x % 32 == 0) best_of[threadIdx.x / 32] = best, at_of[threadIdx.x / 32] = at, broken_of[threadIdx.x / 32] = broken;
    __syncthreads();
    if (threadIdx.x >= 32) return;
    best = best_of[threadIdx.x], at = at_of[threadIdx.x], broken = broken_of[threadIdx.x];
#pragma unroll
    for (int step = 16; step; step /= 2) {
        join(__shfl_xor_sync(~0u, best, step), __shfl_xor_sync(~0u, at, step));
        broken |= __shfl_xor_sync(~0u, broken, step);
    }
    if (threadIdx.x == 0) p.id[0] = at, p.id[1] = broken;
}

namespace layer {

// Bins of logits from the largest down, and how far they reach: what lies further down has a probability of less than e^-32.
constexpr int BEST_BINS = 2048;
constexpr float BEST_DEPTH = 32.f;

} // namespace layer

extern "C" __global__ void __launch_bounds__(1024) best_tokens(const BestParams p) {
    using namespace layer;
    __shared__ int bins[BEST_BINS], least, taken;
    follow();
    const float largest = p.logits[p.likeliest[0]];
    for (int i = threadIdx.x; i < BEST_BINS; i += 1024) bins[i] = 0;
    if (threadIdx.x == 0) least = BEST_BINS, taken = 0;
    __syncthreads();
    auto bin_of = [&](float x) { return (int)fminf((largest - x) * (BEST_BINS / BEST_DEPTH), (float)BEST_BINS); };
#pragma unroll 8
    for (int i = threadIdx.x; i < p.count; i += 1024) {
        const int bin = bin_of(p.logits[i]);
        if (bin < BEST_BINS) atomicAdd(bins + bin, 1);
    }
    __syncthreads();
    // The first bin by which there are enough: each thread adds up to a bin of its own.
    if (threadIdx.x < 32) {
        constexpr int OWN = BEST_BINS / 32;
        int own = 0;
        for (int i = 0; i < OWN; ++i) own += bins[threadIdx.x * OWN + i];
        int before = own;
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
            const int other = __shfl_up_sync(~0u, before, step);
            if (threadIdx.x >= step) before += other;
        }
        before -= own;
        if (before < p.wanted && before + own >= p.wanted) {
            int bin = threadIdx.x * OWN;
            while (before + bins[bin] < p.wanted) before += bins[bin++];
            least = bin;
        }
    }
    __syncthreads();
#pragma unroll 8
    for (int i = threadIdx.x; i < p.count; i += 1024) {
        const float x = p.logits[i];
        if (bin_of(x) > least || least == BEST_BINS) continue;
        const int at = atomicAdd(&taken, 1);
        if (at < p.room) p.ids[at] = i, p.scores[at] = x;
    }
    __syncthreads();
    if (threadIdx.x == 0) *p.found = least == BEST_BINS || taken > p.room ? -1 : taken;
}

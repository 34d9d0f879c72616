// Products of weight matrices with few tokens, at the speed of memory; and matrices unpacked for products with many.

#include "weights.cuh"

namespace products {

constexpr int WARPS = 4, GATED_WARPS = 16, GATED_ROWS = 32, ROWS_THREADS = 64, UNPACK_THREADS = 256, PREFETCHED = 512;

// For matrices that are not all of one format. Kernels of a format each are faster: one that knows all of them holds registers for the
// widest, and has fewer loads under way.
constexpr int ANY = -1;

// Loads of a row that are under way at once, where R rows are read together: more cost registers, and with them warps.
constexpr int PLAIN_STEPS = 2;
template <int R> constexpr int PACKED_STEPS = 4 / R;

// The products of R rows with the activations, in every lane.
template <int FORMAT, int R>
__device__ __forceinline__ void packed_rows(float (&sums)[R], const Matrix *const (&m)[R], const int (&rows)[R], int columns, const Activations &x) {
    const int lane = threadIdx.x % 32, units = columns / 32;
#pragma unroll PACKED_STEPS<R>
    for (int u = lane; u < units; u += 32) {
        const Thirty2 own = activations_at(x, u);
#pragma unroll
        for (int r = 0; r < R; ++r) sums[r] += dot<FORMAT>(unit_of<FORMAT>(*m[r], (int64_t)rows[r] * units + u), own);
    }
}

template <int FORMAT, int R>
__device__ __forceinline__ void plain_rows(float (&sums)[R], const Matrix *const (&m)[R], const int (&rows)[R], int columns, const float *x) {
    const int lane = threadIdx.x % 32;
#pragma unroll PLAIN_STEPS
    for (int i = 8 * lane; i < columns; i += 256) {
        const float4 a = __ldg((const float4 *)(x + i)), b = __ldg((const float4 *)(x + i) + 1);
#pragma unroll
        for (int r = 0; r < R; ++r) {
            float w[8];
            plain8<FORMAT>(w, m[r]->planes[0], (int64_t)rows[r] * columns + i);
            sums[r] += w[0] * a.x + w[1] * a.y + w[2] * a.z + w[3] * a.w + w[4] * b.x + w[5] * b.y + w[6] * b.z + w[7] * b.w;
        }
    }
}

// Rows of matrices of one format.
template <int FORMAT, int R>
__device__ __forceinline__ void multiply_rows(float (&sums)[R], const Matrix *const (&m)[R], const int (&rows)[R], int columns, const float *x, const void *x_q8) {
    if constexpr (FORMAT == ANY) {
        switch (m[0]->format) {
        case F32: return multiply_rows<F32>(sums, m, rows, columns, x, x_q8);
        case F16: return multiply_rows<F16>(sums, m, rows, columns, x, x_q8);
        case BF16: return multiply_rows<BF16>(sums, m, rows, columns, x, x_q8);
        case AFFINE4: return multiply_rows<AFFINE4>(sums, m, rows, columns, x, x_q8);
        case AFFINE5: return multiply_rows<AFFINE5>(sums, m, rows, columns, x, x_q8);
        case Q8_0: return multiply_rows<Q8_0>(sums, m, rows, columns, x, x_q8);
        case Q4_K: return multiply_rows<Q4_K>(sums, m, rows, columns, x, x_q8);
        case Q5_K: return multiply_rows<Q5_K>(sums, m, rows, columns, x, x_q8);
        default: return multiply_rows<Q6_K>(sums, m, rows, columns, x, x_q8);
        }
    } else {
#pragma unroll
        for (int r = 0; r < R; ++r) sums[r] = 0.f;
        if constexpr (FORMAT <= BF16) plain_rows<FORMAT>(sums, m, rows, columns, x);
        else packed_rows<FORMAT>(sums, m, rows, columns, Activations(x_q8, columns));
#pragma unroll
        for (int r = 0; r < R; ++r) sums[r] = sum_of_warp(sums[r]);
    }
}

// Brings the beginning of a row to the L2 cache: weights do not depend on the kernel before, so they may come while it runs. No more
// than the beginning: with all rows at once the cache would lose the first ones again.
__device__ __forceinline__ void prefetch_row(const Matrix &m, int row, int columns) {
    const int bytes = m.format == F32 ? 4 * columns : m.format <= BF16 ? 2 * columns : m.format == Q8_0 ? columns : columns / 2;
    const uint8_t *from = m.planes[0] + (int64_t)row * bytes;
    for (int at = threadIdx.x % 32 * 128; at < min(bytes, PREFETCHED); at += 32 * 128) asm volatile("prefetch.global.L2 [%0];" ::"l"(from + at));
}

// Bytes from one token's activations in 8 bits to the next one's.
__device__ __forceinline__ int64_t activation_bytes(int columns) { return (columns + columns / 32 * 12 + 15) / 16 * 16; }

__device__ __forceinline__ float sigmoid(float x) { return 1.f / (1.f + __expf(-x)); }

__device__ __forceinline__ float activated(float x, int activation) {
    if (activation == 0) return x * sigmoid(x);
    const float u = 0.7978845608028654f * x * (1.f + 0.044715f * x * x);
    return x * sigmoid(2.f * u);
}

// A warp takes a row.
template <int FORMAT> __device__ __forceinline__ void product(const ProductParams &p) {
    const int token = blockIdx.y;
    int row = blockIdx.x * WARPS + threadIdx.x / 32;
    // Selected, not indexed: a parameter that is indexed is copied to memory.
    Matrix m = p.matrices[0];
    int index = 0;
#pragma unroll
    for (int i = 1; i < 4; ++i)
        if (index == i - 1 && row >= m.rows && i < p.count) row -= m.rows, m = p.matrices[i], index = i;
    if (row >= m.rows) return;
    prefetch_row(m, row, p.columns);
    // It would be waited for last of all, and registers are few.
    __shared__ float biases[WARPS];
    float &bias = biases[threadIdx.x / 32];
    copy_few_async<4>(shared_address(&bias), m.bias ? m.bias + row : (const float *)m.out, m.bias != nullptr);
    follow();
    float sums[1];
    const Matrix *const matrices[1] = {&m};
    const int rows[1] = {row};
    const float *x = p.x + (int64_t)token * p.columns;
    const void *x_q8 = (const uint8_t *)p.x_q8 + token * activation_bytes(p.columns);
    multiply_rows<FORMAT>(sums, matrices, rows, p.columns, x, x_q8);
    asm volatile("cp.async.wait_all;" ::: "memory");
    if (threadIdx.x % 32 == 0) m.out[(int64_t)token * m.rows + row] = sums[0] + bias;
}

// A thread block makes 32 rows, which it rounds to 8 bits together.
template <int FORMAT> __device__ __forceinline__ void gated_product(const GatedParams &p) {
    constexpr int EACH = GATED_ROWS / GATED_WARPS;
    __shared__ float made[GATED_ROWS];
    const int warp = threadIdx.x / 32, first = GATED_ROWS * blockIdx.x + warp * EACH;
    prefetch_row(p.gate, first, p.columns), prefetch_row(p.up, first, p.columns);
    follow();
#pragma unroll 1
    for (int row = first; row < first + EACH; ++row) {
        float sums[2];
        if constexpr (FORMAT != ANY) {
            const Matrix *const matrices[2] = {&p.gate, &p.up};
            const int rows[2] = {row, row};
            multiply_rows<FORMAT>(sums, matrices, rows, p.columns, p.x, p.x_q8);
        } else {
            float of_gate[1], of_up[1];
            const Matrix *const gate[1] = {&p.gate}, *const up[1] = {&p.up};
            const int rows[1] = {row};
            multiply_rows<FORMAT>(of_gate, gate, rows, p.columns, p.x, p.x_q8);
            multiply_rows<FORMAT>(of_up, up, rows, p.columns, p.x, p.x_q8);
            sums[0] = of_gate[0], sums[1] = of_up[0];
        }
        if (threadIdx.x % 32 == 0) made[row % GATED_ROWS] = activated(sums[0], p.activation) * sums[1];
    }
    __syncthreads();
    if (warp) return;
    const float x = made[threadIdx.x];
    p.out[GATED_ROWS * blockIdx.x + threadIdx.x] = x;
    quantize32(x, p.out_q8, p.gate.rows, blockIdx.x);
}

} // namespace products

#define EXPAND(name, format)                                                                                                            \
    extern "C" __global__ void __launch_bounds__(products::WARPS * 32, 8) product_##name(const ProductParams p) { products::product<format>(p); } \
    extern "C" __global__ void __launch_bounds__(products::GATED_WARPS * 32, 2) gated_product_##name(const GatedParams p) { products::gated_product<format>(p); }
EXPAND(f32, F32)
EXPAND(f16, F16)
EXPAND(bf16, BF16)
EXPAND(affine4, AFFINE4)
EXPAND(affine5, AFFINE5)
EXPAND(q8_0, Q8_0)
EXPAND(q4_k, Q4_K)
EXPAND(q5_k, Q5_K)
EXPAND(q6_k, Q6_K)
EXPAND(any, products::ANY)
#undef EXPAND

namespace products {

// Eight neighbouring weights: quarter `quarter` of a unit.
__device__ __forceinline__ void eight_weights(float (&w)[8], const Matrix &m, int64_t row, int columns, int u, int quarter) {
    switch (m.format) {
    case F32: return plain8<F32>(w, m.planes[0], row * columns + 32 * u + 8 * quarter);
    case F16: return plain8<F16>(w, m.planes[0], row * columns + 32 * u + 8 * quarter);
    case BF16: return plain8<BF16>(w, m.planes[0], row * columns + 32 * u + 8 * quarter);
    }
    const int64_t at = row * (columns / 32) + u;
    Unit unit;
    switch (m.format) {
    case AFFINE4: unit = unit_of<AFFINE4>(m, at); break;
    case AFFINE5: unit = unit_of<AFFINE5>(m, at); break;
    case Q8_0: unit = unit_of<Q8_0>(m, at); break;
    case Q4_K: unit = unit_of<Q4_K>(m, at); break;
    case Q5_K: unit = unit_of<Q5_K>(m, at); break;
    default: unit = unit_of<Q6_K>(m, at);
    }
    const int zero = m.format == Q6_K ? 32 : 0;
    const float scale = quarter < 2 ? unit.scale[0] : unit.scale[1];
    int q[2] = {unit.q[0], unit.q[1]};
#pragma unroll
    for (int i = 1; i < 4; ++i)
        if (i == quarter) q[0] = unit.q[2 * i], q[1] = unit.q[2 * i + 1];
#pragma unroll
    for (int i = 0; i < 8; ++i) w[i] = scale * (float)((int8_t)(q[i / 4] >> 8 * (i % 4)) - zero) + unit.shift;
}

} // namespace products

// grid (rows of out, columns / 8 / 64 rounded up), 64 threads.
extern "C" __global__ void matrix_rows(const RowsParams p) {
    follow();
    const int place = blockIdx.y * products::ROWS_THREADS + threadIdx.x;
    if (place >= p.columns / 8) return;
    float w[8];
    products::eight_weights(w, p.matrix, p.ids[blockIdx.x], p.columns, place / 4, place % 4);
    float4 *to = (float4 *)(p.out + (int64_t)blockIdx.x * p.columns + 8 * place);
    to[0] = make_float4(w[0] * p.factor, w[1] * p.factor, w[2] * p.factor, w[3] * p.factor);
    to[1] = make_float4(w[4] * p.factor, w[5] * p.factor, w[6] * p.factor, w[7] * p.factor);
}

namespace products {

__device__ __forceinline__ void unpack_weights(const UnpackParams &p) {
    follow();
    int of = 0, first = 0;
    for (; of < p.count - 1 && (int)blockIdx.x >= p.blocks[of]; ++of) first = p.blocks[of];
    const int of_row = p.columns[of] / 8, index = (blockIdx.x - first) * UNPACK_THREADS + threadIdx.x, place = index % of_row;
    if (index >= p.matrices[of].rows * of_row) return;
    float w[8];
    eight_weights(w, p.matrices[of], index / of_row, p.columns[of], place / 4, place % 4);
    using T = __nv_bfloat16;
    ((uint4 *)p.matrices[of].out)[index] = make_uint4(pack<T>(w[0], w[1]), pack<T>(w[2], w[3]), pack<T>(w[4], w[5]), pack<T>(w[6], w[7]));
}

} // namespace products

extern "C" __global__ void __launch_bounds__(products::UNPACK_THREADS) unpack_matrices(const __grid_constant__ UnpackParams p) { products::unpack_weights(p); }

// Weights, then tokens, by a thread block each.
#define ROWS(GROUPS)                                                                                                                                       \
    extern "C" __global__ void __launch_bounds__(products::UNPACK_THREADS) unpack_and_norm_rows_256_##GROUPS(const __grid_constant__ UnpackNormParams p) { \
        __shared__ float shared[32];                                                                                                                       \
        const int unpacking = p.unpack.blocks[p.unpack.count - 1];                                                                                         \
        if ((int)blockIdx.x < unpacking) products::unpack_weights(p.unpack);                                                                               \
        else layer::add_norm<products::UNPACK_THREADS, GROUPS, true>(p.norm, shared, blockIdx.x - unpacking);                                              \
    }
ROWS(1)
ROWS(4)
#undef ROWS

// grid (columns / 32 / 8 rounded up, tokens), 256 threads.
extern "C" __global__ void quantize_activations(const QuantizeParams p) {
    follow();
    const int block = blockIdx.x * 8 + threadIdx.x / 32;
    if (block >= p.columns / 32) return;
    const float x = p.x[(int64_t)blockIdx.y * p.columns + 32 * block + threadIdx.x % 32];
    quantize32(x, (uint8_t *)p.out + blockIdx.y * products::activation_bytes(p.columns), p.columns, block);
}

// grid count / 1024, 256 threads; count is a multiple of 4.
extern "C" __global__ void round_to_bf16(const RoundParams p) {
    follow();
    const int64_t i = ((int64_t)blockIdx.x * 256 + threadIdx.x) * 4;
    if (i >= p.count) return;
    const float4 x = *(const float4 *)(p.x + i);
    *(uint2 *)((__nv_bfloat16 *)p.out + i) = make_uint2(pack<__nv_bfloat16>(x.x, x.y), pack<__nv_bfloat16>(x.z, x.w));
}

// Four numbers for each thread.
extern "C" __global__ void gate_rows(const GateRowsParams p) {
    follow();
    const uint32_t index = blockIdx.x * 256 + threadIdx.x, of_row = p.columns / 4;
    const int64_t token = index / of_row, i = (int64_t)index * 4;
    if (i >= p.count) return;
    const int at = index % of_row * 4;
    const float4 gate = *(const float4 *)(p.gate + token * p.gate_row + at), up = *(const float4 *)(p.up + token * p.up_row + at);
    auto one = [&](float gate, float up) { return products::activated(gate, p.activation) * up; };
    const float4 out = make_float4(one(gate.x, up.x), one(gate.y, up.y), one(gate.z, up.z), one(gate.w, up.w));
    if (p.is_rounded) *(uint2 *)((__nv_bfloat16 *)p.out + i) = make_uint2(pack<__nv_bfloat16>(out.x, out.y), pack<__nv_bfloat16>(out.z, out.w));
    else *(float4 *)((float *)p.out + i) = out;
}

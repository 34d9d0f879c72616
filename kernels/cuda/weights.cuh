// Matrices as the GPU keeps them, and activations in 8 bits.
//
// A row of K weights is K / 32 units of 32; a lane takes one at a time, in loads of 16 bytes. Weights are w = scale * q + shift with q
// in 8 bits; q comes as low nibbles and what is above them. Blocks of ggml are taken apart into planes as they are loaded, so that loads
// are aligned and little is left to unpack.

#pragma once

#include "../layer_params.h"
#include "common.cuh"

namespace {

enum Format { F32, F16, BF16, AFFINE4, AFFINE5, Q8_0, Q4_K, Q5_K, Q6_K };

// The planes of a matrix. Nibbles [16 bytes a unit]: byte i holds weight i, and weight 16 + i above it.
//     AFFINE4 (Q4_0, Q4_1): nibbles; half2 scale and shift of a unit
//     AFFINE5 (Q5_0, Q5_1): the same; fifth bits, bit i of weight i [4 bytes a unit]
//     Q8_0: bytes [32 a unit]; half scale of a unit
//     Q4_K: nibbles; two bytes a unit, factors of scale and shift; half2 of those of 8 units
//     Q5_K: the same; fifth bits
//     Q6_K: nibbles; pairs above them, bits 2 j of byte b of half h of weight 16 h + 4 j + b [8 bytes a unit]; two scales of 8 bits a
//           unit, of 16 weights each; half scale of those of 8 units
//     others: one plane, the numbers

struct Unit {
    int q[8];       // four to an int
    float scale[2]; // of each half
    float shift;    // Q6_K has none: its weights are scale * (q - 32)
};

// Activations in 8 bits: integers [K], the sum of each 16, and a scale for each 32: in this order all are aligned.
struct Activations {
    int8_t *q;
    float *sums, *scales;
    __device__ Activations(const void *buffer, int columns) : q((int8_t *)buffer), sums((float *)(q + columns)), scales(sums + columns / 16) {}
};

__device__ __forceinline__ int4 load16(const void *from) { return __ldg((const int4 *)from); }

__device__ __forceinline__ void nibbles(Unit &unit, int4 x) {
    const int words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) unit.q[j] = words[j] & 0x0f0f0f0f, unit.q[4 + j] = words[j] >> 4 & 0x0f0f0f0f;
}

// Bits 0 to 3 as the lowest bits of four bytes.
__device__ __forceinline__ int spread(uint32_t bits) { return (int)((bits & 0xf) * 0x00204081u & 0x01010101u); }

// Unit number `at` of a matrix.
template <int FORMAT> __device__ __forceinline__ Unit unit_of(const Matrix &m, int64_t at) {
    Unit unit;
    if constexpr (FORMAT == Q8_0) {
        const int4 low = load16(m.planes[0] + 32 * at), high = load16(m.planes[0] + 32 * at + 16);
        unit.q[0] = low.x, unit.q[1] = low.y, unit.q[2] = low.z, unit.q[3] = low.w;
        unit.q[4] = high.x, unit.q[5] = high.y, unit.q[6] = high.z, unit.q[7] = high.w;
        unit.scale[0] = unit.scale[1] = __half2float(__ldg((const half *)m.planes[1] + at));
        unit.shift = 0.f;
        return unit;
    }
    nibbles(unit, load16(m.planes[0] + 16 * at));
    if constexpr (FORMAT == AFFINE5 || FORMAT == Q5_K) {
        const uint32_t high = __ldg((const uint32_t *)m.planes[FORMAT == AFFINE5 ? 2 : 3] + at);
#pragma unroll
        for (int j = 0; j < 8; ++j) unit.q[j] |= spread(high >> 4 * j) << 4;
    }
    if constexpr (FORMAT == AFFINE4 || FORMAT == AFFINE5) {
        const float2 affine = __half22float2(__ldg((const half2 *)m.planes[1] + at));
        unit.scale[0] = unit.scale[1] = affine.x, unit.shift = affine.y;
    } else if constexpr (FORMAT == Q4_K || FORMAT == Q5_K) {
        const uint32_t factors = __ldg((const uint16_t *)m.planes[1] + at);
        const float2 d = __half22float2(__ldg((const half2 *)m.planes[2] + at / 8));
        unit.scale[0] = unit.scale[1] = d.x * (float)(factors & 0xff), unit.shift = -d.y * (float)(factors >> 8);
    } else if constexpr (FORMAT == Q6_K) {
        const int2 high = __ldg((const int2 *)m.planes[1] + at);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            unit.q[j] |= (j < 2 ? high.x << (4 - 2 * j) : high.x >> (2 * j - 4)) & 0x30303030;
            unit.q[4 + j] |= (j < 2 ? high.y << (4 - 2 * j) : high.y >> (2 * j - 4)) & 0x30303030;
        }
        const char2 factors = __ldg((const char2 *)m.planes[2] + at);
        const float d = __half2float(__ldg((const half *)m.planes[3] + at / 8));
        unit.scale[0] = d * (float)factors.x, unit.scale[1] = d * (float)factors.y, unit.shift = 0.f;
    }
    return unit;
}

// 32 activations.
struct Thirty2 {
    int4 low, high;
    float scale;
    float2 sums;
};

__device__ __forceinline__ Thirty2 activations_at(const Activations &x, int u) {
    return {load16(x.q + 32 * u), load16(x.q + 32 * u + 16), __ldg(x.scales + u), __ldg((const float2 *)x.sums + u)};
}

template <int FORMAT> __device__ __forceinline__ float dot(const Unit &unit, const Thirty2 &x) {
    int low = __dp4a(unit.q[0], x.low.x, 0), high = __dp4a(unit.q[4], x.high.x, 0);
    low = __dp4a(unit.q[1], x.low.y, low), high = __dp4a(unit.q[5], x.high.y, high);
    low = __dp4a(unit.q[2], x.low.z, low), high = __dp4a(unit.q[6], x.high.z, high);
    low = __dp4a(unit.q[3], x.low.w, low), high = __dp4a(unit.q[7], x.high.w, high);
    if constexpr (FORMAT == Q6_K)
        return unit.scale[0] * (x.scale * (float)low - 32.f * x.sums.x) + unit.scale[1] * (x.scale * (float)high - 32.f * x.sums.y);
    if constexpr (FORMAT == Q8_0) return unit.scale[0] * x.scale * (float)(low + high);
    return unit.scale[0] * x.scale * (float)(low + high) + unit.shift * (x.sums.x + x.sums.y);
}

// Eight neighbouring weights of a plain matrix.
template <int FORMAT> __device__ __forceinline__ void plain8(float (&w)[8], const uint8_t *from, int64_t i) {
    if constexpr (FORMAT == F32) {
        const float4 a = __ldg((const float4 *)((const float *)from + i)), b = __ldg((const float4 *)((const float *)from + i) + 1);
        w[0] = a.x, w[1] = a.y, w[2] = a.z, w[3] = a.w, w[4] = b.x, w[5] = b.y, w[6] = b.z, w[7] = b.w;
    } else {
        const int4 x = load16(from + 2 * i);
        const int words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            float2 two;
            if constexpr (FORMAT == F16) two = __half22float2(*reinterpret_cast<const half2 *>(&words[j]));
            else two = make_float2(__int_as_float(words[j] << 16), __int_as_float(words[j] & 0xffff0000));
            w[2 * j] = two.x, w[2 * j + 1] = two.y;
        }
    }
}

// Rounds 32 numbers to 8 bits, one of each lane: the integers, the scale of all, and the sum of each half.
__device__ __forceinline__ void quantize32(float x, void *buffer, int columns, int block) {
    const int lane = threadIdx.x % 32;
    float largest = fabsf(x), sum;
#pragma unroll
    for (int step = 16; step; step /= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, step));
    const float scale = largest / 127.f, inverse = largest > 0.f ? 127.f / largest : 0.f;
    const int q = __float2int_rn(x * inverse);
    int whole = q;
#pragma unroll
    for (int step = 8; step; step /= 2) whole += __shfl_xor_sync(~0u, whole, step);
    sum = scale * (float)whole;
    const Activations to(buffer, columns);
    to.q[32 * block + lane] = (int8_t)q;
    const bool broken = __any_sync(~0u, x != x);
    if (lane == 0) to.scales[block] = broken ? NAN : scale;
    if (lane % 16 == 0) to.sums[2 * block + lane / 16] = sum;
}

// Rounds four neighbours to 8 bits, where they are columns; eight threads hold a block of 32. For whole warps.
__device__ __forceinline__ void quantize4(float4 x, void *buffer, int columns, int at) {
    float largest = fmaxf(fmaxf(fabsf(x.x), fabsf(x.y)), fmaxf(fabsf(x.z), fabsf(x.w)));
    if (x.x != x.x || x.y != x.y || x.z != x.z || x.w != x.w) largest = NAN;
#pragma unroll
    for (int step = 4; step; step /= 2) {
        const float other = __shfl_xor_sync(~0u, largest, step);
        largest = other > largest || other != other ? other : largest;
    }
    const float scale = largest / 127.f, inverse = largest > 0.f ? 127.f / largest : 0.f;
    const int q[4] = {__float2int_rn(x.x * inverse), __float2int_rn(x.y * inverse), __float2int_rn(x.z * inverse), __float2int_rn(x.w * inverse)};
    int whole = q[0] + q[1] + q[2] + q[3];
    whole += __shfl_xor_sync(~0u, whole, 1);
    whole += __shfl_xor_sync(~0u, whole, 2);
    if (at >= columns) return;
    const Activations to(buffer, columns);
    *(int *)(to.q + at) = (q[0] & 0xff) | (q[1] & 0xff) << 8 | (q[2] & 0xff) << 16 | q[3] << 24;
    if (at % 32 == 0) to.scales[at / 32] = scale;
    if (at % 16 == 0) to.sums[at / 16] = scale * (float)whole;
}

} // namespace

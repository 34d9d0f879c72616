// What token routers' gates share: the activation of their hidden layer, and the verdict on a single token.

#pragma once

#include "../layer_params.h"
#include "common.cuh"

namespace {

__device__ __forceinline__ float gelu(float x) { return 0.5f * x * (1.f + erff(x * 0.70710678118654752f)); }

// GELU of so many numbers of a layer, `at(row)`, by a warp; those beyond its rows are 0.
template <int N, typename At> __device__ __forceinline__ void activate(float (&x)[N], int rows, At at) {
    // All are under way before one is waited for.
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = threadIdx.x % 32 + 32 * i < rows ? at(threadIdx.x % 32 + 32 * i) : 0.f;
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = gelu(x[i]);
}

// A gate's verdict on the token at `t`, by one warp: what it takes beside the scores does not depend on the kernel before.
class Decision {
    static constexpr int HELD = 4; // weights of a lane that are fetched early
    const Verdict &v;
    uint8_t *mask;
    float weights[HELD], bias;
    uint32_t old;
    int head, t;

  public:
    __device__ __forceinline__ Decision(const Verdict &v, int head, int max_pages, int t) : v(v), weights{}, bias(0.f), head(head), t(t) {
        mask = v.masks + (int64_t)head * max_pages * (PAGE / OCTET) + t / OCTET;
        old = *mask;
        if (!v.weight) return;
        bias = v.bias[head];
#pragma unroll
        for (int i = 0; i < HELD; ++i)
            if (place(i) < v.width) weights[i] = v.weight[head * v.width + place(i)];
    }

    // Notes it for queries that the token is out of the window of, and for the host.
    __device__ __forceinline__ void make() const {
        float score = 0.f;
        if (v.scores && v.weight) {
            float x[HELD];
            activate(x, v.width, [&](int row) { return v.scores[row]; });
#pragma unroll
            for (int i = 0; i < HELD; ++i) score += x[i] * weights[i];
            for (int i = place(HELD); i < v.width; i += 32) score += gelu(v.scores[i]) * v.weight[head * v.width + i];
            score = sum_of_warp(score) + bias;
        } else if (v.scores) score = v.scores[head];
        if (threadIdx.x % 32) return;
        const bool keeps = !v.scores || t < v.sinks || score >= v.tau;
        *mask = old & ~(1 << t % OCTET) | keeps << t % OCTET;
        v.kept[head] = keeps;
    }

  private:
    static __device__ __forceinline__ int place(int i) { return threadIdx.x % 32 + 32 * i; }
};

} // namespace

// Attention of many queries: a tile of queries of a group reads one ascending list of octets. Dense is the full list.
//
// Framework-free, f32 sums, results that do not depend on timing; see common.cuh.

#include "common.cuh"

namespace {
constexpr int ROWS = 128, KEYS = 64, WARPS = 8;
}

// grid (tiles, kv_heads), WARPS * 32 threads. A row is a query and a head of the group: query * G + head; at most ROWS of them.
struct PrefillParams {
    const void *q;        // [tokens, kv_heads * G, D] T
    const void *k;        // [pages * 64, D] T
    const void *v;        // [pages * 64, D] T
    const int *pages;     // [kv_heads, max_pages]
    const int *octets;    // [tiles, kv_heads, max_octets] where the selected ones lie (row / 8), all visible to every query; null: none
    const int *counts;    // [tiles, kv_heads] of them
    const int *tails;     // [tiles] first octet of those that all are read, up to each query's own position; null: 0
    int max_pages, max_octets;
    int start;            // position of the first query
    int tokens;           // queries
    int tile;             // queries of a tile; tile * G <= ROWS
    int kv_heads;
    float scale;
    void *out;            // [tokens, kv_heads * G, D] T
};

template <typename T, int D, int G> __global__ void __launch_bounds__(WARPS * 32, 1) attend_prefill(const PrefillParams p) {
    extern __shared__ __align__(128) unsigned char shared[];
    constexpr int CHUNKS = D / 8, TILE_BYTES = KEYS * D * 2;
    const int head = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int tile = gridDim.x - 1 - blockIdx.x; // the longest first
    follow();
    const int first = tile * p.tile, queries = min(p.tile, p.tokens - first);
    const int row_of_list = tile * p.kv_heads + head;
    const int listed = p.octets ? p.counts[row_of_list] : 0;
    const int *list = p.octets + (int64_t)row_of_list * p.max_octets;
    const int *pages = p.pages + (int64_t)head * p.max_pages;
    const int tail = p.tails ? p.tails[tile] : 0;
    const int newest = p.start + first + queries - 1;
    const int octets = listed + newest / OCTET + 1 - tail, steps = (octets + KEYS / OCTET - 1) / (KEYS / OCTET);
    const uint32_t base = shared_address(shared);

    auto fetch = [&](int step, int stage) {
        if (step < steps) {
            const uint32_t to = base + stage * 2 * TILE_BYTES;
#pragma unroll
            for (int i = 0; i < KEYS * CHUNKS / (WARPS * 32); ++i) {
                const int index = threadIdx.x + WARPS * 32 * i, row = index / CHUNKS, chunk = index % CHUNKS;
                const int at = step * (KEYS / OCTET) + row / OCTET, octet = tail + at - listed;
                const bool selected = at < listed, there = selected || at < octets && octet * OCTET + row % OCTET <= newest;
                int place = 0;
                if (selected) place = list[at];
                else if (there) place = pages[octet / (PAGE / OCTET)] * (PAGE / OCTET) + octet % (PAGE / OCTET);
                const int64_t from = there ? ((int64_t)place * OCTET + row % OCTET) * D + chunk * 8 : 0;
                const uint32_t slot = row * D * 2 + ((chunk ^ (row & 7)) * 16);
                copy_async(to + slot, (const T *)p.k + from, there);
                copy_async(to + TILE_BYTES + slot, (const T *)p.v + from, there);
            }
        }
        asm volatile("cp.async.commit_group;");
    };
    fetch(0, 0);

    // This warp's 16 rows as the left-hand matrix: rows lane / 4 and 8 more.
    const int own[2] = {warp * 16 + lane / 4, warp * 16 + lane / 4 + 8};
    int position[2]; // of the row's query; of rows that are none, before all keys
    uint32_t q[D / 16][4];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const bool is_row = own[r] < queries * G;
        position[r] = is_row ? p.start + first + own[r] / G : -1;
        const int64_t at = is_row ? ((int64_t)(first + own[r] / G) * p.kv_heads * G + head * G + own[r] % G) * D : 0;
        const T *from = (const T *)p.q + at + 2 * (lane % 4);
#pragma unroll
        for (int i = 0; i < D / 16; ++i) {
            q[i][r] = is_row ? *(const uint32_t *)(from + 16 * i) : 0;
            q[i][2 + r] = is_row ? *(const uint32_t *)(from + 16 * i + 8) : 0;
        }
    }
    float sums[D / 8][4] = {};
    float maximum[2] = {-INFINITY, -INFINITY}, weight[2] = {0.f, 0.f};
    const float scale = p.scale * LOG2_E;
    const int oldest = p.start + first; // up to here every query sees everything

    for (int step = 0; step < steps; ++step) {
        fetch(step + 1, (step + 1) & 1);
        asm volatile("cp.async.wait_group 1;");
        __syncthreads();
        const uint32_t keys = base + (step & 1) * 2 * TILE_BYTES, values = keys + TILE_BYTES;
        float c[KEYS / 8][4];
#pragma unroll
        for (int n = 0; n < KEYS / 8; ++n) c[n][0] = c[n][1] = c[n][2] = c[n][3] = 0.f;
        // Scores [16 x KEYS]: two columns of eight keys, two steps of 16 dimensions at a time.
#pragma unroll
        for (int i = 0; i < D / 16; ++i) {
#pragma unroll
            for (int n = 0; n < KEYS / 8; n += 2) {
                uint32_t b[4];
                const int row = n * 8 + lane / 16 * 8 + lane % 8;
                load_matrices(b, keys + row * D * 2 + (((2 * i + lane / 8 % 2) ^ (row & 7)) * 16));
                multiply<T>(c[n], q[i], b[0], b[1]);
                multiply<T>(c[n + 1], q[i], b[2], b[3]);
            }
        }
        // Positions of this step's keys; those of selected octets are seen by all.
        const int at = step * (KEYS / OCTET), after = (tail + at - listed) * OCTET;
        const bool masked = at + KEYS / OCTET > octets || at + KEYS / OCTET > listed && after + KEYS - 1 > oldest;
        if (masked) {
#pragma unroll
            for (int n = 0; n < KEYS / 8; ++n) {
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    const int key = after + n * 8 + 2 * (lane % 4) + j % 2;
                    if (at + n >= octets || at + n >= listed && key > position[j / 2]) c[n][j] = -INFINITY;
                }
            }
        }
        float factor[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float best = maximum[r];
#pragma unroll
            for (int n = 0; n < KEYS / 8; ++n) best = fmaxf(best, fmaxf(c[n][2 * r], c[n][2 * r + 1]) * scale);
            best = fmaxf(best, __shfl_xor_sync(~0u, best, 1));
            best = fmaxf(best, __shfl_xor_sync(~0u, best, 2));
            const float zero = best == -INFINITY ? 0.f : best; // a row that sees nothing yet
            factor[r] = exp2_approx(maximum[r] - zero);
            maximum[r] = best;
            float sum = 0.f;
#pragma unroll
            for (int n = 0; n < KEYS / 8; ++n) {
                c[n][2 * r] = exp2_approx(fmaf(c[n][2 * r], scale, -zero));
                c[n][2 * r + 1] = exp2_approx(fmaf(c[n][2 * r + 1], scale, -zero));
                sum += c[n][2 * r] + c[n][2 * r + 1];
            }
            weight[r] = weight[r] * factor[r] + sum;
        }
#pragma unroll
        for (int d = 0; d < D / 8; ++d) {
            sums[d][0] *= factor[0], sums[d][1] *= factor[0];
            sums[d][2] *= factor[1], sums[d][3] *= factor[1];
        }
        // Sums [16 x D] += weights [16 x KEYS] values [KEYS x D].
#pragma unroll
        for (int n = 0; n < KEYS / 16; ++n) {
            const uint32_t a[4] = {pack<T>(c[2 * n][0], c[2 * n][1]), pack<T>(c[2 * n][2], c[2 * n][3]),
                                   pack<T>(c[2 * n + 1][0], c[2 * n + 1][1]), pack<T>(c[2 * n + 1][2], c[2 * n + 1][3])};
            const int row = n * 16 + lane % 16;
#pragma unroll
            for (int d = 0; d < D / 8; d += 2) {
                uint32_t b[4];
                load_matrices_transposed(b, values + row * D * 2 + (((d + lane / 16) ^ (row & 7)) * 16));
                multiply<T>(sums[d], a, b[0], b[1]);
                multiply<T>(sums[d + 1], a, b[2], b[3]);
            }
        }
        __syncthreads(); // before the stage is written again
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        weight[r] += __shfl_xor_sync(~0u, weight[r], 1);
        weight[r] += __shfl_xor_sync(~0u, weight[r], 2);
        if (position[r] < 0) continue;
        T *to = (T *)p.out + ((int64_t)(first + own[r] / G) * p.kv_heads * G + head * G + own[r] % G) * D + 2 * (lane % 4);
#pragma unroll
        for (int d = 0; d < D / 8; ++d) *(uint32_t *)(to + 8 * d) = pack<T>(sums[d][2 * r] / weight[r], sums[d][2 * r + 1] / weight[r]);
    }
}

extern "C" int foveate_attend_prefill(const PrefillParams *p, int bf16, int head_dim, int group, cudaStream_t stream) {
    if (p->tile * group > ROWS) return -1;
    const dim3 grid((p->tokens + p->tile - 1) / p->tile, p->kv_heads);
    const size_t bytes = (size_t)2 * 2 * KEYS * head_dim * 2;
#define SHAPE(D, G)                                                                                                                        \
    if (head_dim == D && group == G)                                                                                                       \
        return bf16 ? launch(attend_prefill<__nv_bfloat16, D, G>, *p, grid, WARPS * 32, bytes, stream)                                      \
                    : launch(attend_prefill<half, D, G>, *p, grid, WARPS * 32, bytes, stream);
    SHAPE(64, 1) SHAPE(64, 2) SHAPE(64, 3) SHAPE(64, 4) SHAPE(64, 7) SHAPE(64, 8)
    SHAPE(128, 1) SHAPE(128, 2) SHAPE(128, 4) SHAPE(128, 5) SHAPE(128, 7) SHAPE(128, 8)
#undef SHAPE
    return -1;
}

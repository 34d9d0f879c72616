// Attention of many queries: a tile of queries of a group reads one ascending list of octets. Dense is the full list.
//
// Device code only, f32 sums, results that do not depend on timing; see params.h.
//
// D: head_dim.

#include "common.cuh"

namespace prefill {

constexpr int ROWS = 128, WARPS = 8;

// Keys of a step: fewer where the sums of a row take most registers.
template <int D> constexpr int KEYS_OF = D > 128 ? 32 : 64;

// grid (tiles, kv_heads), or by turns (kv_heads, tiles), WARPS * 32 threads. A row is a query and a head of the group: query * group_size + head; at most ROWS.
template <typename T, int D> __device__ void attend(const PrefillParams &p) {
    extern __shared__ __align__(128) unsigned char shared[];
    constexpr int KEYS = KEYS_OF<D>, CHUNKS = D / 8, TILE_BYTES = KEYS * D * 2, OCTETS = KEYS / OCTET;
    __shared__ Octet listed[2][OCTETS];
    __shared__ uint32_t partly[2]; // octets of a step that not every query sees whole
    __shared__ uint32_t places[2][KEYS];
    const Turn turn(p);
    const int tile = turn.tile, head = turn.head, warp = threadIdx.x / 32, lane = threadIdx.x % 32, G = p.group_size;
    follow();
    const TileQueries of_tile(p, tile);
    const int first = of_tile.first, queries = of_tile.count;
    const int row_of_list = (p.lists ? p.lists[tile] : tile) * p.kv_heads + head;
    const int eldest = of_tile.eldest(p), newest = of_tile.newest(p);
    const int local_window = p.windows ? p.windows[row_of_list / p.kv_heads] : p.local_window;
    PromptReads reads(p, head, row_of_list, of_tile);
    if (reads.hidden) reads.count_gathered();
    Gathering gathering;
    const int steps = (reads.octets() + OCTETS - 1) / OCTETS;
    const uint32_t base = shared_address(shared);

    auto fetch = [&](int step, int stage) {
        if (step < steps) {
            const uint32_t to = base + stage * 2 * TILE_BYTES;
            const int first_gathered = reads.gathered_from(step * OCTETS);
            if (reads.gathered && first_gathered > -KEYS) {
                if (threadIdx.x < KEYS)
                    places[stage][threadIdx.x] = gathering.slot(reads, min(max(first_gathered + (int)threadIdx.x, 0), reads.gathered - 1));
                __syncthreads();
            }
            if (warp == 0) {
                const Octet octet = lane < OCTETS ? reads.octet_by_branches(step * OCTETS + lane) : Octet{0xff, -1};
                const bool whole = (octet.row & 0xff) == 0xff &&
                    (octet.position < 0 || octet.position + OCTET - 1 <= eldest && (!p.sliding_window || octet.position > newest - p.sliding_window));
                const uint32_t bits = __ballot_sync(~0u, !whole);
                if (lane < OCTETS) listed[stage][lane] = octet;
                if (lane == 0) partly[stage] = bits;
            }
#pragma unroll
            for (int i = 0; i < KEYS * CHUNKS / (WARPS * 32); ++i) {
                const int index = threadIdx.x + WARPS * 32 * i, row = index / CHUNKS, chunk = index % CHUNKS;
                const Octet octet = reads.octet_by_branches(step * OCTETS + row / OCTET);
                // What no query sees stays out: it may be anything, and no number hides it.
                const bool there = octet.position < 0 ? octet.row >> row % OCTET & 1 : octet.position + row % OCTET <= newest;
                const int slot_of_row = octet.position == GATHERED ? places[stage][row] : (octet.row >> 8) * OCTET + row % OCTET;
                const int64_t from = there ? (int64_t)slot_of_row * D + chunk * 8 : 0;
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
        position[r] = is_row ? eldest + own[r] / G : -1;
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
        const uint32_t some = partly[step & 1];
        if (some) {
#pragma unroll
            for (int n = 0; n < KEYS / 8; ++n) {
                if (!(some >> n & 1)) continue;
                const Octet octet = listed[step & 1][n];
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    const uint32_t bits = visible(octet, position[r], p.sliding_window, local_window) >> 2 * (lane % 4);
                    if (!(bits & 1)) c[n][2 * r] = -INFINITY;
                    if (!(bits & 2)) c[n][2 * r + 1] = -INFINITY;
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
        const int64_t to = ((int64_t)(first + own[r] / G) * p.kv_heads * G + head * G + own[r] % G) * D + 2 * (lane % 4);
#pragma unroll
        for (int d = 0; d < D / 8; ++d) put_out(p, to + 8 * d, sums[d][2 * r] / weight[r], sums[d][2 * r + 1] / weight[r]);
    }
}

} // namespace prefill

#define ATTEND(NAME, T, D) \
    extern "C" __global__ void __launch_bounds__(prefill::WARPS * 32, 1) attend_prefill_##NAME##_##D(const PrefillParams p) { prefill::attend<T, D>(p); }
ATTEND(f16, half, 64) ATTEND(f16, half, 128) ATTEND(f16, half, 256)
ATTEND(bf16, __nv_bfloat16, 64) ATTEND(bf16, __nv_bfloat16, 128) ATTEND(bf16, __nv_bfloat16, 256)
#undef ATTEND

// Attention of one query, and what comes before it: scores of block summaries, and the selection of blocks.
//
// Device code only, plain pointers (params.h). What is read is a list of octets, ascending. f32 sums; results do not depend on timing.
//
// D: head_dim.

#include "common.cuh"
#include "weights.cuh"

namespace decode {

constexpr int TILE = 16, WARPS = 4, STAGES = 3, QUERIES = 8, MOST_SPLITS = 256, TILES_OF_A_SPLIT = 8;

// grid (most splits, kv_heads, ceil(group_size / 8)), WARPS * 32 threads. Each split takes its share of the list; the last one to
// finish merges all, in order. How many splits there are follows from what is read alone.
template <typename T, int D> __device__ void attend(const DecodeParams &p) {
    extern __shared__ __align__(128) unsigned char shared[];
    __shared__ uint32_t seen[WARPS][STAGES]; // the keys of a tile that the query sees, as bits
    constexpr int CHUNKS = D / 8; // of 16 bytes in a row
    constexpr int TILE_BYTES = TILE * D * 2;
    const int head = blockIdx.y, split = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int first_query = head * p.group_size + blockIdx.z * QUERIES, G = min(QUERIES, p.group_size - (int)blockIdx.z * QUERIES);
    const int part = head * gridDim.z + blockIdx.z; // of the partial results
    follow();
    const int t = *p.position;
    const int oldest = p.sliding_window ? max(0, t - p.sliding_window + 1) / OCTET : 0;
    const int octets = p.octets ? p.counts[head] : t / OCTET + 1 - oldest;
    const int tiles = (octets + 1) / 2;
    const int splits = min((int)gridDim.x, max(1, tiles / TILES_OF_A_SPLIT));
    if (split >= splits) return;
    const int first = (int)((int64_t)tiles * split / splits), end = (int)((int64_t)tiles * (split + 1) / splits);
    const uint32_t own = shared_address(shared) + warp * STAGES * 2 * TILE_BYTES;
    const Octet *list = p.octets ? p.octets + (int64_t)head * p.max_octets : nullptr;
    const int *pages = p.pages + (int64_t)head * p.max_pages;

    auto octet_at = [&](int index) {
        if (index >= octets) return Octet{0, -1};
        if (list) return list[index];
        const int octet = oldest + index;
        return Octet{(pages[octet / (PAGE / OCTET)] * (PAGE / OCTET) + octet % (PAGE / OCTET)) << 8 | 0xff, octet * OCTET};
    };
    // Brings a tile's keys and values: 16 rows, swizzled so that eight rows of a chunk lie in different banks.
    auto fetch = [&](int tile, int stage) {
        if (tile < end) {
            const Octet pair[2] = {octet_at(2 * tile), octet_at(2 * tile + 1)};
            const uint32_t bits = visible(pair[0], t, p.sliding_window, p.local_window) | visible(pair[1], t, p.sliding_window, p.local_window) << OCTET;
            if (lane == 0) seen[warp][stage] = bits;
            const uint32_t to = own + stage * 2 * TILE_BYTES;
#pragma unroll
            for (int i = 0; i < TILE * CHUNKS / 32; ++i) {
                const int index = lane + 32 * i, row = index / CHUNKS, chunk = index % CHUNKS;
                const bool there = bits >> row & 1;
                const int64_t at = there ? ((int64_t)(pair[row / OCTET].row >> 8) * OCTET + row % OCTET) * D + chunk * 8 : 0;
                const uint32_t place = row * D * 2 + ((chunk ^ (row & 7)) * 16);
                copy_async(to + place, (const T *)p.k + at, there);
                copy_async(to + TILE_BYTES + place, (const T *)p.v + at, there);
            }
        }
        asm volatile("cp.async.commit_group;");
    };

    // Queries as the right-hand matrix: column lane / 4, rows 2 (lane % 4) and on.
    uint32_t q[D / 16][2];
    {
        const int row = lane / 4;
        const T *from = (const T *)p.q + ((int64_t)first_query + (row < G ? row : 0)) * D + 2 * (lane % 4);
#pragma unroll
        for (int i = 0; i < D / 16; ++i) {
            q[i][0] = row < G ? *(const uint32_t *)(from + 16 * i) : 0;
            q[i][1] = row < G ? *(const uint32_t *)(from + 16 * i + 8) : 0;
        }
    }
    float sums[D / 16][4] = {};
    float maximum[2] = {-INFINITY, -INFINITY}, weight[2] = {0.f, 0.f};
    const float scale = p.scale * LOG2_E;

#pragma unroll
    for (int stage = 0; stage < STAGES - 1; ++stage) fetch(first + warp + stage * WARPS, stage);
    int stage = 0;
    for (int tile = first + warp; tile < end; tile += WARPS) {
        fetch(tile + (STAGES - 1) * WARPS, (stage + STAGES - 1) % STAGES);
        asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 1));
        __syncwarp();
        const uint32_t keys = own + stage * 2 * TILE_BYTES, values = keys + TILE_BYTES;
        const uint32_t bits = seen[warp][stage];
        stage = (stage + 1) % STAGES;
        // Scores [16 keys x 8 queries].
        float c[4] = {};
        {
            const int row = lane % 16;
#pragma unroll
            for (int i = 0; i < D / 16; ++i) {
                uint32_t a[4];
                load_matrices(a, keys + row * D * 2 + (((2 * i + lane / 16) ^ (row & 7)) * 16));
                multiply<T>(c, a, q[i][0], q[i][1]);
            }
        }
        // Keys that are not seen: row lane / 4 and 8 more.
        const bool there[2] = {(bits >> lane / 4 & 1) != 0, (bits >> (OCTET + lane / 4) & 1) != 0};
#pragma unroll
        for (int j = 0; j < 4; ++j) c[j] = there[j / 2] ? c[j] * scale : -INFINITY;
        float factor[2];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            float best = fmaxf(c[j], c[j + 2]);
            best = fmaxf(best, __shfl_xor_sync(~0u, best, 4));
            best = fmaxf(best, __shfl_xor_sync(~0u, best, 8));
            best = fmaxf(best, __shfl_xor_sync(~0u, best, 16));
            best = fmaxf(best, maximum[j]);
            const float zero = best == -INFINITY ? 0.f : best; // nothing seen yet
            factor[j] = exp2_approx(maximum[j] - zero);
            maximum[j] = best;
            c[j] = exp2_approx(c[j] - zero);
            c[j + 2] = exp2_approx(c[j + 2] - zero);
            weight[j] = weight[j] * factor[j] + c[j] + c[j + 2];
        }
        const uint32_t b0 = transposed(pack<T>(c[0], c[1])), b1 = transposed(pack<T>(c[2], c[3]));
        // Sums [D x 8 queries] += values' [D x 16] weights [16 x 8].
        const int row = lane / 16 * 8 + lane % 8;
#pragma unroll
        for (int i = 0; i < D / 16; ++i) {
            uint32_t a[4];
            load_matrices_transposed(a, values + row * D * 2 + (((2 * i + lane / 8 % 2) ^ (row & 7)) * 16));
            sums[i][0] *= factor[0];
            sums[i][1] *= factor[1];
            sums[i][2] *= factor[0];
            sums[i][3] *= factor[1];
            multiply<T>(sums[i], a, b0, b1);
        }
        __syncwarp(); // before the stage is written again
    }
    asm volatile("cp.async.wait_all;");
#pragma unroll
    for (int j = 0; j < 2; ++j) {
        weight[j] += __shfl_xor_sync(~0u, weight[j], 4);
        weight[j] += __shfl_xor_sync(~0u, weight[j], 8);
        weight[j] += __shfl_xor_sync(~0u, weight[j], 16);
    }

    // The warps' parts, side by side in shared memory: [WARPS][QUERIES][D + 2].
    __syncthreads();
    float *parts = reinterpret_cast<float *>(shared);
    constexpr int ROW = D + 2;
    {
        float *to = parts + (warp * QUERIES + 2 * (lane % 4)) * ROW;
#pragma unroll
        for (int i = 0; i < D / 16; ++i) {
#pragma unroll
            for (int j = 0; j < 4; ++j) to[(j % 2) * ROW + 16 * i + lane / 4 + j / 2 * 8] = sums[i][j];
        }
        if (lane < 4) {
            for (int j = 0; j < 2; ++j) {
                to[j * ROW + D] = maximum[j];
                to[j * ROW + D + 1] = weight[j];
            }
        }
    }
    __syncthreads();
    // This split's sums [QUERIES, D], and the maximum and weight of each query [QUERIES, 2].
    float *all_sums = p.partial + (int64_t)part * gridDim.x * QUERIES * D;
    float *all_weights = p.partial + (int64_t)gridDim.y * gridDim.z * gridDim.x * QUERIES * D + (int64_t)part * gridDim.x * QUERIES * 2;
    for (int index = threadIdx.x; index < G * D; index += WARPS * 32) {
        const int query = index / D, d = index % D;
        const float *row = parts + query * ROW;
        float best = -INFINITY, sum = 0.f, total = 0.f;
#pragma unroll
        for (int i = 0; i < WARPS; ++i) best = fmaxf(best, row[i * QUERIES * ROW + D]);
#pragma unroll
        for (int i = 0; i < WARPS; ++i) {
            const float *one = row + i * QUERIES * ROW, factor = one[D] == -INFINITY ? 0.f : exp2_approx(one[D] - best);
            sum += factor * one[d];
            total += factor * one[D + 1];
        }
        if (splits == 1) {
            const int at = first_query * D + index;
            p.out[at] = sum / total;
            if (p.out_q8) quantize32(sum / total, p.out_q8, gridDim.y * p.group_size * D, at / 32);
            continue;
        }
        all_sums[(int64_t)split * QUERIES * D + index] = sum;
        if (d == 0) *(float2 *)(all_weights + 2 * (split * QUERIES + query)) = make_float2(best, total);
    }
    if (splits == 1) return;
    __shared__ bool last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) last = atomicAdd(p.tickets + part, 1) == splits - 1;
    __syncthreads();
    if (!last) return;
    __threadfence();
    // What each split counts for, [G][splits] in shared memory, then the sums: always in the same order.
    for (int query = warp; query < G; query += WARPS) {
        float2 own[MOST_SPLITS / 32];
        float best = -INFINITY, total = 0.f;
#pragma unroll
        for (int i = 0; i < MOST_SPLITS / 32; ++i) {
            const int other = lane + 32 * i;
            own[i] = other < splits ? __ldcg((const float2 *)all_weights + other * QUERIES + query) : make_float2(-INFINITY, 0.f);
            best = fmaxf(best, own[i].x);
        }
        for (int step = 16; step; step /= 2) best = fmaxf(best, __shfl_xor_sync(~0u, best, step));
#pragma unroll
        for (int i = 0; i < MOST_SPLITS / 32; ++i) {
            own[i].x = own[i].x == -INFINITY ? 0.f : exp2_approx(own[i].x - best);
            total += own[i].x * own[i].y;
        }
        total = sum_of_warp(total);
#pragma unroll
        for (int i = 0; i < MOST_SPLITS / 32; ++i)
            if (lane + 32 * i < splits) parts[query * splits + lane + 32 * i] = own[i].x / total;
    }
    __syncthreads();
    for (int index = threadIdx.x; index < G * D; index += WARPS * 32) {
        const float *factors = parts + index / D * splits;
        float sum = 0.f;
#pragma unroll 16
        for (int i = 0; i < splits; ++i) sum += factors[i] * __ldcg(all_sums + (int64_t)i * QUERIES * D + index);
        const int at = first_query * D + index;
        p.out[at] = sum;
        if (p.out_q8) quantize32(sum, p.out_q8, gridDim.y * p.group_size * D, at / 32);
    }
    if (threadIdx.x == 0) p.tickets[part] = 0;
}

// The block of the newest position outside the window of the query at `t`; 0 too where all is in the window.
__device__ __forceinline__ int edge_of(int t, int window, int block_size) { return t >= window ? (t - window) / block_size : 0; }

// The position of the first query of tile number `tile` of a step from `start` on.
__device__ __forceinline__ int first_of(int start, int tile, int size) { return max(start, (start / size + tile) * size); }

// grid (ceil(blocks / (WARPS * TILE)), kv_heads, rows), WARPS * 32 threads.
template <typename T, int D> __device__ void score(const ScoreParams &p) {
    const int head = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32, kv_heads = gridDim.y, group = p.group_size;
    const int first = (blockIdx.x * WARPS + warp) * TILE;
    follow();
    const int blocks = edge_of(first_of(*p.position, p.first_row + blockIdx.z, p.tile), p.window, p.block_size);
    if (first >= blocks) return;
    const int width = p.kind ? 2 * D : D;
    // The order of a product's terms is free: a lane takes 8 neighbours of a row, which two steps of 16 share.
    const int column = 8 * (lane % 4), row = lane / 4;
    const int64_t page = ((int64_t)(first / PAGE) * kv_heads + head) * PAGE + first % PAGE;
    const T *from = (const T *)p.summaries + page * width + column;
    const bool low = first + row < blocks, high = first + row + 8 < blocks;
    uint4 a[2][2 * D / 32];
#pragma unroll
    for (int i = 0; i < 2 * D / 32; ++i) {
        const uint4 zero = {0, 0, 0, 0};
        const bool in = 32 * i < width;
        a[0][i] = low && in ? __ldcs((const uint4 *)(from + (int64_t)row * width + 32 * i)) : zero;
        a[1][i] = high && in ? __ldcs((const uint4 *)(from + (int64_t)(row + 8) * width + 32 * i)) : zero;
    }
    float best[2] = {-INFINITY, -INFINITY};
    for (int queries = 0; queries < group; queries += QUERIES) {
        const int member = queries + row;
        const int q_head = head * group + (member < group ? member : 0);
        const T *q = (const T *)p.q + (p.expanded ? ((int64_t)blockIdx.z * kv_heads * group + q_head) * 2 * D : (int64_t)q_head * D) + column;
        float c[4] = {};
#pragma unroll
        for (int i = 0; i < 2 * D / 32; ++i) {
            if (32 * i >= width) break;
            const bool second = i >= D / 32;
            alignas(16) T x[8];
            *(uint4 *)x = *(const uint4 *)(q + 32 * (p.expanded ? i : i % (D / 32)));
            uint32_t b[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                float pair[2] = {wide(x[2 * j]), wide(x[2 * j + 1])};
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    if (member >= group) pair[e] = 0.f;
                    else if (p.expanded) continue;
                    else if (p.kind == 1) pair[e] = second ? fminf(pair[e], 0.f) : fmaxf(pair[e], 0.f);
                    else if (second) pair[e] = fabsf(pair[e]);
                }
                b[j] = pack<T>(pair[0], pair[1]);
            }
            const uint32_t one[4] = {a[0][i].x, a[1][i].x, a[0][i].y, a[1][i].y}, two[4] = {a[0][i].z, a[1][i].z, a[0][i].w, a[1][i].w};
            multiply<T>(c, one, b[0], b[1]);
            multiply<T>(c, two, b[2], b[3]);
        }
        // The best of the group: queries 2 (lane % 4) and one more, of lanes that share a row.
#pragma unroll
        for (int j = 0; j < 4; ++j)
            if (queries + 2 * (lane % 4) + j % 2 < group) best[j / 2] = fmaxf(best[j / 2], c[j]);
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) {
        best[j] = fmaxf(best[j], __shfl_xor_sync(~0u, best[j], 1));
        best[j] = fmaxf(best[j], __shfl_xor_sync(~0u, best[j], 2));
    }
    float *scores = p.scores + ((int64_t)blockIdx.z * kv_heads + head) * p.max_scores + first;
    if (lane % 4 == 0) {
        if (low) scores[row] = best[0];
        if (high) scores[row + 8] = best[1];
    }
}

constexpr int SELECT = 1024, BIN_BITS = 11, BINS = 1 << BIN_BITS;

// What the threads of a block tell each other.
struct Shared {
    int histogram[BINS], sums[SELECT / 32], chosen_bin, left;
    uint32_t ends[2][SELECT / 32];
};

// The sum of the numbers of the threads before this one, and of all.
__device__ __forceinline__ int before(int x, Shared &shared, int &total) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int sum = x;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const int other = __shfl_up_sync(~0u, sum, step);
        if (lane >= step) sum += other;
    }
    if (lane == 31) shared.sums[warp] = sum;
    __syncthreads();
    int of_warps = shared.sums[lane];
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const int other = __shfl_up_sync(~0u, of_warps, step);
        if (lane >= step) of_warps += other;
    }
    total = __shfl_sync(~0u, of_warps, 31);
    const int earlier = __shfl_sync(~0u, of_warps, warp ? warp - 1 : 0);
    __syncthreads(); // before the sums are written again
    return sum - x + (warp ? earlier : 0);
}

// The smallest and the largest number of all threads.
__device__ __forceinline__ void extremes(uint32_t &low, uint32_t &high, Shared &shared) {
    low = __reduce_min_sync(~0u, low), high = __reduce_max_sync(~0u, high);
    if (threadIdx.x % 32 == 0) shared.ends[0][threadIdx.x / 32] = low, shared.ends[1][threadIdx.x / 32] = high;
    __syncthreads();
    low = __reduce_min_sync(~0u, shared.ends[0][threadIdx.x % 32]), high = __reduce_max_sync(~0u, shared.ends[1][threadIdx.x % 32]);
    __syncthreads();
}

// The number whose bits in order are `key`.
__device__ __forceinline__ float number(uint32_t key) { return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key); }

// grid (kv_heads, tiles), SELECT threads, each with K neighbouring blocks, SELECT * K >= edge; shared memory: edge + 1 numbers.
template <int K> __device__ void select(const SelectParams &p) {
    static_assert(SELECT == 1024 && BINS % SELECT == 0);
    extern __shared__ int chosen_blocks[];
    __shared__ Shared shared;
    const int head = blockIdx.x, kv_heads = gridDim.x, first = threadIdx.x * K;
    follow();
    const int start = *p.position, tile_first = first_of(start, p.first_tile + blockIdx.y, p.tile);
    const int newest = min(start + p.tokens, (tile_first / p.tile + 1) * p.tile) - 1;
    const int edge = edge_of(tile_first, p.window, p.block_size), candidates = max(0, edge - 1);
    const int take = min(p.takes[p.first_tile + blockIdx.y], candidates);
    // This thread's blocks; only those of 1 to edge - 1 take part.
    uint32_t keys[K];
    {
        float own[K];
#pragma unroll
        for (int i = 0; i < K; ++i) own[i] = first + i < edge ? -INFINITY : 0.f;
        for (int row = 0; row < p.rows; ++row) {
            const float *scores = p.scores + (((int64_t)blockIdx.y * p.rows + row) * kv_heads + head) * p.max_scores + first;
            if constexpr (K % 4 == 0) {
#pragma unroll
                for (int i = 0; i < K; i += 4) {
                    if (first + i >= edge) continue;
                    const float4 four = __ldcg((const float4 *)(scores + i));
                    own[i] = fmaxf(own[i], four.x), own[i + 1] = fmaxf(own[i + 1], four.y);
                    own[i + 2] = fmaxf(own[i + 2], four.z), own[i + 3] = fmaxf(own[i + 3], four.w);
                }
            } else {
#pragma unroll
                for (int i = 0; i < K; ++i)
                    if (first + i < edge) own[i] = fmaxf(own[i], __ldcg(scores + i));
            }
        }
#pragma unroll
        for (int i = 0; i < K; ++i) keys[i] = ordered(own[i]);
    }
    auto takes_part = [&](int i) { return first + i >= 1 && first + i < edge; };
    // The take-th largest: the bin that holds it, then the same among the members of that bin, until all are equal. Bins divide the
    // scores evenly, not their bits: those are alike, and all would be counted in a few.
    uint32_t low = ~0u, high = 0;
    int wanted = take;
    const bool searches = take > 0 && take < candidates;
    if (searches) {
#pragma unroll
        for (int i = 0; i < K; ++i)
            if (takes_part(i)) low = min(low, keys[i]), high = max(high, keys[i]);
        extremes(low, high, shared);
    }
    while (searches && low < high) {
#pragma unroll
        for (int i = 0; i < BINS / SELECT; ++i) shared.histogram[threadIdx.x + i * SELECT] = 0;
        __syncthreads();
        const float least = number(low), width = number(high) - least, factor = (BINS - 1) / width;
        // Of scores that no line divides (infinite, or too near each other), the bits are divided.
        const bool even = width > 0.f && factor < 1e30f && factor > 0.f;
        const int shift = max(0, 32 - __clz(high - low) - BIN_BITS);
        int bins[K];
#pragma unroll
        for (int i = 0; i < K; ++i) {
            bins[i] = -1;
            if (!takes_part(i) || keys[i] < low || keys[i] > high) continue;
            bins[i] = even ? min(BINS - 1, (int)((number(keys[i]) - least) * factor)) : (int)(keys[i] - low >> shift);
            atomicAdd(shared.histogram + bins[i], 1);
        }
        __syncthreads();
        // From the largest bin down, neighbours for each thread.
        constexpr int OWN = BINS / SELECT;
        const int top = BINS - 1 - OWN * (int)threadIdx.x;
        int own = 0;
#pragma unroll
        for (int i = 0; i < OWN; ++i) own += shared.histogram[top - i];
        int total, above = before(own, shared, total);
        if (above < wanted && above + own >= wanted) {
            int bin = top;
            while (above + shared.histogram[bin] < wanted) above += shared.histogram[bin--];
            shared.chosen_bin = bin;
            shared.left = wanted - above;
        }
        __syncthreads();
        wanted = shared.left;
        low = ~0u, high = 0;
#pragma unroll
        for (int i = 0; i < K; ++i)
            if (bins[i] == shared.chosen_bin) low = min(low, keys[i]), high = max(high, keys[i]);
        extremes(low, high, shared);
    }
    // Larger ones, and the last `wanted` equal ones.
    const bool all = take >= candidates, none = take <= 0;
    int equal = 0, equals, total;
#pragma unroll
    for (int i = 0; i < K; ++i) equal += takes_part(i) && keys[i] == low;
    int rank = before(equal, shared, equals);
    bool chosen[K];
    int count = 0;
#pragma unroll
    for (int i = 0; i < K; ++i) {
        chosen[i] = takes_part(i) && !none && (all || keys[i] > low || keys[i] == low && rank >= equals - wanted);
        rank += takes_part(i) && keys[i] == low;
        count += chosen[i];
    }
    int at = before(count, shared, total);
#pragma unroll
    for (int i = 0; i < K; ++i)
        if (chosen[i]) chosen_blocks[++at] = first + i;
    if (threadIdx.x == 0) chosen_blocks[0] = 0;
    __syncthreads();
    const int listed = edge > 0 ? total + 1 : 0, block_octets = p.block_size / OCTET;
    const int64_t of_head = (int64_t)blockIdx.y * kv_heads + head;
    if (p.blocks)
        for (int i = threadIdx.x; i < p.max_scores; i += SELECT) p.blocks[of_head * p.max_scores + i] = i < listed ? chosen_blocks[i] : -1;
    // Where their octets lie, all threads at once.
    Octet *octets = p.octets + of_head * p.max_octets;
    const int *pages = p.pages + (int64_t)head * p.max_pages;
    const int tail = edge * block_octets, all_octets = listed * block_octets + newest / OCTET + 1 - tail;
    for (int i = threadIdx.x; i < all_octets; i += SELECT) {
        const int octet = i < listed * block_octets ? chosen_blocks[i / block_octets] * block_octets + i % block_octets : tail + i - listed * block_octets;
        octets[i] = Octet{(pages[octet / (PAGE / OCTET)] * (PAGE / OCTET) + octet % (PAGE / OCTET)) << 8 | 0xff, octet * OCTET};
    }
    if (threadIdx.x == 0) p.counts[of_head] = all_octets;
}

} // namespace decode

#define ATTEND(NAME, T, D)                                                                                                                 \
    extern "C" __global__ void __launch_bounds__(decode::WARPS * 32) attend_decode_##NAME##_##D(const DecodeParams p) { decode::attend<T, D>(p); } \
    extern "C" __global__ void __launch_bounds__(decode::WARPS * 32) score_blocks_##NAME##_##D(const ScoreParams p) { decode::score<T, D>(p); }
ATTEND(f16, half, 64) ATTEND(f16, half, 128) ATTEND(f16, half, 256)
ATTEND(bf16, __nv_bfloat16, 64) ATTEND(bf16, __nv_bfloat16, 128) ATTEND(bf16, __nv_bfloat16, 256)
#undef ATTEND
#define SELECT_BLOCKS(K) \
    extern "C" __global__ void __launch_bounds__(decode::SELECT) select_blocks_##K(const SelectParams p) { decode::select<K>(p); }
SELECT_BLOCKS(1) SELECT_BLOCKS(4) SELECT_BLOCKS(8) SELECT_BLOCKS(16) SELECT_BLOCKS(32)
#undef SELECT_BLOCKS

// One decode step of one layer: score block summaries, select blocks, attend to what was selected.
//
// Framework-free: plain pointers, no host code but the launchers at the end. What is read is a list of octets, 8 neighbouring
// slots each, ascending. f32 sums; results do not depend on timing. See common.cuh.
//
// D: head_dim. G: query heads of a group, at most 8.

#include "common.cuh"

namespace {
constexpr int TILE = 16, WARPS = 4, STAGES = 3, QUERIES = 8, MOST_SPLITS = 256;
}

// `out[head] = softmax(scale q . K') V` for the group of each key/value head, over its list of octets.
//
// grid (splits, kv_heads), WARPS * 32 threads. Each split takes its share of the list; the last one to finish merges all, in order.
struct AttendParams {
    const void *q;         // [kv_heads * G, D] T
    const void *k;         // [pages * 64, D] T
    const void *v;         // [pages * 64, D] T
    const int *pages;      // [kv_heads, max_pages]
    const int *octets;     // [kv_heads, max_octets] where they lie: row / 8; the newest is the last. Null: all, by `pages`
    const int *counts;     // [kv_heads] octets of the list
    int max_pages, max_octets;
    int len;               // slots that are filled; the same for all heads
    int splits;            // 1 to MOST_SPLITS
    float scale;
    float *partial;        // [kv_heads, splits, G, D] sums, then [kv_heads, splits, G, 2] maxima and weights
    unsigned *tickets;     // [kv_heads] zeros, left as zeros
    void *out;             // [kv_heads * G, D] T
};

template <typename T, int D, int G> __global__ void __launch_bounds__(WARPS * 32) attend_decode(const AttendParams p) {
    extern __shared__ __align__(128) unsigned char shared[];
    constexpr int CHUNKS = D / 8; // of 16 bytes in a row
    constexpr int TILE_BYTES = TILE * D * 2;
    const int head = blockIdx.y, split = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    follow();
    const int octets = p.octets ? p.counts[head] : (p.len + OCTET - 1) / OCTET;
    const int tiles = (octets + 1) / 2;
    const int first = (int)((int64_t)tiles * split / p.splits), end = (int)((int64_t)tiles * (split + 1) / p.splits);
    const uint32_t own = shared_address(shared) + warp * STAGES * 2 * TILE_BYTES;
    const int *list = p.octets ? p.octets + (int64_t)head * p.max_octets : nullptr;
    const int *pages = p.pages + (int64_t)head * p.max_pages;

    const int newest = (p.len + OCTET - 1) / OCTET - 1, in_newest = p.len - newest * OCTET; // filled slots of the last octet
    // Where an octet of the list lies, and how many of its slots are filled.
    auto place = [&](int index) {
        if (index >= octets) return make_int2(0, 0);
        const int row = list ? list[index] : pages[index / (PAGE / OCTET)] * (PAGE / OCTET) + index % (PAGE / OCTET);
        return make_int2(row, index == octets - 1 ? in_newest : OCTET);
    };
    // Brings a tile's keys and values: 16 rows, swizzled so that eight rows of a chunk lie in different banks.
    auto fetch = [&](int tile, int stage) {
        if (tile < end) {
            const int2 pair[2] = {place(2 * tile), place(2 * tile + 1)};
            const uint32_t to = own + stage * 2 * TILE_BYTES;
#pragma unroll
            for (int i = 0; i < TILE * CHUNKS / 32; ++i) {
                const int index = lane + 32 * i, row = index / CHUNKS, chunk = index % CHUNKS;
                const int2 octet = pair[row / OCTET];
                const bool there = row % OCTET < octet.y;
                const int64_t at = there ? ((int64_t)octet.x * OCTET + row % OCTET) * D + chunk * 8 : 0;
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
        const T *from = (const T *)p.q + ((int64_t)head * G + (row < G ? row : 0)) * D + 2 * (lane % 4);
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
        // Keys that are not there: row lane / 4 and 8 more.
        const int after = octets - 2 * tile; // octets from this tile on
        const bool there[2] = {after > 1 || lane / 4 < in_newest, after > 2 || after == 2 && lane / 4 < in_newest};
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
            factor[j] = exp2_approx(maximum[j] - best);
            maximum[j] = best;
            c[j] = exp2_approx(c[j] - best);
            c[j + 2] = exp2_approx(c[j + 2] - best);
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
    T *out = (T *)p.out + (int64_t)head * G * D;
    // This split's sums [G, D], and the maximum and weight of each query [G, 2].
    float *split_sums = p.partial + ((int64_t)head * p.splits + split) * G * D;
    float *split_weights = p.partial + (int64_t)gridDim.y * p.splits * G * D + ((int64_t)head * p.splits + split) * G * 2;
    for (int index = threadIdx.x; index < G * D; index += WARPS * 32) {
        const int query = index / D, d = index % D;
        const float *row = parts + query * ROW;
        float best = -INFINITY, sum = 0.f, total = 0.f;
#pragma unroll
        for (int i = 0; i < WARPS; ++i) best = fmaxf(best, row[i * QUERIES * ROW + D]);
#pragma unroll
        for (int i = 0; i < WARPS; ++i) {
            const float *part = row + i * QUERIES * ROW, factor = part[D] == -INFINITY ? 0.f : exp2_approx(part[D] - best);
            sum += factor * part[d];
            total += factor * part[D + 1];
        }
        if (p.splits == 1) {
            narrow(out[index], sum / total);
        } else {
            split_sums[index] = sum;
            if (d == 0) *(float2 *)(split_weights + 2 * query) = make_float2(best, total);
        }
    }
    if (p.splits == 1) return;
    __shared__ bool last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) last = atomicAdd(p.tickets + head, 1u) == (unsigned)p.splits - 1;
    __syncthreads();
    if (!last) return;
    __threadfence();
    // What each split counts for, [G][splits] in shared memory, then the sums: always in the same order.
    const float *all_sums = p.partial + (int64_t)head * p.splits * G * D;
    const float2 *all_weights = (const float2 *)(p.partial + (int64_t)gridDim.y * p.splits * G * D) + (int64_t)head * p.splits * G;
    for (int query = warp; query < G; query += WARPS) {
        float2 own[MOST_SPLITS / 32];
        float best = -INFINITY, total = 0.f;
#pragma unroll
        for (int i = 0; i < MOST_SPLITS / 32; ++i) {
            const int other = lane + 32 * i;
            own[i] = other < p.splits ? __ldcg(all_weights + (int64_t)other * G + query) : make_float2(-INFINITY, 0.f);
            best = fmaxf(best, own[i].x);
        }
        for (int step = 16; step; step /= 2) best = fmaxf(best, __shfl_xor_sync(~0u, best, step));
#pragma unroll
        for (int i = 0; i < MOST_SPLITS / 32; ++i) {
            own[i].x = own[i].x == -INFINITY ? 0.f : exp2_approx(own[i].x - best);
            total += own[i].x * own[i].y;
        }
        for (int step = 16; step; step /= 2) total += __shfl_xor_sync(~0u, total, step);
#pragma unroll
        for (int i = 0; i < MOST_SPLITS / 32; ++i)
            if (lane + 32 * i < p.splits) parts[query * p.splits + lane + 32 * i] = own[i].x / total;
    }
    __syncthreads();
    for (int index = 4 * threadIdx.x; index < G * D; index += 4 * WARPS * 32) {
        const float *factors = parts + index / D * p.splits;
        float4 sum = {0.f, 0.f, 0.f, 0.f};
#pragma unroll 16
        for (int i = 0; i < p.splits; ++i) {
            const float4 one = __ldcg((const float4 *)(all_sums + (int64_t)i * G * D + index));
            sum.x += factors[i] * one.x;
            sum.y += factors[i] * one.y;
            sum.z += factors[i] * one.z;
            sum.w += factors[i] * one.w;
        }
        narrow(out[index], sum.x);
        narrow(out[index + 1], sum.y);
        narrow(out[index + 2], sum.z);
        narrow(out[index + 3], sum.w);
    }
    if (threadIdx.x == 0) p.tickets[head] = 0;
}

// `scores[head][block] = max over the group of q . first + |q| . second`, where a block's summary is [first, second]: mean and
// deviation. With RANGE it is relu(q) . first - relu(-q) . second: largest and smallest.
//
// grid (ceil(blocks / (WARPS * 16)), kv_heads), WARPS * 32 threads.
struct ScoreParams {
    const void *q;         // [kv_heads * G, D] T
    const void *summaries; // [kv_heads, max_blocks, 2 D] T
    int blocks, max_blocks, max_scores;
    float *scores;         // [kv_heads, max_scores]
};

template <typename T, int D, int G, bool RANGE> __global__ void __launch_bounds__(WARPS * 32) score_blocks(const ScoreParams p) {
    const int head = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int first = (blockIdx.x * WARPS + warp) * TILE;
    follow();
    if (first >= p.blocks) return;
    // The order of a product's terms is free: a lane takes 8 neighbours of a row, which two steps of 16 share.
    const int column = 8 * (lane % 4), row = lane / 4;
    const T *from = (const T *)p.summaries + ((int64_t)head * p.max_blocks + first) * 2 * D + column;
    const bool low = first + row < p.blocks, high = first + row + 8 < p.blocks;
    uint4 a[2][2 * D / 32];
#pragma unroll
    for (int i = 0; i < 2 * D / 32; ++i) {
        const uint4 zero = {0, 0, 0, 0};
        a[0][i] = low ? __ldcs((const uint4 *)(from + (int64_t)row * 2 * D + 32 * i)) : zero;
        a[1][i] = high ? __ldcs((const uint4 *)(from + (int64_t)(row + 8) * 2 * D + 32 * i)) : zero;
    }
    const T *q = (const T *)p.q + ((int64_t)head * G + (row < G ? row : 0)) * D + column;
    float c[4] = {};
#pragma unroll
    for (int i = 0; i < 2 * D / 32; ++i) {
        const bool second = i >= D / 32;
        alignas(16) T x[8];
        *(uint4 *)x = *(const uint4 *)(q + 32 * (i % (D / 32)));
        uint32_t b[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            float pair[2] = {wide(x[2 * j]), wide(x[2 * j + 1])};
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                if (row >= G) pair[e] = 0.f;
                else if (RANGE) pair[e] = second ? fminf(pair[e], 0.f) : fmaxf(pair[e], 0.f);
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
        if (2 * (lane % 4) + j % 2 >= G) c[j] = -INFINITY;
    float best[2] = {fmaxf(c[0], c[1]), fmaxf(c[2], c[3])};
#pragma unroll
    for (int j = 0; j < 2; ++j) {
        best[j] = fmaxf(best[j], __shfl_xor_sync(~0u, best[j], 1));
        best[j] = fmaxf(best[j], __shfl_xor_sync(~0u, best[j], 2));
    }
    float *scores = p.scores + (int64_t)head * p.max_scores + first;
    if (lane % 4 == 0) {
        if (low) scores[row] = best[0];
        if (high) scores[row + 8] = best[1];
    }
}

constexpr int SELECT = 1024, BIN_BITS = 11, BINS = 1 << BIN_BITS;

// The octets that the query reads: block 0, the `take` best of blocks 1 to edge - 1 (of equal ones the later), and everything from
// the edge on. Ascending.
//
// grid kv_heads, SELECT threads, each with K neighbouring blocks, SELECT * K >= edge; shared memory: edge numbers.
struct SelectParams {
    const float *scores; // [kv_heads, max_scores]
    int max_scores;      // a multiple of 4
    int edge;            // the block that holds the newest position outside the window; at least 1
    int take;            // blocks that fit the budget beside the forced ones
    int block_octets;    // octets of a block
    const int *pages;    // [kv_heads, max_pages]
    int max_pages;
    int len;             // tokens
    int max_octets;
    int *octets;         // [kv_heads, max_octets] where they lie: row / 8
    int *counts;         // [kv_heads]
};

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

template <int K> __global__ void __launch_bounds__(SELECT) select_blocks(const SelectParams p) {
    static_assert(SELECT == 1024 && BINS % SELECT == 0);
    extern __shared__ int chosen_blocks[];
    __shared__ Shared shared;
    const int head = blockIdx.x, candidates = p.edge - 1, first = threadIdx.x * K;
    const int take = p.take < candidates ? p.take : candidates;
    follow();
    // This thread's blocks; only those of 1 to edge - 1 take part.
    uint32_t keys[K];
    {
        const float *scores = p.scores + (int64_t)head * p.max_scores + first;
        float own[K];
        if constexpr (K % 4 == 0) {
#pragma unroll
            for (int i = 0; i < K; i += 4) {
                const float4 four = first + i < p.edge ? __ldcg((const float4 *)(scores + i)) : make_float4(0.f, 0.f, 0.f, 0.f);
                own[i] = four.x, own[i + 1] = four.y, own[i + 2] = four.z, own[i + 3] = four.w;
            }
        } else {
#pragma unroll
            for (int i = 0; i < K; ++i) own[i] = first + i < p.edge ? __ldcg(scores + i) : 0.f;
        }
#pragma unroll
        for (int i = 0; i < K; ++i) keys[i] = ordered(own[i]);
    }
    auto takes_part = [&](int i) { return first + i >= 1 && first + i < p.edge; };
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
    // Where their octets lie, all threads at once.
    int *octets = p.octets + (int64_t)head * p.max_octets;
    const int *pages = p.pages + (int64_t)head * p.max_pages;
    const int tail = p.edge * p.block_octets, listed = (total + 1) * p.block_octets, octets_listed = listed + (p.len + OCTET - 1) / OCTET - tail;
    for (int i = threadIdx.x; i < octets_listed; i += SELECT) {
        const int octet = i < listed ? chosen_blocks[i / p.block_octets] * p.block_octets + i % p.block_octets : tail + i - listed;
        octets[i] = pages[octet / (PAGE / OCTET)] * (PAGE / OCTET) + octet % (PAGE / OCTET);
    }
    if (threadIdx.x == 0) p.counts[head] = octets_listed;
}

// Launchers: 0 or a CUDA error; -1: no such shape.
namespace {
template <typename T, int D, int G> int attend(const AttendParams &p, int kv_heads, cudaStream_t stream) {
    const size_t stages = (size_t)WARPS * STAGES * 2 * TILE * D * 2, merge = (size_t)WARPS * QUERIES * (D + 2) * 4, factors = (size_t)G * p.splits * 4;
    const size_t bytes = stages > merge ? (stages > factors ? stages : factors) : (merge > factors ? merge : factors);
    return launch(attend_decode<T, D, G>, p, dim3(p.splits, kv_heads), WARPS * 32, bytes, stream);
}
template <typename T, int D, int G> int score(const ScoreParams &p, int kv_heads, int range, cudaStream_t stream) {
    const dim3 grid((p.blocks + WARPS * TILE - 1) / (WARPS * TILE), kv_heads);
    return launch(range ? score_blocks<T, D, G, true> : score_blocks<T, D, G, false>, p, grid, WARPS * 32, 0, stream);
}
template <typename F> int with_shape(int bf16, int head_dim, int group, F f) {
#define SHAPE(D, G)                                                                                                                        \
    if (head_dim == D && group == G) return bf16 ? f.template operator()<__nv_bfloat16, D, G>() : f.template operator()<half, D, G>();
    SHAPE(64, 1) SHAPE(64, 2) SHAPE(64, 3) SHAPE(64, 4) SHAPE(64, 7) SHAPE(64, 8)
    SHAPE(128, 1) SHAPE(128, 2) SHAPE(128, 4) SHAPE(128, 5) SHAPE(128, 7) SHAPE(128, 8)
    SHAPE(256, 1) SHAPE(256, 2) SHAPE(256, 4)
#undef SHAPE
    return -1;
}
} // namespace

extern "C" {
int foveate_attend_decode(const AttendParams *p, int bf16, int head_dim, int group, int kv_heads, cudaStream_t stream) {
    return with_shape(bf16, head_dim, group, [&]<typename T, int D, int G>() { return attend<T, D, G>(*p, kv_heads, stream); });
}
int foveate_score_blocks(const ScoreParams *p, int bf16, int head_dim, int group, int kv_heads, int range, cudaStream_t stream) {
    return with_shape(bf16, head_dim, group, [&]<typename T, int D, int G>() { return score<T, D, G>(*p, kv_heads, range, stream); });
}
int foveate_select_blocks(const SelectParams *p, int kv_heads, cudaStream_t stream) {
    const size_t bytes = (size_t)p->edge * 4;
    const dim3 grid(kv_heads);
    if (p->edge <= SELECT) return launch(select_blocks<1>, *p, grid, SELECT, bytes, stream);
    if (p->edge <= 4 * SELECT) return launch(select_blocks<4>, *p, grid, SELECT, bytes, stream);
    if (p->edge <= 8 * SELECT) return launch(select_blocks<8>, *p, grid, SELECT, bytes, stream);
    if (p->edge <= 32 * SELECT) return launch(select_blocks<32>, *p, grid, SELECT, bytes, stream);
    return -1;
}
}

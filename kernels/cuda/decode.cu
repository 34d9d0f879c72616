// Attention of one query, and what comes before it: scores of block summaries, and the selection of blocks.
//
// Device code only, plain pointers (params.h). What is read is a list of octets, ascending. f32 sums; results do not depend on timing.
//
// D: head_dim.

#include "common.cuh"
#include "weights.cuh"

namespace decode {

// MERGED: parts of a result that a thread fetches at a time.
constexpr int TILE = 16, WARPS = 4, STAGES = 3, QUERIES = 8, MOST_SPLITS = 256, MERGED = 16, TILES_OF_A_SPLIT = 8, LONG = 4096;

// The Hadamard transform of 32 neighbours of queries, as `attend` holds them: of dimension 16 i + 8 j + 2 (lane % 4) + e, lanes have bits 1
// and 2, and each lane all others.
template <typename T> __device__ __forceinline__ void transform(uint32_t (&first)[2], uint32_t (&second)[2]) {
    float x[8];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float2 pair = unpack<T>(i / 2 ? second[i % 2] : first[i % 2]);
        x[2 * i] = pair.x, x[2 * i + 1] = pair.y;
    }
    // In the order of the bits, as everywhere.
    auto within = [&](int step) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            if (i & step) continue;
            const float a = x[i], b = x[i + step];
            x[i] = a + b, x[i + step] = a - b;
        }
    };
    within(1);
#pragma unroll
    for (int step = 1; step < 4; step *= 2) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const float other = __shfl_xor_sync(~0u, x[i], step);
            x[i] = threadIdx.x & step ? other - x[i] : x[i] + other;
        }
    }
    within(2), within(4);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        first[i] = pack<T>(x[2 * i] * HADAMARD_FACTOR, x[2 * i + 1] * HADAMARD_FACTOR);
        second[i] = pack<T>(x[4 + 2 * i] * HADAMARD_FACTOR, x[5 + 2 * i] * HADAMARD_FACTOR);
    }
}

// grid (most splits, kv_heads, ceil(group_size / 8)), WARPS * 32 threads. Each split takes its share of the list; the last one to
// finish merges all, in order. How many splits there are follows from what is read alone.
template <typename S, int D> __device__ void attend(const DecodeParams &p) {
    using T = typename ComputedAs<S>::T;
    constexpr bool IS_BYTES = std::is_same_v<S, Bytes>;
    extern __shared__ __align__(128) unsigned char shared[];
    __shared__ uint32_t seen[WARPS][STAGES]; // the keys of a tile that the query sees, as bits
    constexpr int ROW_BYTES = IS_BYTES ? D : 2 * D, CHUNKS = ROW_BYTES / 16; // of 16 bytes in a row
    constexpr int SCALE_BYTES = D / GROUP * 2;                               // of a row
    constexpr int TILE_BYTES = TILE * D * 2;
    // Keys and values of a tile as they are stored; bytes have their scales after them, and are widened into a tile of a warp's own.
    constexpr int STORED_BYTES = TILE * (ROW_BYTES + (IS_BYTES ? SCALE_BYTES : 0)), WARP_BYTES = STAGES * 2 * STORED_BYTES + (IS_BYTES ? 2 * TILE_BYTES : 0);
    const int head = blockIdx.y, split = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int first_query = head * p.group_size + blockIdx.z * QUERIES, G = min(QUERIES, p.group_size - (int)blockIdx.z * QUERIES);
    const int part = head * gridDim.z + blockIdx.z; // of the partial results
    const int t = *p.position;
    // The kernel before makes the list; or it writes the newest token, and all others are there already.
    if (p.octets) follow();
    const bool hides = t >= p.hides_from;
    const Reads reads(p, head, head, t, t, hides, hides ? Reads::before(p, head) : make_int2(0, 0));
    const int tiles = (reads.count + 1) / 2;
    // There is room for two thread blocks on each processor. Of up to LONG tiles one is faster: there is less to merge. Bytes have more to compute.
    const int most = IS_BYTES || tiles >= LONG ? gridDim.x : max(1, (int)gridDim.x / 2);
    // Rounded up: a warp that takes a tile more than others is what all wait for. What one split reads alone needs no merging.
    const int splits = min(most, tiles < 2 * TILES_OF_A_SPLIT ? 1 : (tiles + TILES_OF_A_SPLIT - 1) / TILES_OF_A_SPLIT);
    if (split >= splits) return;
    const int first = (int)((int64_t)tiles * split / splits), end = (int)((int64_t)tiles * (split + 1) / splits);
    const uint32_t own = shared_address(shared) + warp * WARP_BYTES;

    // Octets of the warp's next 16 tiles, one for each lane: all are looked up at once, and those after them while these are read.
    constexpr int AT_ONCE = 16;
    auto seek = [&](int number) {
        const int tile = first + warp + (number + lane / 2) * WARPS;
        return tile < end ? reads.seek(2 * tile + lane % 2) : Reads::Sought{0, 0, -1};
    };
    Reads::Sought next{};
    Octet octet{};
    uint32_t own_bits = 0;

    // Brings keys and values of the warp's tile of that number: 16 rows, swizzled so that eight rows of a chunk lie in different banks.
    auto fetch = [&](int number, int stage) {
        if (first + warp + number * WARPS < end) {
            if (number % AT_ONCE == 0) {
                octet = next.found();
                own_bits = visible(octet, t, p.sliding_window, p.local_window);
                next = seek(number + AT_ONCE);
            }
            const int from = 2 * (number % AT_ONCE);
            const int rows[2] = {__shfl_sync(~0u, octet.row, from) >> 8, __shfl_sync(~0u, octet.row, from + 1) >> 8};
            const uint32_t bits = __shfl_sync(~0u, own_bits, from) | __shfl_sync(~0u, own_bits, from + 1) << OCTET;
            if (lane == 0) seen[warp][stage] = bits;
            const uint32_t to = own + stage * 2 * STORED_BYTES;
            auto is_there = [&](int row) { return (bits >> row & 1) != 0; };
            auto slot_of = [&](int row) { return is_there(row) ? (int64_t)rows[row / OCTET] * OCTET + row % OCTET : 0; };
#pragma unroll
            for (int i = 0; i < TILE * CHUNKS / 32; ++i) {
                const int index = lane + 32 * i, row = index / CHUNKS, chunk = index % CHUNKS;
                const int64_t at = slot_of(row) * ROW_BYTES + chunk * 16;
                const uint32_t place = row * ROW_BYTES + ((IS_BYTES ? chunk : chunk ^ (row & 7)) * 16);
                copy_async(to + place, (const uint8_t *)p.k + at, is_there(row));
                copy_async(to + STORED_BYTES + place, (const uint8_t *)p.v + at, is_there(row));
            }
            if constexpr (IS_BYTES) {
                const int row = lane % TILE;
                const uint8_t *from = (const uint8_t *)(lane < TILE ? p.k_scales : p.v_scales) + slot_of(row) * SCALE_BYTES;
                copy_few_async<SCALE_BYTES>(to + lane / TILE * STORED_BYTES + TILE * ROW_BYTES + row * SCALE_BYTES, from, is_there(row));
            }
        }
        asm volatile("cp.async.commit_group;");
    };

    auto fetch_first = [&] {
#pragma unroll
        for (int stage = 0; stage < STAGES - 1; ++stage) fetch(stage, stage);
    };
    // Verdicts on the newest tokens are not looked at: all see those.
    next = seek(0);
    const bool is_early = !p.octets && min(end - 1, first + warp + (STAGES - 2) * WARPS) < tiles - 1;
    if (is_early) fetch_first();
    if (!p.octets) follow();
    if (!is_early) fetch_first();

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
    if constexpr (IS_BYTES) {
#pragma unroll
        for (int i = 0; i < D / 16; i += 2) transform<T>(q[i], q[i + 1]);
    }
    float sums[D / 16][4] = {};
    float maximum[2] = {-INFINITY, -INFINITY}, weight[2] = {0.f, 0.f};
    const float scale = p.scale * LOG2_E;

    int stage = 0;
    for (int number = 0; first + warp + number * WARPS < end; ++number) {
        fetch(number + STAGES - 1, (stage + STAGES - 1) % STAGES);
        asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 1));
        __syncwarp();
        const uint32_t stored = own + stage * 2 * STORED_BYTES, keys = IS_BYTES ? own + STAGES * 2 * STORED_BYTES : stored, values = keys + TILE_BYTES;
        const uint32_t bits = seen[warp][stage];
        if constexpr (IS_BYTES) {
            unsigned char *base = shared + warp * WARP_BYTES;
#pragma unroll
            for (int i = 0; i < 2 * TILE * CHUNKS / 32; ++i) {
                const int index = (lane + 32 * i) % (TILE * CHUNKS), of_values = (lane + 32 * i) / (TILE * CHUNKS), row = index / CHUNKS, chunk = index % CHUNKS;
                const unsigned char *from = base + stage * 2 * STORED_BYTES + of_values * STORED_BYTES;
                const uint4 bytes = *(const uint4 *)(from + index * 16);
                const half scale = *(const half *)(from + TILE * ROW_BYTES + row * SCALE_BYTES + chunk * 16 / GROUP * 2);
                const uint2 wide[4] = {widened<T>(bytes.x, scale), widened<T>(bytes.y, scale), widened<T>(bytes.z, scale), widened<T>(bytes.w, scale)};
                unsigned char *to = base + STAGES * 2 * STORED_BYTES + of_values * TILE_BYTES + row * D * 2;
                *(uint4 *)(to + ((2 * chunk) ^ (row & 7)) * 16) = make_uint4(wide[0].x, wide[0].y, wide[1].x, wide[1].y);
                *(uint4 *)(to + ((2 * chunk + 1) ^ (row & 7)) * 16) = make_uint4(wide[2].x, wide[2].y, wide[3].x, wide[3].y);
            }
            __syncwarp();
        }
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
    // Four neighbours for each thread, whole warps.
    for (int index = 4 * threadIdx.x; index - 4 * lane < G * D; index += 4 * WARPS * 32) {
        float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
        if (index < G * D) {
            const float *factors = parts + index / D * splits;
            // All of some are on their way at once, the last ones, too.
            for (int first = 0; first < splits; first += MERGED) {
                float4 x[MERGED];
#pragma unroll
                for (int i = 0; i < MERGED; ++i)
                    x[i] = first + i < splits ? __ldcg((const float4 *)(all_sums + (int64_t)(first + i) * QUERIES * D + index)) : make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
                for (int i = 0; i < MERGED; ++i) {
                    const float factor = first + i < splits ? factors[first + i] : 0.f;
                    sum = make_float4(sum.x + factor * x[i].x, sum.y + factor * x[i].y, sum.z + factor * x[i].z, sum.w + factor * x[i].w);
                }
            }
        }
        const int at = first_query * D + index;
        if (index < G * D) *(float4 *)(p.out + at) = sum;
        if (p.out_q8) quantize4(sum, p.out_q8, index < G * D ? gridDim.y * p.group_size * D : 0, at);
    }
    if (threadIdx.x == 0) p.tickets[part] = 0;
}

// The block of the newest position outside the window of the query at `t`; 0 too where all is in the window.
__device__ __forceinline__ int edge_of(int t, int window, int block_size) { return t >= window ? (t - window) / block_size : 0; }

// The position of the first query of tile number `tile` of a step from `start` on.
__device__ __forceinline__ int first_of(int start, int tile, int size) { return max(start, (start / size + tile) * size); }

// Thread blocks of `score` that a processor has room for: with 8 of them, all of a long sequence are there at once.
template <typename S, int D> constexpr int SCORES_AT_ONCE = (std::is_same_v<S, Bytes> ? D : 2 * D) <= 128 ? 8 : 1;

// grid (ceil(blocks / (WARPS * TILE)), kv_heads, rows), WARPS * 32 threads.
template <typename S, typename T, int D> __device__ void score(const ScoreParams &p) {
    const int head = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32, kv_heads = gridDim.y, group = p.group_size;
    const int first = (blockIdx.x * WARPS + warp) * TILE;
    // Summaries before the edge do not depend on the kernel before, which writes the newest one.
    const int blocks = edge_of(first_of(*p.position, p.first_row + blockIdx.z, p.tile), p.window, p.block_size);
    if (first >= blocks) return;
    const int width = p.kind ? 2 * D : D;
    constexpr bool IS_BYTES = std::is_same_v<S, Bytes>;
    // A lane takes 16 bytes of a row at a time, whose numbers are those of a product's terms that it has, eight for two steps of 16: the order
    // of terms is free.
    constexpr int NUMBERS = IS_BYTES ? 16 : 8, LOADS = 2 * D / (4 * NUMBERS);
    const int column = NUMBERS * (lane % 4), row = lane / 4;
    const int64_t page = ((int64_t)(first / PAGE) * kv_heads + head) * PAGE + first % PAGE;
    const bool low = first + row < blocks, high = first + row + 8 < blocks;
    uint4 a[2][LOADS];
    half scales[2][IS_BYTES ? LOADS : 1];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        // Of rows that are none the last one, which is as good as any.
        const int64_t at = page + min(row + 8 * r, blocks - 1 - first);
        const char *from = (const char *)p.summaries + (at * width + column) * (IS_BYTES ? 1 : 2);
#pragma unroll
        for (int i = 0; i < LOADS; ++i) {
            if (4 * NUMBERS * i >= width) break;
            a[r][i] = __ldcs((const uint4 *)(from + 64 * i));
            if constexpr (IS_BYTES) scales[r][i] = ((const half *)p.scales)[(at * width + column) / GROUP + 4 * NUMBERS / GROUP * i];
        }
    }
    follow();
    float best[2] = {-INFINITY, -INFINITY};
    for (int queries = 0; queries < group; queries += QUERIES) {
        const int member = queries + row;
        const int q_head = head * group + (member < group ? member : 0);
        const T *q = (const T *)p.q + (p.expanded ? ((int64_t)blockIdx.z * kv_heads * group + q_head) * 2 * D : (int64_t)q_head * D) + column;
        float c[4] = {};
#pragma unroll
        for (int i = 0; i < LOADS; ++i) {
            if (4 * NUMBERS * i >= width) break;
            const bool second = i >= LOADS / 2;
            // Nothing is widened or fetched before it is wanted: registers are for summaries.
#pragma unroll
            for (int r = 0; r < 2; ++r) asm volatile("" : "+r"(a[r][i].x), "+r"(a[r][i].y), "+r"(a[r][i].z), "+r"(a[r][i].w)::"memory");
#pragma unroll
            for (int eight = 0; eight < NUMBERS / 8; ++eight) {
                const uint4 x = *(const uint4 *)(q + 4 * NUMBERS * (p.expanded ? i : i % (LOADS / 2)) + 8 * eight);
                const uint32_t pairs[4] = {x.x, x.y, x.z, x.w};
                uint32_t b[4];
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    float2 pair = unpack<T>(pairs[j]);
                    if (member >= group) pair = make_float2(0.f, 0.f);
                    else if (!p.expanded && p.kind == 1) {
                        pair = second ? make_float2(fminf(pair.x, 0.f), fminf(pair.y, 0.f)) : make_float2(fmaxf(pair.x, 0.f), fmaxf(pair.y, 0.f));
                    } else if (!p.expanded && second) pair = make_float2(fabsf(pair.x), fabsf(pair.y));
                    b[j] = pack<T>(pair.x, pair.y);
                }
                uint4 wide[2];
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    if constexpr (IS_BYTES) {
                        const uint2 one = widened<T>(eight ? a[r][i].z : a[r][i].x, scales[r][i]), two = widened<T>(eight ? a[r][i].w : a[r][i].y, scales[r][i]);
                        wide[r] = make_uint4(one.x, one.y, two.x, two.y);
                    } else wide[r] = a[r][i];
                }
                const uint32_t one[4] = {wide[0].x, wide[1].x, wide[0].y, wide[1].y}, two[4] = {wide[0].z, wide[1].z, wide[0].w, wide[1].w};
                multiply<T>(c, one, b[0], b[1]);
                multiply<T>(c, two, b[2], b[3]);
            }
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

// RANKED: members of a bin that are few enough to compare each with each.
constexpr int SELECT = 1024, BIN_BITS = 11, BINS = 1 << BIN_BITS, RANKED = 128;

// What the threads of a block tell each other.
struct Shared {
    int histogram[BINS], sums[SELECT / 32], chosen_bin, left, members;
    uint32_t ends[2][SELECT / 32];
    unsigned long long ranks[RANKED], worst; // the score, then the block: of equal ones the later is better
    int weights[RANKED];
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

// What a token router keeps of a head, as a selection reads it.
struct KeptTokens {
    const int *pages, *ranks;
    const uint8_t *masks;
    int frontier, count; // first recent position; kept tokens before it

    __device__ __forceinline__ KeptTokens(const SelectParams &p, int head)
        : pages(p.kept.pages + (int64_t)head * p.kept.max_pages), ranks(p.kept.ranks + (int64_t)head * p.max_pages),
          masks(p.kept.masks + (int64_t)head * p.max_pages * (PAGE / OCTET)), frontier(p.kept.counts[0]), count(p.kept.counts[1 + head]) {}

    __device__ __forceinline__ int of_block(int block, int block_size) const {
        int tokens = 0;
        for (int octet = block * (block_size / OCTET); octet < (block + 1) * (block_size / OCTET); ++octet) tokens += __popc(masks[octet]);
        return tokens;
    }

    // Kept tokens before a position up to the frontier: also the slot of that position.
    __device__ __forceinline__ int rank(int position) const {
        if (position >= frontier) return count;
        const uint64_t bits = *(const uint64_t *)(masks + position / PAGE * (PAGE / OCTET));
        return ranks[position / PAGE] + __popcll(bits & ((uint64_t(1) << position % PAGE) - 1));
    }
};

// Lists octets of the chosen blocks before the edge, and everything from there on: kept tokens lie packed, so that an octet may hold
// tokens of several blocks, chosen or not. `bits`: a word for 32 kept tokens.
__device__ __forceinline__ int list_kept(const SelectParams &p, const KeptTokens &kept, const int *chosen_blocks, int listed, int edge, int newest, const int *pages,
                                         bool whole, Octet *octets, uint32_t *bits, Shared &shared) {
    for (int i = threadIdx.x; i < (kept.count + 31) / 32; i += SELECT) bits[i] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i <= listed; i += SELECT) {
        const int block = i < listed ? chosen_blocks[i] : edge;
        const int from = kept.rank(block * p.block_size), end = i < listed ? kept.rank((block + 1) * p.block_size) : kept.count;
        for (int slot = from; slot < end;) {
            const int last = min(end, (slot / 32 + 1) * 32);
            atomicOr(bits + slot / 32, (~0u >> (32 - (last - slot))) << slot % 32);
            slot = last;
        }
    }
    __syncthreads();
    // Octets of kept tokens, then of recent ones before the edge whose blocks were chosen, neighbours for each thread.
    const int packed = (kept.count + OCTET - 1) / OCTET, tail = max(kept.frontier, edge * p.block_size) / OCTET, all = packed + tail - kept.frontier / OCTET;
    // The kept tokens of an octet, or -1: it is left out. Where all is read, a query may see dropped ones, too, of blocks that keep none.
    auto mask_of = [&](int i) {
        if (i < packed) {
            const int mask = bits[i / 4] >> i % 4 * OCTET & 0xff;
            return mask ? mask : -1;
        }
        const int octet = kept.frontier / OCTET + i - packed, block = octet * OCTET / p.block_size, mask = kept.masks[octet];
        if (whole) return mask;
        // Chosen blocks ascend.
        int low = 0, high = listed;
        while (low < high) {
            const int middle = (low + high) / 2;
            if (chosen_blocks[middle] < block) low = middle + 1;
            else high = middle;
        }
        return low < listed && chosen_blocks[low] == block && mask ? mask : -1;
    };
    const int each = (all + SELECT - 1) / SELECT, first = threadIdx.x * each, end = min(all, first + each);
    int own = 0, total;
    for (int i = first; i < end; ++i) own += mask_of(i) >= 0;
    int at = before(own, shared, total);
    for (int i = first; i < end; ++i) {
        const int mask = mask_of(i), octet = kept.frontier / OCTET + i - packed;
        if (mask < 0) continue;
        octets[at++] = i < packed ? Octet{Reads::row(kept.pages, i) | mask, -1} : Octet{Reads::row(pages, octet) | mask, octet * OCTET};
    }
    for (int octet = tail + threadIdx.x; octet <= newest / OCTET; octet += SELECT)
        octets[total + octet - tail] = Octet{Reads::row(pages, octet) | kept.masks[octet], octet * OCTET};
    return total + newest / OCTET + 1 - tail;
}

// grid (kv_heads, tiles), SELECT threads, each with K neighbouring blocks, SELECT * K >= edge; shared memory: edge + 1 numbers, and with
// KEPT a bit for each kept token.
template <int K, bool KEPT> __device__ void select(const SelectParams &p) {
    static_assert(SELECT == 1024 && BINS % SELECT == 0);
    extern __shared__ int chosen_blocks[];
    __shared__ Shared shared;
    const int head = blockIdx.x, kv_heads = gridDim.x, first = threadIdx.x * K;
    const int start = *p.position, tile_first = first_of(start, p.first_tile + blockIdx.y, p.tile);
    const int newest = min(start + p.tokens, (tile_first / p.tile + 1) * p.tile) - 1;
    const int edge = edge_of(tile_first, p.window, p.block_size);
    const int *pages = p.pages + (int64_t)head * p.max_pages;
    const int budget = p.takes[(p.first_tile + blockIdx.y) * kv_heads + head]; // tokens
    // What a block counts for: its tokens, where a token router keeps some.
    int weights[KEPT ? K : 1] = {};
    if constexpr (KEPT) {
        const KeptTokens kept(p, head);
#pragma unroll
        for (int i = 0; i < K; ++i) weights[i] = first + i >= 1 && first + i < edge ? kept.of_block(first + i, p.block_size) : 0;
    }
    follow();
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
    auto weight = [&](int i) { return KEPT ? weights[KEPT ? i : 0] : 1; };
    auto takes_part = [&](int i) { return KEPT ? weight(i) > 0 : first + i >= 1 && first + i < edge; };
    int take, candidates = max(0, edge - 1);
    if constexpr (KEPT) {
        int own = 0;
#pragma unroll
        for (int i = 0; i < K; ++i) own += weight(i);
        before(own, shared, candidates);
        take = min(budget, candidates);
    } else take = min(budget / p.block_size, candidates);
    // The score from which there is no more room in `take`: the bin that holds it, then the same among the members of that bin, until they
    // are few or all equal. Bins divide the scores evenly, not their bits: those are alike, and all would be counted in a few.
    uint32_t low = ~0u, high = 0;
    int wanted = take;
    const bool searches = take > 0 && take < candidates;
    auto rank_of = [&](int i) { return (unsigned long long)keys[i] << 32 | (first + i); };
    unsigned long long worst = 0;
    bool ranked = false;
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
            atomicAdd(shared.histogram + bins[i], weight(i));
        }
        __syncthreads();
        // From the largest bin down, neighbours for each thread.
        constexpr int OWN = BINS / SELECT;
        const int top = BINS - 1 - OWN * (int)threadIdx.x;
        int own = 0;
#pragma unroll
        for (int i = 0; i < OWN; ++i) own += shared.histogram[top - i];
        int total, above = before(own, shared, total);
        // Tokens of a block are in or out together: the bin that is one too many.
        const int most = KEPT ? wanted + 1 : wanted;
        if (above < most && above + own >= most) {
            int bin = top;
            while (above + shared.histogram[bin] < most) above += shared.histogram[bin--];
            shared.chosen_bin = bin;
            shared.left = wanted - above;
            shared.members = 0, shared.worst = ~0ull;
        }
        __syncthreads();
        wanted = shared.left;
        const int chosen_bin = shared.chosen_bin;
        low = ~0u, high = 0;
#pragma unroll
        for (int i = 0; i < K; ++i) {
            if (bins[i] != chosen_bin) continue;
            low = min(low, keys[i]), high = max(high, keys[i]);
            const int member = atomicAdd(&shared.members, 1);
            if (member < RANKED) shared.ranks[member] = rank_of(i), shared.weights[member] = weight(i);
        }
        extremes(low, high, shared);
        if (shared.members > RANKED) continue;
        // The worst one that has room with all better ones.
        if (threadIdx.x < shared.members) {
            const unsigned long long own = shared.ranks[threadIdx.x];
            int up_to = 0;
            for (int member = 0; member < shared.members; ++member) up_to += shared.ranks[member] >= own ? shared.weights[member] : 0;
            if (up_to <= wanted) atomicMin(&shared.worst, own);
        }
        __syncthreads();
        worst = shared.worst, ranked = true;
        break;
    }
    // Larger ones, and the last equal ones that `wanted` has room for.
    const bool all = take >= candidates, none = take <= 0;
    int equal = 0, equals = 0, rank = 0, total;
    if (!ranked) {
#pragma unroll
        for (int i = 0; i < K; ++i) equal += takes_part(i) && keys[i] == low ? weight(i) : 0;
        rank = before(equal, shared, equals);
    }
    uint32_t chosen = 0; // a bit for each of this thread's blocks
    int tokens = 0;
#pragma unroll
    for (int i = 0; i < K; ++i) {
        const bool is_better = ranked ? keys[i] > high || rank_of(i) >= worst : !none && (all || keys[i] > low || keys[i] == low && rank >= equals - wanted);
        chosen |= (uint32_t)(takes_part(i) && is_better) << i;
        rank += takes_part(i) && keys[i] == low ? weight(i) : 0;
        tokens += chosen >> i & 1 ? weight(i) : 0;
    }
    int at = before(__popc(chosen), shared, total);
#pragma unroll
    for (int i = 0; i < K; ++i)
        if (chosen >> i & 1) chosen_blocks[++at] = first + i;
    if (threadIdx.x == 0) chosen_blocks[0] = 0;
    __syncthreads();
    const int listed = edge > 0 ? total + 1 : 0, block_octets = p.block_size / OCTET;
    const int64_t of_head = (int64_t)blockIdx.y * kv_heads + head;
    if (p.blocks)
        for (int i = threadIdx.x; i < p.max_scores; i += SELECT) p.blocks[of_head * p.max_scores + i] = i < listed ? chosen_blocks[i] : -1;
    Octet *octets = p.octets + of_head * p.max_octets;
    if constexpr (KEPT) {
        const KeptTokens kept(p, head);
        int picked;
        before(tokens, shared, picked);
        const int octets_of_all = list_kept(p, kept, chosen_blocks, listed, edge, newest, pages, budget == 0x7fffffff, octets, (uint32_t *)(chosen_blocks + p.max_scores + 1), shared);
        if (threadIdx.x == 0) p.counts[of_head] = octets_of_all;
        if (threadIdx.x == 0 && p.picked) p.picked[of_head] = edge > 0 ? picked + kept.of_block(0, p.block_size) : 0;
        return;
    }
    // Where their octets lie, all threads at once.
    const int tail = edge * block_octets, all_octets = listed * block_octets + newest / OCTET + 1 - tail;
#pragma unroll 4
    for (int i = threadIdx.x; i < all_octets; i += SELECT) {
        const int octet = i < listed * block_octets ? chosen_blocks[i / block_octets] * block_octets + i % block_octets : tail + i - listed * block_octets;
        octets[i] = Octet{(__ldg(pages + octet / (PAGE / OCTET)) * (PAGE / OCTET) + octet % (PAGE / OCTET)) << 8 | 0xff, octet * OCTET};
    }
    if (threadIdx.x == 0) p.counts[of_head] = all_octets;
}

} // namespace decode

#define ATTEND(NAME, S, D) \
    extern "C" __global__ void __launch_bounds__(decode::WARPS * 32) attend_decode_##NAME##_##D(const DecodeParams p) { decode::attend<S, D>(p); }
#define SCORE(NAME, S, T, D) \
    extern "C" __global__ void __launch_bounds__(decode::WARPS * 32, decode::SCORES_AT_ONCE<S, D>) score_##NAME##_##D(const ScoreParams p) { decode::score<S, T, D>(p); }
#define DECODE(D)                                                                                                                          \
    ATTEND(f16, half, D) ATTEND(bf16, __nv_bfloat16, D) ATTEND(q8_0, Bytes, D)                                                             \
    SCORE(blocks_f16, half, half, D) SCORE(blocks_bf16, __nv_bfloat16, __nv_bfloat16, D)                                                   \
    SCORE(bytes_f16, Bytes, half, D) SCORE(bytes_bf16, Bytes, __nv_bfloat16, D)
DECODE(64) DECODE(128) DECODE(256)
#undef DECODE
#undef SCORE
#undef ATTEND
#define SELECT_BLOCKS(K) \
    extern "C" __global__ void __launch_bounds__(decode::SELECT) select_blocks_##K(const SelectParams p) { decode::select<K, false>(p); } \
    extern "C" __global__ void __launch_bounds__(decode::SELECT) select_kept_##K(const SelectParams p) { decode::select<K, true>(p); }
SELECT_BLOCKS(1) SELECT_BLOCKS(4) SELECT_BLOCKS(8) SELECT_BLOCKS(16) SELECT_BLOCKS(32)
#undef SELECT_BLOCKS
